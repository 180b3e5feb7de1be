"""Ranks that can be killed: forked from one process that has imported torch, DeepSpeed and megatron-core.

A start takes a second instead of ten, so that tests can afford dozens of kills.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from pause_megatron.checkpoint import Store
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from support.file_calls import Decide, hand_over, watch
from support.tiny_config import tiny_model

STEPS, RANKS = 24, 2
TIMING = {"seconds", "loader_seconds", "hook_seconds", "tokens_per_second", "text_tokens_per_second", "mfu"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pause_megatron.train.pretrain", "deepspeed"])


def run_config(corpus: str, folder: Path, zero: int) -> RunConfig:
    return load(
        recipe="tiny-pause",
        overrides=[
            *(f"data.prefix={corpus}", f"run.dir={folder}", f"engine.zero_stage={zero}", f"train.steps={STEPS}"),
            *tiny_model(layers=2, hidden=32, heads=2, tied=True),
            *("data.sequence_length=64", "batch.global_size=8", "batch.micro_size=2", "optim.warmup_steps=2"),
            *("checkpoint.every=2", "checkpoint.keep=2", "validation.every=8", "validation.samples=8"),
            *("log.samples_every=10", "pause.window=trim", "pause.placement=bernoulli"),
            "engine.deterministic=true",  # a whole run obeys it, with its validation, saves and resumes
        ],
    )


def rank_main(config: RunConfig) -> None:
    from pause_megatron.train.pretrain import pretrain

    raise SystemExit(pretrain(config))


def start(config: RunConfig, output: Path, decide: Decide | None = None) -> list:
    """The ranks of a run; `decide` is asked about their calls on files in its folder."""
    return fork(rank_main, (config,), output, folder=Path(config.run.dir), decide=decide)


def fork(
    program: Callable[..., None],
    arguments: tuple,
    output: Path,
    *,
    ranks: int = RANKS,
    folder: Path | None = None,
    decide: Decide | None = None,
) -> list:
    """Processes that call `program(*arguments)` as ranks, and print to `output`.

    Args:
        folder, decide: see `file_calls.watch`; None: no interception
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        ours, theirs = _context.Pipe() if decide else (None, None)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = _context.Process(target=_enter, args=(program, arguments, place, str(output), theirs))
        process.start()
        if decide:
            theirs.close()
            watch(ours, rank, folder, decide)
        processes.append(process)
    return processes


def _enter(
    program: Callable[..., None], arguments: tuple, place: dict[str, str], output: str, pipe: Connection | None
) -> None:
    if pipe is not None:
        hand_over(pipe)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(place)
    program(*arguments)


def finish(processes: list, output: Path, code: int = 0) -> None:
    """Waits for the ranks to end, each with the exit code."""
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [code] * RANKS, output.read_text()[-4000:]


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def final_state(folder: Path) -> dict[str, bytes]:
    last = Store(folder / "checkpoints").path(STEPS)
    return {path.name: path.read_bytes() for path in sorted(last.glob("state-*.safetensors"))}


def assert_same(folder: Path, straight: Path) -> None:
    assert metrics(folder) == metrics(straight)
    assert final_state(folder) == final_state(straight)
