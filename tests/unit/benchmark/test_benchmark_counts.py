"""What a step is taken apart into: waits of the host, and operators by time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pause_megatron.benchmark.kernels import profiling
from pause_megatron.benchmark.tensors import held_bytes
from pause_megatron.benchmark.waits import counting_waits

CPU = torch.device("cpu")


class Engine:
    """A module under an engine that reads as many values of each kind as it is told."""

    def __init__(self) -> None:
        self.module = nn.Linear(4, 1)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize(("micro_batches", "inside", "outside"), [(1, 0, 0), (1, 2, 3), (4, 1, 5)])
def test_waits_are_told_apart(micro_batches, inside, outside):
    engine, data = Engine(), torch.ones(2, 4)
    reads = (lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool((x > 0).all()), lambda x: x.nonzero())

    def read(times: int) -> None:
        for number in range(times):
            reads[number % len(reads)](data)

    with counting_waits(engine, CPU) as waits:
        read(outside)
        for _ in range(micro_batches):
            loss = engine.module(data).sum()
            read(inside)
            engine.backward(loss)
        read(outside)
    assert (waits.per_micro_batch, waits.per_step) == (inside, 2 * outside)
    read(3)
    assert waits.per_step == 2 * outside
    assert "backward" not in vars(engine) and not engine.module._forward_pre_hooks


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
