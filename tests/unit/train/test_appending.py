"""Files that grow by whole records, on real limits, devices, pipes and folders."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pause_megatron.train.logs.appending import AppendedFile


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_record_is_taken_back_and_the_next_ones_are_whole(tmp_path):
    file = AppendedFile(tmp_path / "log", b"head\n")
    with files_of_at_most(25):
        file.append(b"0123456789\n")  # 16 bytes with the head
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                file.append(b"abcdefghij\n")
        file.append(b"short\n")
    file.append(b"later\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"head\n0123456789\nshort\nlater\n"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_deleted_file_is_created_again(tmp_path, what):
    path = tmp_path / "logs" / "log"
    file = AppendedFile(path, b"head\n")
    file.append(b"one\n")
    path.unlink() if what == "file" else shutil.rmtree(path.parent)
    file.append(b"two\n")
    file.append(b"three\n")
    file.close()
    assert path.read_bytes() == b"head\ntwo\nthree\n"


def test_a_pipe_device_or_folder_at_the_path_is_an_error_until_removed(tmp_path):
    for number, make in enumerate((os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/full", path))):
        path = tmp_path / str(number)
        make(path)
        file = AppendedFile(path)
        for _ in range(2):
            with pytest.raises(OSError):
                file.append(b"one\n")
        path.rmdir() if number == 0 else path.unlink()
        file.append(b"two\n")
        file.close()
        assert path.read_bytes() == b"two\n"
