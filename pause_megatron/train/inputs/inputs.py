"""What a run trains on, as the loop sees it: the same for a corpus and for a task's examples."""

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
    """The windows of one validation: the first `count` of these. `names`: of the corpora, where they are a blend."""

    windows: Samples
    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingData:
    """Attributes:
    train: windows of the whole run, by number; None where they are streamed
    valid: held-out windows with pauses; None: no validation
    valid_without_pauses: held-out windows without pauses; the windows of `valid` themselves where the run has none
    tokenizer: of all of them
    pause_ids: the K pause ids
    fingerprint: of all that decides the windows and is no key of the configuration
    description: what a step reads, in a few words
    show: the first window of a micro-batch as text
    names: of the corpora that `train` blends; empty for one
    stream: opens the stream at the place that a checkpoint's folder says (None: its beginning). Every rank calls it
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
