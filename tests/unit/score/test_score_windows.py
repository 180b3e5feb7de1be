"""Units and windows: each token has one value, from a window with at least half a context before it."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pause_megatron.score.units import unit_tokens
from pause_megatron.score.windows import CorpusUnit, batches_of, units_of


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    context=st.integers(2, 20),
    size=st.integers(1, 100),
    batch=st.integers(20, 60),
)
def test_each_token_has_one_value_with_enough_before_it(
    lengths: list[int], context: int, size: int, batch: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = np.zeros(offsets[-1], dtype=int)
    stop = 0
    for unit in units_of(offsets, context, size):
        assert unit.start == stop
        stop = unit.stop
        windows = unit.windows(context)
        batches = list(batches_of(windows, batch))
        assert sorted(itertools.chain(*batches), key=lambda window: window.first) == windows
        assert all(len(rows) * max(map(len, rows)) <= batch for rows in batches)
        for window in windows:
            document = int(np.searchsorted(offsets, window.first, side="right")) - 1
            assert offsets[document] <= window.first < window.stop <= offsets[document + 1]
            assert window.begins == (window.first == offsets[document]) and len(window) <= context
            assert unit.start <= window.scored < window.stop <= unit.stop
            values[window.scored : window.stop] += 1
            # The token before window.first is read too: a token has as many before it as it has in the window.
            assert window.scored == offsets[document] or window.scored - window.first >= context // 2
    assert stop == offsets[-1] and (values == 1).all()


def test_units_are_few_and_bounded() -> None:
    assert [unit_tokens(tokens) for tokens in (10, 1 << 24, 10**12)] == [1 << 13, 1 << 16, 1 << 20]
    assert str(CorpusUnit(3, 1000, 2000, np.zeros((0, 2)))) == "unit 3 (tokens 1,000 to 1,999)"
