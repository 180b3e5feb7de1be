"""The train windows of a run that extends a finished one: the unread rest of the corpora, else the corpora read again.

The number of windows decides how megatron-core shuffles a corpus that is read in several epochs. An extension cannot
simply ask for more windows: those that were read would come again in another order. Within the first epoch, the order
does not depend on the number. So the windows after the first `before` are:

  all windows of the run are in the first epoch of each corpus    the next ones in the same order; none was read before;
  otherwise                                                       the corpora read again, as another epoch, with an
                                                                  order and pauses of its own.

Both are functions of only the configuration, so that an extended run resumes like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseGPTDatasetConfig
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import positive_seed

Build = Callable[[PauseGPTDatasetConfig, Split, int | None], PauseGPTDataset | BlendedDataset]
"""Builds a split: (configuration, split, number of windows or None for one epoch) -> dataset."""


class TooFewWindows(ConfigError):
    """Corpora without weights, which are read once each, hold fewer windows than were asked for."""


class LaterWindows:
    """The windows of an extension, under their numbers in the run, which begin with `first`.

    Args:
        windows: The windows of the extension, numbered from 0.
        first: Number of the first of them in the run.

    Attributes:
        datasets: The datasets of the single corpora, as in BlendedDataset.
    """

    def __init__(self, windows: PauseGPTDataset | BlendedDataset, first: int) -> None:
        self._windows, self._first = windows, first
        self.datasets = corpora_of(windows)

    def __len__(self) -> int:
        return self._first + len(self._windows)

    def __getitem__(self, idx: int) -> Mapping[str, torch.Tensor]:
        """Return window `idx` of the run.

        Raises:
            IndexError: The window belongs to the finished run.
        """
        if idx < self._first:
            raise IndexError(f"window {idx}: expected {self._first} or more, the windows of the extension")
        return self._windows[idx - self._first]


TrainWindows: TypeAlias = PauseGPTDataset | BlendedDataset | LaterWindows


def corpora_of(dataset: TrainWindows) -> list[PauseGPTDataset]:
    """Return the datasets of the single corpora that a dataset blends; of one corpus, the dataset itself."""
    return [dataset] if isinstance(dataset, PauseGPTDataset) else list(dataset.datasets)


def train_windows(build: Build, config: PauseGPTDatasetConfig, samples: int | None, before: int) -> TrainWindows:
    """Return the train windows of a run.

    Args:
        build: Builds a split.
        config: The configuration of the train split.
        samples: Windows that the whole run needs. None: those of one epoch; not for an extension.
        before: Windows that a finished run was given, which this one extends. 0: no extension.

    Returns:
        The windows by their number in the run. Those below `before` may be missing.

    Raises:
        ConfigError: As `build` does.
    """
    if not before or samples is None:
        return build(config, Split.train, samples)
    try:
        windows = build(config, Split.train, samples)
        if all(_is_one_epoch(corpus) for corpus in corpora_of(windows)):
            return windows
    except TooFewWindows:
        pass
    again = dataclasses.replace(config, pause_seed=positive_seed(config.pause_seed, before))
    again.random_seed = positive_seed(config.random_seed, before)
    return LaterWindows(build(again, Split.train, samples - before), before)


def _is_one_epoch(corpus: PauseGPTDataset) -> bool:
    """Return whether each document of the split occurs once in the document index of the corpus."""
    count = float(len(corpus.dataset.sequence_lengths))
    first, end = (round(bound * count) for bound in corpus.config.split_matrix[corpus.index_split.value])
    return len(corpus.document_index) <= end - first
