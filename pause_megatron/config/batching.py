"""The arithmetic of a batch: micro x accumulation x data parallel = global; raw and text tokens; steps. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError


def pauses_per_window(rate: float, sequence_length: int) -> int:
    """M = round(rate x N): pauses inserted into a window of N tokens (Goyal et al., section 3.1)."""
    return round(rate * sequence_length)


def pause_range(text: str) -> range:
    """ "10" or "0..50" (both ends included), as `finetune.pauses` has it -> the numbers of pauses that may be drawn.

    Raises:
        ConfigError: neither a number nor a range.
    """
    low, dots, high = text.partition("..")
    ends = (low, high) if dots else (low, low)
    if not all(end.strip().isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
        raise ConfigError(f"finetune.pauses: expected a whole number or a range LOW..HIGH such as 0..50, came {text!r}")
    return range(int(ends[0]), int(ends[1]) + 1)


@dataclass(frozen=True)
class BatchPlan:
    """How the windows of an optimizer step spread over ranks and passes. Sizes are windows, the rest is tokens."""

    world_size: int
    tensor: int
    data_parallel: int
    micro_size: int
    accumulation: int
    global_size: int
    sequence_length: int
    pauses: int  # inserted per window, before the cut of window=trim
    pause_fraction: float  # expected pauses per input token
    steps: int | None  # of this run; of an extended one, those that are added

    @property
    def raw_tokens(self) -> int:
        """Text and pauses, per step."""
        return self.global_size * self.sequence_length

    @property
    def text_tokens(self) -> float:
        """Expected input tokens that are not pauses, per step."""
        return self.raw_tokens * (1 - self.pause_fraction)

    @property
    def target_rows(self) -> int:
        """Rows of a micro-batch that reach the head: those whose next token is text (expected, for a cut window)."""
        length = self.sequence_length
        pauses = self.pause_fraction * length * length / max(length - 1, 1)
        return round(self.micro_size * (length - pauses))

    @property
    def targets(self) -> int:
        """Rows that reach the head, per step."""
        return self.target_rows * self.accumulation * self.data_parallel

    @property
    def total_tokens(self) -> int | None:
        """Text and pauses, all steps."""
        return None if self.steps is None else self.steps * self.raw_tokens


def data_parallel_size(config: ResolvedConfig, world_size: int) -> int:
    """Ranks that see different data.

    Raises:
        ConfigError: parallel.tensor does not divide the ranks.
    """
    tensor = config.parallel.tensor
    if world_size < 1 or world_size % tensor:
        raise ConfigError(
            f"parallel.tensor: expected a divisor of the number of ranks ({world_size}), came {tensor}. "
            f"Start a multiple of {tensor} ranks or lower parallel.tensor"
        )
    return world_size // tensor


def batch_plan(config: ResolvedConfig, world_size: int) -> BatchPlan:
    """Split the global batch over the ranks.

    Args:
        config: a resolved configuration. world_size: ranks in all.

    Raises:
        ConfigError: parallel.tensor does not divide the ranks, or the global batch does not divide evenly.
    """
    data_parallel = data_parallel_size(config, world_size)
    batch = config.batch
    per_pass = batch.micro_size * data_parallel
    if batch.global_size % per_pass:
        below, above = batch.global_size // per_pass * per_pass, -(-batch.global_size // per_pass) * per_pass
        smaller = next((n for n in range(batch.micro_size, 0, -1) if batch.global_size % (n * data_parallel) == 0), 0)
        raise ConfigError(
            f"batch.global_size: expected a multiple of batch.micro_size ({batch.micro_size}) x data-parallel ranks "
            f"({world_size} ranks / parallel.tensor {config.parallel.tensor} = {data_parallel}) = {per_pass}, "
            f"came {batch.global_size}. Nearest: {f'{below} or ' if below else ''}{above}"
            + (f"; or keep it and give batch.micro_size={smaller}" if smaller else "")
        )
    length = config.data.sequence_length
    pauses = pauses_per_window(config.pause.rate, length)
    return BatchPlan(
        world_size=world_size,
        tensor=config.parallel.tensor,
        data_parallel=data_parallel,
        micro_size=batch.micro_size,
        accumulation=batch.global_size // per_pass,
        global_size=batch.global_size,
        sequence_length=length,
        pauses=pauses,
        pause_fraction=expected_pause_fraction(pauses, length, config.pause.window),
        steps=added_steps(config),
    )


def added_steps(config: ResolvedConfig) -> int | None:
    """Steps that a run takes after the one that it extends, all of them where it extends none; None: not known yet."""
    steps = config.train.steps
    return None if steps is None else steps - (config.train.extended_from or 0)


def expected_pause_fraction(pauses: int, sequence_length: int, window: str) -> float:
    """Expected share of pauses among the N input tokens of a window.

    A window holds N+1 tokens, inputs are the first N, and the very first is always text. So M pauses spread evenly
    over N places (exact), or over N+M places of which the cut leaves N (trim); N-1 of the places are inputs.
    """
    places = sequence_length + (pauses if window == "trim" else 0)
    return pauses / places * (sequence_length - 1) / sequence_length
