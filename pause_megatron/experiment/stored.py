"""The JSON files of an experiment's folder and of its cells, as typed records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer
from typing_extensions import Self

from pause_megatron import __version__
from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import Cell, Verb
from pause_megatron.experiment.ledger import Ledger
from pause_megatron.files.durable import write_whole
from pause_megatron.files.typed_json import Number, TypedJson, parse_object


class StoredFile(TypedJson):
    """A JSON file of a folder. A subclass names the file and declares its keys in their order.

    Attributes:
        version: Version of the format.
    """

    NAME: ClassVar[str]
    version: Literal[1] = 1

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the content of the file.

        Raises:
            DataError: The file is missing, damaged or of another version.
        """
        found = cls.read_if_present(folder)
        if found is None:
            raise DataError(
                f"{folder / cls.NAME}: expected a file that `pause-megatron experiment run` wrote, got none"
            )
        return found

    @classmethod
    def read_if_present(cls, folder: Path) -> Self | None:
        """Return the content of the file; None if it does not exist.

        Raises:
            DataError: The file is damaged or of another version.
        """
        path = folder / cls.NAME
        try:
            return cls.parse(parse_object(path.read_bytes(), str(path)), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except DataError as error:
            raise DataError(f"{error}; remove it, and the cell is computed again") from None

    def write(self, folder: Path) -> None:
        """Write the file atomically."""
        write_json(folder / self.NAME, self.model_dump(mode="json"))


class CellFile(StoredFile):
    """cell.json: what a cell runs.

    Attributes:
        name: Name of the cell.
        fingerprint: See `Cell.fingerprint`.
        verb: The verb.
        arguments: Arguments of the verb, with placeholders.
        input: Name of the input cell's folder in DIR/cells.
        ranks: Ranks that the verb is started on.
        flops_per_token: See `Estimate`.
        parameters: See `Estimate`.
        identity: See `Cell.identity`.
        package: Version of the package.
        scores: Name of the folder of the cell whose values of answers this one reads; None where it reads none.
    """

    NAME = "cell.json"
    name: str
    fingerprint: str
    verb: Verb
    arguments: tuple[str, ...]
    input: str | None
    ranks: int
    flops_per_token: Number
    parameters: int
    identity: dict[str, Any]
    package: str
    scores: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `scores` out where there are none, as files of earlier versions do."""
        return _without(handler(self), "scores")

    @classmethod
    def of(cls, cell: Cell, folder_of: Callable[[Cell], str], ranks: int) -> Self:
        """Return the file of a cell.

        Args:
            cell: The cell.
            folder_of: Returns the name of a cell's folder in DIR/cells.
            ranks: Ranks that the verb is started on.
        """
        return cls(
            name=cell.name,
            fingerprint=cell.fingerprint,
            verb=cell.verb,
            arguments=cell.arguments,
            input=folder_of(cell.input) if cell.input else None,
            ranks=ranks,
            flops_per_token=cell.estimate.flops_per_token,
            parameters=cell.estimate.parameters,
            identity=dict(cell.identity),
            package=__version__,
            scores=folder_of(cell.scores) if cell.scores else None,
        )


class Attempt(TypedJson):
    """One start of a cell's verb.

    Attributes:
        begun: Start, seconds since the epoch.
        seconds: Duration, seconds; None while it runs or if it was killed.
    """

    begun: Number
    seconds: Number | None


class AttemptsFile(StoredFile):
    """attempts.json: every start of a cell's verb.

    Attributes:
        attempts: The attempts, oldest first.
    """

    NAME = "attempts.json"
    attempts: tuple[Attempt, ...] = ()


class DoneFile(StoredFile):
    """done.json: marks a complete cell.

    Attributes:
        name: Name of the cell.
        fingerprint: See `Cell.fingerprint`.
        attempts: Number of attempts.
        ranks: Ranks of the verb.
        ledger: Costs.
    """

    NAME = "done.json"
    name: str
    fingerprint: str
    attempts: int
    ranks: int
    ledger: Ledger


class FailedFile(StoredFile):
    """failed.json: marks a cell whose last attempt failed.

    Attributes:
        code: Exit code of the verb.
        fingerprint: See `Cell.fingerprint`.
    """

    NAME = "failed.json"
    code: int
    fingerprint: str


class JobFile(StoredFile):
    """job.json: the SLURM job of a cell.

    Attributes:
        job: Job id.
    """

    NAME = "job.json"
    job: str


class StoredPoint(TypedJson):
    """One point of a table or curve that an evaluate cell measures; see `grid.Point`.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning, as the grid has them.
        seed: Seed of the finetuning.
        m_inf: Pauses at inference of the variant.
        cell: Name of the cell's folder.
        held_out: Name of the folder of the cell that scored the held-out part of train; None where nothing is chosen.
    """

    variant: str
    task: str
    m_ft: str
    seed: int
    m_inf: tuple[int, ...]
    cell: str
    held_out: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `held_out` out where there is none, as files of earlier versions do."""
        return _without(handler(self), "held_out")


class PlanFile(StoredFile):
    """plan.json: the cells of an experiment, and the points that each evaluation measures.

    Attributes:
        cells: Folder names, inputs first.
        points: The points of the grid.
    """

    NAME = "plan.json"
    cells: tuple[str, ...]
    points: tuple[StoredPoint, ...]


def is_done(folder: Path, fingerprint: str) -> bool:
    """Return whether done.json marks the cell of this fingerprint as complete.

    Args:
        folder: Folder of the cell.
        fingerprint: See `Cell.fingerprint`.
    """
    done = DoneFile.read_if_present(folder)
    return done is not None and done.fingerprint == fingerprint


def _without(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the content without a key that is null."""
    return {key: value for key, value in content.items() if key != name or value is not None}


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically.

    Args:
        path: The file.
        content: Plain JSON.
    """
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
