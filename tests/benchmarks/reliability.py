"""Kills, delays and damage: what becomes of a run that saves with plain DeepSpeed, and of one that saves with this one.

    python tests/benchmarks/reliability.py --kills 50 --delays 10 --flips 200 --output reliability.md

Both systems save the same ZeRO-1 engine again and again, on two ranks. Every element of parameters and moments is the
number of the step, so that a state which loads and is wrong shows.

    R1  kill -9 at random moments, half of them aimed at a save; then the same program starts again
    R2  one rank is slow to write; as soon as the pointer names the new checkpoint, everything is killed
    R3  one file of the newest checkpoint is damaged (one rank)
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path

SYSTEMS = ("deepspeed", "pause-megatron")
WIDTH = 512
KEPT = 2

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pause_megatron.train.pretrain", "deepspeed"])


class Saving:
    """An engine, and how a system saves and restores it."""

    def __init__(self, system: str, folder: Path, context) -> None:
        import torch

        from pause_megatron.checkpoint import Store
        from pause_megatron.config.deepspeed import deepspeed_config
        from pause_megatron.config.load import load
        from pause_megatron.engine import Engine

        config = load(overrides=["train.steps=1", "batch.global_size=2", "batch.micro_size=1", "engine.precision=fp32"])
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        self.system, self.folder, self.context = system, folder, context
        self.engine = Engine(
            model,
            groups=groups,
            ds_config=deepspeed_config(config, data_parallel=context.dp_size),
            optim=config.optim,
            mpu=context.mpu,
            dp_rank=context.dp_rank,
            dp_size=context.dp_size,
        )
        self.store = Store(folder, context.rank, context.world_size)

    def fill(self, step: int) -> None:
        """A state that says which step it is of."""
        import torch

        from pause_megatron.engine import ADAM_STATE

        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.fill_(step)
        for address in self.engine.state.needed():
            for key in ADAM_STATE:
                self.engine.state.set(address, key, torch.full((address.numel,), float(step)))

    def is_of(self, step: int) -> bool:
        """Whether every element is the step's."""
        from pause_megatron.engine import ADAM_STATE

        state = self.engine.state
        return all(bool((p == step).all()) for p in self.engine.module.parameters()) and all(
            bool((state.get(address, key) == step).all()) for address in state.owned() for key in ADAM_STATE
        )

    def save(self, step: int) -> None:
        """As the system does it."""
        if self.system == "deepspeed":
            self.engine.deepspeed.save_checkpoint(str(self.folder), tag=f"step{step}", client_state={"step": step})
            if self.context.rank == 0:
                shutil.rmtree(self.folder / f"step{step - KEPT}", ignore_errors=True)
            return
        from pause_megatron.checkpoint import save

        save(
            self.store,
            self.engine,
            self.context,
            step=step,
            corpus="",
            progress={"step": step},
            config_yaml="",
            save_tokenizer=lambda path: path.mkdir(),
            keep=KEPT,
        )

    def restore(self) -> tuple[str, int]:
        """("fresh" | "resumed" | "wrong" | "refused: ...", step)."""
        self.fill(-1)
        try:
            step = self._load()
        except Exception as error:
            return f"refused: {type(error).__name__}", 0
        if step is None:
            return "fresh", 0
        return ("resumed" if self.is_of(step) else "wrong"), step

    def _load(self) -> int | None:
        if self.system == "deepspeed":
            path, client = self.engine.deepspeed.load_checkpoint(str(self.folder))
            return None if path is None else client["step"]
        from pause_megatron.checkpoint import CheckpointReader, restore_engine, restore_weights

        found = self.store.newest_complete()
        if found is None:
            return None
        reader = CheckpointReader(found[0], self.context.tp_rank)
        restore_weights(self.engine.module, reader)
        restore_engine(self.engine, reader)
        return found[1].step


def program(system: str, folder: Path, rank: int, ranks: int, port: int, slow_rank: int | None) -> None:
    """What is killed: restores, says how that went, and saves until it is killed."""
    quiet = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection()) as context:
        saving = Saving(system, folder, context)
        outcome, step = saving.restore()
        partial = folder.parent / f"outcome-{rank}.partial"
        partial.write_text(json.dumps([outcome, step]))
        partial.rename(folder.parent / f"outcome-{rank}.json")
        if slow_rank == rank:
            write_slowly(0.5)
        if outcome.startswith("refused"):
            return
        while True:
            step += 1
            saving.fill(step)
            saving.save(step)


def write_slowly(seconds: float) -> None:
    """This rank waits before it writes a file."""
    import torch

    ours = importlib.import_module(
        "pause_megatron.checkpoint.save"
    )  # the package's attribute of that name is a function

    def delayed(function):
        def wait_and_write(*args, **kwargs):
            time.sleep(seconds)
            return function(*args, **kwargs)

        return wait_and_write

    torch.save, ours.save_file = delayed(torch.save), delayed(ours.save_file)


