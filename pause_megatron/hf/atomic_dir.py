"""Output folders that are written atomically: a hidden staging folder that is renamed once it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import sync_folder


def output_folder(path: str | Path) -> Path:
    """Return the absolute path of an output folder, which must be new or empty.

    Args:
        path: Path of the folder.

    Raises:
        CheckpointError: The path is a link or a file, or the folder holds files.
    """
    folder = Path(os.path.abspath(path))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: expected a new or an empty folder, got something else")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: expected a new or an empty folder, got one that holds files; name another")
    return folder


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Open a hidden staging folder beside `folder`; rename it when the body ends, remove it when the body fails.

    Args:
        folder: Path from `output_folder`.

    Yields:
        The staging folder. The body must fsync what it writes there.

    Raises:
        CheckpointError: The folder cannot be written, or `folder` is no longer empty.
    """
    staging = folder.with_name(f".{folder.name}.incoming")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        output_folder(folder)
        os.rename(staging, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
