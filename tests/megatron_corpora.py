"""Corpora as Megatron-LM's tools/preprocess_data.py writes them: tokenizers' own libraries, megatron-core's builder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

Encode = Callable[[str], list[int]]


def sentencepiece_of(model: Path) -> tuple[Encode, int, int]:
    """How Megatron-LM encodes with a SentencePiece model; its EOD; its number of ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return processor.encode_as_ids, processor.eos_id(), processor.vocab_size()


def hugging_face_of(folder: Path) -> tuple[Encode, int, int]:
    """The same with a Hugging Face folder: literal special tokens in a text become special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer.encode, tokenizer.eos_token_id, len(tokenizer)


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
