"""Checkpoints: bit for bit at the same topology, the same state at another, and nothing that is only half there."""

from __future__ import annotations

import itertools
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import run_on_ranks
from test_engine import STEPS, Toy, config, make_engine, masters, take_step

from pause_megatron.checkpoint import CheckpointReader, Manifest, Store
from pause_megatron.checkpoint.manifest import FileEntry
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.engine import ADAM_STATE, Address
from pause_megatron.errors import CheckpointError

HALF = STEPS // 2


def save_toy(engine, context, folder: str | Store, step: int, keep: int = 3) -> None:
    """Saves into the store, or into the folder with a new one, as a process that has just started."""
    from pause_megatron.checkpoint import save

    save(
        folder if isinstance(folder, Store) else Store(folder, context.rank, context.world_size),
        engine,
        context,
        step=step,
        corpus="corpus",
        progress={"step": step, "tokens": 16 * step, "text_tokens": 15 * step},
        config_yaml="run: {}\n",
        save_tokenizer=lambda path: (path.mkdir(), (path / "tokenizer.json").write_text("{}")),
        keep=keep,
    )


def write(folder: str, zero: int, precision: str, micro: int) -> list:
    """Trains to the half, saves, trains on. Returns the norms of the second half and the final state."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(zero, precision, micro)
    with initialize(ParallelSection()) as context, make_engine(run, context) as engine:
        for step in range(HALF):
            take_step(engine, run, context, step)
        save_toy(engine, context, folder, HALF)
        norms = [take_step(engine, run, context, step).grad_norm for step in range(HALF, STEPS)]
        return [norms, masters(engine)]


def resume(folder: str, zero: int, precision: str, micro: int) -> list:
    """Builds everything afresh from other initial weights, restores, trains on."""
    from pause_megatron.checkpoint import restore_engine, restore_weights
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(zero, precision, micro)
    with initialize(ParallelSection()) as context:
        store = Store(folder, context.rank, context.world_size)
        reader = CheckpointReader(store.newest_complete()[0], context.tp_rank)

        def prepare(model) -> None:
            scramble(model)
            restore_weights(model, reader)

        with make_engine(run, context, prepare) as engine:
            restore_engine(engine, reader)
            before = masters(engine)
            norms = [take_step(engine, run, context, step).grad_norm for step in range(HALF, STEPS)]
            return [norms, masters(engine), before]


def scramble(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)


@pytest.mark.parametrize(("zero", "precision"), [*itertools.product(range(4), ("fp32", "bf16"))])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, zero, precision):
    uninterrupted = run_on_ranks(2, write, str(tmp_path), zero, precision, 2)
    resumed = run_on_ranks(2, resume, str(tmp_path), zero, precision, 2)
    for (norms, state), (norms_again, state_again, _) in zip(uninterrupted, resumed, strict=True):
        assert norms == norms_again
        assert state.keys() == state_again.keys()
        assert all(torch.equal(state[key], state_again[key]) for key in state)


def test_any_stage_and_data_parallel_size_loads_at_any_other(tmp_path):
    """World 1 -> 2 -> 4 -> 2 -> 1 over ZeRO 0..3: the state that is loaded is the state that was written."""
    for ranks, micro, zero in [(1, 4, 0), (1, 4, 3), (2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 1, 0), (4, 1, 2), (4, 1, 3)]:
        folder = str(tmp_path / f"{ranks}-{zero}")
        norms = run_on_ranks(ranks, write, folder, zero, "fp32", micro)[0][0]
        other_ranks, other_micro, other_zero = {1: (2, 4, 3), 2: (4, 2, 1), 4: (1, 8, 2)}[ranks]
        target = (zero + other_zero) % 4
        results = run_on_ranks(other_ranks, resume, folder, target, "fp32", other_micro)
        reader = CheckpointReader(Store(folder).path(HALF), 0)
        for _, _, loaded in results:
            for (name, start, key), values in loaded.items():
                assert torch.equal(values, reader.read(Address(name, start, values.numel()), key))
        assert results[0][0] == pytest.approx(norms, rel=2e-6), (ranks, zero, other_ranks, target)


def test_a_checkpoint_holds_each_element_once(tmp_path):
    for ranks, zero in itertools.product((2, 4), range(4)):
        folder = tmp_path / f"{ranks}-{zero}"
        run_on_ranks(ranks, write, str(folder), zero, "fp32", 1)
        reader = CheckpointReader(folder / f"step-{HALF:08d}", 0)
        for name, parameter in Toy().named_parameters():
            assert reader.manifest.parameters[name].shape == tuple(parameter.shape)
            for key in ADAM_STATE:
                assert sum(numel for _, numel, _ in reader._pieces[key, name]) == parameter.numel()
                reader.read(Address(name, 0, parameter.numel()), key)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_on_ranks(2, write_two, str(folder))
    return folder


def write_two(folder: str) -> None:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    run = config(1, "fp32", 2)
    with initialize(ParallelSection()) as context, make_engine(run, context) as engine:
        for step in range(2):
            take_step(engine, run, context, step)
            save_toy(engine, context, folder, step + 1)


def damages(folder: Path) -> list[tuple[str, str]]:
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(kind, name) for name in files for kind in ("flip", "truncate", "delete")]


def test_damage_to_any_file_is_found_named_and_passed_over(two_checkpoints, tmp_path):
    kinds = damages(two_checkpoints / "step-00000002")
    assert len(kinds) == 3 * 5  # two state files, config, tokenizer, manifest
    for kind, name in kinds:
        copy = tmp_path / "copy"
        shutil.copytree(two_checkpoints, copy, symlinks=True)
        target = copy / "step-00000002" / name
        content = bytearray(target.read_bytes())
        if kind == "flip":
            content[len(content) // 2] ^= 1
            target.write_bytes(content)
        elif kind == "truncate":
            target.write_bytes(content[:-1])
        else:
            target.unlink()
        found = Store(copy).newest_complete()
        assert found[0].name == "step-00000001", (kind, name)
        assert any(name in complaint for complaint in found[2]), (kind, name)
        shutil.rmtree(copy)


def test_swapped_files_are_found(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy, symlinks=True)
    first, second = sorted((copy / "step-00000002").glob("state-*"))
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    folder, _, complaints = Store(copy).newest_complete()
    assert folder.name == "step-00000001"
    assert len(complaints) == 2


def test_a_run_with_only_damaged_checkpoints_does_not_restart(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy, symlinks=True)
    for manifest in copy.glob("*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        Store(copy).newest_complete()


def test_a_manifest_names_files_inside_its_folder_only(two_checkpoints, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints / "step-00000002", copy)
    manifest = Manifest.load(copy)
    for name in ("../../etc/passwd", "/etc/passwd", "a//b", ".", "manifest.json", "a\nb"):
        entries = {**manifest.files, name: FileEntry(1, "")}
        (copy / "manifest.json").write_text(replace(manifest, files=entries).dumps())
        with pytest.raises(CheckpointError, match=r"expected .*file names"):
            Manifest.load(copy)


def test_a_user_may_type_the_run_its_checkpoints_latest_or_one(two_checkpoints):
    expected = (two_checkpoints / "step-00000002").resolve()
    for place in ("", "latest", expected):
        assert open_newest(two_checkpoints / place).folder == expected
    assert open_newest(two_checkpoints / "step-00000001").folder.name == "step-00000001"
    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        open_newest(two_checkpoints / "nothing")


def test_only_the_newest_are_kept(tmp_path):
    run_on_ranks(2, write_many, str(tmp_path))
    assert Store(tmp_path).steps() == [4, 5]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "set-aside-step-00000005", "step-00000004", "step-00000005"]


def write_many(folder: str) -> None:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection()) as context, make_engine(config(1, "fp32", 2), context) as engine:
        for step in (1, 2, 3, 4, 5, 5):  # the last one twice: nothing is deleted in its favour
            engine.state.step = step
            save_toy(engine, context, folder, step, keep=2)


def save_with_a_full_disk(folder: str, limited_rank: int) -> list[str]:
    """The kernel refuses to let one rank's files grow beyond 512 bytes, after one good checkpoint."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection()) as context, make_engine(config(1, "fp32", 2), context) as engine:
        save_toy(engine, context, folder, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if context.rank == limited_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        try:
            save_toy(engine, context, folder, 2)
        except CheckpointError as error:
            return [str(error)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        return []


@pytest.mark.parametrize("limited_rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_all_and_keeps_the_old_checkpoint(tmp_path, limited_rank):
    for messages in run_on_ranks(2, save_with_a_full_disk, str(tmp_path), limited_rank):
        assert "checkpoint of step 2 could not be written" in messages[0]
        assert f"rank {limited_rank}" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert Store(tmp_path).newest_complete()[0].name == "step-00000001"


def test_another_model_is_refused_by_parameter_name(tmp_path):
    from pause_megatron.checkpoint import restore_weights

    run_on_ranks(2, write, str(tmp_path), 1, "fp32", 2)
    reader = CheckpointReader(tmp_path / f"step-{HALF:08d}", 0)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"a different architecture: 0\.bias: expected shape \(3,\), got none"):
        restore_weights(other, reader)
