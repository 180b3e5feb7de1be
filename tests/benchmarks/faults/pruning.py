"""R15: damage, resume, save, prune, again and again: is a complete checkpoint gone before a newer one exists?"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.results import Result
from benchmarks.faults.saves import alter
from support.forked_ranks import fork
from support.saving import KEPT, Saving

WIDTH = 32
KEPT_BEFORE, ROUNDS, SAVES_A_ROUND = 6, 3, 3
TITLE = "R15: newer checkpoints damaged, resume, save, prune"


class Pruning(Saving):
    """Restores as a user does, in the end: where a system refuses what it finds, somebody gives an older tag by hand.

    DeepSpeed deletes no checkpoints. What its users do stands in for it: all but the newest few are removed by name.
    """

    def save(self, step: int) -> None:
        """And what is too old goes."""
        if self.system != "deepspeed":
            super().save(step)
            return
        self.engine.deepspeed.save_checkpoint(str(self.folder), tag=f"step{step}", client_state={"step": step})
        for old in self.steps()[: -self.kept]:
            shutil.rmtree(self.path(old))

    def steps(self) -> list[int]:
        """Of the folders that are there, ascending."""
        digits = ("".join(filter(str.isdecimal, path.name)) for path in self.folder.glob("step*") if path.is_dir())
        return sorted(int(number) for number in digits)

    def resume(self) -> tuple[str, int]:
        """How it went, and the step to go on from; 0: nothing could be loaded."""
        outcome, step = self.restore()
        if outcome in ("fresh", "resumed", "wrong"):
            return outcome, step
        if self.system == "deepspeed":
            for step in reversed(self.steps()):
                try:
                    path, _ = self.engine.deepspeed.load_checkpoint(str(self.folder), tag=f"step{step}")
                except Exception:
                    continue
                if path is not None:
                    return ("resumed by hand" if self.is_of(step) else "wrong"), step
        return "refused", 0


def prune(system: str, count: int) -> Result:
    """R15, on one rank: `count` schedules of damage, a start, saves that prune."""
    with tempfile.TemporaryDirectory() as name:
        output, log = Path(name, "found.json"), Path(name, "log.txt")
        for process in fork(_schedules, (system, count, output), log, ranks=1):
            process.join()
        if not output.exists():
            raise RuntimeError(f"{system}: the schedules did not come to their end\n{log.read_text()[-4000:]}")
        each = f"{ROUNDS} times damage, a start and {SAVES_A_ROUND} saves that keep {KEPT}"
        result = Result(note=f"{count} schedules, each {KEPT_BEFORE} saves, then {each}")
        for outcome in json.loads(output.read_text()):
            result.count(TITLE, outcome)
    return result


def _schedules(system: str, count: int, output: Path) -> None:
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    found = []
    with tempfile.TemporaryDirectory() as name, initialize(ParallelSection()) as context:
        saving = Pruning(system, Path(name), context, WIDTH)
        for number in range(count):
            shutil.rmtree(saving.folder)
            saving.folder.mkdir()
            found += _schedule(saving, random.Random(number))
    output.write_text(json.dumps(found))
    os._exit(0)


def _schedule(saving: Pruning, rng: random.Random) -> Iterator[str]:
    """What each start found, and whether each save held."""
    saving.kept, step, whole = KEPT_BEFORE, 0, {}
    for _ in range(KEPT_BEFORE):
        step += rng.randrange(5, 15)
        saving.fill(step)
        saving.save(step)
        whole[step] = _content(saving.path(step))
    saving.kept = KEPT
    for _ in range(ROUNDS):
        for damaged in sorted(whole)[rng.randrange(1, len(whole) + 1) :]:
            files = sorted(path for path in saving.path(damaged).rglob("*") if path.is_file() and path.stat().st_size)
            alter(rng.choice(("flip", "truncate", "delete")), [rng.choice(files)], rng)
            del whole[damaged]
        outcome, step = saving.resume()
        if outcome not in ("resumed", "resumed by hand"):
            wrong = (
                "**a wrong state is taken**" if outcome == "wrong" else "**refused, though a complete one is there**"
            )
            yield f"a start: {wrong}"
            return
        yield f"a start: {outcome} from {'the newest complete one' if step == max(whole) else 'an older one'}"
        for _ in range(SAVES_A_ROUND):
            step += rng.randrange(1, 8)
            saving.fill(step)
            try:
                saving.save(step)
            except Exception as error:
                yield f"a save: fails with {type(error).__name__}"
                return
            whole = {old: content for old, content in whole.items() if _content(saving.path(old)) == content}
            if saving.path(step).is_dir():
                whole[step] = _content(saving.path(step))
                yield "a save: held"
            elif whole:
                yield "a save: **deleted at once**, an older complete one is left"
            else:
                yield "a save: **deleted at once, no complete one is left**"
                return


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
