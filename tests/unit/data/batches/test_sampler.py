"""Any topology covers the same samples per step, in the same order."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.errors import ConfigError


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**9))
def test_every_topology_covers_the_same_samples_in_order(micro: int, ranks: int, accumulation: int, step: int) -> None:
    size = micro * ranks * accumulation
    samplers = [StepSampler(size, micro, rank, ranks) for rank in range(ranks)]
    of_ranks = [sampler.indices(step) for sampler in samplers]
    assert all(
        len(batches) == sampler.accumulation == accumulation
        for batches, sampler in zip(of_ranks, samplers, strict=True)
    )
    assert all(len(batch) == micro for batches in of_ranks for batch in batches)
    in_order = itertools.chain.from_iterable(batch for round_ in zip(*of_ranks, strict=True) for batch in round_)
    assert list(in_order) == list(range(step * size, (step + 1) * size))


@given(st.integers(0, 10**9))
def test_a_step_is_a_pure_function(step: int) -> None:
    sampler = StepSampler(24, 2, 1, 3)
    first = sampler.indices(step)
    sampler.indices(step + 1)
    assert sampler.indices(step) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0, 1), r"batch\.global_size: expected a multiple of batch\.micro_size=4 x 1 .*, got 10"),
        ((12, 4, 0, 2), r"batch\.global_size: expected a multiple of batch\.micro_size=4 x 2 data-parallel.*, got 12"),
        ((0, 1, 0, 1), r"batch\.global_size: expected 1 or more, got 0"),
        ((4, 0, 0, 1), r"batch\.micro_size: expected 1 or more, got 0"),
        ((4, 1, 0, 0), r"data-parallel ranks: expected 1 or more, got 0"),
        ((4, 1, 2, 2), r"data-parallel rank: expected 0 to 1, got 2"),
        ((4, 1, -1, 2), r"data-parallel rank: expected 0 to 1, got -1"),
    ],
)
def test_sizes_that_do_not_fit(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepSampler(*arguments)
