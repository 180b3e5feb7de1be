"""R14: one bit flipped somewhere in the newest of three checkpoints, its metadata included, and the run started again.

Half of the flips are drawn by the bytes of a file, half by files, so that small files of metadata get their share.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.faults.results import Result
from support.forked_ranks import fork
from support.log_lines import captured_log
from support.prose import train_model
from support.saving import Saving

WIDTH, NEWEST = 32, 3
OF = ": "  # before the error's name
BY_BYTES, BY_FILES = "drawn by the bytes of the files", "drawn by files, all alike"


class WholeSaving(Saving):
    """Restores as a run does: with its configuration, tokenizer and counters."""

    def __init__(self, system: str, folder: Path, context: Any) -> None:
        super().__init__(system, folder, context, WIDTH)
        from pause_megatron.config.load import dump, load
        from pause_megatron.data.tokenizer.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(train_model(folder.parent / "tokenizer.model"))
        self.config = load(overrides=["train.steps=9", "batch.global_size=2", "batch.micro_size=1"])
        self.yaml = dump(self.config)
        self.progress: dict[str, int] = {}

    def save(self, step: int) -> None:
        """With counters that say which step they are of."""
        self.engine.state.step = step
        counters = {"step": step, "tokens": 1000 * step, "text_tokens": 900 * step}
        if self.system == "deepspeed":
            self.engine.deepspeed.global_steps = step
            self.engine.deepspeed.save_checkpoint(str(self.folder), tag=self.path(step).name, client_state=counters)
            return
        from pause_megatron.checkpoint import save

        save(
            self.store,
            self.engine,
            self.context,
            step=step,
            corpus="corpus",
            progress=counters,
            config_yaml=self.yaml,
            save_tokenizer=self.tokenizer.save,
            keep=NEWEST,
        )

    def _load(self) -> int | None:
        if self.system == "deepspeed":
            path, client = self.engine.deepspeed.load_checkpoint(str(self.folder))
            if path is None:
                return None
            self.progress = {key: client.get(key) for key in ("step", "tokens", "text_tokens")}
            self.progress["steps of the engine"] = self.engine.deepspeed.global_steps
            return client["step"]
        from pause_megatron.checkpoint import MergedReader, load_weights, restore_engine
        from pause_megatron.config.load import scheduled
        from pause_megatron.train.start.resume import find_checkpoint, progress_record

        found = find_checkpoint(self.store, scheduled(self.config), "corpus", self.context)
        if found is None:
            return None
        reader = MergedReader(found.folder)
        restore_engine(self.engine, load_weights(self.engine.module, reader, live_rows=0, rank=0, ranks=1))
        self.progress = {**progress_record(found.progress), "steps of the engine": self.engine.state.step}
        return found.progress.step

    def counters_of(self, step: int) -> bool:
        """Whether all counters are the step's."""
        return list(self.progress.values()) == [step, 1000 * step, 900 * step, step]


def flips(system: str, count: int) -> Result:
    """R14, on one rank. A process that crashes on a flip counts, and the next continues after it."""
    with tempfile.TemporaryDirectory() as name:
        journal, log = Path(name, "journal.jsonl"), Path(name, "log.txt")
        done: list[list[str]] = []
        while len(done) < count:
            for process in fork(_flip, (system, count, len(done), journal), log, ranks=1):
                process.join()
            lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
            if len(lines) == len(done):
                raise RuntimeError(f"{system}: no flip was tried\n{log.read_text()[-4000:]}")
            # A line is written before a flip is tried, and again when it is known how that ended.
            done = [list(pair) for pair in {number: (draw, end) for number, draw, end in lines}.values()]
    result, errors = Result(), Counter()
    for draw, end in done:
        outcome, _, error = end.partition(OF)
        result.count(f"R14: one bit of a checkpoint flipped, {draw}", outcome)
        errors.update([error] if error else [])
    result.note = ", ".join([f"{len(done)} flips", *(f"{count} {error}" for error, count in errors.most_common())])
    return result


def _flip(system: str, count: int, first: int, journal: Path) -> None:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with tempfile.TemporaryDirectory() as name, initialize(ParallelSection()) as context, open(journal, "a") as file:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        saving = WholeSaving(system, folder, context)
        for step in range(1, NEWEST + 1):
            saving.fill(step)
            saving.save(step)
        files = sorted(path for path in saving.path(NEWEST).rglob("*") if path.is_file() and path.stat().st_size)
        files += [folder / "latest"] if (folder / "latest").is_file() and not (folder / "latest").is_symlink() else []
        sizes = [path.stat().st_size for path in files]
        for number in range(first, count):
            rng, draw = random.Random(number), (BY_BYTES, BY_FILES)[number % 2]
            path = rng.choices(files, sizes if draw == BY_BYTES else None)[0]
            whole = path.read_bytes()
            content = bytearray(whole)
            content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            print(json.dumps([number, draw, "the process dies"]), file=file, flush=True)
            end = _end_of(saving, path)
            path.write_bytes(whole)
            print(json.dumps([number, draw, end]), file=file, flush=True)
            print(number, path.name, end, file=sys.stderr)
    os._exit(0)


def _end_of(saving: WholeSaving, flipped: Path) -> str:
    """What a start makes of it, in a few words."""
    from pause_megatron.errors import PauseMegatronError

    saving.fill(-1)
    try:
        with captured_log() as said:
            step = saving._load()
    except PauseMegatronError:
        return "refused in a sentence, though an older complete one is there"
    except Exception as error:
        return f"refused with a traceback, though an older complete one is there{OF}{type(error).__name__}"
    if step is None:
        return "**silent**, the run begins anew"
    if step not in range(1, NEWEST + 1) or not saving.is_of(step) or not saving.counters_of(step):
        return "**silent**, taken, state or counters are wrong"
    if step == NEWEST:
        return "taken, nothing is wrong"
    named = any(part in said.getvalue() for part in (flipped.name, saving.path(NEWEST).name))
    return f"the older one is taken, {'the damage is named' if named else 'without a word'}"
