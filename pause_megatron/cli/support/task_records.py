"""The folder of a task's records below `--task-path`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pause_megatron.errors import DataError

if TYPE_CHECKING:
    from pause_megatron.tasks import Task


def records_folder(task: Task, root: str | None) -> str | None:
    """Return the folder of a task's records, or None for the Hugging Face Hub.

    Args:
        task: The task.
        root: `--task-path`, which has a folder for each task.

    Raises:
        DataError: There is no such folder.
    """
    if root is None:
        return None
    path = Path(root) / task.folder
    if not path.is_dir():
        raise DataError(
            f"--task-path {root}: expected the folder {task.folder} with the records of {task.name}, got none"
        )
    return str(path)
