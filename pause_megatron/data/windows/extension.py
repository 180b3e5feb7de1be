"""The windows of a run that goes on behind its end: what the corpus still holds, else the corpus anew.

The number of windows decides how megatron-core shuffles a corpus that is read more than once, so a run cannot simply
be given more of them: those that it has seen would come again in another order. While a corpus is read for the first
time, the order does not depend on the number. Hence the rule for the windows behind the first `before`:

  all of the run's windows are of the first reading of each corpus    they follow in the same order: none of them has
                                                                      been read;
  else                                                                the corpus is read anew, in an order and with
                                                                      pauses of its own, as another epoch.

Both are functions of the configuration alone, so that an extended run resumes like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.data.batches.loader import Samples
from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseGPTDatasetConfig
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import positive_seed

Build = Callable[[PauseGPTDatasetConfig, Split, int | None], PauseGPTDataset | BlendedDataset]


class TooFewWindows(ConfigError):
    """Corpora without weights, which are read once each, hold fewer windows than were asked for."""


class LaterWindows:
    """Windows by the number that they have in a run, beginning with `first`."""

    def __init__(self, windows: Samples, first: int) -> None:
        self._windows, self._first = windows, first
        self.datasets = getattr(windows, "datasets", [windows])  # those of the corpora, as BlendedDataset names them

    def __len__(self) -> int:
        return self._first + len(self._windows)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """Window `idx` of the run.

        Raises:
            IndexError: it is of the run before.
        """
        if idx < self._first:
            raise IndexError(f"window {idx} was read before the run was extended, behind window {self._first - 1}")
        return self._windows[idx - self._first]


def read_on(build: Build, config: PauseGPTDatasetConfig, samples: int | None, before: int) -> Samples:
    """The training windows of a run.

    Args:
        build: (configuration, split, number of windows or None) -> windows
        config: of the run
        samples: windows that the whole run needs; None: those of one pass
        before: of these, windows that a finished run was given, which this one extends; 0: it extends none

    Returns:
        the windows by their number in the run; those below `before` may be missing.

    Raises:
        ConfigError: as `build`.
    """
    if not before:
        return build(config, Split.train, samples)
    try:
        whole = build(config, Split.train, samples)
        if _all_of_first_readings(whole):
            return whole
    except TooFewWindows:
        pass
    own = dataclasses.replace(
        config, random_seed=_seed(config.random_seed, before), pause_seed=_seed(config.pause_seed, before)
    )
    return LaterWindows(build(own, Split.train, samples - before), before)


def _all_of_first_readings(windows: PauseGPTDataset | BlendedDataset) -> bool:
    corpora = windows.datasets if isinstance(windows, BlendedDataset) else [windows]
    return all(_is_one_reading(corpus) for corpus in corpora)


def _is_one_reading(corpus: PauseGPTDataset) -> bool:
    """Whether each document of the split stands once in the corpus's document index."""
    count = float(len(corpus.dataset.sequence_lengths))
    first, end = (round(bound * count) for bound in corpus.config.split_matrix[corpus.index_split.value])
    return len(corpus.document_index) <= end - first


def _seed(seed: int, before: int) -> int:
    """Another seed, below 2**31."""
    return positive_seed(seed, before)
