"""The plan of a scoring: all that determines its values, and the finished units in a folder of parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from pause_megatron.data.corpus.records import FrozenModel, SideRecord, read_record
from pause_megatron.errors import DataError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.files.durable import write_whole
from pause_megatron.score.units import Batch, Unit

_PLAN = "plan.json"
_DIGEST_BYTES = len(bytes_digest(b""))


class Plan(FrozenModel):
    """Everything that determines the values of a scoring.

    Attributes:
        device: Kind of device; its arithmetic differs from that of others.
        unit_tokens: Approximate size of a unit.
    """

    device: Literal["cpu", "cuda"]
    unit_tokens: int

    output_option: ClassVar[str]
    """The option that names what is written."""

    @property
    def dtype(self) -> str:
        """Data type of the stored values, a numpy name."""
        raise NotImplementedError

    @property
    def value_kind(self) -> Literal["loss", "entropy"]:
        """What a value is."""
        raise NotImplementedError

    @property
    def compute_dtype(self) -> str | None:
        """Data type of the forward pass, such as "fp32"."""
        raise NotImplementedError

    def determines(self) -> dict[str, Any]:
        """Return what determines the values, by name. The folder of the model may have another name."""
        return self.model_dump()

    def gives_values_of(self, other: Plan) -> bool:
        """Return whether another plan gives the same values."""
        return type(self) is type(other) and self.determines() == other.determines()

    def differences(self, other: Plan) -> list[str]:
        """Return the differences from another plan of this type, one sentence each; empty for equal plans."""
        ours, theirs = self.determines(), other.determines()
        return [f"{name}: {ours[name]} there, {theirs[name]} now" for name in ours if ours[name] != theirs[name]]


class SidePlan(Plan):
    """The plan of a side array.

    Attributes:
        side: Its record, whose `file` is not known yet.
    """

    side: SideRecord

    output_option: ClassVar[str] = "--name"

    @property
    def dtype(self) -> str:
        """Data type of the stored values, a numpy name."""
        return self.side.dtype

    @property
    def value_kind(self) -> Literal["loss", "entropy"]:
        """What a value is."""
        assert self.side.kind != "user"
        return self.side.kind

    @property
    def compute_dtype(self) -> str | None:
        """Data type of the forward pass, such as "fp32"."""
        return self.side.compute

    def determines(self) -> dict[str, Any]:
        """Return what determines the values, by name. The folder of the model may have another name."""
        return {**self.model_dump(exclude={"side"}), **self.side.model_dump(exclude={"file", "model"})}


class AnswerPlan(Plan):
    """The plan of the values of a task's answers.

    Attributes:
        examples: Digest of the ids of all examples, in order.
        kind: What a value is.
        model_digest: Digest of the content of the model's folder.
        context: Largest number of tokens that the model reads.
        compute: Data type of the forward pass.
        batch_tokens: Largest number of tokens of a forward pass.
    """

    examples: str
    kind: Literal["loss", "entropy"]
    model_digest: str
    context: int
    compute: str
    batch_tokens: int

    output_option: ClassVar[str] = "--output"

    @property
    def dtype(self) -> str:
        """Data type of the stored values, a numpy name."""
        return "float32"

    @property
    def value_kind(self) -> Literal["loss", "entropy"]:
        """What a value is."""
        return self.kind

    @property
    def compute_dtype(self) -> str | None:
        """Data type of the forward pass, such as "fp32"."""
        return self.compute


class Parts:
    """A folder with the plan, and a file for each finished unit, which appears whole.

    Args:
        folder: The folder: PREFIX.NAME.parts or OUTPUT.parts.
        plan: The plan.

    Attributes:
        folder: The folder.
        plan: The plan.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan

    @property
    def begun(self) -> bool:
        """Whether the folder has this plan, as an interrupted run leaves it."""
        try:
            return self.plan.gives_values_of(read_record(self.folder / _PLAN, type(self.plan)))
        except DataError:  # missing, or damaged, which `open` reports
            return False

    def open(self, *, overwrite: bool) -> None:
        """Create the folder, or continue in one of the same plan.

        Args:
            overwrite: Whether units of another plan may be removed.

        Raises:
            DataError: There are units of another plan, or files of something else.
        """
        if foreign := self._foreign():
            raise DataError(f"{self.folder}: expected the units of a scoring, or no such folder, got {foreign}")
        if (self.folder / _PLAN).exists() and not self.begun:
            if any(self.folder.glob("[0-9]*")) and not overwrite:
                found = read_record(self.folder / _PLAN, type(self.plan))
                raise DataError(
                    f"{self.folder}: there is an unfinished scoring with another model, other data or options; "
                    f"choose another {self.plan.output_option}, or replace it with --overwrite. The differences:\n  "
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
        """Remove the folder, once all values are in their file."""
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
        data = values.astype(np.dtype(self.plan.dtype).newbyteorder("<")).tobytes()
        write_whole(self._path(unit), data + bytes_digest(data).encode())

    def read(self, units: Iterable[Unit]) -> Iterator[np.ndarray]:
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
            yield np.frombuffer(data, dtype=np.dtype(self.plan.dtype).newbyteorder("<"))

    def _foreign(self) -> str:
        """Return a name of the folder that no scoring wrote; "" for none."""
        if not self.folder.is_dir():
            return "a file" if self.folder.exists() else ""
        ours = (_PLAN, "*.values", "*.tmp")
        return next((path.name for path in self.folder.iterdir() if not any(map(path.match, ours))), "")

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.number:06}.values"

    def _bytes(self, unit: Unit) -> int:
        return len(unit) * np.dtype(self.plan.dtype).itemsize


@dataclass(frozen=True)
class UnitConfig:
    """What a process needs to compute units.

    Attributes:
        folder: Folder of the finished units.
        model: Folder of the model.
        devices: Devices of the processes, used in turn.
        pauses: Ids of the model's pauses.
        plan: The plan.
        batches: Yields the batches of a unit.
    """

    folder: Path
    model: str
    devices: tuple[str, ...]
    pauses: range
    plan: Plan
    batches: Callable[[Any], Iterator[Batch]]
