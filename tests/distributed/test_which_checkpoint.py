"""Which checkpoint every reader selects, which damage is detected, and which checkpoints are kept."""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import run_on_ranks
from test_checkpoint import save_toy
from test_engine import config, make_engine

from pause_megatron.checkpoint import Manifest, Store
from pause_megatron.checkpoint.format import VERSION
from pause_megatron.checkpoint.manifest import FileEntry, NewerFormatError
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.checkpoint.verify import problems_of
from pause_megatron.errors import CheckpointError
from pause_megatron.files.digest import file_digest
from pause_megatron.run_folder import choose, last_published

FLIPS, FULL_FLIPS = 300, 2500


def one_rank(folder: str, call) -> None:
    """Call `call(save)` on a single rank; `save(step, keep=3)` saves its engine into a store of one process."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection()) as context, make_engine(config(1, "fp32", 2), context) as engine:
        store = Store(folder)
        store.newest_complete()

        def save_step(step: int, *, keep: int = 3, applied: int | None = None) -> None:
            engine.state.step = step if applied is None else applied
            save_toy(engine, context, store, step, keep)

        call(save_step, store, engine)


def save_all(save, store, engine) -> None:
    for step in (10, 20, 30):
        save(step)


def save_three(folder: str) -> None:
    one_rank(folder, save_all)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("three") / "run"
    run_on_ranks(1, save_three, str(folder / "checkpoints"))
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def taken(run: Path) -> int:
    """Return the step that resume selects, and export by each valid name."""
    resumed = Store(run / "checkpoints").newest_complete()[1].step
    for place in ("", "checkpoints", "checkpoints/latest"):
        assert open_newest(run / place).manifest.step == resumed, place
    return resumed


def damage(folder: Path) -> None:
    """Flip one bit of a state file."""
    path = next(folder.glob("state-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def point_by_hand(run: Path, target: str) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to(target)


def resolved_link(run: Path) -> None:
    """Replace the link by its target, as `cp -rL`, `scp -r` and object stores do."""
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    shutil.rmtree(run)
    copy.rename(run)
    assert (run / "checkpoints" / "latest").is_dir() and not (run / "checkpoints" / "latest").is_symlink()


def a_text_file(run: Path) -> None:
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").write_text("step-00000020\n")


def killed_before_the_pointer_moved(run: Path) -> None:
    point_by_hand(run, "step-00000020")
    (run / ".checkpoints.json").write_text('{"published": 20}')


def without_a_record(run: Path, minutes: int) -> None:
    """Point `latest` at an older checkpoint, later than the newest (a roll-back) or earlier (a killed save)."""
    point_by_hand(run, "step-00000020")
    (run / ".checkpoints.json").unlink()
    made = (run / "checkpoints" / "step-00000030" / "manifest.json").stat().st_mtime + 60 * minutes
    os.utime(run / "checkpoints" / "latest", (made, made), follow_symlinks=False)


def only_the_copy_is_whole(run: Path) -> None:
    """`cp -rL` writes `latest` first, and was interrupted."""
    resolved_link(run)
    (run / "checkpoints" / "step-00000030" / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000020")


def copied_after_a_roll_back(run: Path) -> None:
    point_by_hand(run, "step-00000010")
    resolved_link(run)


CHANGES = {
    "a copy of a roll-back that followed the link": (copied_after_a_roll_back, 10),
    "moved back, no record": (lambda run: without_a_record(run, 1), 20),
    "killed before the pointer moved, no record": (lambda run: without_a_record(run, -1), 30),
    "only the copy in its place is whole": (only_the_copy_is_whole, 30),
    "nothing": (lambda run: None, 30),
    "no latest": (lambda run: (run / "checkpoints" / "latest").unlink(), 30),
    "moved back": (lambda run: point_by_hand(run, "step-00000020"), 20),
    "moved back, as DeepSpeed's file": (a_text_file, 20),
    "moved back with a path": (lambda run: point_by_hand(run, str(run / "checkpoints" / "step-00000010")), 10),
    "moved back to a damaged one": (
        lambda run: (point_by_hand(run, "step-00000020"), damage(run / "checkpoints" / "step-00000020")),
        10,
    ),
    "leads nowhere": (lambda run: point_by_hand(run, "step-00000099"), 30),
    "no name of a checkpoint": (lambda run: point_by_hand(run, "../../etc"), 30),
    "a copy that followed the link": (resolved_link, 30),
    "killed before the pointer moved": (killed_before_the_pointer_moved, 30),
    "the newest is damaged": (lambda run: damage(run / "checkpoints" / "step-00000030"), 20),
    "the newest lost its folder": (lambda run: shutil.rmtree(run / "checkpoints" / "step-00000030"), 20),
    "no record": (lambda run: (run / ".checkpoints.json").unlink(), 30),
    "a record that is none": (lambda run: (run / ".checkpoints.json").write_text("[" * 9999), 30),
    "other things beside them": (
        lambda run: [
            (run / "checkpoints" / "step-0000000040").mkdir(),  # more digits than this number needs
            (run / "checkpoints" / "step-00000050").touch(),
            (run / "checkpoints" / "step-99999999").symlink_to("nowhere"),
        ],
        30,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_and_export_take_the_same_checkpoint(run, change):
    act, expected = CHANGES[change]
    act(run)
    assert taken(run) == expected


def test_only_latest_was_copied(run):
    """`scp -r HOST:RUN/checkpoints/latest checkpoints/`: it is used, and becomes a checkpoint at the next save."""
    resolved_link(run)
    for step in (10, 20, 30):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    assert taken(run) == 30
    run_on_ranks(1, save_one, str(run / "checkpoints"), 40)
    assert Store(run / "checkpoints").steps() == [30, 40] and taken(run) == 40


def save_one(folder: str, step: int, keep: int = 3, applied: int | None = None) -> None:
    one_rank(folder, lambda save, store, engine: save(step, keep=keep, applied=applied))


def test_a_folder_in_place_of_latest_is_replaced_without_loss(run):
    resolved_link(run)
    run_on_ranks(1, save_one, str(run / "checkpoints"), 40)
    assert os.readlink(run / "checkpoints" / "latest") == "step-00000040"
    assert Manifest.load(run / "checkpoints" / "set-aside-latest").step == 30
    assert taken(run) == 40


def test_a_copy_that_a_run_resumed_from_is_kept_as_a_checkpoint(run):
    only_the_copy_is_whole(run)
    run_on_ranks(1, save_one, str(run / "checkpoints"), 40)
    assert Store(run / "checkpoints").steps() == [10, 30, 40]
    assert not problems_of(run / "checkpoints" / "step-00000030")


def test_a_broken_link_is_reported_and_does_no_harm(run):
    shutil.rmtree(run / "checkpoints" / "step-00000030")
    (run / "checkpoints" / "step-00000030").symlink_to("/not mounted/step-00000030")
    assert "step-00000030 links to /not mounted/step-00000030, which does not exist" in choose(run).note
    run_on_ranks(1, save_one, str(run / "checkpoints"), 30)
    assert taken(run) == 30 and (run / "checkpoints" / "set-aside-step-00000030").is_symlink()


def test_a_checkpoint_that_cannot_be_renamed_stays_and_saves_succeed(run):
    """For example another user's folder; the roll-back still applies."""
    point_by_hand(run, "step-00000010")
    run_on_ranks(1, save_beside_another_users, str(run / "checkpoints"))
    assert Store(run / "checkpoints").steps() == [14, 15, 20, 30] and taken(run) == 15


