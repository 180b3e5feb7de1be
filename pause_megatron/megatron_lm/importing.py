"""Import of a GPT checkpoint of Megatron-LM to a native checkpoint of any tensor-parallel size, with pause rows."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pause_megatron.config.load import dump
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import sync_folder, write_whole
from pause_megatron.hf.architecture import Architecture
from pause_megatron.hf.atomic_dir import atomic_dir, output_folder
from pause_megatron.hf.folder import SourceFolder
from pause_megatron.hf.imported import imported_config
from pause_megatron.hf.importing import ImportedTokenizer, import_tokenizer
from pause_megatron.hf.native_writer import PauseRows, RowSource, write_native
from pause_megatron.hf.weights import HFRows, native_shapes
from pause_megatron.megatron_lm.arguments import Arguments, read_arguments
from pause_megatron.megatron_lm.flags import ignored_arguments
from pause_megatron.megatron_lm.legacy import LegacyWeights
from pause_megatron.megatron_lm.torch_dist import TorchDistWeights, read_common
from pause_megatron.model import Vocabulary
from pause_megatron.terminal.progress import Report

TRACKER = "latest_checkpointed_iteration.txt"

_MOST_PADDING = 20
"""A tokenizer of another model is noticed where padding is more than Megatron-LM adds and than 1 / 20 of the rows."""


@dataclass(frozen=True)
class ImportedMegatron:
    """Result of an import.

    Attributes:
        folder: The checkpoint.
        source: The folder that was read, `iter_XXXXXXX` or `release`.
        format: "torch_dist" or "torch".
        rows: Vocabulary rows of the source, padding included.
        text_rows: Rows of the tokenizer's own ids.
        pause_ids: The K pause ids.
        how: Origin of the pause rows: "kept" or "new".
        notes: What Megatron-LM's own model provider computed otherwise.
    """

    folder: Path
    source: Path
    format: str
    rows: int
    text_rows: int
    pause_ids: tuple[int, ...]
    how: str
    notes: tuple[str, ...]


def import_megatron(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path,
    pause_token: str = PAUSE_TOKEN,
    keep_pause_row: bool = False,
    tensor_parallel: int = 1,
    sequence_length: int | None = None,
    seed: int = 1234,
    report: Report = lambda stage, done, total: None,
) -> ImportedMegatron:
    """Import a checkpoint for `pretrain model.from=...`.

    Weights are streamed on one process without process groups. Optimizer state, random states and iteration are not
    imported: moments are zero, the step is 0.

    Args:
        source: `iter_XXXXXXX`, `release`, or the folder above, whose latest checkpoint is read.
        output: The checkpoint; new or empty.
        tokenizer: Folder with tokenizer.json or tokenizer.model, or such a file.
        pause_token: A special token of the tokenizer that serves as pause; `<pause>` is added if missing.
        keep_pause_row: Whether the row after the tokenizer's ids is a trained pause row (of `PauseTokenizer`).
        tensor_parallel: Tensor-parallel size of the checkpoint; `model.from` reads any.
        sequence_length: Longest window; None for the source's max_position_embeddings.
        seed: Seed of the pause rows.
        report: Progress callback: (stage, bytes done, bytes in all).

    Raises:
        CheckpointError: Another architecture or an option that the native model lacks, missing or damaged files,
            tensors that do not fit the arguments, a tokenizer of another size, a file that holds code, an output that
            is not empty.
        ConfigError: The sizes cannot be sharded for `tensor_parallel`.
    """
    output = output_folder(output)
    folder = checkpoint_folder(source)
    opened = _open(folder, sequence_length)
    with _tokenizer_folder(tokenizer) as files:
        found = _tokenizer(files, opened, pause_token, keep_pause_row)
    pause_ids, weights = tuple(found.pause_ids), opened.weights
    config = imported_config(
        opened.arguments.model,
        where=str(folder),
        sequence_length=opened.arguments.sequence_length,
        embeddings=len(pause_ids),
        tensor_parallel=tensor_parallel,
        precision=opened.arguments.precision,
    )
    vocabulary = Vocabulary(found.native.vocab_size, pause_ids)
    shapes = native_shapes(config.model, min(opened.rows, vocabulary.size))
    with atomic_dir(output) as staging:
        write_whole(staging / "config.yaml", dump(config).encode())
        found.native.save(staging / "tokenizer")
        write_native(
            staging,
            config,
            {name: [HFRows(name, 0, shape[0], 0)] for name, shape in shapes.items()},
            weights,
            vocabulary=vocabulary,
            pauses=PauseRows(() if found.kept else pause_ids, found.text_size, seed),
            corpus=f"imported:{found.native.fingerprint}",
            report=report,
        )
        sync_folder(staging)
    how = "kept" if found.kept else "new"
    return ImportedMegatron(output, folder, opened.format, opened.rows, found.text_size, pause_ids, how, opened.notes)


def checkpoint_folder(source: str | Path) -> Path:
    """Return the folder of one iteration.

    Args:
        source: That folder, or the one above, with `latest_checkpointed_iteration.txt`.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(source)
    tracker = path / TRACKER
    if not tracker.is_file():
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected a folder iter_XXXXXXX or one with {TRACKER}, got none")
        return path
    text = tracker.read_text(encoding="utf-8", errors="replace")[:100].strip()
    if not re.fullmatch(r"\d+|release", text, re.ASCII):
        raise CheckpointError(f"{tracker}: expected an iteration or 'release', got {text!r}")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker}: expected the folder {folder.name} that it names, got none")
    return folder


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose tensors are known to fit its arguments."""

    format: str
    arguments: Arguments
    rows: int
    step: int
    vocab_size: int | None
    notes: tuple[str, ...]
    weights: RowSource


def _open(folder: Path, sequence_length: int | None) -> _Opened:
    if (folder / "metadata.json").exists() or (folder / ".metadata").exists():
        if (folder / "metadata.json").exists():
            _check_backend(folder / "metadata.json")
        args = read_common(folder).get("args")
        arguments = read_arguments(args, str(folder), sequence_length)
        rows = TorchDistWeights.vocabulary_rows(folder)
        shapes = native_shapes(arguments.model, rows)
        _check_rows(arguments, rows, folder)
        return _Opened("torch_dist", arguments, rows, *_noted(args), TorchDistWeights(folder, shapes))
    legacy = LegacyWeights(folder)
    arguments = read_arguments(legacy.args, str(folder), sequence_length)
    rows = legacy.vocabulary_rows()
    _check_rows(arguments, rows, folder)
    legacy.check(native_shapes(arguments.model, rows))
    return _Opened("torch", arguments, rows, *_noted(legacy.args), legacy)


def _check_backend(path: Path) -> None:
    record = SourceFolder(path.parent).json(path.name)
    if record.get("sharded_backend") != "torch_dist" or record.get("common_backend", "torch") != "torch":
        raise CheckpointError(
            f"{path}: sharded_backend: expected 'torch_dist', got {str(record.get('sharded_backend'))[:40]!r}"
        )


def _check_rows(arguments: Arguments, rows: int, folder: Path) -> None:
    if arguments.rows not in (None, rows):
        raise CheckpointError(
            f"{folder}: tensor embedding.word_embeddings.weight: expected {arguments.rows} rows "
            f"(args.padded_vocab_size), got {rows}"
        )


def _noted(args: Any) -> tuple[int, int | None, tuple[str, ...]]:
    """Return the multiple to which the vocabulary is padded, its size if the run noted it, and ignored arguments."""
    step = 1
    for name, default in (("make_vocab_size_divisible_by", 128), ("tensor_model_parallel_size", 1)):
        value = getattr(args, name, None)
        step *= value if type(value) is int and value > 0 else default
    size = getattr(args, "vocab_size", None)
    return step, size if type(size) is int else None, tuple(ignored_arguments(args))


@contextmanager
def _tokenizer_folder(path: str | Path) -> Iterator[SourceFolder]:
    """Yield a folder with a tokenizer; a file is copied into a temporary one under the name that is looked for."""
    path = Path(path)
    if not path.is_file():
        yield SourceFolder(path)
        return
    if path.suffix not in (".json", ".model"):
        raise CheckpointError(f"--tokenizer {path}: expected a folder, tokenizer.json or a SentencePiece .model")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / f"tokenizer{path.suffix}")
        yield SourceFolder(folder)


def _tokenizer(folder: SourceFolder, opened: _Opened, token: str, keep_pause_row: bool) -> ImportedTokenizer:
    """Return the tokenizer with its pauses, whose size fits the rows of the source."""
    noted = opened.arguments.pause_ids
    size = _ids_of(folder)
    # The rows after the tokenizer's ids are padding, so for an import they do not exist.
    architecture = Architecture("llama", opened.arguments.model, size, 0, {"ids": list(noted)} if noted else None, None)
    found = import_tokenizer(folder, architecture, token)
    most = max(opened.step, opened.rows // _MOST_PADDING)
    used = found.pause_ids.stop if keep_pause_row else size
    if used > opened.rows or (size != opened.vocab_size and opened.rows - used >= most):
        expected = f"{max(opened.rows - most + 1, 1):,} to {opened.rows:,}"
        raise CheckpointError(
            f"--tokenizer {folder.path}: expected a tokenizer of {expected} ids, for the embedding has {opened.rows:,} "
            f"rows with padding, got {used:,}"
        )
    if noted and tuple(found.pause_ids) != noted:
        raise CheckpointError(
            f"--tokenizer {folder.path}: expected pauses at the ids {list(noted)} (args.pause_ids), got "
            f"{list(found.pause_ids)}; name the tokenizer that the export wrote"
        )
    return replace(found, kept=True) if keep_pause_row else found


def _ids_of(folder: SourceFolder) -> int:
    """Return the number of ids of a tokenizer, or a size that refuses nothing if it has no usable file."""
    from pause_megatron.data.tokenizer.backends import open_backend
    from pause_megatron.errors import DataError

    for name in ("tokenizer.json", "tokenizer.model"):
        if folder.has(name):
            try:
                return open_backend(str(folder.file(name))).vocab_size
            except DataError as error:
                raise CheckpointError(f"{folder.path}: its tokenizer cannot be used: {error}") from None
    return 1
