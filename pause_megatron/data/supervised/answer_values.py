"""The file of `score --task`: a value for each token of the answers of a task, found by an example's ids.

It is a safetensors file, so nothing is unpickled:

    digests   int64 [examples]: xxh3_64 of the ids of the prompt and of the target, ascending
    ends      int64 [examples]: end of the values of each example
    values    fp32 [sum of T]: those of each token of the targets, EOD included

An example is found by its ids. Records may be in another order, and only a part of them may be trained on; records of
another tokenizer or text are not found.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pause_megatron.data.supervised.examples import EncodedExample
from pause_megatron.errors import DataError
from pause_megatron.files.digest import Hasher
from pause_megatron.files.durable import write_whole

VERSION = "1"
_TYPES = {"digests": "I64", "ends": "I64", "values": "F32"}


def example_digest(example: EncodedExample) -> int:
    """Return the digest of the ids of an example, as a signed number of 64 bits.

    Args:
        example: The encoded example.
    """
    ids = np.concatenate([example.prompt, example.target]).astype("<i4")
    digest = xxhash.xxh3_64(struct.pack("<q", example.prompt.size) + ids.tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)


class AnswerValues:
    """The values of the answers of a task.

    Args:
        path: The file, for messages.
        arrays: Its arrays.
        metadata: What it says about itself: `task`, `kind`, `model` and others.

    Attributes:
        metadata: As given.

    Raises:
        DataError: The arrays do not fit together, or are altered.
    """

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
        self._path, self.metadata = path, metadata
        digests, ends, self._values = (arrays[name] for name in _TYPES)
        starts = np.concatenate([[0], ends])
        if digests.size != ends.size or starts[-1] != self._values.size or (np.diff(starts) < 1).any():
            raise DataError(
                f"{path}: ends: expected an ascending end for each of {digests.size:,} digests, the last one "
                f"{self._values.size:,}, got {ends.size:,}, the last one {starts[-1]:,}"
            )
        if (np.diff(digests) <= 0).any():
            raise DataError(f"{path}: digests: expected ascending ones, each once, got others")
        if _content(arrays) != metadata.get("content"):
            raise DataError(f"{path}: altered since it was written: its content has another digest than it says")
        if not np.isfinite(self._values).all():
            raise DataError(f"{path}: values: expected finite ones, got some that are not")
        self._values.flags.writeable = False
        self._places = dict(zip(digests.tolist(), zip(starts[:-1].tolist(), ends.tolist(), strict=True), strict=True))

    @classmethod
    def read(cls, path: str | Path) -> AnswerValues:
        """Read and check a file.

        Args:
            path: The file: `task.scores`.

        Raises:
            DataError: It cannot be read, or is no such file.
        """
        path, expected = Path(path), "expected a file that `pause-megatron score --task` wrote"
        if not path.is_file():
            got = "something else" if path.exists() else "no such file"
            raise DataError(f"task.scores: {path}: {expected}, got {got}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, names = dict(file.metadata() or {}), set(file.keys())
                if metadata.get("version") != VERSION or names != set(_TYPES):
                    raise DataError(
                        f"task.scores: {path}: {expected} with version {VERSION} and the arrays {', '.join(_TYPES)}, "
                        f"got version {metadata.get('version')} and {', '.join(sorted(names)) or 'none'}"
                    )
                for name, dtype in _TYPES.items():
                    part = file.get_slice(name)
                    if part.get_dtype() != dtype or len(part.get_shape()) != 1:
                        raise DataError(
                            f"task.scores: {path}: {name}: expected {dtype} of one dimension, got {part.get_dtype()} "
                            f"of shape {part.get_shape()}"
                        )
                return cls(path, {name: file.get_tensor(name) for name in _TYPES}, metadata)
        except (OSError, SafetensorError) as error:
            raise DataError(f"task.scores: {path}: {expected}, got one that cannot be read ({error})") from None

    @staticmethod
    def write(
        path: str | Path, examples: Sequence[EncodedExample], values: Iterable[np.ndarray], metadata: Mapping[str, str]
    ) -> None:
        """Write a file, which appears whole.

        Args:
            path: The file.
            examples: The encoded examples; those with the same ids are kept once.
            values: The values of each one's target, [T].
            metadata: What the file says about itself.

        Raises:
            OSError: It cannot be written.
        """
        found = {example_digest(example): part for example, part in zip(examples, values, strict=True)}
        digests = sorted(found)
        arrays = {
            "digests": np.array(digests, dtype=np.int64),
            "ends": np.cumsum([found[digest].size for digest in digests], dtype=np.int64),
            "values": np.concatenate([found[digest] for digest in digests]).astype(np.float32),
        }
        described = {**metadata, "version": VERSION, "content": _content(arrays)}
        write_whole(Path(path), _sorted_header(save(arrays, metadata=described)))

    def of(self, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
        """Return examples with the values of their answers.

        Args:
            examples: The encoded examples.

        Raises:
            DataError: An example is not in the file. The message names the first one, and how many there are.
        """
        places = [self._places.get(example_digest(example)) for example in examples]
        missing = [example.id for example, place in zip(examples, places, strict=True) if place is None]
        if missing:
            every = len(missing) == len(examples)
            raise DataError(
                f"task.scores: {self._path}: expected values of example {missing[0]}, got none; {len(missing):,} of "
                f"{len(examples):,} examples are missing. The file is of the task {self.metadata.get('task')}, read by "
                f"{self.metadata.get('model')}. "
                + ("The tokenizer or the prompts differ" if every else "The records differ, or were fewer")
                + f": run `pause-megatron score --task NAME --model DIR --output {self._path} --overwrite` with a "
                "model of this run's tokenizer, and with the records, task.limit and task.held_out of this run"
            )
        result = []
        for example, place in zip(examples, places, strict=True):
            assert place is not None
            values = self._values[slice(*place)]
            if values.size != example.target.size:
                raise DataError(
                    f"task.scores: {self._path}: example {example.id}: expected {example.target.size} values, got "
                    f"{values.size}"
                )
            result.append(example._replace(values=values[:-1]))
        return result


def _sorted_header(file: bytes) -> bytes:
    """Return a safetensors file with its header sorted: the library writes the metadata in random order."""
    data = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:data]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[data:]


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    hasher = Hasher()
    for name in _TYPES:
        hasher.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hasher.digest
