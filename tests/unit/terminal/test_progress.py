"""Bars on a terminal move; in a log each of their states is a line."""

from __future__ import annotations

import io

from pause_megatron.cli.support.prepare_progress import PrepareBar
from pause_megatron.data.prepare.pool import PrepareProgress
from pause_megatron.terminal.progress import bar_file


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn_on(stream: io.StringIO) -> str:
    """What `prepare` draws of two shards."""
    with PrepareBar(stream) as bar:
        for done in (0, 1, 2):
            bar.update(PrepareProgress("read", 10 * done, 900 * done, 4_000 * done, 0, 50 * done, 100, done, 2))
        for done in (0, 2):
            bar.update(PrepareProgress("join", 20, 1_800, 8_000, 0, 50 * done, 100, done, 2))
    return stream.getvalue()


def test_a_bar_in_a_log_is_made_of_lines():
    text = drawn_on(io.StringIO())
    assert "\r" not in text and text.endswith("\n")
    begun, read, joining, joined = text.splitlines()
    assert begun.startswith("prepare   0% |") and read.startswith("prepare 100% |") and read.endswith("shard 2 of 2")
    assert joining.startswith("join shards   0% |") and joined.startswith("join shards 100% |")


def test_a_bar_on_a_terminal_moves():
    stream = Terminal()
    assert bar_file(stream) is stream
    assert drawn_on(stream).count("\r") >= 4
