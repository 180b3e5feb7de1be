"""What a step is taken apart into: operators by time, and memory of tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pause_megatron.benchmark.kernels import profiling
from pause_megatron.benchmark.tensors import held_bytes

CPU = torch.device("cpu")


def test_operators_are_counted_and_shares_add_up():
    matrix = torch.randn(300, 300)
    with profiling(CPU) as profile:
        for _ in range(7):
            matrix @ matrix
        with torch.profiler.record_function("a region"):
            matrix.exp()
    kernels = profile.kernels
    found = {kernel.name: kernel for kernel in kernels}
    assert found["aten::mm"].calls == 7 and found["aten::exp"].calls == 1
    assert "a region" not in found
    assert [kernel.seconds for kernel in kernels] == sorted((kernel.seconds for kernel in kernels), reverse=True)
    assert sum(kernel.share for kernel in kernels) == pytest.approx(1)
    assert found["aten::mm"].share == pytest.approx(
        found["aten::mm"].seconds / sum(kernel.seconds for kernel in kernels)
    )


def test_tensors_held_and_taken_on_top_are_the_peak():
    mib = 2**20 // 4  # elements of fp32
    before = held_bytes()
    kept = torch.zeros(3 * mib)
    kept.grad = torch.zeros(3 * mib)
    views = [kept[:5], kept.view(3, mib)]  # of one storage
    with FakeTensorMode():
        traced = torch.zeros(mib)
    assert held_bytes() - before == 6 * 2**20
    with profiling(CPU) as profile:
        first = torch.zeros(8 * mib)
        del first
        second, third = torch.zeros(4 * mib), torch.zeros(5 * mib)
        del second
    assert profile.tensor_bytes - before == (6 + 9) * 2**20
    assert held_bytes() - before == (6 + 5) * 2**20
    del kept, views, third, traced
    assert held_bytes() == before
