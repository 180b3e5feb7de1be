"""The learning rate is a pure function of the step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_megatron.config.schema import OptimSection
from pause_megatron.engine.schedule import learning_rate

optim = st.builds(
    OptimSection,
    lr=st.floats(1e-6, 1.0),
    min_lr_fraction=st.floats(0, 1),
    warmup_steps=st.integers(0, 50),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    decay_fraction=st.floats(0.01, 1.0),
)


@given(optim, st.integers(60, 500))
def test_it_rises_over_the_warm_up_then_never_rises_and_ends_where_it_should(section, total):
    rates = [learning_rate(section, step, total) for step in range(1, total + 1)]
    warmup = section.warmup_steps
    assert rates[:warmup] == sorted(rates[:warmup])
    later = rates[max(warmup - 1, 0) :]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(later))
    assert max(rates) <= section.lr * (1 + 1e-12)
    end = section.lr if section.schedule == "constant" else section.lr * section.min_lr_fraction
    assert rates[-1] == pytest.approx(end)


def test_known_values():
    cosine = OptimSection(lr=1.0, min_lr_fraction=0.0, warmup_steps=10)
    assert [learning_rate(cosine, step, 110) for step in (1, 5, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 0.5, 0])
    wsd = OptimSection(lr=1.0, min_lr_fraction=0.0, schedule="wsd", decay_fraction=0.2)
    assert [learning_rate(wsd, step, 100) for step in (1, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])


@given(optim, st.integers(60, 500), st.integers(1, 10_000))
def test_added_steps_have_the_schedule_of_a_run_of_their_number(section, added, ended):
    rates = [learning_rate(section, ended + step, ended + added, ended) for step in range(1, added + 1)]
    if section.schedule == "constant":
        assert rates == [section.lr] * added
    else:
        assert rates == [learning_rate(section, step, added) for step in range(1, added + 1)]
