"""Windows of a benchmark: of the run's corpus or task, else of synthetic text.

Synthetic text passes through the code of `data.source`: pauses, kept rows, positions and documents cost what they cost
in a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pause_megatron.config.load import scheduled
from pause_megatron.config.pauses import BY_PATTERN
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.data.stream.windows import StreamDataset
from pause_megatron.data.windows.dataset import PauseTokenizer
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.errors import ConfigError
from pause_megatron.train.finetune import training_data
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.inputs.task_data import open_task
from pause_megatron.train.pretrain import corpus_data

DOCUMENT_TOKENS = 427
"""Mean length of a synthetic document, as in C4's English part: 156 G tokens (Dodge et al. 2021), 365 M documents."""


@dataclass(frozen=True)
class SyntheticIds:
    """A vocabulary of ids without text, in place of a tokenizer.

    Attributes:
        vocab_size: Number of ids.
        eod: Id that ends a document.
    """

    vocab_size: int
    eod: int = 0


class SyntheticText:
    """Synthetic text by window number: uniform ids, documents of about `DOCUMENT_TOKENS` tokens.

    Args:
        ids: The vocabulary.
        length: T, text tokens of a window.
        seed: Seed of the ids.
    """

    def __init__(self, ids: SyntheticIds, length: int, seed: int) -> None:
        self._ids, self._length, self._seed = ids, length, seed

    def text(self, sample: int) -> np.ndarray:
        """Return the text of a window, int64 [T].

        Args:
            sample: Number of the window.
        """
        draw = np.random.Generator(np.random.Philox(key=(self._seed, sample)))
        text = draw.integers(0, self._ids.vocab_size, self._length)
        text[text == self._ids.eod] = self._ids.vocab_size - 1
        text[draw.random(self._length) < 1 / DOCUMENT_TOKENS] = self._ids.eod
        return text


def synthetic_windows(config: ScheduledConfig, text_size: int) -> TrainingData:
    """Return windows of synthetic text for a pretraining.

    Args:
        config: Configuration with a known number of steps.
        text_size: Ids of the text vocabulary; the pause ids follow them.
    """
    ids = SyntheticIds(text_size)
    pause = config.pause
    weights = config.objective.token_weights
    reads = [f"pause.placement={pause.placement}"] if pause.placement in ("scored", *BY_PATTERN) else []
    reads += [f"objective.token_weights={weights}"] if weights == "side" else []
    if reads:
        raise ConfigError(
            f"data.prefix: expected a corpus with {' and '.join(reads)}, got none: synthetic ids have neither texts "
            "nor side values"
        )
    plan = PausePlan.of(pause, config.data.sequence_length)
    pause_ids = PauseTokenizer(ids, pause.embeddings).pause_ids
    windows = StreamDataset(
        SyntheticText(ids, plan.text_length, config.run.seed),
        PauseInjector(plan, pause_ids, "made-up", "train"),
        config.train.steps * config.batch.global_size,
        eod=ids.eod,
        intra_document_masking=config.data.intra_document_masking,
        eod_mask_loss=config.data.eod_mask_loss,
        shared_positions=config.pause.positions == "shared",
    )
    return TrainingData(
        train=windows,
        valid=None,
        valid_without_pauses=None,
        tokenizer=ids,  # type: ignore[arg-type]  # a model reads its vocab_size only
        pause_ids=pause_ids,
        fingerprint="",
        description=f"synthetic text of {text_size:,} ids",
        show=lambda batch: "",
    )


def windows_of(
    config: ResolvedConfig, text_size: int, *, ranks: int, rank: int
) -> tuple[ScheduledConfig, TrainingData]:
    """Return the windows of a run, and its configuration with a known number of steps. Every rank calls this.

    Args:
        config: Resolved configuration with `train.steps`, `train.tokens` or `finetune.epochs`.
        text_size: Ids of synthetic text.
        ranks: World size.
        rank: This rank.

    Raises:
        PauseMegatronError: A corpus, task or tokenizer cannot be used.
    """
    if config.task.name is not None:
        task = open_task(config)
        return task.config, training_data(task)
    run = scheduled(config)
    if config.data.prefix or config.data.source:
        return run, corpus_data(run, ranks, rank)
    return run, synthetic_windows(run, text_size)
