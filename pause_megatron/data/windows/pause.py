"""Where pauses go in a window of text, and how they get there. Pure numpy: no model, no engine, no torch.

Notation (Goyal et al., "Think before you speak", ICLR 2024, section 3; `pause.*` are this project's options):

    N     data.sequence_length: input tokens of a window. A window is drawn with one token more, so that inputs and
          targets both have N.
    M     round(rate * N): pauses asked for.
    T     text tokens drawn. `exact`: N + 1 - M, so that text and pauses fill the window and no text is lost.
          `trim` (the paper's): N + 1; the longer sequence is cut back to N + 1 after insertion.
    gap   g in 1..T: the place directly after the g-th text token. There is none before the first token: a window
          always starts with text, so an `exact` window has T - 1 supervised targets, whatever is drawn.

Randomness is addressed, not stateful: the places in a sample are a function of (pause seed, dataset, split, sample
number) alone, so ranks, workers, micro-batches and the point of a resume do not matter.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from pause_megatron.config.batching import pauses_per_window
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import philox_key


@runtime_checkable
class PlacementPolicy(Protocol):
    """Decides after which text tokens pauses stand. Any callable of this shape is a policy.

    To use one of your own, name it as `pause.placement=module:attribute`.
    """

    def __call__(self, text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
        """Returns the gaps of one window.

        Args:
            text: int64 [T], read-only. The window's text tokens, padding (if any) at its end.
            count: M, the pauses asked for. In an `exact` window precisely this many gaps must be returned; in a
                `trim` window any number may be.
            rate: pause.rate.
            rng: The sample's own generator, to be used in this call only. Draw from nothing else, or samples stop
                being reproducible.

        Returns:
            Integers [number of pauses], each in 1..T, in any order; a gap named twice gets two pauses.
        """
        ...


def uniform(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Every interleaving of M pauses with the text after its first token is equally likely. Runs can occur."""
    # An interleaving is a choice of M of the T - 1 + M places behind the first token. The j-th pause (from 0), at
    # place p, has p - j text tokens before it besides the first.
    places = rng.choice(text.size - 1 + count, count, replace=False, shuffle=False)
    places.sort()
    return places - np.arange(-1, count - 1)


