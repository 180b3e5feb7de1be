"""A run that is damaged, killed, stopped, resumed, pruned and rolled back in any order, as a stateful property.

Whatever happens, a complete checkpoint never disappears before a newer complete one exists, and a resume continues
from the newest complete one; after a roll-back by hand, from the newest complete one that is not newer than it.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pause_megatron.checkpoint import Store
from pause_megatron.files.digest import file_digest
from pause_megatron.run_folder import step_of
from support.saving import Saving

RULES_A_SCHEDULE = 14


def run_schedules(count: int) -> dict[str, int]:
    """Random schedules on a rank that is alone. Returns how often each thing happened.

    Raises:
        AssertionError: the property does not hold; hypothesis prints the shortest schedule that it found.
    """
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    done: dict[str, int] = {}
    with initialize(ParallelSection()) as context:
        saving = Saving("pause-megatron", Path("nowhere"), context, width=8)

        class Schedule(_Schedule):
            program, happened = saving, done

        run_state_machine_as_test(
            Schedule,
            settings=settings(
                max_examples=count,
                stateful_step_count=RULES_A_SCHEDULE,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return done


class _Schedule(RuleBasedStateMachine):
    program: Saving
    happened: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.run = Path(tempfile.mkdtemp(prefix="schedule-"))
        self.folder = self.run / "checkpoints"
        self.digests: dict[int, dict[str, str]] = {}  # of the files of each step's checkpoint when it was saved
        self.before: set[int] = set()
        self.running = False
        self.step = 0
        self.target: int | None = None  # of a roll-back that is not carried out yet
        self.rng = random.Random(0)

    def teardown(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    # What is there, found out without the program's own checks

    def named(self) -> list[int]:
        steps = [step_of(path.name) for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(step for step in steps if step is not None)

    def complete(self) -> set[int]:
        return {step for step in self.named() if self.files(step) == self.digests.get(step)}

    def files(self, step: int) -> dict[str, str]:
        folder = self.folder / f"step-{step:08d}"
        return {str(p.relative_to(folder)): file_digest(p) for p in folder.rglob("*") if p.is_file()}

    def inode(self, step: int) -> int | None:
        folder = self.folder / f"step-{step:08d}"
        return folder.stat().st_ino if folder.exists() else None

    def expected(self) -> int | None:
        steps = [step for step in self.complete() if self.target is None or step <= self.target]
        return max(steps, default=None)

    # What happens

    @precondition(lambda self: not self.running)
    @rule()
    def start(self) -> None:
        self.count("start")
        self.program.folder, self.program.store = self.folder, Store(self.folder)
        expected = self.expected()
        if expected is None and self.named():  # every one is damaged: nothing begins anew by itself
            assert self.program.restore()[0] == "refused: CheckpointError"
            shutil.rmtree(self.folder)
            self.target = None
            (self.run / ".checkpoints.json").unlink(missing_ok=True)
        self.program.store = Store(self.folder)
        outcome, step = self.program.restore()
        assert (outcome, step) == (("fresh", 0) if self.expected() is None else ("resumed", self.expected()))
        self.step, self.running, self.applied = step, True, step
        if outcome == "fresh":
            self.program.fill(0)

    @precondition(lambda self: self.running)
    @rule(keep=st.integers(1, 3), skipped=st.booleans())
    def save(self, keep: int, skipped: bool) -> None:
        self.count("save")
        self.take_steps(skipped)
        kept_before = self.complete()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            self.program.kept = keep
            self.program.save(self.step)
        self.digests[self.step] = self.files(self.step)
        self.target = None
        steps = self.complete()
        assert self.step in steps
        older = [step for step in kept_before if step < self.step]
        assert not older or max(older) in steps, "the newest complete one before it is gone"

    @precondition(lambda self: self.running)
    @rule(moment=st.floats(0, 1))
    def kill_in_a_save(self, moment: float) -> None:
        self.count("kill")
        self.take_steps(False)
        before = self.inode(self.step)  # of a damaged one that was passed over
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with contextlib.suppress(BaseException):
                self.program.save(self.step)
            os._exit(0)
        time.sleep(moment * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.running = False
        if self.inode(self.step) not in (None, before):  # a name is given to complete ones only
            assert not Store(self.folder).verify(self.folder / f"step-{self.step:08d}")
            self.digests[self.step] = self.files(self.step)
            self.target = None

    @rule()
    def stop(self) -> None:
        self.running = False

    @precondition(lambda self: self.named())
    @rule(
        which=st.integers(0, 99),
        file=st.integers(0, 99),
        kind=st.sampled_from(["flip", "truncate", "delete", "append", "folder"]),
    )
    def damage(self, which: int, file: int, kind: str) -> None:
        self.count(f"damage: {kind}")
        steps = self.named()
        folder = self.folder / f"step-{steps[which % len(steps)]:08d}"
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        if not files:
            return
        path = files[file % len(files)]
        content = path.read_bytes()
        if kind == "flip":
            place = self.rng.randrange(len(content))
            path.write_bytes(
                content[:place] + bytes([content[place] ^ 1 << self.rng.randrange(8)]) + content[place + 1 :]
            )
        elif kind == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif kind == "append":
            path.write_bytes(content + b"x")
        else:
            path.unlink()
            if kind == "folder":
                path.mkdir()
        self.before = self.complete()

    @precondition(lambda self: not self.running and self.complete())
    @rule(which=st.integers(0, 99))
    def roll_back(self, which: int) -> None:
        self.count("roll back")
        steps = sorted(self.complete())
        self.target = steps[which % len(steps)]
        latest = self.folder / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(f"step-{self.target:08d}")

    @invariant()
    def none_is_lost(self) -> None:
        now = self.complete()
        for step in self.before - now:
            aside = self.folder.glob(f"set-aside-step-{step:08d}*") if self.folder.is_dir() else ()
            assert any(newer > step for newer in now) or any(aside), f"{step} is gone, complete are {sorted(now)}"
        self.before = now

    def take_steps(self, skipped: bool) -> None:
        self.step += 1 + self.rng.randrange(3)
        self.program.fill(self.step)
        if skipped:
            self.program.engine.state.step = self.applied
        else:
            self.applied = self.step

    def count(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1
