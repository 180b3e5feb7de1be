"""One process of a scoring: it computes units, each from the corpus to its file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch

from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.errors import DataError
from pause_megatron.score.model import load_model
from pause_megatron.score.plan import Parts, ScorePlan
from pause_megatron.score.values import Scorer
from pause_megatron.score.windows import Unit, Window, batches_of


@dataclass(frozen=True)
class UnitConfig:
    """What a process needs to compute units.

    Attributes:
        prefix: PREFIX of the corpus.
        name: Name of the side array.
        model: Folder of the model.
        devices: Devices of the processes, used in turn.
        bin_dtype: Data type of the ids in `.bin`.
        pauses: Ids of the model's pauses.
        vocabulary: Number of rows of its embedding.
        plan: The plan.
    """

    prefix: str
    name: str
    model: str
    devices: tuple[str, ...]
    bin_dtype: str
    pauses: range
    vocabulary: int
    plan: ScorePlan


class UnitScorer:
    """The model of a process, loaded once.

    Args:
        config: What it needs.
        device: Its device.

    Attributes:
        model: The model.

    Raises:
        DataError: The model cannot be loaded.
    """

    def __init__(self, config: UnitConfig, device: str) -> None:
        self._config, side = config, config.plan.side
        self.model = load_model(config.model, device, side.compute)
        self._scorer = Scorer(self.model, config.pauses, cast(Literal["loss", "entropy"], side.kind))
        self._parts = Parts(config.prefix, config.name, config.plan)
        self._tokens = np.memmap(path_of(config.prefix, "bin"), dtype=config.bin_dtype, mode="r")

    def score(self, unit: Unit, on_tokens: Callable[[int], bool]) -> bool:
        """Compute a unit and write its file.

        Args:
            unit: The unit.
            on_tokens: Called after each batch with the number of tokens that now have values; False stops.

        Returns:
            Whether it was finished.

        Raises:
            DataError: The device is out of memory, a value is not finite, or an id is not the model's.
            OSError: The file cannot be written.
        """
        side = self._config.plan.side
        assert side.context is not None and side.batch_tokens is not None
        self._check_ids(unit)
        values = np.full(len(unit), np.nan, dtype=np.float32)
        for batch in batches_of(unit.windows(side.context), side.batch_tokens):
            try:
                found = self._scorer.values(*self._rows(batch)).numpy()
            except (RuntimeError, MemoryError) as error:
                raise DataError(f"{unit}: {describe(error)}") from None
            counts = [window.stop - window.scored for window in batch]
            for window, part in zip(batch, np.split(found, np.cumsum(counts)[:-1]), strict=True):
                values[window.scored - unit.start : window.stop - unit.start] = part
            if not on_tokens(len(found)):
                return False
        with np.errstate(over="ignore"):
            stored = values.astype(side.dtype)
        if not (finite := np.isfinite(stored)).all():
            first = int(np.argmin(finite))
            remedy = "compute with --dtype fp32, or check the model"
            if np.isfinite(values[first]):
                remedy = "choose --store float32"
            raise DataError(
                f"{unit}: token {unit.start + first:,}: expected a finite {side.kind} in {side.dtype}, got "
                f"{values[first]}; {remedy}"
            )
        self._parts.save(unit, stored)
        return True

    def _rows(self, batch: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the ids that the model reads, those that it predicts (int64), and whether they get a value (bool).

        Each is of the shape [windows, tokens of the longest].
        """
        inputs = np.zeros((len(batch), len(batch[0])), dtype=np.int64)
        targets, scored, start = np.zeros_like(inputs), np.zeros(inputs.shape, dtype=bool), self._config.plan.side.start
        assert start is not None
        for row, window in enumerate(batch):
            targets[row, : len(window)] = self._tokens[window.first : window.stop]
            inputs[row, 1 : len(window)] = targets[row, : len(window) - 1]
            inputs[row, 0] = start if window.begins else self._tokens[window.first - 1]
            scored[row, window.scored - window.first : len(window)] = True
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(scored)

    def _check_ids(self, unit: Unit) -> None:
        tokens, pauses = self._tokens[unit.start : unit.stop], self._config.pauses
        wrong = (tokens >= self._config.vocabulary) | (tokens < 0)
        if pauses:
            wrong |= (tokens >= pauses.start) & (tokens < pauses.stop)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise DataError(
                f"{path_of(self._config.prefix, 'bin')}: token {unit.start + first:,}: expected an id below "
                f"{self._config.vocabulary:,} that is no pause of the model, got {tokens[first]}"
            )


def describe(error: Exception) -> str:
    """Return the first line of an error of the device, and what helps against one of its memory."""
    text = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in text
    return f"out of memory ({text}); use fewer --batch-tokens or --processes" if memory else text
