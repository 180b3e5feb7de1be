"""A placement policy by its name, with runs of pauses and checks of what it chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pause_megatron.config.pauses import BY_PATTERN, pattern_error
from pause_megatron.config.user_code import calling, check_arguments, import_for_key
from pause_megatron.data.windows.policies import POLICIES, ByPattern, Policy
from pause_megatron.data.windows.text_window import TextWindow, WindowPolicy
from pause_megatron.errors import ConfigError


def resolve_policy(placement: str, pattern: str | None = None) -> Policy:
    """Return a policy by its name, or by 'module:attribute'. A class is made without arguments, at each call.

    Args:
        placement: `pause.placement`.
        pattern: `pause.pattern`; None: the policy's own.

    Raises:
        ConfigError: There is no such policy, module or attribute, it is no policy, or the pattern is no regular
            expression.
    """
    if placement in POLICIES:
        return _with_pattern(POLICIES[placement], pattern)
    return _users_policy(placement)


def _users_policy(placement: str) -> Policy:
    allowed = f"one of {', '.join(POLICIES)}, or 'module:attribute'"
    policy = import_for_key("pause.placement", placement, allowed)
    expected = f"pause.placement: expected {allowed}, got {placement!r}"
    if isinstance(policy, type):
        try:
            policy = policy()
        except Exception as error:
            raise ConfigError(
                f"{expected}, a class that cannot be made without arguments ({type(error).__name__}: {error})"
            ) from error
    if not isinstance(policy, WindowPolicy) and not callable(policy):
        raise ConfigError(f"{expected}, a {type(policy).__name__}, which cannot be called and has no method `place`")
    place = f"pause.placement={placement}"
    if isinstance(policy, WindowPolicy):
        check_arguments(f"{place}: place", policy.place, "window", "rng")
    else:
        check_arguments(place, policy, "text", "count", "rate", "rng")
    return policy


def _with_pattern(policy: Policy, pattern: str | None) -> Policy:
    if pattern is None or not isinstance(policy, ByPattern):
        return policy
    if (wrong := pattern_error(pattern)) is not None:
        raise ConfigError(f"pause.pattern: expected a regular expression, got {pattern!r} ({wrong})")
    return replace(policy, pattern=pattern)


def choose(policy: Policy, window: TextWindow, rng: np.random.Generator) -> np.ndarray:
    """Return the gaps that a policy of either generation chooses, unchecked.

    Args:
        policy: The policy.
        window: The window.
        rng: Its generator.
    """
    if isinstance(policy, WindowPolicy):
        return policy.place(window, rng)
    return policy(window.text, window.count, window.rate, rng)


@dataclass(frozen=True)
class Placement:
    """Where pauses are: a policy, and the consecutive pauses at each place that it chooses.

    Attributes:
        name: A name in POLICIES, or 'module:attribute'.
        run: Pauses at each place.
        pattern: Regular expression of `after` and `before`; None: punctuation.

    Raises:
        ConfigError: As `resolve_policy`; a run below 1, or a pattern that the policy does not use.
    """

    name: str = "uniform"
    run: int = 1
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.run < 1:
            raise ConfigError(f"pause.run: expected 1 or more, got {self.run}")
        if self.pattern is not None and self.name not in BY_PATTERN:
            raise ConfigError(
                f"pause.pattern: expected pause.placement=after or before with it, got pause.placement={self.name}"
            )
        _ = self._policy

    @cached_property
    def _policy(self) -> Policy:
        return resolve_policy(self.name, self.pattern)

    @cached_property
    def sees_windows(self) -> bool:
        """Whether the policy takes a whole TextWindow; else text, count and rate suffice."""
        return isinstance(self._policy, WindowPolicy)

    def gaps(self, window: TextWindow, rng: np.random.Generator, *, exact: bool) -> np.ndarray:
        """Return the gaps of one window, each once for each of its pauses.

        The policy chooses ceil(M / run) places. Each gets `run` pauses, and the last one what is left of M. In a `trim`
        window a policy may choose any number of places, all of which then get `run` pauses; so does `bernoulli`, whose
        number is drawn.

        Args:
            window: The window; its `count` is M and its `rate` that of pauses.
            rng: The generator of this sample.
            exact: Whether there must be exactly M pauses.

        Returns:
            Gaps in 1..T, int64 [pauses], ascending.

        Raises:
            ConfigError: The policy lacks something, or returned something else. The message names the policy.
        """
        policy, run, count = self._policy, self.run, window.count
        places, rate = (count, window.rate) if run == 1 else (-(-count // run), window.rate / run)
        place = f"pause.placement={self.name}"
        try:
            with calling(place):
                if self.sees_windows:
                    chosen = policy.place(replace(window, count=places, rate=rate), rng)  # type: ignore[union-attr]
                else:
                    chosen = policy(window.text, places, rate, rng)  # type: ignore[operator]
        except ConfigError as error:
            said = str(error) if str(error).startswith(place) else f"{place}: {error}"
            raise ConfigError(f"{said}{_where(window)}") from error.__cause__
        gaps = np.asarray(chosen)
        if gaps.ndim != 1 or (gaps.size and gaps.dtype.kind not in "iu"):
            raise self._error(window, f"an array of integers with one axis, got {gaps.dtype} of shape {gaps.shape}")
        gaps = gaps.astype(np.int64)
        gaps.sort()
        if exact and gaps.size != places:
            raise self._error(window, f"{places} gaps for an exact window, got {gaps.size}")
        if gaps.size and (gaps[0] < 1 or gaps[-1] > window.text.size):
            raise self._error(window, f"gaps from 1 to {window.text.size}, got some from {gaps[0]} to {gaps[-1]}")
        if run == 1:
            return gaps
        whole = gaps.size != places or self.name == "bernoulli"
        return gaps.repeat(run)[: None if whole else count]

    def _error(self, window: TextWindow, expected: str) -> ConfigError:
        return ConfigError(f"pause.placement={self.name}: expected {expected}{_where(window)}")


def _where(window: TextWindow) -> str:
    return f" (dataset {window.dataset}, split {window.split}, sample {window.sample})"
