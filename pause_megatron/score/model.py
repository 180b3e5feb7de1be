"""The model of a scoring, as far as it is known without its weights; and whether its tokenizer is the corpus's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference.loading import DTYPES, check_folder, load
from pause_megatron.inference.prompts import PauseInfo, PromptEncoder

CONTEXT, BATCH_TOKENS = 2048, 8192
_PLACES = 64
_PLACE_TOKENS = 512


@dataclass(frozen=True)
class ModelFacts:
    """What the files of a model's folder say, without its weights.

    Attributes:
        positions: Largest number of positions; None where config.json names none.
        vocabulary: Number of rows of its embedding.
        pauses: Ids of its pauses.
        start: Id that its tokenizer puts before a text, such as a BOS; None for none.
        dtype: Data type of the weights as stored: "fp32", "bf16" or "fp16".
        encoder: Its tokenizer.
    """

    positions: int | None
    vocabulary: int
    pauses: range
    start: int | None
    dtype: str
    encoder: PromptEncoder


def read_facts(folder: Path) -> ModelFacts:
    """Read config.json and the tokenizer of a folder.

    Args:
        folder: What `export-hf` wrote, or another transformers folder with safetensors.

    Raises:
        DataError: It is no such folder, or its tokenizer puts several ids before a text.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_folder(folder)
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # transformers raises many types: each means an unusable folder
        raise DataError(
            f"{folder}: the configuration or the tokenizer cannot be loaded: {type(error).__name__}: "
            f"{str(error).strip()[:300]}"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    pause = PauseInfo.of(config, tokenizer)
    encoder = PromptEncoder(tokenizer, pause)
    if len(encoder.leading) > 1:
        raise DataError(
            f"{folder}: expected a tokenizer that puts at most one id before a text, got the ids {encoder.leading}"
        )
    stored = {str(value).removeprefix("torch."): name for name, value in DTYPES.items()}
    named = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch.")
    return ModelFacts(
        positions=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        pauses=pause.ids,
        start=encoder.leading[0] if encoder.leading else None,
        dtype=stored.get(named, "fp32"),
        encoder=encoder,
    )


def sizes(context: int | None, batch_tokens: int | None, facts: ModelFacts) -> tuple[int, int]:
    """Return the largest number of tokens that are read at a time, and that of a forward pass.

    Args:
        context: The first one; None for 2048, or the model's positions if fewer.
        batch_tokens: The second one; None for 8192, or the first one if larger.
        facts: What the model's files say.

    Raises:
        ConfigError: The model has fewer positions, or the second is less than the first.
    """
    limit = facts.positions
    context = context or min(CONTEXT, limit or CONTEXT)
    if context < 2 or (limit is not None and context > limit):
        raise ConfigError(f"--context: expected 2 to {limit:,}, the model's max_position_embeddings, got {context:,}")
    batch_tokens = batch_tokens or max(BATCH_TOKENS, context)
    if batch_tokens < context:
        raise ConfigError(f"--batch-tokens: expected at least --context {context:,}, got {batch_tokens:,}")
    return context, batch_tokens


def find_devices(device: str) -> tuple[str, ...]:
    """Return the devices of a scoring: all GPUs, or "cpu".

    Args:
        device: "cpu", "cuda", or "auto" for GPUs where there are any.

    Raises:
        ConfigError: "cuda" without a GPU.
    """
    import torch

    count = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not count:
        raise ConfigError("--device cuda: expected a CUDA device, this machine has none; use --device cpu")
    return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)


def load_model(folder: str | Path, device: str, dtype: str | None) -> Any:
    """Load the model of a folder, quietly, with the fastest attention that computes it exactly.

    Args:
        folder: What `export-hf` wrote, or another transformers folder with safetensors.
        device: "cpu", "cuda:0", ...
        dtype: "fp32", "bf16" or "fp16"; None for that of the stored weights.

    Raises:
        DataError: It cannot be loaded.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    attention = "sdpa" if getattr(known, "_supports_sdpa", True) else "eager"  # models with soft caps, such as Gemma 2
    return load(folder, device=device, dtype=dtype, attention=attention).model


def check_tokenizer(corpus: Corpus, folder: Path, facts: ModelFacts) -> None:
    """Check that the model's tokenizer gives the ids of the corpus, on texts of many places of it.

    Args:
        corpus: The corpus.
        folder: The model's folder, for messages.
        facts: What its files say.

    Raises:
        DataError: It gives other ids, or the model's vocabulary lacks an id of the corpus's tokenizer.
    """
    tokenizer = corpus.tokenizer
    largest = max(tokenizer.eod, tokenizer.vocab_size - 1 if tokenizer.pause_id >= tokenizer.vocab_size else 0)
    if largest >= facts.vocabulary:
        raise DataError(
            f"model {folder}: expected the tokenizer of corpus {corpus.prefix} with ids up to {largest:,}, got a "
            f"vocabulary of {facts.vocabulary:,} ids. Score with a model of the corpus's own tokenizer"
        )
    texts = _texts(corpus)
    # Hugging Face spells special tokens apart; in a corpus their names are text, which both sides encode as text.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    different = [
        (text, expected, actual)
        for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True)
        if (actual := facts.encoder.tokenizer(text, **options)["input_ids"]) != expected
    ]
    if different:
        text, expected, actual = different[0]
        at = next((at for at, pair in enumerate(zip(expected, actual, strict=False)) if pair[0] != pair[1]), 0)
        raise DataError(
            f"model {folder}: expected the tokenizer of corpus {corpus.prefix}, got one of other ids for "
            f"{len(different):,} of {len(texts):,} texts: in {text[:60]!r}, token {at:,} is {expected[at : at + 5]} in "
            f"the corpus's and {actual[at : at + 5]} in the model's. Score with a model of the corpus's own tokenizer"
        )


def _texts(corpus: Corpus) -> list[str]:
    """Return texts of evenly spaced places of the corpus, each within a document."""
    tokens = np.memmap(path_of(corpus.prefix, "bin"), dtype=corpus.manifest.dtype, mode="r")
    places = np.linspace(0, max(len(tokens) - _PLACE_TOKENS, 0), _PLACES).astype(np.int64)
    found = []
    for place in dict.fromkeys(places.tolist()):
        ids = np.array(tokens[place : place + _PLACE_TOKENS], dtype=np.int64)
        documents = np.split(ids, np.flatnonzero(ids == corpus.tokenizer.eod) + 1)
        found.append(corpus.tokenizer.decode(max(documents, key=len).tolist()))
    return [text for text in found if text]
