"""One cell of a grid: one call of one verb, and the fingerprint of what determines its result. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xxhash

from pause_megatron import __version__
from pause_megatron.errors import DataError
from pause_megatron.files.durable import write_whole

VERSION = 1
Verb = Literal["pretrain", "finetune", "export-hf", "evaluate"]

# What a verb leaves in its cell's folder.
PRODUCT = {"pretrain": "run", "finetune": "run", "export-hf": "hf", "evaluate": "results"}
# Stand in arguments for this cell's product and for the product of the cell that it begins from.
OUTPUT, INPUT = "{output}", "{input}"


@dataclass(frozen=True)
class Estimate:
    """What a cell will cost, as far as the configuration tells.

    Attributes:
        steps: optimizer steps, None where the verb takes none or the number is not known.
        raw_tokens: text and pauses; None if not known.
        flops_per_token: model FLOPs of forward and backward pass for a raw token in training, of the forward pass alone
            in evaluation.
        parameters: of the model.
    """

    steps: int | None = None
    raw_tokens: int | None = None
    flops_per_token: float = 0.0
    parameters: int = 0

    @property
    def flops(self) -> float | None:
        """Model FLOPs of the cell, or None."""
        return None if self.raw_tokens is None else self.raw_tokens * self.flops_per_token


@dataclass(frozen=True)
class Cell:
    """One call of one verb.

    Attributes:
        name: for people; says what is computed. Two grids may call one cell differently.
        verb: what runs.
        arguments: after the verb, with OUTPUT and INPUT in place of folders.
        identity: what determines the result: no paths, no hardware, nothing that changes only the speed. Plain JSON.
        input: the cell whose product this one begins from.
        estimate: its cost.
    """

    name: str
    verb: Verb
    arguments: tuple[str, ...]
    identity: Mapping[str, Any]
    input: Cell | None = None
    estimate: Estimate = field(default=Estimate(), compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of verb, identity, the input's fingerprint and the package's version: 32 hexadecimal digits."""
        content = {
            "version": VERSION,
            "package": __version__,
            "verb": self.verb,
            "identity": self.identity,
            "input": self.input.fingerprint if self.input else None,
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    @property
    def folder_name(self) -> str:
        """Its folder in DIR/cells."""
        return f"{self.name}-{self.fingerprint[:8]}"


def describe(cell: Cell, folder_of_input: str | None, ranks: int) -> dict[str, Any]:
    """The content of cell.json.

    Args:
        folder_of_input: in DIR/cells. ranks: that the verb is started on.
    """
    return {
        "version": VERSION,
        "name": cell.name,
        "fingerprint": cell.fingerprint,
        "verb": cell.verb,
        "arguments": list(cell.arguments),
        "input": folder_of_input,
        "ranks": ranks,
        "flops_per_token": cell.estimate.flops_per_token,
        "parameters": cell.estimate.parameters,
        "identity": cell.identity,
        "package": __version__,
    }


def find_folder(cells: Path, cell: Cell) -> Path:
    """The folder of a cell: one that holds its fingerprint, whatever a former grid called it; else the one to make."""
    for folder in sorted(cells.glob(f"*-{cell.fingerprint[:8]}")):
        record = read_json(folder / "cell.json", missing_ok=True)
        if record and record["fingerprint"] == cell.fingerprint:
            return folder
    return cells / cell.folder_name


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any] | None:
    """Read a JSON object of this package.

    Returns:
        the object; None where there is no such file and that is allowed.

    Raises:
        DataError: missing, not JSON, or of another version.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return None
        raise DataError(f"{path}: expected a file that `pause-megatron experiment run` wrote; there is none") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it, and the cell is computed again") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise DataError(f"{path}: expected a JSON object with version {VERSION}, got {str(content)[:60]}")
    return content
