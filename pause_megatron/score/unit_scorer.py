"""One process of a scoring: it computes units, and writes each to its file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pause_megatron.errors import DataError
from pause_megatron.score.model import load_model
from pause_megatron.score.plan import Parts, UnitConfig
from pause_megatron.score.units import Unit
from pause_megatron.score.values import Scorer


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
        self._batches, self._plan = config.batches, config.plan
        self.model = load_model(config.model, device, config.plan.compute_dtype)
        self._scorer = Scorer(self.model, config.pauses, config.plan.value_kind)
        self._parts = Parts(config.folder, config.plan)

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
        values = np.full(len(unit), np.nan, dtype=np.float32)
        for batch in self._batches(unit):
            rows = map(torch.from_numpy, (batch.inputs, batch.targets, batch.scored))
            try:
                found = self._scorer.values(*rows).numpy()
            except (RuntimeError, MemoryError) as error:
                raise DataError(f"{unit}: {describe(error)}") from None
            values[batch.places] = found
            if not on_tokens(len(found)):
                return False
        self._parts.save(unit, self._stored(unit, values))
        return True

    def _stored(self, unit: Unit, values: np.ndarray) -> np.ndarray:
        """Return values in the data type that they are stored in."""
        with np.errstate(over="ignore"):
            stored = values.astype(self._plan.dtype)
        if not (finite := np.isfinite(stored)).all():
            first = int(np.argmin(finite))
            remedy = "compute with --dtype fp32, or check the model"
            if np.isfinite(values[first]):
                remedy = "choose --store float32"
            raise DataError(
                f"{unit}: {unit.place(first)}: expected a finite {self._plan.value_kind} in {self._plan.dtype}, got "
                f"{values[first]}; {remedy}"
            )
        return stored


def describe(error: Exception) -> str:
    """Return the first line of an error of the device, and what helps against one of its memory."""
    text = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in text
    return f"out of memory ({text}); use fewer --batch-tokens or --processes" if memory else text
