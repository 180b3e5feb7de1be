"""Corpora as Megatron-LM's tools/preprocess_data.py writes them: megatron-core's tokenizers and builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

Encode = Callable[[str], list[int]]


def megatron_tokenizer(path: Path) -> tuple[Encode, int, int]:
    """How Megatron-LM encodes, with a SentencePiece model or a Hugging Face folder; its EOD; its number of ids."""
    from megatron.core.tokenizers import MegatronTokenizer

    library = "huggingface" if path.is_dir() else "sentencepiece"
    tokenizer = MegatronTokenizer.from_pretrained(tokenizer_path=str(path), metadata_path={"library": library})
    return tokenizer.tokenize, tokenizer.eod, tokenizer.vocab_size


def preprocess(
    prefix: Path,
    texts: Sequence[str],
    encode: Encode,
    eod: int | None,
    vocab_size: int,
    dtype: type | None = None,
) -> Path:
    """Write PREFIX.bin and PREFIX.idx as preprocess_data.py does, with --append-eod unless `eod` is None."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype or DType.optimal_dtype(vocab_size))
    for text in texts:
        ids = encode(text)
        if ids and eod is not None:
            ids = [*ids, eod]
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_ids(
    prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16, multimodal: bool = False
) -> Path:
    """Write documents of given ids, item by item, as older releases and other programs do."""
    import torch

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for ids in documents:
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
