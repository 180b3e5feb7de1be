"""The configuration of an imported checkpoint, checked with the places its values were read from."""

from __future__ import annotations

from typing import Literal

from pause_megatron.config.load import resolve
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.rules import check
from pause_megatron.config.schema import (
    DataSection,
    EngineSection,
    ParallelSection,
    PauseSection,
    Precision,
    ResolvedConfig,
    RunConfig,
)


def imported_config(
    model: ResolvedModel,
    *,
    where: str,
    sequence_length: int,
    embeddings: int,
    tensor_parallel: int,
    precision: Precision,
    positions: Literal["own", "shared"] = "own",
) -> ResolvedConfig:
    """Return the configuration of an imported checkpoint.

    Args:
        model: Sizes and options of the source.
        where: Names the source in messages.
        sequence_length: Longest window.
        embeddings: Number of pause rows.
        tensor_parallel: Tensor-parallel size of the checkpoint.
        precision: Type of the source's weights; that of a run which starts from them.
        positions: Positions of the source's pauses, as `pause.positions`.

    Raises:
        ConfigError: A rule about models is broken; it names the source and the option.
    """
    config = resolve(
        RunConfig(
            data=DataSection(sequence_length=sequence_length),
            model=model,
            pause=PauseSection(rate=0.0, embeddings=embeddings, positions=positions),
            parallel=ParallelSection(tensor=tensor_parallel),
            engine=EngineSection(precision=precision),
        )
    )
    origin = {f"model.{name}": where for name in type(model).model_fields}
    check(config, {**origin, "parallel.tensor": "--tensor-parallel", "data.sequence_length": "--sequence-length"})
    return config
