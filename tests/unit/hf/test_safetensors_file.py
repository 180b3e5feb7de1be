"""The streaming writer makes files that safetensors reads, from pieces of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pause_megatron.checkpoint.reader import state_file_faults
from pause_megatron.hf.safetensors_file import SafetensorsWriter, TensorEntry, split_into_files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_in_pieces_is_read_whole(tmp_path, dtype):
    tensors = {
        "a": torch.randn(7, 5).to(dtype),
        "ü.weight": torch.randn(3).to(dtype),
        "c": torch.randn(64, 33).to(dtype),
    }
    with SafetensorsWriter(
        tmp_path / "x.safetensors", [TensorEntry(n, tuple(t.shape), dtype) for n, t in tensors.items()]
    ) as w:
        for tensor in tensors.values():
            for rows in tensor.split(2):
                w.write(rows)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())


def test_views_are_written_as_they_look(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    with SafetensorsWriter(tmp_path / "x.safetensors", [TensorEntry("a", (4, 3), torch.float32)]) as writer:
        writer.write(whole[:, 3:])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], whole[:, 3:])


def test_zeros_are_zeros_wherever_they_stand(tmp_path):
    entries = [TensorEntry(name, (1000,), torch.float32) for name in "abc"]
    with SafetensorsWriter(tmp_path / "x.safetensors", entries) as writer:
        writer.zeros(1000)
        writer.write(torch.ones(1000))
        writer.zeros(1000)
    read = load_file(tmp_path / "x.safetensors")
    assert [float(read[name].sum()) for name in "abc"] == [0, 1000, 0]


def test_a_file_that_is_not_what_was_announced_is_a_bug(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors", [TensorEntry("a", (4,), torch.float32)])
    with pytest.raises(AssertionError, match="announced"), writer:
        writer.write(torch.ones(3))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(4, 300))
def test_files_are_as_full_as_they_may_be(sizes, largest):
    entries = [TensorEntry(str(number), (size,), torch.float32) for number, size in enumerate(sizes)]
    files = split_into_files(entries, largest)
    assert [entry for file in files for entry in file] == entries
    for file, following in zip(files, [*files[1:], None], strict=True):
        size = sum(entry.bytes for entry in file)
        assert size <= largest or len(file) == 1
        assert following is None or size + following[0].bytes > largest


def test_values_are_checked_with_a_bounded_number_of_pages(tmp_path):
    """The check of a state file maps it; pages of a map are resident until it is closed."""
    path, count = tmp_path / "state.safetensors", 100_000_000
    entries = [TensorEntry(f"exp_avg_sq|{name}|0", (count,), torch.float32) for name in "ab"]
    with SafetensorsWriter(path, entries) as writer:
        writer.zeros(count)
        writer.zeros(count - 1)
        writer.write(torch.tensor([-1.0]))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident("VmRSS")
    faults = state_file_faults(path)
    assert resident("VmHWM") - before < 200e6
    assert len(faults) == 1 and "exp_avg_sq|b|0: expected squares, got -1" in faults[0]


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
