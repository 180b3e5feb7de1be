"""A run of plain DeepSpeed and one of this program, small and equal, and their outputs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.plain_deepspeed import SETTINGS, train
from support.prose import documents, json_lines, train_model

PLAIN_SCRIPT = Path(__file__).with_name("plain_deepspeed.py")
QUIET = ("log.samples_every=0", "validation.every=0")


def prepared(folder: Path, count: int = 300) -> str:
    """Prefix of a prepared corpus of some speeches."""
    from pause_megatron.cli import main

    model, shard, prefix = folder / "tokenizer.model", folder / "shard.jsonl", folder / "corpus"
    train_model(model)
    shard.write_bytes(json_lines(documents(count)))
    assert main(["prepare", "--input", str(shard), "--tokenizer", str(model), "--output", str(prefix)]) == 0
    return str(prefix)


def arguments(corpus: str, folder: Path, **changes: Any) -> list[str]:
    """Of `pause-megatron`: a run like the plain one. `changes`: keys with "__" for the dot."""
    keys = {
        "data.prefix": corpus,
        "run.dir": folder,
        "model.preset": "null",
        "model.layers": 1,
        "model.hidden": SETTINGS["hidden"],
        "model.heads": 2,
        "data.sequence_length": SETTINGS["sequence_length"],
        "batch.global_size": 8,
        "batch.micro_size": SETTINGS["micro_size"],
        "optim.warmup_steps": SETTINGS["warmup_steps"],
        "train.steps": SETTINGS["steps"],
        "checkpoint.every": SETTINGS["save_every"],
        "engine.zero_stage": SETTINGS["zero_stage"],
    }
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return ["pretrain", "--recipe", "tiny-pause", *QUIET, *(f"{key}={value}" for key, value in keys.items())]


def run_ours(words: list[list[str]]) -> None:
    """As a rank of a pool: the command line of this rank."""
    from pause_megatron.cli import main

    raise SystemExit(main(words[int(os.environ["RANK"]) % len(words)]))


def run_plain(settings: list[dict[str, Any]]) -> None:
    """As a rank of a pool: the script with the settings of this rank."""
    train(settings[int(os.environ["RANK"]) % len(settings)])


def steps_done(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint that `latest` names; 0: none."""
    latest = folder / "checkpoints" / "latest"
    try:
        name = os.readlink(latest) if latest.is_symlink() else latest.read_text()
    except OSError:
        return 0
    found = re.search(r"(\d+)\s*$", name)
    return int(found[1]) if found else 0


def processes_of(folder: Path) -> list[int]:
    """Processes that live and have the folder on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, state = (process / "cmdline").read_bytes(), (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if str(folder).encode() in words and state[0] not in "ZX" and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def wait_for_end(processes: list, seconds: float) -> bool:
    """Whether all of them ended in time."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return not any(process.is_alive() for process in processes)


def torchrun(words: list[str]) -> list[str]:
    """A command line that starts two ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
