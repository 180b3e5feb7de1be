"""The plan of a scoring: all that determines its values, and the finished units in PREFIX.NAME.parts/."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.records import FrozenModel, SideRecord, read_record
from pause_megatron.errors import DataError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.files.durable import write_whole
from pause_megatron.score.windows import Unit

_PLAN = "plan.json"
_DIGEST_BYTES = len(bytes_digest(b""))


class ScorePlan(FrozenModel):
    """Everything that determines the values of a scoring.

    Attributes:
        side: The record of the side array, whose `file` is not known yet.
        device: Kind of device; its arithmetic differs from that of others.
        unit_tokens: Approximate size of a unit.
    """

    side: SideRecord
    device: Literal["cpu", "cuda"]
    unit_tokens: int

    def gives_values_of(self, other: ScorePlan) -> bool:
        """Return whether another plan gives the same values; the folder of the model may have another name."""
        return self == other.model_copy(
            update={"side": other.side.model_copy(update={"model": self.side.model, "file": self.side.file})}
        )

    def differences(self, other: ScorePlan) -> list[str]:
        """Return the differences from another plan, one sentence each; empty for equal plans."""
        ours, theirs = (
            {"device": plan.device, **plan.side.model_dump(exclude={"file", "model"})} for plan in (self, other)
        )
        return [f"{name}: {ours[name]} there, {theirs[name]} now" for name in ours if ours[name] != theirs[name]]


class Parts:
    """PREFIX.NAME.parts/: the plan, and a file for each finished unit, which appears whole.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        plan: The plan.

    Attributes:
        folder: The folder.
        plan: The plan.
    """

    def __init__(self, prefix: str | Path, name: str, plan: ScorePlan) -> None:
        self.folder = path_of(prefix, f"{name}.parts")
        self.plan = plan

    @property
    def begun(self) -> bool:
        """Whether the folder has this plan, as an interrupted run leaves it."""
        try:
            return self.plan.gives_values_of(read_record(self.folder / _PLAN, ScorePlan))
        except DataError:  # missing, or damaged, which `open` reports
            return False

    def open(self, *, overwrite: bool) -> None:
        """Create the folder, or continue in one of the same plan.

        Args:
            overwrite: Whether units of another plan may be removed.

        Raises:
            DataError: There are units of another plan.
        """
        if (self.folder / _PLAN).exists() and not self.begun:
            if any(self.folder.glob("[0-9]*")) and not overwrite:
                found = read_record(self.folder / _PLAN, ScorePlan)
                raise DataError(
                    f"{self.folder}: there is an unfinished scoring with another model, corpus or options; choose "
                    "another --name, or replace it with --overwrite. The differences:\n  "
                    + "\n  ".join(found.differences(self.plan))
                )
            shutil.rmtree(self.folder)
        if not (self.folder / _PLAN).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            write_whole(self.folder / _PLAN, self.plan.model_dump_json().encode())
        for left in self.folder.glob("*.tmp"):  # of a killed process
            left.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder if it has no finished unit."""
        if self.folder.is_dir() and not any(self.folder.glob("[0-9]*")):
            shutil.rmtree(self.folder)

    def remove(self) -> None:
        """Remove the folder, once the side array is recorded."""
        shutil.rmtree(self.folder)

    def has(self, unit: Unit) -> bool:
        """Return whether a unit is finished."""
        try:
            return self._path(unit).stat().st_size == self._bytes(unit) + _DIGEST_BYTES
        except FileNotFoundError:
            return False

    def save(self, unit: Unit, values: np.ndarray) -> None:
        """Write the values of a unit, followed by their digest.

        Args:
            unit: The unit.
            values: Its values [tokens of the unit].
        """
        data = values.astype(np.dtype(self.plan.side.dtype).newbyteorder("<")).tobytes()
        write_whole(self._path(unit), data + bytes_digest(data).encode())

    def read(self, units: Iterator[Unit]) -> Iterator[np.ndarray]:
        """Yield the values of each unit, in order.

        Args:
            units: The units, all of which are finished.

        Raises:
            DataError: A unit was altered after it was written. It is removed, so that the next run computes it again.
        """
        for unit in units:
            content = self._path(unit).read_bytes()
            data, digest = content[: self._bytes(unit)], content[self._bytes(unit) :]
            if digest != bytes_digest(data).encode():
                self._path(unit).unlink()
                raise DataError(
                    f"{self._path(unit)}: altered since it was written; run the same command again to compute it again"
                )
            yield np.frombuffer(data, dtype=np.dtype(self.plan.side.dtype).newbyteorder("<"))

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.number:06}.values"

    def _bytes(self, unit: Unit) -> int:
        return len(unit) * np.dtype(self.plan.side.dtype).itemsize
