"""Computing of the units that are not finished, in as many processes as fit; errors of the disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pause_megatron.errors import DataError
from pause_megatron.score.plan import Parts, UnitConfig
from pause_megatron.score.units import Unit
from pause_megatron.terminal.progress import Report

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


def compute_units(
    units: Iterable[Unit], config: UnitConfig, processes: int | None, stage: str, report: Report, *, overwrite: bool
) -> tuple[int, int]:
    """Compute the units that are not finished; return the number of processes, and of values of finished units.

    Args:
        units: All units.
        config: What a process needs.
        processes: Number of processes; None for one each core that memory allows, or one each GPU.
        stage: What is scored, for progress.
        report: Progress callback.
        overwrite: Whether finished units of another plan may be removed.

    Raises:
        DataError: A unit failed, a process was killed, or there are units of another plan.
        OSError: A file cannot be written.
    """
    parts = Parts(config.folder, config.plan)
    parts.open(overwrite=overwrite)
    try:
        total, missing = 0, []
        for unit in units:
            total += len(unit)
            if not parts.has(unit):
                missing.append(unit)
        reused = total - sum(map(len, missing))
        processes = max(1, min(processes or _processes(config), len(missing)))
        if missing:
            from pause_megatron.score.pool import score_units

            report(stage, reused, total)
            score_units(iter(missing), config, processes, lambda done: report(stage, reused + done, total))
    finally:
        parts.close()
    return processes, reused


@contextlib.contextmanager
def storage_errors(place: str | Path) -> Iterator[None]:
    """Raise errors of the disk as a DataError that says what is kept.

    Args:
        place: What is written, for an error that names no file.

    Raises:
        DataError: The disk is full, or is not writable.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        raise DataError(
            f"cannot write {error.filename or place}: {os.strerror(error.errno or 0)}; finished units are kept: "
            "resolve this and run the same command again"
        ) from None


def _processes(config: UnitConfig) -> int:
    """Return one process each GPU, or one each core if half of the free memory holds as many copies of the model."""
    if config.plan.device == "cuda":
        return len(config.devices)
    stored = sum(path.stat().st_size for path in Path(config.model).glob("*.safetensors"))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), int(free / 2 // (2 * stored + (512 << 20)))))