def start(system: str, folder: Path, slow_rank: int | None = None, ranks: int = 2) -> list:
    for old in folder.parent.glob("outcome-*.json"):
        old.unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        _context.Process(target=program, args=(system, folder, rank, ranks, port, slow_rank)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def outcome_of(folder: Path, processes: list, seconds: float = 300) -> str:
    """How restoring went on all ranks: the worst, once all have said so or none is alive."""
    end = time.monotonic() + seconds
    said: list[str] = []
    while time.monotonic() < end:
        said = [json.loads(path.read_text())[0] for path in folder.parent.glob("outcome-*.json")]
        if len(said) == len(processes) or any(text.startswith("refused") for text in said):
            break
        time.sleep(0.005)
    return next(
        (text for text in sorted(said, reverse=True) if text not in ("fresh", "resumed")), max(said, default="hung")
    )


def kill(processes: list, rng: random.Random) -> None:
    """All, in any order; every third time with a little time between."""
    for process in rng.sample(processes, len(processes)):
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        if rng.random() < 1 / 3:
            time.sleep(rng.uniform(0, 0.1))
    for process in processes:
        process.join()


def kills(system: str, count: int, rng: random.Random) -> Counter:
    """R1. What a restart finds; a folder that cannot be resumed is begun anew."""
    found: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        processes = start(system, folder)
        outcome_of(folder, processes)
        for _ in range(count):
            if rng.random() < 0.5:  # wait until a save begins
                before = {path.name for path in folder.iterdir()}
                end = time.monotonic() + 10
                while time.monotonic() < end and {path.name for path in folder.iterdir()} <= before:
                    time.sleep(0.0005)
            else:
                time.sleep(0.2)
            time.sleep(rng.uniform(0, 0.3))
            kill(processes, rng)
            begun = any(folder.iterdir())
            processes = start(system, folder)
            outcome = outcome_of(folder, processes)
            found["lost: began anew" if outcome == "fresh" and begun else outcome] += 1
            if outcome.startswith("refused") or outcome in ("wrong", "hung"):
                kill(processes, rng)
                shutil.rmtree(folder)
                folder.mkdir()
                processes = start(system, folder)
                outcome_of(folder, processes)
        kill(processes, rng)
    return found


def delays(system: str, count: int, rng: random.Random) -> Counter:
    """R2. What a restart finds when the pointer has moved while a rank had not written yet."""
    found: Counter = Counter()
    for trial in range(count):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "checkpoints"
            folder.mkdir()
            processes = start(system, folder, slow_rank=trial % 2)
            outcome_of(folder, processes)
            pointer = folder / "latest"
            end = time.monotonic() + 60
            moves, last = 0, None
            while moves < 2 and time.monotonic() < end:  # the first checkpoint stands; the second is under way
                now = (
                    os.readlink(pointer) if pointer.is_symlink() else pointer.read_text() if pointer.exists() else None
                )
                moves, last = moves + (now != last and bool(now)), now
                time.sleep(0.0005)
            kill(processes, rng)
            processes = start(system, folder)
            found[outcome_of(folder, processes)] += 1
            kill(processes, rng)
    return found


def named_by(pointer: Path) -> str | None:
    """What `latest` says: ours is a symbolic link, DeepSpeed's a file."""
    try:
        return os.readlink(pointer) if pointer.is_symlink() else pointer.read_text()
    except OSError:
        return None


def damage(system: str, flips: int, queue) -> None:
    """R3, on one rank: one file of the newest checkpoint altered, restored, mended."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import Ranks, initialize

    rng, found = random.Random(1), {"flip": Counter(), "truncate": Counter(), "delete": Counter()}
    alone = Ranks(0, 0, 1, "127.0.0.1", 0, "alone")
    with tempfile.TemporaryDirectory() as name, initialize(ParallelSection(), ranks=alone) as context:
        saving = Saving(system, Path(name), context)
        for step in (1, 2):
            saving.fill(step)
            saving.save(step)
        newest = Path(name) / ("step2" if system == "deepspeed" else "step-00000002")
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        sizes = [path.stat().st_size for path in files]
        for kind in found:
            for number in range(flips if kind == "flip" else len(files)):
                path = rng.choices(files, sizes)[0] if kind == "flip" else files[number]
                whole = path.read_bytes()
                if kind == "flip":
                    place = rng.randrange(len(whole))
                    path.write_bytes(
                        whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
                    )
                elif kind == "truncate":
                    path.write_bytes(whole[: len(whole) // 2])
                else:
                    path.unlink()
                outcome, step = saving.restore()
                if outcome == "resumed":
                    outcome = "older checkpoint instead, file named" if step == 1 else "not seen, no element differs"
                elif outcome == "wrong":
                    outcome = "not seen, state is wrong"
                found[kind][outcome] += 1
                path.write_bytes(whole)
    queue.put(found)


def table(title: str, results: dict[str, Counter]) -> list[str]:
    lines = [f"### {title}", "", "| outcome | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    outcomes = sorted({outcome for counter in results.values() for outcome in counter})
    for outcome in outcomes:
        lines.append(f"| {outcome} | " + " | ".join(str(counter[outcome]) for counter in results.values()) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--delays", type=int, default=10)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    import deepspeed
    import torch

    lines = ["# Reliability of saving: plain DeepSpeed and pause-megatron", ""]
    lines += [
        f"`python tests/benchmarks/reliability.py --kills {args.kills} --delays {args.delays} --flips {args.flips}`; "
        f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        "CPU and gloo, two ranks, ZeRO 1. DeepSpeed: `save_checkpoint` / `load_checkpoint` as documented, no tag given "
        "on loading. `refused` needs a person: no restart resumes by itself.",
        "",
    ]
    results = {system: kills(system, args.kills, random.Random(0)) for system in SYSTEMS}
    lines += table("R1: kill -9 at random moments, restart", results)
    results = {system: delays(system, args.delays, random.Random(0)) for system in SYSTEMS}
    lines += table("R2: one rank slow to write, killed when the pointer moves, restart", results)
    damaged = {}
    for system in SYSTEMS:
        queue = _context.Queue()
        process = _context.Process(target=damage, args=(system, args.flips, queue))
        process.start()
        damaged[system] = queue.get()
        process.join()
    for kind, what in (("flip", "one bit flipped"), ("truncate", "a file cut in half"), ("delete", "a file deleted")):
        lines += table(f"R3: {what}", {system: counters[kind] for system, counters in damaged.items()})
    text = "\n".join(lines)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
