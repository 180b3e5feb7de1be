"""The sampler: optimizer step -> sample numbers of one data-parallel rank. Its only state is the step."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.errors import ConfigError


@dataclass(frozen=True)
class StepSampler:
    """A sampler that distributes the samples of a step over data-parallel ranks and their micro-batches.

    Step k (from 0) covers the global sample numbers [k * global_size, (k + 1) * global_size) in every topology.
    Micro-batch a of rank r takes the micro_size numbers from k * global_size + (a * dp_size + r) * micro_size on, as in
    Megatron-LM. Reading micro-batch by micro-batch and rank by rank gives the samples in order.

    Attributes:
        global_size: Samples per optimizer step, over all ranks.
        micro_size: Samples per forward and backward pass on one rank.
        dp_rank: This data-parallel rank, 0 <= dp_rank < dp_size.
        dp_size: Number of data-parallel ranks.

    Raises:
        ConfigError: A size is not positive, or the micro-batches of all ranks do not divide the global batch.
    """

    global_size: int
    micro_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        for name, value in (
            ("batch.global_size", self.global_size),
            ("batch.micro_size", self.micro_size),
            ("data-parallel ranks", self.dp_size),
        ):
            if value < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {value}")
        if not 0 <= self.dp_rank < self.dp_size:
            raise ConfigError(f"data-parallel rank: expected 0 to {self.dp_size - 1}, got {self.dp_rank}")
        if self.global_size % (self.micro_size * self.dp_size):
            raise ConfigError(
                f"batch.global_size: expected a multiple of batch.micro_size={self.micro_size} x {self.dp_size} "
                f"data-parallel ranks, got {self.global_size}"
            )

    @property
    def accumulation(self) -> int:
        """Gradient accumulation steps: micro-batches per optimizer step on one rank."""
        return self.global_size // (self.micro_size * self.dp_size)

    def indices(self, step: int) -> list[range]:
        """Return the sample numbers of this rank's micro-batches in a step, one range of micro_size for each."""
        first = step * self.global_size + self.dp_rank * self.micro_size
        stride = self.dp_size * self.micro_size
        return [
            range(first + round_ * stride, first + round_ * stride + self.micro_size)
            for round_ in range(self.accumulation)
        ]
