"""Ranks of different runs do not take a step: what is compared, the messages, and failures on one rank."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from pause_megatron.config.identity import LOCAL_KEYS
from pause_megatron.config.keys import Key, keys
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.distributed.agreement import difference, ranks_of, same_on_every_rank
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import SharedError
from pause_megatron.train.guards.same_run import PACKAGE, code_digest, environment_record, run_record


def messages(records: list[dict[str, str]], failures: dict[int, str] | None = None) -> set[str]:
    """Return the messages of ranks with these records, one thread per rank; "" means that the run starts."""
    store, answers = dist.HashStore(), {}

    def compare(rank: int) -> None:
        ranks = Ranks(rank, rank, len(records), "", 0, "environment")
        try:
            same_on_every_rank(store, ranks, records[rank], (failures or {}).get(rank, ""))
            answers[rank] = ""
        except SharedError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=compare, args=(rank,), daemon=True) for rank in range(len(records))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == len(records), "a rank waits for ever"
    return set(answers.values())


CONFIG = load(recipe="tiny-pause", overrides=["data.prefix=a", "train.steps=4"])


def another(key: Key, config: RunConfig) -> RunConfig:
    """Return the configuration with a different valid value of the key."""
    section, name = key.path.split(".")
    group = getattr(config, section)
    field = next(field for field, info in type(group).model_fields.items() if (info.alias or field) == name)
    value = getattr(group, field)
    if key.choices:
        changed = next(choice for choice in key.choices if choice != value)
    elif key.kind is bool:
        changed = not value
    elif key.kind is tuple:
        changed = (*value, "another")
    elif key.path == "engine.ds_config":
        changed = "zero1"
    elif key.kind is str:
        changed = f"{value or ''}another" if key.path != "pause.placement" else "isolated"
    elif key.path == "batch.micro_size":
        changed = 2 if value == 1 else 1
    elif key.path in ("batch.global_size", "parallel.tensor"):
        changed = 2 * value
    else:
        changed = (value or 0) + 1 if key.kind is int else (value or 1) / 2
    return config.model_copy(update={section: group.model_copy(update={field: changed})})


@pytest.fixture(scope="module")
def base() -> dict[str, str]:
    return run_record("pretrain", CONFIG, 2)


@pytest.mark.parametrize("key", keys().values(), ids=lambda key: key.path)
def test_a_key_that_differs_between_ranks_is_an_error_or_local(key, base):
    changed = another(key, CONFIG)
    assert changed != CONFIG
    (text,) = messages([base, run_record("pretrain", changed, 2), base])
    if key.local:
        assert text == "" and key.path in LOCAL_KEYS
        return
    line = next(line for line in text.split("\n") if key.path in line)
    assert text.startswith("expected the same run on every rank:")
    assert f"{key.path} is {base[key.path]} on ranks 0, 2 and " in line and line.endswith(" on rank 1")


def test_the_local_keys_are_few_and_their_content_is_compared():
    assert {key.path for key in keys().values() if key.local} == LOCAL_KEYS
    assert {"data.prefix", "data.valid_prefix", "data.tokenizer", "task.path", "task.scores"} == LOCAL_KEYS


def test_equal_records_start():
    assert messages([{"a": "1"}] * 4) == {""} and messages([{}]) == {""}


def test_a_difference_names_ranks_and_key():
    one, other = {"optim.lr": "0.001", "a": "x"}, {"optim.lr": "0.01", "a": "x"}
    text = "expected the same run on every rank: optim.lr is 0.001 on ranks 0, 2-3 and 0.01 on rank 1"
    assert messages([one, other, one, one]) == {text}


def test_a_message_about_many_keys_stays_readable():
    records = [{f"key{number}": f"{rank}" * 500 for number in range(30)} for rank in (1, 2)]
    lines = difference(records).split("\n")
    assert len(lines) == 7 and lines[-1] == "  (and 25 more)"
    assert max(map(len, lines)) < 300


def test_a_rank_with_another_verb_is_reported_by_its_verb_only():
    assert messages([{"verb": "pretrain", "a": "1"}, {"verb": "finetune"}]) == {
        "expected the same run on every rank: verb is pretrain on rank 0 and finetune on rank 1"
    }


def test_a_failure_of_one_rank_is_the_error_of_all_with_its_rank():
    (text,) = messages([{"a": "1"}, {"verb": "x"}, {"a": "1"}], {1: "no corpus at c"})
    assert text.startswith("rank 1 on ") and text.endswith(": no corpus at c")
    assert messages([{}] * 3, dict.fromkeys(range(3), "no corpus at c")) == {"no corpus at c"}
    (text,) = messages([{}] * 4, {0: "a", 1: "b", 2: "b"})
    assert text.startswith("rank 0 on ") and text.endswith(": a\nranks 1-2: b")


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([3], "rank 3"), ([0, 2, 3], "ranks 0, 2-3"), ([2, 1, 0], "ranks 0-2"), ([5, 1], "ranks 1, 5")],
)
def test_ranks_are_listed_as_ranges(numbers, words):
    assert ranks_of(numbers) == words


def test_one_changed_byte_of_the_sources_is_a_different_version(tmp_path):
    copy = tmp_path / "pause_megatron"
    shutil.copytree(PACKAGE / "config", copy / "config", ignore=shutil.ignore_patterns("__pycache__"))
    before = code_digest(copy)
    assert before == code_digest(copy)
    file = copy / "config" / "batching.py"
    file.write_bytes(file.read_bytes().replace(b"round(", b"int(", 1))
    changed = code_digest(copy)
    file.rename(file.with_name("plans.py"))
    assert len({before, changed, code_digest(copy)}) == 3


def test_unreadable_sources_are_named_and_hidden_files_skipped(tmp_path):
    """Editors' locks and backups, broken links, folders and pipes with a source's name."""
    (tmp_path / "plain.py").write_text("1\n")
    before = code_digest(tmp_path)
    (tmp_path / ".#plain.py").symlink_to("somebody@host.123:456")
    (tmp_path / ".plain.py").write_text("2\n")
    (tmp_path / "plain.py~").write_text("3\n")
    for name in (".ipynb_checkpoints", "__pycache__", "folder.py"):
        (tmp_path / name).mkdir()
    (tmp_path / "__pycache__" / "plain.py").write_text("4\n")
    (tmp_path / "__pycache__").chmod(0)
    assert code_digest(tmp_path) == before
    (tmp_path / "__pycache__").chmod(0o700)
    digests = [before]
    for make in (lambda path: path.symlink_to("nowhere"), os.mkfifo, lambda path: path.symlink_to(path.name)):
        make(tmp_path / "odd.py")
        digests.append(code_digest(tmp_path))
        assert digests[-1] == code_digest(tmp_path)
        (tmp_path / "odd.py").unlink()
    (tmp_path / os.fsdecode(b"\xff.py")).write_text("5\n")
    digests.append(code_digest(tmp_path))
    assert len({*digests}) == 5


def test_run_dir_is_compared_as_the_folder_that_a_rank_resolves(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (text,) = messages([base, run_record("pretrain", CONFIG, 2)])
    assert "run.dir is" in text and repr(str(tmp_path / "runs/tiny-pause")) in text


def test_two_spellings_of_one_folder_are_equal(tmp_path):
    origin = tmp_path / "there" / "origin"
    origin.mkdir(parents=True)
    (tmp_path / "link").symlink_to("there")

    def record(folder: Path) -> dict[str, str]:
        run = CONFIG.run.model_copy(update={"dir": str(folder / "run")})
        model = CONFIG.model.model_copy(update={"from_": str(folder / "origin")})
        return run_record("pretrain", CONFIG.model_copy(update={"run": run, "model": model}), 2)

    assert messages([record(tmp_path / "there"), record(tmp_path / "link")]) == {""}


def test_the_content_at_a_path_is_compared(tmp_path, monkeypatch, base):
    """A DeepSpeed file, a placement policy, an initial checkpoint: the same path with different content."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_policy", raising=False)
    (tmp_path / "own_policy.py").write_text("def place(): ...\n")
    engine = tmp_path / "own.json"
    engine.write_text((PACKAGE.parent / "ds_configs" / "zero1.json").read_text())
    origin = tmp_path / "origin"
    origin.mkdir()
    for name in ("manifest.json", "config.yaml"):
        (origin / name).write_text("{}")
    changes = {
        "pause": CONFIG.pause.model_copy(update={"placement": "own_policy:place"}),
        "engine": CONFIG.engine.model_copy(update={"ds_config": str(engine)}),
        "model": CONFIG.model.model_copy(update={"from_": str(origin)}),
    }
    config = CONFIG.model_copy(update=changes)
    before = run_record("pretrain", config, 2)
    (tmp_path / "own_policy.py").write_text("def place(): return 1\n")
    engine.write_text(engine.read_text().replace('"stage": 1', '"stage": 1, "reduce_bucket_size": 12345'))
    (origin / "manifest.json").write_text("[]")
    (text,) = messages([before, run_record("pretrain", config, 2)])
    assert "source of own_policy:place is" in text and "content of model.from is" in text
    assert "zero_optimization.reduce_bucket_size for DeepSpeed is" in text and "12345 on rank 1" in text


