"""Placement policies and injection: the invariants of a window, and the distribution of each policy."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pause_megatron.config.pauses import PLACEMENTS
from pause_megatron.data.windows.pause import POLICIES, PauseInjector, PausePlan, inject
from pause_megatron.data.windows.targets import supervise
from pause_megatron.data.windows.token_texts import TokenTextTable
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import philox_key

PAUSE = 1000
TEXTS = TokenTextTable(100, lambda ids: "a," if ids == [5] else "a", [])
"""Texts of ids: token 5 has a comma."""


def after_stops(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """A user's policy: pauses stand behind full stops (here: token 0) only; as many as there are, at most `count`."""
    stops = np.flatnonzero(text == 0) + 1
    return rng.choice(stops, min(count, stops.size), replace=False)


def too_far(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return np.full(count, text.size + 1)


def before_the_text(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(count, dtype=int)


def too_few(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return np.ones(count - 1, dtype=int)


def fractions(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return np.linspace(1, 2, count)


def writes_to_the_text(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    text[0] = 1
    return np.ones(count, dtype=int)


def make_injector(
    length: int, rate: float, window: str, placement: str, embeddings: int = 1, seed: int = 1, run: int = 1
) -> PauseInjector:
    plan = PausePlan(length, rate, window, placement, seed, run)
    return PauseInjector(plan, range(PAUSE, PAUSE + embeddings), "corpus", "train", TEXTS)


@st.composite
def injectors(draw: st.DrawFn) -> PauseInjector:
    """Every combination of policy, window, rate and K that is allowed."""
    window = draw(st.sampled_from(["exact", "trim"]))
    placement = draw(st.sampled_from([*POLICIES, f"{__name__}:after_stops"]))
    if window == "exact" and placement in ("bernoulli", f"{__name__}:after_stops"):
        window = "trim"
    if placement == "every":
        window = "exact"
    length = draw(st.integers(4, 120))
    rate = draw(st.floats(0, 0.5 if placement == "isolated" else 0.8))
    embeddings, seed, run = draw(st.integers(1, 4)), draw(st.integers(0, 2**40)), draw(st.integers(1, 4))
    run = min(run, length - 1)  # `every` leaves room for two text tokens
    return make_injector(length, rate, window, placement, embeddings, seed, run)


@given(injectors(), st.integers(0, 2**40), st.integers(0, 2**32 - 1))
@settings(max_examples=400)
def test_invariants(injector: PauseInjector, sample: int, text_seed: int) -> None:
    """Removing the pauses gives the text; every text token but the first has something before it; M; runs; K."""
    plan = injector.plan
    draw = np.random.default_rng(text_seed)
    text, side = draw.integers(0, 9, plan.text_length), draw.choice([0, 1, 2, np.nan], plan.text_length)
    before = text.copy()
    window = injector(text, sample, side=side)
    again = PauseInjector(plan, injector.pause_ids, injector.dataset, injector.split, injector.texts)
    assert np.array_equal(again(text, sample, side=side).tokens, window.tokens)  # 4: a function of the address
    tokens, is_text = window.tokens, window.is_text
    assert np.array_equal(text, before)
    assert tokens.shape == is_text.shape == (plan.sequence_length + 1,)
    assert np.array_equal(is_text, tokens < PAUSE)
    # 1: without the pauses it is the text, in order; all of it if the window is exact.
    kept = tokens[is_text]
    assert np.array_equal(kept, text[: kept.size])
    if plan.window == "exact":
        assert kept.size == text.size and (~is_text).sum() == plan.count
    # 2: as no pause stands before the first text token, each other one has something directly before it.
    assert is_text[0]
    # Runs use the pause ids in turn.
    for begin, run in _runs(tokens):
        assert run == [PAUSE + index % len(injector.pause_ids) for index in range(len(run))], begin
    if plan.placement == "isolated":
        assert all(len(run) <= plan.run for _, run in _runs(tokens))
    # Runs are whole, except the last one of a window.
    assert all(len(run) % plan.run == 0 for _, run in [*_runs(tokens)][:-1])
    # 3: no label is a pause, and targets are exactly the text tokens but the first.
    targets = supervise(window)
    assert targets.labels.max() < PAUSE
    assert np.array_equal(targets.loss_mask == 1, is_text[1:])


def _runs(tokens: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    for is_pause, group in itertools.groupby(enumerate(tokens.tolist()), lambda item: item[1] >= PAUSE):
        if is_pause:
            places, run = zip(*group, strict=True)
            yield places[0], list(run)


@given(
    st.lists(st.integers(1, 12), max_size=20),
    st.integers(1, 3),
    st.integers(0, 20),
)
def test_inject_is_what_a_loop_does(gaps: list[int], embeddings: int, cut: int) -> None:
    text = list(range(12))
    expected = []
    for number, token in enumerate(text, start=1):
        expected.append(token)
        expected += [PAUSE + index % embeddings for index in range(gaps.count(number))]
    length = max(1, len(expected) - cut)
    window = inject(np.array(text), np.array(gaps, dtype=int), range(PAUSE, PAUSE + embeddings), length)
    assert window.tokens.tolist() == expected[:length]


def _windows(draws: int, injector: PauseInjector) -> Counter[tuple[bool, ...]]:
    text = np.arange(injector.plan.text_length)
    return Counter(tuple(injector(text, sample).is_text.tolist()) for sample in range(draws))


def _pattern(gaps: tuple[int, ...], injector: PauseInjector) -> tuple[bool, ...]:
    plan = injector.plan
    text = np.arange(plan.text_length)
    window = inject(text, np.sort(np.array(gaps, dtype=int)), injector.pause_ids, plan.sequence_length + 1)
    return tuple(window.is_text.tolist())


def _enumerate(injector: PauseInjector) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    """Every draw of a policy as (gaps, probability), from its definition."""
    plan = injector.plan
    size, count = plan.text_length, plan.count
    if plan.placement == "uniform":
        ways = [*itertools.combinations(range(size - 1 + count), count)]
        yield from ((tuple(p - j + 1 for j, p in enumerate(way)), Fraction(1, len(ways))) for way in ways)
    elif plan.placement == "isolated":
        ways = [*itertools.combinations(range(1, size + 1), count)]
        yield from ((way, Fraction(1, len(ways))) for way in ways)
    elif plan.placement == "with_replacement":
        yield from ((way, Fraction(1, size**count)) for way in itertools.product(range(1, size + 1), repeat=count))
    elif plan.placement == "bernoulli":
        rate = Fraction(plan.rate)
        for chosen in itertools.product((False, True), repeat=size):
            way = tuple(gap for gap, is_chosen in enumerate(chosen, start=1) if is_chosen)
            yield way, rate ** len(way) * (1 - rate) ** (size - len(way))
    else:
        for phase in range(size):
            yield tuple((j * size + phase) // count + 1 for j in range(count)), Fraction(1, size)


@pytest.mark.parametrize(
    ("placement", "window", "length", "rate"),
    [
        ("uniform", "exact", 6, 0.5),
        ("uniform", "exact", 7, 0.3),
        ("uniform", "trim", 5, 0.4),
        ("isolated", "exact", 6, 0.35),
        ("isolated", "trim", 5, 0.4),
        ("with_replacement", "exact", 5, 0.4),
        ("with_replacement", "trim", 4, 0.5),
        ("bernoulli", "trim", 4, 0.25),
        ("interval", "exact", 8, 0.25),
        ("interval", "trim", 7, 0.3),
    ],
)
def test_distribution(placement: str, window: str, length: int, rate: float) -> None:
    """Each window comes as often as the policy's definition says; none that it does not allow."""
    draws = 8000
    injector = make_injector(length, rate, window, placement, seed=11)
    expected: Counter[tuple[bool, ...]] = Counter()
    for gaps, probability in _enumerate(injector):
        expected[_pattern(gaps, injector)] += probability
    assert sum(expected.values()) == 1
    seen = _windows(draws, injector)
    assert set(seen) <= set(expected)
    chi_square = sum((seen[way] - draws * p) ** 2 / (draws * p) for way, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), (float(chi_square), freedom)


def test_uniform_hits_every_interleaving() -> None:
    injector = make_injector(7, 3 / 7, "exact", "uniform")
    seen = _windows(4000, injector)
    assert len(seen) == math.comb(7, 3)
    assert all(way[0] for way in seen)


def test_the_papers_arithmetic() -> None:
    """2048 at 10 %: 205 inserted, and after the trim about 186 pauses and 1862 text tokens in the 2048 places."""
    injector = make_injector(2048, 0.1, "trim", "uniform")
    plan = injector.plan
    assert plan.count == 205
    assert plan.text_length == 2049
    assert plan.counts.expected == pytest.approx(186.35, abs=0.01)
    text = np.arange(2049)
    kept = [int((~injector(text, sample).is_text).sum()) for sample in range(400)]
    assert np.mean(kept) == pytest.approx(plan.counts.expected, abs=1.0)
    assert make_injector(2048, 0.1, "exact", "uniform").plan.text_length == 2049 - 205


def test_places_depend_on_the_address_only() -> None:
    text = np.arange(461)
    plan = PausePlan(512, 0.1, seed=3)

    def places(seed: int = 3, dataset: str = "corpus", split: str = "train", sample: int = 5) -> bytes:
        injector = PauseInjector(PausePlan(512, 0.1, seed=seed), range(PAUSE, PAUSE + 1), dataset, split)
        return injector.gaps(text + 1, sample).tobytes()

    assert plan.count == 51
    assert places() == places()
    others = [
        places(seed=4),
        places(dataset="other"),
        places(split="valid"),
        places(sample=6),
        places(sample=2**33 + 5),
    ]
    assert len({places(), *others}) == 6


def test_places_are_independent_of_what_was_drawn_before() -> None:
    injector = make_injector(64, 0.25, "exact", "uniform")
    text = np.arange(injector.plan.text_length)
    forwards = [injector(text, sample).tokens.tolist() for sample in range(20)]
    backwards = [injector(text, sample).tokens.tolist() for sample in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({tuple(tokens) for tokens in forwards}) == 20


def test_generator_is_philox_at_the_address() -> None:
    injector = make_injector(64, 0.25, "exact", "uniform")
    for sample in (0, 7, 2**33):
        injector.generator(3).random(5, dtype=np.float32)  # leaves half a draw behind
        low, high = philox_key(1, "corpus", "train")
        fresh = np.random.Philox(key=low + (high << 64), counter=sample << 128)
        assert injector.generator(sample).random(9).tolist() == np.random.Generator(fresh).random(9).tolist()


def test_threads_do_not_share_a_generator() -> None:
    injector = make_injector(512, 0.25, "exact", "uniform")
    text = np.arange(injector.plan.text_length)
    alone = [injector.gaps(text, sample).tolist() for sample in range(300)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda sample: injector.gaps(text, sample).tolist(), range(300))) == alone


def test_places_stay_the_same_between_releases() -> None:
    """A resumed run must find its pauses again: numpy promises this for Philox, not for Generator's methods."""
    golden = {
        name: make_injector(40, 0.15, "exact" if name == "every" else "trim", name, seed=1234)
        .gaps(np.arange(41) % 8, 7, side=np.arange(41) % 13)
        .tolist()
        for name in POLICIES
    }
    assert golden == GOLDEN


GOLDEN = {
    "uniform": [3, 22, 29, 29, 39, 40],
    "isolated": [3, 20, 27, 29, 38, 40],
    "with_replacement": [3, 21, 23, 29, 32, 38],
    "bernoulli": [29],
    "interval": [4, 11, 18, 25, 32, 38],
    "scored": [11, 12, 24, 25, 37, 38],
    "after": [6, 14, 22, 22, 30, 38],
    "before": [5, 13, 21, 21, 29, 37],
    "every": [*range(1, 21)],
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.0}, r"pause\.rate: expected a fraction, 0 <= rate < 1, got 1\.0"),
        ({"rate": -0.1}, r"pause\.rate: expected a fraction"),
        ({"rate": float("nan")}, r"pause\.rate: expected a fraction"),
        ({"window": "cut"}, r"pause\.window: expected 'exact' or 'trim', got 'cut'"),
        ({"seed": -1}, r"pause\.seed: expected 0 or more"),
        ({"placement": "random"}, r"pause\.placement: expected one of uniform, isolated.*got 'random'"),
        (
            {"placement": "no.such.module:policy"},
            r"pause\.placement.*the module no.such.module in this folder or on",
        ),
        ({"placement": "math:no_such_name"}, r"pause\.placement.*no_such_name"),
        ({"placement": "math:pi"}, r"pause\.placement.*a float, which cannot be called"),
        ({"placement": "json:loads"}, r"expected a function of \(text, count, rate, rng\), got \(s, "),
        (
            {"placement": "bernoulli"},
            r"pause\.placement: expected pause\.window=trim with bernoulli: .*got pause\.placement=bern.*window=exact",
        ),
        (
            {"rate": 0.995},
            r"pause\.rate: expected at least 2 text tokens .* 64 pauses, got pause\.rate=0\.995, .*_length=64",
        ),
        (
            {"rate": 0.6, "placement": "isolated"},
            r"pause\.rate: expected no more pauses \(38\) than text tokens \(27\), .* got pause\.rate=0\.6",
        ),
    ],
)
def test_settings_that_cannot_be_run(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PausePlan(**{"sequence_length": 64, "rate": 0.1, **settings})


def test_the_policies_are_those_that_a_configuration_may_name() -> None:
    assert tuple(POLICIES) == PLACEMENTS


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("too_far", "expected gaps from 1 to 15, got some from 16 to 16"),
        ("before_the_text", "expected gaps from 1 to 15, got some from 0 to 0"),
        ("too_few", "expected 2 gaps for an exact window, got 1"),
        ("fractions", "expected an array of integers with one axis, got float64"),
        ("writes_to_the_text", r"expected a result, got ValueError: .*read-only \(.*test_pause\.py:\d+\)"),
    ],
)
def test_a_users_policy_that_is_wrong_is_named(policy: str, message: str) -> None:
    injector = make_injector(16, 0.1, "exact", f"{__name__}:{policy}")
    with pytest.raises(ConfigError, match=rf"pause\.placement=.*:{policy}: {message}.*corpus.*train.*sample 3"):
        injector(np.arange(15), 3)


def test_a_users_policy_cannot_change_the_text() -> None:
    injector = make_injector(16, 0.1, "exact", f"{__name__}:writes_to_the_text")
    text = np.arange(15)
    with pytest.raises(ConfigError, match="read-only"):
        injector(text, 0)
    text[0] = 5  # the caller's own array stays writable


def test_a_users_policy_sees_the_text() -> None:
    injector = make_injector(60, 0.2, "trim", f"{__name__}:after_stops")
    text = np.random.default_rng(0).integers(0, 5, injector.plan.text_length)
    window = injector(text, 0)
    tokens, is_text = window.tokens, window.is_text
    assert (~is_text).sum() > 3
    assert (tokens[:-1][~is_text[1:]] == 0).all()
