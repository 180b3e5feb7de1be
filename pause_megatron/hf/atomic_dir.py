"""An output folder that is there only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import sync_folder


def new_folder(path: str | Path) -> Path:
    """The absolute path of a folder to write.

    Raises:
        CheckpointError: there is something that a new folder would replace.
    """
    folder = Path(os.path.abspath(path))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder}: expected a new or an empty folder, found something else")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: expected a new or an empty folder, this one holds files; name another one")
    return folder


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, which takes its name when the body is done, and goes when the body fails.

    Args:
        folder: as `new_folder` gives it. The body brings what it writes to the disk.

    Raises:
        CheckpointError: it cannot be written, or something has come into `folder` in between.
    """
    hidden = folder.with_name(f".{folder.name}.incoming")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
        yield hidden
        new_folder(folder)
        os.rename(hidden, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
