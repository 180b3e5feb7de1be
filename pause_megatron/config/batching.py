"""Batch arithmetic: micro-batch x gradient accumulation x data parallel = global batch; tokens and steps."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.pauses import OBJECTIVES, PauseCounts
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError


def pause_range(text: str) -> range:
    """Return the numbers of pauses that `finetune.pauses` allows: "10", or "0..50" with both ends included.

    Args:
        text: The value of the key.

    Raises:
        ConfigError: The text is neither a number nor a range.
    """
    low, dots, high = text.partition("..")
    ends = (low, high) if dots else (low, low)
    if not all(end.strip().isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
        raise ConfigError(f"finetune.pauses: expected a whole number or a range LOW..HIGH such as 0..50, got {text!r}")
    return range(int(ends[0]), int(ends[1]) + 1)


def pause_counts(config: ResolvedConfig) -> PauseCounts:
    """Return pauses and text tokens of a pretraining window.

    Args:
        config: Resolved configuration.
    """
    pause = config.pause
    return PauseCounts(config.data.sequence_length, pause.rate, pause.window, pause.placement, pause.run)


def positions(config: ResolvedConfig) -> int:
    """Return the most positions of a window: its tokens; with `pause.positions=shared`, those of them that are text.

    Args:
        config: Resolved configuration.
    """
    length = config.data.sequence_length
    if config.pause.positions != "shared":
        return length
    if config.task.name is not None:
        return length - pause_range(config.finetune.pauses).start
    if config.pause.placement == "every" and config.pause.rate:  # a window begins with text
        return -(-length // (config.pause.run + 1))
    return min(length, pause_counts(config).text_length)


@dataclass(frozen=True)
class BatchPlan:
    """The windows of an optimizer step over ranks and micro-batches.

    Attributes:
        world_size: Ranks in all.
        tensor: Tensor-parallel size.
        data_parallel: Data-parallel size.
        micro_size: Windows of a micro-batch.
        accumulation: Gradient accumulation steps: micro-batches of a rank per optimizer step.
        global_size: Windows of an optimizer step, over all ranks.
        counts: Pauses and text tokens of a window.
        steps: Optimizer steps of this run; of an extended one, those that are added; None where not known yet.
        runs: Whether the objective needs the rows of whole runs: a text token and the pauses after it. Of an objective
            of the user's that is not known without its code; one row a target is assumed.
    """

    world_size: int
    tensor: int
    data_parallel: int
    micro_size: int
    accumulation: int
    global_size: int
    counts: PauseCounts
    steps: int | None
    runs: bool = False

    @property
    def sequence_length(self) -> int:
        """Input tokens of a window."""
        return self.counts.sequence_length

    @property
    def pauses(self) -> int:
        """Pauses inserted into a window, before the cut of `pause.window=trim`."""
        return self.counts.inserted

    @property
    def pause_fraction(self) -> float:
        """Expected pauses per input token."""
        return self.counts.input_fraction

    @property
    def raw_tokens(self) -> int:
        """Text and pauses per step."""
        return self.global_size * self.sequence_length

    @property
    def text_tokens(self) -> float:
        """Expected input tokens that are not pauses, per step."""
        return self.raw_tokens * (1 - self.pause_fraction)

    @property
    def target_rows(self) -> int:
        """Rows of a micro-batch that reach the LM head: those whose next token is text (expected, in a trim window).

        With runs all of them, but for the pauses at the end of a window whose target is beyond it.
        """
        if self.runs:
            return self.micro_size * self.sequence_length
        return round(self.micro_size * (self.sequence_length - self.counts.expected))

    @property
    def targets(self) -> int:
        """Rows that reach the LM head per step, over all data-parallel ranks."""
        return self.target_rows * self.accumulation * self.data_parallel

    @property
    def total_tokens(self) -> int | None:
        """Text and pauses of all steps; None where the number of steps is not known yet."""
        return None if self.steps is None else self.steps * self.raw_tokens


def data_parallel_size(config: ResolvedConfig, world_size: int) -> int:
    """Return the data-parallel size: ranks that see different windows.

    Args:
        config: Resolved configuration.
        world_size: Ranks in all.

    Raises:
        ConfigError: `parallel.tensor` does not divide the number of ranks.
    """
    tensor = config.parallel.tensor
    if world_size < 1 or world_size % tensor:
        raise ConfigError(
            f"parallel.tensor: expected a divisor of the number of ranks ({world_size}), got {tensor}. "
            f"Start a multiple of {tensor} ranks or lower parallel.tensor"
        )
    return world_size // tensor


def batch_plan(config: ResolvedConfig, world_size: int) -> BatchPlan:
    """Split the global batch over the ranks.

    Args:
        config: Resolved configuration.
        world_size: Ranks in all.

    Returns:
        Sizes of the micro-batches, and the tokens that follow from them.

    Raises:
        ConfigError: `parallel.tensor` does not divide the number of ranks, or the global batch does not divide evenly.
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
            f"got {batch.global_size}. Nearest: {f'{below} or ' if below else ''}{above}"
            + (f"; or keep it and give batch.micro_size={smaller}" if smaller else "")
        )
    return BatchPlan(
        world_size=world_size,
        tensor=config.parallel.tensor,
        data_parallel=data_parallel,
        micro_size=batch.micro_size,
        accumulation=batch.global_size // per_pass,
        global_size=batch.global_size,
        counts=pause_counts(config),
        steps=added_steps(config),
        runs=config.objective.name in OBJECTIVES[1:],
    )


def added_steps(config: ResolvedConfig) -> int | None:
    """Return the optimizer steps that a run takes after the run it extends; all of them where it extends none.

    Args:
        config: Resolved configuration.

    Returns:
        The number; None where `train.steps` is not known yet.
    """
    steps = config.train.steps
    return None if steps is None else steps - (config.train.extended_from or 0)
