"""kill -9 at random moments, inside saves too: restarted, the run ends as the one that was never interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from pause_megatron.checkpoint import Store
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig

STEPS, RANKS = 24, 2
TIMING = {"seconds", "tokens_per_second", "text_tokens_per_second", "mfu"}

# Ranks are forked from one process that has imported torch, DeepSpeed and megatron-core: a start takes a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pause_megatron.train.pretrain", "deepspeed"])


def run_config(corpus: str, folder: Path, zero: int) -> RunConfig:
    return load(
        recipe="tiny-pause",
        overrides=[
            *(f"data.prefix={corpus}", f"run.dir={folder}", f"engine.zero_stage={zero}", f"train.steps={STEPS}"),
            *("model.preset=null", "model.layers=2", "model.hidden=32", "model.heads=2", "model.tied=true"),
            *("data.sequence_length=64", "batch.global_size=8", "batch.micro_size=2", "optim.warmup_steps=2"),
            *("checkpoint.every=2", "checkpoint.keep=2", "validation.every=8", "validation.samples=8"),
            *("log.samples_every=10", "pause.window=trim", "pause.placement=bernoulli"),
        ],
    )


def rank_main(config: RunConfig, rank: int, port: int, output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from pause_megatron.train.pretrain import pretrain

    raise SystemExit(pretrain(config))


def start(config: RunConfig, output: Path) -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [_context.Process(target=rank_main, args=(config, rank, port, str(output))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list, output: Path) -> None:
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * RANKS, output.read_text()[-4000:]


def kill_at(processes: list, checkpoints: Path, rng: random.Random, one_rank: bool) -> bool:
    """Kills all ranks (or one, and then the others, as a launcher does). False if the run ended before."""
    inside_a_save = rng.random() < 0.5
    time.sleep(rng.uniform(0.3, 2.5))
    if inside_a_save:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not any(checkpoints.glob(".incoming-*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
    if not any(process.is_alive() for process in processes):
        return False
    victims = rng.sample(processes, len(processes))
    for process in victims:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        if one_rank:
            time.sleep(rng.uniform(0, 0.2))
    for process in processes:
        process.join()
    return True


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def final_state(folder: Path) -> dict[str, bytes]:
    last = Store(folder / "checkpoints").path(STEPS)
    return {path.name: path.read_bytes() for path in sorted(last.glob("state-*.safetensors"))}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_kill_and_restart_ends_as_the_uninterrupted_run(corpus, tmp_path, zero, full):
    straight = tmp_path / "straight"
    finish(start(run_config(corpus, straight, zero), tmp_path / "straight.log"), tmp_path / "straight.log")
    assert [line["step"] for line in metrics(straight)] == list(range(1, STEPS + 1))

    rng = random.Random(zero)
    kills, inside_saves, runs, wanted = 0, 0, 0, 200 if full else 17
    while kills < wanted:
        folder, output = tmp_path / f"killed-{runs}", tmp_path / f"killed-{runs}.log"
        processes = start(run_config(corpus, folder, zero), output)
        if kill_at(processes, folder / "checkpoints", rng, one_rank=rng.random() < 0.3):
            kills += 1
            inside_saves += any((folder / "checkpoints").glob(".incoming-*"))
        else:  # it ended before it was hit: the next kills hit another run
            finish(processes, output)
            assert_same(folder, straight)
            runs += 1
    folder, output = tmp_path / f"killed-{runs}", tmp_path / f"killed-{runs}.log"
    finish(start(run_config(corpus, folder, zero), output), output)
    assert_same(folder, straight)
    assert inside_saves >= wanted // 5, "too few of the kills hit a save"


def assert_same(folder: Path, straight: Path) -> None:
    assert metrics(folder) == metrics(straight)
    assert final_state(folder) == final_state(straight)
