"""What a run trains on, as the training loop sees it: the same for a corpus, a stream and a task's examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.data.batches.loader import Samples
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.distributed import ParallelContext
from pause_megatron.train.inputs.streaming import Stream


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows that a validation scores.

    Attributes:
        windows: Window number -> sample.
        count: How many of them are scored, from the first one on.
        names: Names of the corpora, where the windows are a blend.
    """

    windows: Samples
    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """The windows of a run and what belongs to them.

    Attributes:
        train: Training windows of the whole run, by number; None where `stream` reads them.
        valid: Held-out windows with pauses; None: no validation.
        valid_without_pauses: Held-out windows without pauses; the windows of `valid` where the run has no pauses.
        tokenizer: Tokenizer of all of them.
        pause_ids: The K pause ids.
        fingerprint: Digest of all that affects the windows and is no key of the configuration.
        description: What a step reads, in a few words.
        show: Returns the first window of a micro-batch as text.
        names: Names of the corpora that `train` blends; empty for one corpus.
        stream: Opens the stream of `data.source` where a checkpoint's folder left it (None: its beginning). Every rank
            calls it.
        auxiliary_heads: Number of auxiliary heads that the windows' hints need.
    """

    train: Samples | None
    valid: HeldOut | None
    valid_without_pauses: HeldOut | None
    tokenizer: Tokenizer
    pause_ids: range
    fingerprint: str
    description: str
    show: Callable[[MicroBatch], str]
    names: tuple[str, ...] = ()
    stream: Callable[[ParallelContext, Path | None], Stream] | None = None
    auxiliary_heads: int = 0