@pytest.mark.parametrize(
    ("placement", "changed"),
    [
        ("own:place", "own.py"),
        ("answers own:place", "own.py"),
        ("answers own:place", "gap.txt"),
        ("own:place", "beside.py"),  # a helper in the same folder
        ("own:place", "later.py"),  # imported when it is called
        ("own:place", "elsewhere/far.py"),  # a helper in another folder
        ("package:place", "package/inside.py"),
        ("package.inside:place", "package/__init__.py"),
        ("space.inside:place", "space/inside.py"),  # without an __init__.py
        ("own:place", "gap.txt"),  # a data file
    ],
)
def test_a_different_policy_is_an_error_wherever_its_code_differs(placement, changed, tmp_path, monkeypatch):
    bodies = {
        "own.py": "import beside, far\n"
        "def place(text, count, rate, rng):\n"
        "    import later\n"
        "    return beside.np.full(count, int(open(later.FILE).read()))\n",
        "beside.py": "import numpy as np\n",
        "later.py": f"FILE = {str(tmp_path / 'gap.txt')!r}\n",
        "elsewhere/far.py": "A = 1\n",
        "package/__init__.py": "from .inside import place\n",
        "package/inside.py": "from own import place\n",
        "space/inside.py": "from own import place\n",
        "gap.txt": "3",
    }
    for name, body in bodies.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.syspath_prepend(str(tmp_path))
    where, _, placement = placement.rpartition(" ")
    finetune = CONFIG.finetune.model_copy(update={"answer_placement": placement})
    pause = CONFIG.pause.model_copy(update={"placement": placement})
    config = CONFIG.model_copy(update={"finetune": finetune} if where else {"pause": pause})

    def record() -> dict[str, str]:
        """Return the record of a separate process."""
        for name in ("own", "beside", "later", "far", "package", "package.inside", "space", "space.inside"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return run_record("pretrain", config, 2)

    before = record()
    assert messages([before, record()]) == {""}
    (tmp_path / changed).write_text("4" if changed == "gap.txt" else f"{bodies[changed]}B = 2\n")
    (text,) = messages([before, record()])
    pauses = f"pauses {where and 'in answers '}by {placement} is "
    assert (pauses if changed == "gap.txt" else f"source of {placement} is ") in text


def test_variables_that_change_numerics_are_compared_but_not_threads():
    usual = environment_record({"OMP_NUM_THREADS": "1", "HOME": "/a"})
    assert usual == environment_record({"OMP_NUM_THREADS": "8", "HOME": "/b", "CUDA_VISIBLE_DEVICES": "1"})
    (text,) = messages([usual, environment_record({"NCCL_ALGO": "Ring"})])
    assert text.endswith("variable NCCL_ALGO is not set on rank 0 and Ring on rank 1")
    (text,) = messages([environment_record({"NVTE_FLASH_ATTN": "0"}), usual])
    assert text.endswith("variable NVTE_FLASH_ATTN is 0 on rank 0 and not set on rank 1")


def test_versions_are_compared(base):
    names = [name for name in base if name.startswith("version of ")]
    assert {f"version of {name}" for name in ("pause-megatron", "torch", "deepspeed", "megatron-core", "numpy")} <= set(
        names
    )
    assert all(base[name] != "not installed" for name in names if name.split()[-1] in ("torch", "deepspeed", "numpy"))


def test_the_readme_names_the_local_keys():
    text = (Path(__file__).resolve().parents[2] / "launchers" / "README.md").read_text()
    assert all(f"`{key}`" in text for key in LOCAL_KEYS)


@pytest.mark.parametrize("key", ["name", "token_weights"])
def test_a_different_objective_or_weights_of_the_users_are_an_error(key, tmp_path, monkeypatch):
    objective = CONFIG.objective.model_copy(update={key: "own_loss:thing"})
    config = CONFIG.model_copy(update={"objective": objective})
    monkeypatch.syspath_prepend(str(tmp_path))
    body = "from pause_megatron.objective.shipped import CrossEntropy as Loss\ndef thing(it): return Loss(it)\n"
    records = []
    for text in (body, body, f"{body}changed = 1\n"):
        (tmp_path / "own_loss.py").write_text(text)
        monkeypatch.delitem(sys.modules, "own_loss", raising=False)
        importlib.invalidate_caches()
        records.append(run_record("pretrain", config, 2))
    assert messages(records[:2]) == {""}
    (text,) = messages(records[1:])
    assert "source of own_loss:thing is " in text
