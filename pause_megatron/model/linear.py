"""megatron-core's parallel linear layers with a bias where `add_bias_linear` has none, and with a norm of the output.

A bias is added within the layer. megatron-core's layers would return it to be added later, when ZeRO-3 has freed it.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from pause_megatron.model.norm import RMSNorm


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel layer with a bias. Arguments as ColumnParallelLinear."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "bias": True, "skip_bias_add": False})


class BiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel layer with a bias, which is added once. Arguments as RowParallelLinear."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "bias": True, "skip_bias_add": False})


class NormedRowParallelLinear(RowParallelLinear):
    """A row-parallel layer with an RMSNorm of its output, bias included, as OLMo 2's layers have.

    It writes into the residual stream; under sequence parallelism each rank normalizes its part of the sequence.
    Arguments as RowParallelLinear.
    """

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **{**options, "skip_bias_add": False})
        config: Any = self.config
        self.post_layernorm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Compute the normalized product, [seq, batch, output_size].

        Args:
            input_: [seq, batch, this rank's part of input_size].
        """
        output, _ = super().forward(input_)
        return self.post_layernorm(output), None


class BiasedNormedRowParallelLinear(NormedRowParallelLinear):
    """A row-parallel layer with a bias and an RMSNorm of its output. Arguments as RowParallelLinear."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **{**options, "bias": True})


def row_parallel(*, bias: bool, normed: bool) -> type[RowParallelLinear]:
    """Return the class of a layer that writes into the residual stream.

    Args:
        bias: Whether it has a bias.
        normed: Whether its output is normalized.
    """
    if normed:
        return BiasedNormedRowParallelLinear if bias else NormedRowParallelLinear
    return BiasedRowParallelLinear if bias else RowParallelLinear
