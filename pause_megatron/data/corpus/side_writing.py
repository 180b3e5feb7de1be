"""Writing of side arrays: the file, then its record in the manifest; and what becomes of them with a new corpus."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.data.corpus.records import FileRecord, SideRecord
from pause_megatron.data.corpus.side import DTYPES, SideArray, check_side_name, describe_side, header_of, side_path
from pause_megatron.errors import DataError
from pause_megatron.files.durable import DigestFile, only_file_writer, only_writer, sync_folder
from pause_megatron.files.locks import Backoff

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
# Preparing a corpus anew holds the lock for long; recording a side array, for milliseconds.
_WAIT_SECONDS = 60.0


def write_side(prefix: str | Path, name: str, made: SideRecord, values: Iterable[np.ndarray]) -> SideArray:
    """Write PREFIX.NAME.npy and record it in the manifest, in place of an earlier one of this name.

    Call this while holding `only_side_writer`. A kill leaves the earlier side array, or none.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        made: How the values were made; its `file` is not read.
        values: The values in order, in arrays [any] of the dtype `made.dtype`.

    Returns:
        The side array.

    Raises:
        DataError: A value is not finite, there is not one value for each token of the `.bin`, or the corpus was
            replaced meanwhile.
        OSError: A file cannot be written.
    """
    tokens = CorpusManifest.load(prefix).counts.tokens
    file = DigestFile(side_path(prefix, name))
    try:
        file.write(header_of(made.dtype, tokens))
        count = 0
        for chunk in values:
            _require_finite(file.path, chunk, count)
            file.write(np.ascontiguousarray(chunk, dtype=np.dtype(made.dtype).newbyteorder("<")).data.cast("B"))
            count += len(chunk)
        if count != tokens:
            raise DataError(f"{file.path}: expected {tokens:,} values, one for each token of the .bin, got {count:,}")
        file.finish()
        record = made.model_copy(update={"file": FileRecord(bytes=file.bytes, digest=file.digest)})
        with _manifest_lock(prefix):
            manifest = CorpusManifest.load(prefix)
            if (record.bin, record.idx) != (manifest.files["bin"].digest, manifest.files["idx"].digest):
                raise DataError(f"corpus {prefix}: expected the one that the values are of, got one prepared since")
            others = {other: side for other, side in manifest.sides.items() if other != name}
            if name in manifest.sides:  # its record must not name the new file, nor the new record the old file
                manifest.with_sides(others).save(prefix)
            file.publish()
            sync_folder(file.path.parent)
            manifest.with_sides({**others, name: record}).save(prefix)
    finally:
        file.discard()
    return SideArray(str(prefix), name, record, tokens)


def register_values(prefix: str | Path, name: str, source: Path, *, overwrite: bool = False) -> SideArray:
    """Copy a user's own array to PREFIX.NAME.npy, after checks, and record it in the manifest.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        source: A `.npy` with one value for each token of the `.bin`, in its order. Nothing in it is unpickled.
        overwrite: Replace a side array of this name.

    Returns:
        The side array.

    Raises:
        DataError: The file is no array of numbers in numpy's format, or has another length; a value is not finite;
            there is such a side array; or another process writes it.
    """
    check_side_name(name)
    manifest = CorpusManifest.load(prefix)
    array = _read_values(source, manifest.counts.tokens)
    made = SideRecord(
        file=FileRecord(bytes=0, digest=""),
        dtype=array.dtype.name,
        bin=manifest.files["bin"].digest,
        idx=manifest.files["idx"].digest,
        kind="user",
    )
    with only_side_writer(prefix, name):
        require_free(prefix, name, overwrite=overwrite)
        return write_side(prefix, name, made, (array[start : start + _CHUNK] for start in range(0, len(array), _CHUNK)))


def require_free(prefix: str | Path, name: str, *, overwrite: bool, resumed: bool = False) -> None:
    """Check that no side array has this name, unless it may be replaced.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        overwrite: Whether it may be replaced.
        resumed: Whether this continues an interrupted writing, which may have left the file without its record.

    Raises:
        DataError: There is one, or a file of its name.
    """
    if overwrite:
        return
    record = CorpusManifest.load(prefix).sides.get(name)
    if record is not None:
        raise DataError(
            f"corpus {prefix}: there is a side array {name!r} already ({describe_side(record)}); choose another "
            "--name, or replace it with --overwrite"
        )
    if not resumed and (path := side_path(prefix, name)).exists():
        raise DataError(
            f"{path}: expected no such file, got one without a record in the manifest; choose another --name, or "
            "replace it with --overwrite"
        )


@contextlib.contextmanager
def only_side_writer(prefix: str | Path, name: str) -> Iterator[None]:
    """Hold the lock of a side array while the body runs, and remove the temporary files of a killed process.

    Args:
        prefix: PREFIX of the corpus.
        name: Name of the side array.

    Raises:
        DataError: Another process writes it.
    """
    path = side_path(prefix, name)
    with only_file_writer(path, path_of(prefix, f"{name}.lock"), f"side array {path}"):
        yield


def carried_sides(prefix: str | Path, manifest: CorpusManifest) -> tuple[CorpusManifest, list[Path]]:
    """Return a new manifest with the side arrays at PREFIX that are of its files too, and the paths of the others.

    Args:
        prefix: PREFIX of the corpus, where the former manifest still is.
        manifest: Manifest of the corpus that replaces it.
    """
    try:
        former = CorpusManifest.load(prefix).sides
    except DataError:  # missing, or damaged, which is a reason to prepare it again
        return manifest, []
    belongs = manifest.files["bin"].digest, manifest.files["idx"].digest
    kept = {name: record for name, record in former.items() if (record.bin, record.idx) == belongs}
    return manifest.with_sides(kept), [side_path(prefix, name) for name in former if name not in kept]


def remove_sides(paths: Iterable[Path]) -> None:
    """Remove the side arrays of a corpus that was replaced.

    Args:
        paths: Their paths.
    """
    for path in paths:
        path.unlink(missing_ok=True)
        log.warning(f"removed {path}: its values were those of the corpus that was replaced")


def _read_values(path: Path, tokens: int) -> np.ndarray:
    """Memory-map a user's array after checking its header."""
    if path.exists() and not path.is_file():  # reading a pipe would wait
        raise DataError(f"{path}: expected a file of values (.npy), got something else of that name")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # numpy evaluates the header: what it raises depends on what is there
        raise DataError(
            f"{path}: expected an array of numbers in numpy's format (.npy), got a file that numpy refuses "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(array, np.ndarray):  # an archive (.npz)
        raise DataError(f"{path}: expected one array (.npy), got an archive of arrays")
    if array.dtype.name not in DTYPES:
        raise DataError(f"{path}: expected values of {', '.join(DTYPES)}, got {array.dtype}")
    if array.shape != (tokens,):
        raise DataError(
            f"{path}: expected the shape ({tokens:,},), one value for each token of the .bin, got {array.shape}"
        )
    return array


def _require_finite(path: Path, chunk: np.ndarray, start: int) -> None:
    if chunk.dtype.kind == "f" and not (finite := np.isfinite(chunk)).all():
        first = int(np.argmin(finite))
        raise DataError(f"{path}: token {start + first:,}: expected a finite value, got {chunk[first]}")


@contextlib.contextmanager
def _manifest_lock(prefix: str | Path) -> Iterator[None]:
    """Hold the lock of the corpus. Another process that records a side array is waited for."""
    backoff, begun = Backoff(0.02, 1.0), time.monotonic()
    with contextlib.ExitStack() as holding:
        while True:
            try:
                holding.enter_context(only_writer(path_of(prefix, "lock"), f"corpus {prefix}"))
                break
            except DataError:
                if time.monotonic() - begun > _WAIT_SECONDS:
                    raise
                backoff.wait()
        yield
