"""The folder of a run's checkpoints: which are complete, which is newest, which go."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pause_megatron.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from pause_megatron.distributed.collective import broadcast_object, gather_objects
from pause_megatron.durable import digest_of, point, sync_folder
from pause_megatron.errors import CheckpointError

LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")
_HIDDEN = ".incoming-"


class Store:
    """`RUN/checkpoints/`.

    Args:
        folder: created when something is written to it
        rank, world_size: place among all ranks; rank 0 alone renames and deletes
    """

    def __init__(self, folder: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.folder = Path(folder)
        self._rank, self._world_size = rank, world_size

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have a name, ascending. A name is given only to complete ones."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def begin(self, step: int) -> Path:
        """An empty hidden folder to write into, in place of what a killed save left behind. Rank 0 only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.hidden(step).mkdir()
        return self.hidden(step)

    def hidden(self, step: int) -> Path:
        """Where a save of a step writes until it is complete."""
        return self.folder / f"{_HIDDEN}{step:08d}"

    def publish(self, hidden: Path, step: int) -> Path:
        """Gives a complete, synced folder its name and points `latest` at it. Rank 0 only."""
        final = self.path(step)
        if final.exists():  # an earlier one of the same step, found damaged when the run resumed before it
            shutil.rmtree(final)
        sync_folder(hidden)
        os.rename(hidden, final)
        sync_folder(self.folder)
        point(self.folder / LATEST, final.name)
        return final

    def prune(self, keep: int) -> None:
        """Deletes all but the newest `keep`. Rank 0 only. Each loses its manifest first: half of one is none."""
        for step in self.steps()[:-keep]:
            (self.path(step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.path(step), ignore_errors=True)

    def newest_complete(self) -> tuple[Path, Manifest, list[str]] | None:
        """The newest checkpoint whose every file has the size and digest that its manifest states.

        Every rank calls this; the digests are shared out among them, and all return the same.

        Returns:
            (folder, manifest, complaints about newer ones that were passed over), or None when there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none of them is complete.
        """
        complaints: list[str] = []
        for step in reversed(broadcast_object(self.steps())):
            folder = self.path(step)
            problems = self.verify(folder)
            if not problems:
                return folder, Manifest.load(folder), complaints
            complaints += problems
        if complaints:
            raise CheckpointError(
                f"{self.folder}: expected at least one complete checkpoint, every one is damaged:\n  "
                + "\n  ".join(complaints)
            )
        return None

    def verify(self, folder: Path) -> list[str]:
        """What is wrong with a checkpoint, one line a file; empty when nothing is. Every rank calls this."""
        try:
            manifest = Manifest.load(folder)
        except CheckpointError as error:
            return sorted({problem for problems in gather_objects([str(error)]) for problem in problems})
        mine = list(manifest.files)[self._rank :: self._world_size]
        found = [problem for name in mine if (problem := file_problem(folder / name, manifest.files[name]))]
        return sorted({problem for problems in gather_objects(found) for problem in problems})


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from what a user typed: the folder, `.../latest`, `RUN/checkpoints` or `RUN`.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for candidate in (path, path / LATEST, path / "checkpoints" / LATEST):
        if (candidate / MANIFEST).is_file():
            return candidate.resolve()
    raise CheckpointError(f"{path}: expected a checkpoint (a folder with {MANIFEST}) or a run folder, found neither")


def file_problem(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file whose size and digest are known; None when nothing is."""
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{path}: expected {entry.bytes} bytes, found {size}"
        if digest_of(path) != entry.digest:
            return f"{path}: its digest is not the manifest's; the file was altered after it was written"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None