def isolated(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """M distinct gaps, every choice equally likely: no two pauses stand side by side."""
    return rng.choice(text.size, count, replace=False, shuffle=False) + 1


def with_replacement(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each of M pauses picks its gap independently. Runs are more frequent than in `uniform`'s windows of few gaps."""
    return rng.integers(1, text.size + 1, count)


def bernoulli(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each gap gets one pause with probability `rate`. The number of pauses varies, so the window must be `trim`."""
    return np.flatnonzero(rng.random(text.size) < rate) + 1


def interval(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """M evenly spaced gaps (spacings differ by at most one), shifted by a phase that is drawn for each sample."""
    # Integers throughout: in floating point the last gap could round up to T + 1.
    phase = rng.integers(text.size)
    return (np.arange(count) * text.size + phase) // max(count, 1) + 1


POLICIES: dict[str, PlacementPolicy] = {
    policy.__name__: policy for policy in (uniform, isolated, with_replacement, bernoulli, interval)
}
"""The policies that ship, by the name used in `pause.placement`."""


def resolve_policy(placement: str) -> PlacementPolicy:
    """The policy of that name, or the attribute that 'module:attribute' points to.

    Raises:
        ConfigError: no such policy, module or attribute, or something that cannot be called.
    """
    if placement in POLICIES:
        return POLICIES[placement]
    module_name, colon, attribute = placement.partition(":")
    expected = f"pause.placement: expected one of {', '.join(POLICIES)}, or 'module:attribute', got {placement!r}"
    if not (module_name and colon and attribute):
        raise ConfigError(expected)
    try:
        policy = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{expected}: {error}") from error
    if not callable(policy):
        raise ConfigError(f"{expected}: it is a {type(policy).__name__}, which cannot be called")
    return policy


class Window(NamedTuple):
    """A window with its pauses.

    Attributes:
        tokens: int64 [L], text and pause ids.
        places: int64 [number of pauses], ascending: the indices in `tokens` where pauses stand; never 0.
    """

    tokens: np.ndarray
    places: np.ndarray

    @property
    def is_text(self) -> np.ndarray:
        """bool [L], False where a pause stands."""
        is_text = np.empty(self.tokens.size, dtype=bool)
        is_text.fill(True)  # np.ones takes 1 us more
        is_text[self.places] = False
        return is_text


def inject(text: np.ndarray, gaps: np.ndarray, pause_ids: range, length: int | None = None) -> Window:
    """Puts a pause into each gap. Removing the pauses again gives back the text, in order.

    Args:
        text: int64 [T].
        gaps: Integers [M] in 1..T, ascending.
        pause_ids: The K pause ids. They are used in turn within each run of pauses, beginning with the first.
        length: Cut the result to this many tokens (the paper's trim); at most T + M. None: keep all.

    Returns:
        Window of `length` or T + M tokens.
    """
    index = np.arange(gaps.size)
    places = gaps + index
    if length is None:
        length = text.size + gaps.size
    elif length < text.size + gaps.size:
        kept = int(places.searchsorted(length))
        places, text = places[:kept], text[: length - kept]
    window = Window(np.empty(length, dtype=np.int64), places)
    window.tokens[window.is_text] = text
    if len(pause_ids) == 1:
        window.tokens[places] = pause_ids.start
    else:
        index_in_run = index - gaps.searchsorted(gaps)
        window.tokens[places] = pause_ids.start + index_in_run[: places.size] % len(pause_ids)
    return window


LOCATIONS = ("append", "prepend")
"""Where the pauses of a prefix stand: behind it, or before it."""


def add_pauses(ids: np.ndarray, count: int, pause_ids: range, *, location: str, kept: int = 0) -> np.ndarray:
    """A prefix and its M pauses, for finetuning and inference (method.md, sections 2 and 3).

    Args:
        ids: int64 [tokens] of the prefix; there may be none.
        count: M.
        pause_ids: The K pause ids, used in turn; or a filler's one id.
        location: One of LOCATIONS.
        kept: Tokens at the beginning (a BOS) that prepended pauses stand behind.

    Returns:
        int64 [tokens + M].
    """
    # inject() never puts a pause before the first token: one that is taken away again stands there.
    gap = 1 + (ids.size if location == "append" else kept)
    return inject(np.concatenate([[0], ids]), np.full(count, gap, dtype=np.int64), pause_ids).tokens[1:]


@dataclass(frozen=True)
class PausePlan:
    """What `pause.*` and the sequence length mean for every window. Checked when made.

    Attributes:
        sequence_length: N, input tokens of a window.
        rate: Pauses inserted, as a fraction of N; 0 <= rate < 1.
        window: "exact" or "trim".
        placement: A name in POLICIES, or 'module:attribute'.
        seed: Seed of the places.

    Raises:
        ConfigError: a value out of its range, a policy that does not exist or does not fit the window, or more pauses
            than the window has room for.
    """

    sequence_length: int
    rate: float
    window: str = "exact"
    placement: str = "uniform"
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ConfigError(f"pause.rate: expected a fraction, 0 <= rate < 1, got {self.rate}")
        if self.window not in ("exact", "trim"):
            raise ConfigError(f"pause.window: expected 'exact' or 'trim', got {self.window!r}")
        if self.seed < 0:
            raise ConfigError(f"pause.seed: expected 0 or more, got {self.seed}")
        resolve_policy(self.placement)
        if self.placement == "bernoulli" and self.window == "exact":
            raise ConfigError(
                "pause.placement=bernoulli draws a different number of pauses for each window, but pause.window=exact "
                "fixes it: use pause.window=trim, or another placement"
            )
        if self.text_length < 2:
            raise ConfigError(
                f"pause.rate: {self.rate} of data.sequence_length={self.sequence_length} is {self.count} pauses, which "
                f"leaves {self.text_length} text tokens in an exact window; expected at least 2, one of them to predict"
            )
        if self.placement == "isolated" and self.count > self.text_length:
            raise ConfigError(
                f"pause.placement=isolated: {self.count} pauses do not fit behind {self.text_length} text tokens "
                f"without touching; lower pause.rate={self.rate}"
            )

    @property
    def count(self) -> int:
        """M, pauses inserted before any trim (Python's round: halves go to the even neighbour)."""
        return pauses_per_window(self.rate, self.sequence_length)

    @property
    def text_length(self) -> int:
        """T, text tokens drawn for a window."""
        return self.sequence_length + 1 - (self.count if self.window == "exact" else 0)

    @property
    def expected_pauses(self) -> float:
        """Expected pauses among the N places behind the first token, for the uniform policy.

        `exact`: M. `trim`: M * N / (N + M), as the cut takes text and pauses alike (186 of 205 at N = 2048).
        """
        if self.window == "exact":
            return float(self.count)
        return self.count * self.sequence_length / (self.sequence_length + self.count)


_of_thread = threading.local()


class PauseInjector:
    """Gives the windows of one dataset and split their pauses: a pure function of the sample number.

    Args:
        plan: Rate, window, placement, seed.
        pause_ids: The K pause ids.
        dataset: Name of the corpus. Its prefix without the folder, so that a corpus can be moved.
        split: Name of the split: train, valid or test.
    """

    def __init__(self, plan: PausePlan, pause_ids: range, dataset: str, split: str) -> None:
        self.plan = plan
        self.pause_ids = pause_ids
        self.dataset = dataset
        self.split = split
        self._policy = resolve_policy(plan.placement)
        self._key = philox_key(plan.seed, dataset, split)

    def generator(self, sample: int) -> np.random.Generator:
        """The sample's generator: Philox, keyed by (seed, dataset, split), with its counter at the sample number.

        The sample number is the counter's third word, so that each sample has 2**128 blocks of its own. Each thread
        has one generator, which is set anew here: that takes 1 us, where making one takes 9.
        """
        generator = getattr(_of_thread, "generator", None)
        if generator is None:
            generator = _of_thread.generator = np.random.Generator(np.random.Philox(key=0))
        generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": (0, 0, sample, 0), "key": self._key},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,  # the buffer is used up: the next draw computes a block
            "has_uint32": 0,
            "uinteger": 0,
        }
        return generator

    def gaps(self, text: np.ndarray, sample: int) -> np.ndarray:
        """The places of a sample's pauses, checked: integers [number of pauses] in 1..T, ascending.

        Raises:
            ConfigError: a user's policy returned something else. It is named.
        """
        text = text.view()
        text.flags.writeable = False
        gaps = np.asarray(self._policy(text, self.plan.count, self.plan.rate, self.generator(sample)))
        if gaps.ndim != 1 or (gaps.size and gaps.dtype.kind not in "iu"):
            raise self._refusal(sample, f"an array of integers with one axis, got {gaps.dtype} of shape {gaps.shape}")
        gaps = gaps.astype(np.int64)
        gaps.sort()
        if self.plan.window == "exact" and gaps.size != self.plan.count:
            raise self._refusal(sample, f"{self.plan.count} gaps for an exact window, got {gaps.size}")
        if gaps.size and (gaps[0] < 1 or gaps[-1] > text.size):
            raise self._refusal(sample, f"gaps from 1 to {text.size}, got some from {gaps[0]} to {gaps[-1]}")
        return gaps

    def __call__(self, text: np.ndarray, sample: int) -> Window:
        """Cuts one window of N + 1 tokens.

        Args:
            text: int64 [T], with T = plan.text_length.
            sample: Sample number, 0 or more.
        """
        return inject(text, self.gaps(text, sample), self.pause_ids, self.plan.sequence_length + 1)

    def _refusal(self, sample: int, what: str) -> ConfigError:
        return ConfigError(
            f"pause.placement={self.plan.placement}: expected {what} (dataset {self.dataset}, split {self.split}, "
            f"sample {sample})"
        )
