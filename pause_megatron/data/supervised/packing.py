"""Sequence packing: examples of different lengths into windows of one length, as a pure function of the lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack items into windows by best fit, in order: each goes where it leaves least room, else into a new window.

    Args:
        lengths: Tokens of each item, each in 1..room.
        room: Tokens of a window.

    Returns:
        The numbers of the items of each window, ascending; windows in the order in which they were opened.
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
