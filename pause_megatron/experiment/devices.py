"""The GPUs of this machine, shared out among the cells that run side by side. No torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess


def visible_gpus() -> tuple[str, ...]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip() not in ("", "-1"))
    if not shutil.which("nvidia-smi"):
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return tuple(re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE))


def share_of(gpus: tuple[str, ...], place: int, ranks: int) -> tuple[str, ...]:
    """GPUs of the cell that runs in a place.

    Args:
        gpus: see `visible_gpus`
        place: 0, 1, ...; cells that run at the same time have different ones
        ranks: of the cell

    Returns:
        One for each rank: the cell's own while there are enough for all places, else in turn. () where there are too
        few for a single cell, or several are wanted and DeepSpeed's launcher cannot name them (UUIDs): all are left to
        the program.
    """
    if ranks > len(gpus) or (ranks > 1 and not all(name.isdecimal() for name in gpus)):
        return ()
    return tuple(gpus[(place * ranks + rank) % len(gpus)] for rank in range(ranks))
