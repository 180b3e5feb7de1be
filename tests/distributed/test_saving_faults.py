"""Saves in which each file-system call fails or is delayed in turn."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.file_calls import FileCall, available
from support.forked_ranks import RANKS, finish, fork
from support.saving import Saving, start

from pause_megatron.checkpoint import Manifest, Store
from pause_megatron.checkpoint.verify import file_problem

pytestmark = pytest.mark.skipif(not available(), reason="this kernel does not hand over file calls")


START = 3  # checkpoints that are there already


class EachInTurn:
    """Act on one call per save: the first of rank 0, in the next save its second, then those of other ranks.

    Args:
        folder: of the checkpoints
        act: called with (rank, call); returns 0 or the errno of the call

    Attributes:
        acted: by number of the save: rank, and the call that was acted on
        over: set by the first save in which no rank has a call that was not acted on
    """

    def __init__(self, folder: Path, act: Callable[[int, FileCall], int]) -> None:
        self.acted: dict[int, tuple[int, FileCall]] = {}
        self.over = threading.Event()
        self._folder, self._act, self._lock = folder, act, threading.Lock()
        self._save, self._rank, self._turn, self._seen = -1, 0, -1, [0] * RANKS

    def __call__(self, rank: int, call: FileCall) -> int:
        with self._lock:
            if rank == 0 and (call.name, call.path) == ("mkdir", self._folder):
                self._begin_a_save()
            index = self._seen[rank]
            self._seen[rank] += call.writes
            chosen = call.writes and (rank, index) == (self._rank, self._turn)
            if chosen:
                self.acted[self._save] = rank, call
        return self._act(rank, call) if chosen else 0

    def _begin_a_save(self) -> None:
        if self._save in self.acted or self._save < 0:
            self._turn += 1
        else:
            self._rank, self._turn = self._rank + 1, 0
        if self._rank == RANKS:
            self.over.set()
        self._save, self._seen = self._save + 1, [0] * RANKS


def save_until_told(folder: Path, told: Path, output: Path) -> None:
    """Saves and restores; of each save, one line: [step, error, what is restored then, its step, names]."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize
    from pause_megatron.distributed.collective import broadcast_object
    from pause_megatron.errors import CheckpointError

    with initialize(ParallelSection()) as context:
        saving = Saving("pause-megatron", folder, context)
        step = saving.restore()[1]
        while not broadcast_object(told.exists()):
            step, error = step + 1, ""
            saving.fill(step)
            try:
                saving.save(step)
            except CheckpointError as raised:
                error = str(raised)
            line = [step, error, *saving.restore(), sorted(path.name for path in folder.iterdir())]
            if context.rank == 0:
                with output.open("a") as file:
                    print(json.dumps(line), file=file)


@dataclass(frozen=True)
class Save:
    """One save, in which one call of one rank was acted on.

    Attributes:
        rank, call: the call
        before: step that could be restored before
        step: that was saved
        error: of the save; "" when there was none
        outcome, restored: of `Saving.restore` afterwards
        names: in the folder of the checkpoints then
    """

    rank: int
    call: FileCall
    before: int
    step: int
    error: str
    outcome: str
    restored: int
    names: list[str]


def saves_with(act: Callable[[int, FileCall], int], tmp_path: Path) -> list[Save]:
    """Run one save per call that a save makes on any rank."""
    folder, told, output, log = (tmp_path / name for name in ("checkpoints", "told", "lines", "log.txt"))
    folder.mkdir()
    finish(start("pause-megatron", folder, saves=START), log)
    each = EachInTurn(folder, act)
    processes = fork(save_until_told, (folder, told, output), log, folder=folder, decide=each)
    while not each.over.wait(0.1):
        assert all(process.is_alive() for process in processes), log.read_text()[-4000:]
    told.touch()
    finish(processes, log)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    before = [START, *(line[3] for line in lines)]
    saves = [Save(*each.acted[n], before[n], *line) for n, line in enumerate(lines) if n in each.acted]
    assert {save.rank for save in saves} == set(range(RANKS)) and len(saves) > 50
    return saves


def test_a_write_that_fails_leaves_complete_checkpoints_and_is_named(tmp_path):
    silent = []
    for save in saves_with(lambda *_: errno.ENOSPC, tmp_path):
        assert save.outcome == "resumed", save
        if save.error:
            assert f"the checkpoint of step {save.step} could not be written" in save.error, save
            assert f"rank {save.rank}: " in save.error and "No space left on device" in save.error, save
            assert save.restored in (save.before, save.step), save
        else:
            silent.append(save.call)
            assert save.restored == save.step, save
        assert all(name == "latest" or name.startswith(("step-", "set-aside-")) for name in save.names), save
    # What fails once the checkpoint has its name costs space, or leaves `latest` behind for a while: no checkpoint.
    deletes = [call for call in silent if call.name in ("unlink", "rmdir", "mkdir")]
    after = [call for call in silent if call not in deletes]
    assert deletes and after
    assert {call.path.name for call in after} <= {"checkpoints", "latest", ".latest.partial"}, after


def test_a_late_rank_never_lets_latest_precede_the_data(tmp_path):
    store, pointed = Store(tmp_path / "checkpoints"), []

    def look() -> None:
        folder = store.folder / os.readlink(store.folder / "latest")
        files = Manifest.load(folder).files
        pointed.append((folder.name, [p for name, entry in files.items() if (p := file_problem(folder / name, entry))]))

    def late(rank: int, call: FileCall) -> int:
        look()
        time.sleep(0.05)  # the other ranks continue as far as they can
        look()
        return 0

    for save in saves_with(late, tmp_path):
        assert (save.error, save.outcome, save.restored) == ("", "resumed", save.step), save
    assert [problems for _, problems in pointed if problems] == []
    assert len({name for name, _ in pointed}) > 50
