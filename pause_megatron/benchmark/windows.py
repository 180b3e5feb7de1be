"""Windows to benchmark on: of the run's own corpus or task where it has one, else of made-up text.

Made-up text has no meaning, but everything that takes time is a run's own: pauses are placed, and kept rows, positions
and documents follow from them, by the code that serves data.source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pause_megatron.config.load import scheduled
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.data.stream.windows import StreamDataset
from pause_megatron.data.windows.dataset import PauseTokenizer
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.train.finetune import training_data
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.inputs.task_data import open_task
from pause_megatron.train.pretrain import corpus_data

DOCUMENT_TOKENS = 427
"""Mean length of a made-up document, that of C4's English part: 156 G tokens (Dodge et al. 2021) in 365 M documents."""


@dataclass(frozen=True)
class MadeUpIds:
    """The ids of a vocabulary without words, in place of a tokenizer. `eod` ends a document."""

    vocab_size: int
    eod: int = 0


class MadeUpText:
    """Text by window number: ids drawn evenly, documents of about `DOCUMENT_TOKENS` tokens.

    Args:
        ids: the vocabulary.
        length: T, tokens of a window before its pauses.
        seed: of the ids.
    """

    def __init__(self, ids: MadeUpIds, length: int, seed: int) -> None:
        self._ids, self._length, self._seed = ids, length, seed

    def text(self, sample: int) -> np.ndarray:
        """The text of a window: int64 [T]."""
        draw = np.random.Generator(np.random.Philox(key=(self._seed, sample)))
        text = draw.integers(0, self._ids.vocab_size, self._length)
        text[text == self._ids.eod] = self._ids.vocab_size - 1
        text[draw.random(self._length) < 1 / DOCUMENT_TOKENS] = self._ids.eod
        return text


def made_up(config: ScheduledConfig, text_size: int) -> TrainingData:
    """Windows of made-up text for a pretraining; `text_size` ids, the pauses behind them."""
    ids = MadeUpIds(text_size)
    pause = config.pause
    plan = PausePlan(config.data.sequence_length, pause.rate, pause.window, pause.placement, pause.seed)
    pause_ids = PauseTokenizer(ids, pause.embeddings).pause_ids
    windows = StreamDataset(
        MadeUpText(ids, plan.text_length, config.run.seed),
        PauseInjector(plan, pause_ids, "made-up", "train"),
        config.train.steps * config.batch.global_size,
        eod=ids.eod,
        intra_document_masking=config.data.intra_document_masking,
        eod_mask_loss=config.data.eod_mask_loss,
    )
    return TrainingData(
        train=windows,
        valid=None,
        valid_without_pauses=None,
        tokenizer=ids,
        pause_ids=pause_ids,
        fingerprint="",
        description=f"made-up text of {text_size:,} ids",
        show=lambda batch: "",
    )


def windows_of(
    config: ResolvedConfig, text_size: int, *, ranks: int, rank: int
) -> tuple[ScheduledConfig, TrainingData]:
    """What the steps read, and the configuration with what follows from it. Every rank calls this.

    Args:
        config: resolved, its length known from train.steps, train.tokens or finetune.epochs.
        text_size: ids of made-up text.
        ranks, rank: in all, and which.

    Raises:
        PauseMegatronError: a corpus, task or tokenizer that cannot be used.
    """
    if config.task.name is not None:
        task = open_task(config)
        return task.config, training_data(task)
    run = scheduled(config)
    if config.data.prefix or config.data.source:
        return run, corpus_data(run, ranks, rank)
    return run, made_up(run, text_size)