def save_beside_another_users(folder: str) -> None:
    def act(save, store, engine) -> None:
        def refuse(_: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        store._set_aside = refuse
        for step in (12, 14, 15):
            save(step, keep=1)

    one_rank(folder, act)


def save_without_links(folder: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    original, Path.symlink_to = Path.symlink_to, refuse
    try:
        save_three(folder)
    finally:
        Path.symlink_to = original


def test_without_symbolic_links_latest_is_a_file(tmp_path):
    run_on_ranks(1, save_without_links, str(tmp_path / "checkpoints"))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000030\n"
    assert taken(tmp_path) == 30
    run_on_ranks(1, save_one, str(tmp_path / "checkpoints"), 40)
    assert taken(tmp_path) == 40


def test_a_roll_back_resumes_there_and_sets_newer_checkpoints_aside(run):
    point_by_hand(run, "step-00000010")
    run_on_ranks(1, save_one, str(run / "checkpoints"), 15)
    checkpoints = run / "checkpoints"
    assert Store(checkpoints).steps() == [10, 15] and taken(run) == 15
    aside = sorted(checkpoints.glob("set-aside-*"))
    assert [path.name for path in aside] == ["set-aside-step-00000020", "set-aside-step-00000030"]
    assert all(not problems_of(path) for path in aside)


def interrupted_save(folder: str, call: str) -> None:
    """Interrupt a save, as a kill would, before this call of the store."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    def act(save, store, engine) -> None:
        setattr(store, call, kill)
        with pytest.raises(Killed):
            save(15)

    one_rank(folder, act)


@pytest.mark.parametrize(("call", "expected"), [("publish", 10), ("_set_aside", 10), ("move_latest", 15)])
def test_a_roll_back_that_was_killed_during_a_save_resumes(run, call, expected):
    point_by_hand(run, "step-00000010")
    run_on_ranks(1, interrupted_save, str(run / "checkpoints"), call)
    assert taken(run) == expected


def fail_after_publishing(folder: str) -> str:
    """Return stderr of a save that can change neither `latest` nor older checkpoints."""
    import contextlib
    import io

    import pause_megatron.checkpoint.store as module

    said = io.StringIO()

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def act(save, store, engine) -> None:
        original, module.symlink_atomic, store._delete = module.symlink_atomic, refuse, refuse
        try:
            with contextlib.redirect_stderr(said):
                save(40)
                save(50)
        finally:
            module.symlink_atomic = original

    one_rank(folder, act)
    return said.getvalue()


def test_a_failure_after_publication_is_a_warning(run):
    (said,) = run_on_ranks(1, fail_after_publishing, str(run / "checkpoints"))
    assert said.count("the checkpoint of step 40 is complete, but") == 2, said
    assert "could not be written" not in said
    assert Store(run / "checkpoints").steps() == [10, 20, 30, 40, 50] and taken(run) == 50
    assert last_published(run / "checkpoints") == 30


# Pruning


def test_damaged_checkpoints_never_cost_an_intact_one(run):
    """With newer damaged checkpoints: after resume and save, the new one and the resumed one exist."""
    for step in (20, 30):
        damage(run / "checkpoints" / f"step-{step:08d}")
    run_on_ranks(1, save_one, str(run / "checkpoints"), 12, 1)
    assert Store(run / "checkpoints").steps() == [10, 12] and taken(run) == 12
    run_on_ranks(1, save_one, str(run / "checkpoints"), 31, 1)
    assert Store(run / "checkpoints").steps() == [12, 31]


def damage_then_save(folder: str) -> None:
    def act(save, store, engine) -> None:
        damage(Path(folder) / "step-00000020")
        damage(Path(folder) / "step-00000030")
        save(40, keep=2)

    one_rank(folder, act)


def test_only_complete_checkpoints_count_even_if_damaged_meanwhile(run):
    run_on_ranks(1, damage_then_save, str(run / "checkpoints"))
    assert {10, 40} <= set(Store(run / "checkpoints").steps())
    damage(run / "checkpoints" / "step-00000040")
    assert taken(run) == 10


def save_skipped(folder: str) -> None:
    """Save many times without an applied step in between."""

    def act(save, store, engine) -> None:
        for step in range(40, 100, 10):
            save(step, keep=2, applied=31)

    one_rank(folder, act)


def test_saves_of_skipped_steps_prune_nothing(run):
    run_on_ranks(1, save_skipped, str(run / "checkpoints"))
    assert Store(run / "checkpoints").steps() == [30, 80, 90]


# Detection of damage


def flips(folder: Path, count: int) -> list[tuple[Path, int, int]]:
    """Return (file, byte, bit): half weighted by file size, half uniform over files."""
    rng = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    by_size = rng.choices(files, [path.stat().st_size for path in files], k=count // 2)
    chosen = by_size + [rng.choice(files) for _ in range(count - count // 2)]
    return [(path, rng.randrange(path.stat().st_size), rng.randrange(8)) for path in chosen]


def test_no_flipped_bit_is_silent_and_none_hides_an_older_checkpoint(run, full):
    newest = run / "checkpoints" / "step-00000030"
    for path, place, bit in flips(newest, FULL_FLIPS if full else FLIPS):
        content = path.read_bytes()
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        folder, _, complaints = Store(run / "checkpoints").newest_complete()
        assert folder.name == "step-00000020", (path, place, bit)
        assert any(path.name in complaint for complaint in complaints), (path, place, bit, complaints)
        path.write_bytes(content)
    assert taken(run) == 30


def rewrite(folder: Path, manifest: Manifest) -> None:
    """Write a manifest with valid digests of the present files."""
    files = {
        name: FileEntry((folder / name).stat().st_size, file_digest(folder / name))
        if (folder / name).is_file()
        else entry
        for name, entry in manifest.files.items()
    }
    (folder / "manifest.json").write_text(replace(manifest, files=files).dumps())


def change_state(folder: Path, change) -> None:
    path = next(folder.glob("state-*"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def doubled(tensors: dict) -> None:
    """Replace a parameter by its first half twice."""
    name = next(name for name in tensors if name.startswith("param|layers.0.weight|0"))
    values = tensors.pop(name)
    half = len(values) // 2
    tensors[name], tensors[name[:-1] + "1"] = values[:half].clone(), values[: len(values) - half].clone()


def value(key: str, number: float):
    def change(tensors: dict) -> None:
        name = next(name for name in tensors if name.startswith(f"{key}|"))
        tensors[name][-1] = number

    return change


FORGED = {
    "half of a parameter twice": doubled,
    "a parameter less": lambda tensors: tensors.pop("param|layers.2.bias|0"),
    "a moment less": lambda tensors: tensors.pop("exp_avg_sq|layers.2.bias|0"),
    "an element less": lambda tensors: tensors.update({"param|layers.2.bias|0": tensors["param|layers.2.bias|0"][1:]}),
    "an element more": lambda tensors: tensors.update({"param|layers.2.bias|0": torch.zeros(6)}),
    "a parameter more": lambda tensors: tensors.update({"param|other|0": torch.zeros(1)}),
    "integers": lambda tensors: tensors.update({"param|layers.2.bias|0": torch.zeros(5, dtype=torch.int32)}),
    "half precision": lambda tensors: tensors.update({"param|layers.2.bias|0": torch.zeros(5, dtype=torch.bfloat16)}),
    "NaN weights": value("param", math.nan),
    "infinite moments": value("exp_avg", -math.inf),
    "NaN second moments": value("exp_avg_sq", math.nan),
    "negative second moments": value("exp_avg_sq", -1.0),
}


@pytest.mark.parametrize("kind", FORGED)
def test_an_invalid_state_with_valid_digests_is_skipped(run, kind):
    newest = run / "checkpoints" / "step-00000030"
    manifest = Manifest.load(newest)
    change_state(newest, FORGED[kind])
    rewrite(newest, manifest)
    _, found, complaints = Store(run / "checkpoints").newest_complete()
    assert found.step == 20 and any("step-00000030" in line for line in complaints), complaints


MANIFESTS = {
    "another step": lambda m: replace(m, step=31, progress={**m.progress, "step": 31}),
    "another step in the progress": lambda m: replace(m, progress={**m.progress, "step": 31}),
    "a negative counter": lambda m: replace(m, progress={**m.progress, "tokens": -1}),
    "a step that is null": lambda m: replace(m, step=None),
    "a step that is a number with a point": lambda m: replace(m, step=30.0),
    "a step that is true": lambda m: replace(m, optimizer_step=True),
    "a nested counter": lambda m: replace(m, progress={**m.progress, "tokens": {"a": 1}}),
    "a huge counter": lambda m: replace(m, progress={**m.progress, "step": 10**400}),
    "no tensor-parallel rank": lambda m: replace(m, tensor_parallel=0),
    "a million ranks": lambda m: replace(m, data_parallel=10**12, tensor_parallel=10**12),
    "a stage that there is not": lambda m: replace(m, zero_stage=4),
    "another cut": lambda m: replace(
        m, parameters={name: replace(entry, partition_dim=7) for name, entry in m.parameters.items()}
    ),
    "a dimension too many": lambda m: replace(
        m, parameters={name: replace(entry, partition_dim=1) for name, entry in m.parameters.items()}
    ),
    "an empty shape": lambda m: replace(
        m, parameters={name: replace(entry, shape=(0,)) for name, entry in m.parameters.items()}
    ),
    "a file that is not there": lambda m: replace(m, files={**m.files, "other": FileEntry(1, "xxh3_128:0")}),
    "no state file": lambda m: replace(m, files={n: e for n, e in m.files.items() if not n.startswith("state")}),
    "an odd name": lambda m: replace(m, files={**m.files, "a\n\x00": FileEntry(1, "")}),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_an_invalid_manifest_with_a_valid_digest_is_skipped(run, kind):
    newest = run / "checkpoints" / "step-00000030"
    (newest / "manifest.json").write_text(MANIFESTS[kind](Manifest.load(newest)).dumps())
    _, found, complaints = Store(run / "checkpoints").newest_complete()
    assert found.step == 20 and any("step-00000030" in line for line in complaints)


def in_place(folder: Path, make) -> None:
    (folder / "manifest.json").unlink()
    make(folder / "manifest.json")


PLACES = {
    "a pipe for a manifest": lambda f: in_place(f, os.mkfifo),
    "a folder for a manifest": lambda f: in_place(f, Path.mkdir),
    "an empty manifest": lambda f: in_place(f, Path.touch),
    "brackets for a manifest": lambda f: in_place(f, lambda path: path.write_text("[" * 100_000)),
    "zeros for a manifest": lambda f: in_place(f, lambda path: path.write_bytes(b"\0" * 999)),
    "a pipe for a file": lambda f: ((f / "config.yaml").unlink(), os.mkfifo(f / "config.yaml")),
    "a folder for a file": lambda f: ((f / "config.yaml").unlink(), (f / "config.yaml").mkdir()),
    "a link out of it": lambda f: (
        shutil.move(f / "config.yaml", f.parent / "aside"),
        (f / "config.yaml").symlink_to(f.parent / "aside"),
    ),
    "another name": lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("step-00000010"), f)),
}


@pytest.mark.parametrize("kind", PLACES)
def test_entries_that_are_not_files_are_skipped_without_a_hang(run, kind):
    PLACES[kind](run / "checkpoints" / "step-00000030")
    assert Store(run / "checkpoints").newest_complete()[1].step == 20


@pytest.mark.parametrize("version", [VERSION + 1, 99, 10**9])
@pytest.mark.parametrize("digested", [True, False])
def test_a_newer_format_is_an_error_that_names_it(run, version, digested, monkeypatch):
    newest = run / "checkpoints" / "step-00000030"
    if digested:
        manifest = Manifest.load(newest)
        monkeypatch.setattr("pause_megatron.checkpoint.manifest.VERSION", version)
        (newest / "manifest.json").write_text(manifest.dumps())
        monkeypatch.undo()
    else:  # written by hand
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace(f'"version": {VERSION}', f'"version": {version}'))
    for take in (Store(run / "checkpoints").newest_complete, lambda: open_newest(run)):
        with pytest.raises(NewerFormatError, match=rf"version {VERSION} or older, got version {version}"):
            take()


def test_a_manifest_of_the_first_version_is_read(run):
    newest = run / "checkpoints" / "step-00000030" / "manifest.json"
    lines = [line for line in newest.read_text().splitlines() if "manifest_digest" not in line]
    newest.write_text("\n".join(lines).replace(f'"version": {VERSION}', '"version": 1'))
    assert taken(run) == 30


def test_files_have_the_permissions_of_the_umask(made):
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def save_broken(folder: str) -> list[str]:
    said = []

    def act(save, store, engine) -> None:
        for key, number in (("param", math.nan), ("exp_avg", math.inf), ("exp_avg_sq", math.nan)):
            address = engine.state.owned()[0]
            before = engine.state.get(address, key).clone()
            engine.state.set(address, key, torch.full((address.numel,), number))
            with pytest.raises(CheckpointError) as raised:
                save(40)
            said.append(str(raised.value))
            engine.state.set(address, key, before)

    one_rank(folder, act)
    return said


def test_a_state_that_is_not_finite_is_not_saved(run):
    for said in run_on_ranks(1, save_broken, str(run / "checkpoints"))[0]:
        assert "the checkpoint of step 40 could not be written" in said and "expected finite numbers" in said
    assert taken(run) == 30


def test_choose_reports_what_is_unusual(run):
    assert choose(run).note == ""
    point_by_hand(run, "step-00000010")
    assert choose(run).note == (
        f"passed over: step-00000020, step-00000030; {run / 'checkpoints' / 'latest'} was moved back to step-00000010"
    )


def resume_what_may_not_be_listed(folder: str) -> str:
    import pause_megatron.checkpoint.store as module
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with initialize(ParallelSection()) as context:
        before, module.choose_in = module.choose_in, refuse
        try:
            Store(folder, context.rank, context.world_size).newest_complete()
        except CheckpointError as error:
            return str(error)
        finally:
            module.choose_in = before
    return ""


def test_a_folder_that_rank_0_may_not_list_is_an_error_on_every_rank(tmp_path):
    said = run_on_ranks(2, resume_what_may_not_be_listed, str(tmp_path), timeout=60)
    assert said == [f"{tmp_path}: Permission denied"] * 2
