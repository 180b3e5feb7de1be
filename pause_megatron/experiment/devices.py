"""The GPUs of this machine, divided among cells that run side by side."""

from __future__ import annotations

import os
import re
import shutil
import subprocess


def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; () without GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip() not in ("", "-1"))
    if not shutil.which("nvidia-smi"):
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return tuple(re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE))


def gpus_of_slot(gpus: tuple[str, ...], slot: int, ranks: int) -> tuple[str, ...]:
    """Return the GPUs of the cell that runs in a slot.

    Args:
        gpus: See `visible_gpus`.
        slot: 0, 1, ...; cells that run at the same time have different slots.
        ranks: Ranks of the cell.

    Returns:
        One GPU for each rank. Slots share GPUs only if there are too few for all. () leaves the choice to the program:
        there are too few GPUs for one cell, or DeepSpeed's launcher cannot name several of them (UUIDs).
    """
    if ranks > len(gpus) or (ranks > 1 and not all(name.isdecimal() for name in gpus)):
        return ()
    return tuple(gpus[(slot * ranks + rank) % len(gpus)] for rank in range(ranks))
