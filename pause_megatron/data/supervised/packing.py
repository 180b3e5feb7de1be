"""Examples of different lengths -> windows of one length: a pure function of the lengths and their order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Puts each item, in order, into the window that it fills best (best fit); a new one where it fits into none.

    Args:
        lengths: Tokens of each item, each in 1..room.
        room: Tokens of a window.

    Returns:
        For each window, in the order in which they were opened, the numbers of its items, ascending.
    """
    windows: list[list[int]] = []
    smallest = min(lengths, default=1)
    free: list[tuple[int, int]] = []  # (tokens left, window), ascending
    for item, length in enumerate(lengths):
        place = bisect_left(free, (length, -1))
        if place < len(free):
            left, window = free.pop(place)
        else:
            left, window = room, len(windows)
            windows.append([])
        windows[window].append(item)
        if left - length >= smallest:
            insort(free, (left - length, window))
    return windows
