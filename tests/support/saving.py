"""A program that saves repeatedly, with plain DeepSpeed or with this package, for tests that kill it.

Both systems save the same ZeRO-1 engine on two ranks. Every element of parameters and moments equals the number of
the step, so that a wrong state is detected.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

from support.file_calls import Decide
from support.forked_ranks import fork

WIDTH = 512
KEPT = 3


class Saving:
    """An engine, and how a system saves and restores it.

    Args:
        system: "deepspeed" or "pause-megatron".
        folder: Folder of the checkpoints.
        context: Process groups of this rank.
        width: Width of the four layers.
    """

    def __init__(self, system: str, folder: Path, context, width: int = WIDTH) -> None:
        import torch

        from pause_megatron.checkpoint import Store
        from pause_megatron.config.load import load
        from pause_megatron.train.run import new_engine

        config = load(overrides=["train.steps=1", "batch.global_size=2", "batch.micro_size=1", "engine.precision=fp32"])
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
        groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
        self.system, self.folder, self.context = system, folder, context
        self.engine = new_engine(config, model, groups, context)
        self.store = Store(folder, context.rank, context.world_size)
        self.kept, self.complaints = KEPT, []

    def path(self, step: int) -> Path:
        """Return the path of a checkpoint."""
        return self.folder / f"step{step}" if self.system == "deepspeed" else self.store.path(step)

    def fill(self, step: int) -> None:
        """Set every element of the state to the step."""
        import torch

        from pause_megatron.engine import ADAM_STATE

        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.fill_(step)
        for address in self.engine.state.needed():
            for key in ADAM_STATE:
                self.engine.state.set(address, key, torch.full((address.numel,), float(step)))
        self.engine.state.step = max(step, 0)

    def is_of(self, step: int) -> bool:
        """Whether every element equals the step."""
        from pause_megatron.engine import ADAM_STATE

        state = self.engine.state
        return all(bool((p == step).all()) for p in self.engine.module.parameters()) and all(
            bool((state.get(address, key) == step).all()) for address in state.owned() for key in ADAM_STATE
        )

    def save(self, step: int) -> None:
        """Save with the chosen system."""
        if self.system == "deepspeed":
            self.engine.deepspeed.save_checkpoint(str(self.folder), tag=f"step{step}", client_state={"step": step})
            if self.context.rank == 0:
                shutil.rmtree(self.folder / f"step{step - self.kept}", ignore_errors=True)
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
            keep=self.kept,
        )

    def restore(self) -> tuple[str, int]:
        """Restore; return ("fresh" | "resumed" | "wrong" | "refused: ...", step)."""
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
        self.complaints = list(found[2])
        reader = CheckpointReader(found[0], self.context.tp_rank)
        restore_weights(self.engine.module, reader)
        restore_engine(self.engine, reader)
        return found[1].step


def program(system: str, folder: Path, saves: int | None) -> None:
    """Restore, write the outcome to a file, and save `saves` times, or until killed."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection()) as context:
        saving = Saving(system, folder, context)
        outcome, step = saving.restore()
        partial = folder.parent / f"outcome-{context.rank}.partial"
        partial.write_text(json.dumps([outcome, step]))
        partial.rename(folder.parent / f"outcome-{context.rank}.json")
        if outcome.startswith("refused"):
            return
        done = 0
        while saves is None or done < saves:
            step, done = step + 1, done + 1
            saving.fill(step)
            saving.save(step)


def start(system: str, folder: Path, *, saves: int | None = None, decide: Decide | None = None) -> list:
    """Start the program; `decide` is called for every file call in `folder`."""
    for old in folder.parent.glob("outcome-*.json"):
        old.unlink()
    return fork(program, (system, folder, saves), folder.parent / "log.txt", folder=folder, decide=decide)


def outcome_of(folder: Path, processes: list, seconds: float = 300) -> str:
    """Return the worst outcome of a restore over the ranks, once all have written theirs or have exited."""
    end = time.monotonic() + seconds
    said: list[str] = []
    while time.monotonic() < end:
        alive = any(process.is_alive() for process in processes)
        said = [json.loads(path.read_text())[0] for path in folder.parent.glob("outcome-*.json")]
        if len(said) == len(processes) or any(text.startswith("refused") for text in said) or not alive:
            break
        time.sleep(0.005)
    return next(
        (text for text in sorted(said, reverse=True) if text not in ("fresh", "resumed")), max(said, default="hung")
    )


def kill(processes: list, pauses: list[float]) -> None:
    """Kill the processes with SIGKILL in this order, with these pauses in seconds."""
    for process, seconds in zip(processes, pauses, strict=True):
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(seconds)
    for process in processes:
        process.join()


def named_by(pointer: Path) -> str | None:
    """Return the target of `latest`: a symbolic link here, a file in DeepSpeed."""
    try:
        return os.readlink(pointer) if pointer.is_symlink() else pointer.read_text()
    except OSError:
        return None
