"""Parity check of exports and imports: logits on windows with pauses and token ids, native and by transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pause_megatron.checkpoint import load_weights
from pause_megatron.config.schema import ParallelSection
from pause_megatron.data.corpus.corpora import open_corpora
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.tokenizer.tokenizer import ids_before
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.distributed import initialize
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import CheckpointError, PauseMegatronError
from pause_megatron.hf.checkpoint import NativeCheckpoint
from pause_megatron.model import build_model

WINDOWS = 2
_LONGEST_WINDOW = 512
_LINES = 2000
_TOKENS = 200_000
_RELATIVE_TOLERANCE = 1e-5
_DEFAULT_RATE = 0.1

SENTENCES = (
    "The committee met on Tuesday, 4 March 1997, and adjourned at 11:45 a.m. without a vote.",
    "She asked how many apples were left; there were 3,141 of them, or about 12.5 % of the harvest.",
    "It isn't what we don't know that gives us trouble, it's what we know that ain't so.",
    "Water boils at 100 °C (212 °F) at sea level, but at 8,848 m it boils at roughly 70 °C.",
    "for i in range(10):\n    print(f'{i:>3} squared is {i**2}')",
    "The naïve café owner — Zoë, née Müller — paid €42.50 for a crème brûlée.",
    "東京は日本の首都です。 Москва — столица России. القاهرة عاصمة مصر.",
    "Two  spaces, three   spaces, a tab\tand a smile 🙂 end this line.",
    "http://example.org/a/b?c=d&e=f#g is a link; user.name+tag@example.com is an address.",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism, pneumonoultramicroscopicsilicovolcanoconiosis!",
)
"""Text for checkpoints without their corpus: digits, punctuation, code, other scripts, runs of spaces."""


@dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    Attributes:
        largest_difference: Largest difference of a logit.
        tolerance: Largest difference allowed.
        rounding: Largest change of a native logit when the weights are rounded to the folder's type.
        windows: Number and length of the windows compared.
        lines: Number of texts with identical ids.
        source: "corpus" or "built-in sentences".
    """

    largest_difference: float
    tolerance: float
    rounding: float
    windows: tuple[int, int]
    lines: int
    source: str


def check_export(checkpoint: NativeCheckpoint, folder: Path, dtype: torch.dtype) -> Parity:
    """Compare the token ids and the logits of an export with the native ones.

    The native model gets weights rounded to the folder's type, and both models compute in fp32, so only the conversion
    is compared. The two models are in memory one after the other.

    Args:
        checkpoint: The checkpoint that was exported.
        folder: The export.
        dtype: Type of the export's weights.

    Raises:
        CheckpointError: Logits or ids differ. The message has the largest difference and its place, or the text.
    """
    tokens, source = corpus_tokens(checkpoint)
    lines = compare_tokenizers(checkpoint, folder, _lines(checkpoint, tokens))
    windows = _windows(checkpoint, tokens)
    native, rounding = native_logits(checkpoint, windows, dtype)
    exported = exported_logits(folder, windows)
    difference, tolerance = compare_logits(native, exported, windows)
    return Parity(difference, tolerance, rounding, (windows.shape[0], windows.shape[1]), lines, source)


def check_import(checkpoint: NativeCheckpoint, source: Path, rows: int, new_rows: Sequence[int]) -> float:
    """Compare the logits of an imported checkpoint with those that transformers computes from the source, on text.

    Args:
        checkpoint: The imported checkpoint.
        source: The source folder.
        rows: Vocabulary rows of the source.
        new_rows: Rows that the import added, whose logits are not compared.

    Returns:
        The largest difference of a logit.

    Raises:
        CheckpointError: Logits differ; see `compare_logits`.
    """
    config = checkpoint.config
    tokens, _ = corpus_tokens(checkpoint)
    length = min(config.data.sequence_length, _LONGEST_WINDOW)
    windows = torch.from_numpy(tokens[: WINDOWS * length].reshape(WINDOWS, length))
    both = torch.tensor([row for row in range(rows) if row not in set(new_rows)])
    native, _ = native_logits(checkpoint, windows, torch.float32)
    native = [logits[:, both] for logits in native]
    exported = (logits[:, both] for logits in exported_logits(source, windows))
    return compare_logits(native, exported, windows)[0]


def corpus_tokens(checkpoint: NativeCheckpoint) -> tuple[np.ndarray, str]:
    """Return text tokens, int64 [tokens], and their source: the corpus of the run if it exists.

    Args:
        checkpoint: A checkpoint of the run.
    """
    try:
        corpora = open_corpora(checkpoint.config.data, checkpoint.config.pause.embeddings)
        if corpora.corpora and corpora.fingerprint == checkpoint.reader.manifest.corpus:
            corpus = corpora.corpora[0]
            tokens = np.memmap(path_of(corpus.prefix, "bin"), dtype=corpus.manifest.dtype, mode="r")
            return np.array(tokens[:_TOKENS], dtype=np.int64), "corpus"
    except (PauseMegatronError, OSError, ValueError):
        pass  # moved or removed; an imported model has none
    ids = [i for text in checkpoint.tokenizer.encode_batch(SENTENCES) for i in (*text, checkpoint.tokenizer.eod)]
    return np.tile(np.array(ids, dtype=np.int64), -(-WINDOWS * (_LONGEST_WINDOW + 1) // len(ids))), "built-in sentences"


def tokenizer_agrees(checkpoint: NativeCheckpoint, folder: Path) -> bool:
    """Return whether transformers, which loads a tokenizer by the model type in config.json, gives the native ids.

    Args:
        checkpoint: The checkpoint that is exported.
        folder: Folder with config.json and the tokenizer's files.
    """
    try:
        compare_tokenizers(checkpoint, folder, _lines(checkpoint, corpus_tokens(checkpoint)[0]))
    except CheckpointError:
        return False
    return True


def compare_tokenizers(checkpoint: NativeCheckpoint, folder: Path, lines: Sequence[str]) -> int:
    """Compare the native tokenizer with the folder's on lines of text, plain and with pauses appended.

    Args:
        checkpoint: The checkpoint with the native tokenizer.
        folder: The export.
        lines: Lines of text.

    Returns:
        Number of lines compared.

    Raises:
        CheckpointError: Ids differ. The message has the first such line, both lists, and the number of such lines.
    """
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # Hugging Face encodes the name of a special token as that token; in a corpus it is text.
    names = [token.content for token in exported.added_tokens_decoder.values()]
    lines = [line for line in lines if not any(name in line for name in names)]
    expected = checkpoint.tokenizer.encode_batch(lines)
    actual = exported(lines, add_special_tokens=False, verbose=False)["input_ids"]
    different = [number for number in range(len(lines)) if list(expected[number]) != list(actual[number])]
    if different:
        first = different[0]
        raise CheckpointError(
            f"the converted tokenizer gives other ids for {len(different)} of {len(lines)} lines, for example "
            f"{lines[first][:200]!r}: expected {list(expected[first])[:40]}, got {list(actual[first])[:40]}"
        )
    whole, alone = exported("a")["input_ids"], exported("a", add_special_tokens=False)["input_ids"]
    if (leading := ids_before(whole, alone)) != checkpoint.tokenizer.leading:
        raise CheckpointError(f"before a text: expected the ids {checkpoint.tokenizer.leading}, got {leading}")
    pauses = list(checkpoint.pause_ids)
    text = exported.convert_ids_to_tokens(pauses)
    for line, ids in zip(lines[:10], expected[:10], strict=True):
        with_pauses = exported(line + "".join(text) + text[0] * 2, add_special_tokens=False, verbose=False)["input_ids"]
        if with_pauses != [*ids, *pauses, pauses[0], pauses[0]]:
            raise CheckpointError(
                f"pauses after {line[:80]!r}: expected the ids {pauses} after its own, got {with_pauses[-40:]}"
            )
    if exported.eos_token_id != checkpoint.tokenizer.eod:
        raise CheckpointError(f"end of sequence: expected id {checkpoint.tokenizer.eod}, got {exported.eos_token_id}")
    return len(lines)


def native_logits(checkpoint: NativeCheckpoint, windows: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """Compute logits of the native model at tensor-parallel size 1 in fp32, with weights rounded to `dtype`.

    Args:
        checkpoint: The checkpoint.
        windows: Token ids, int64 [windows, seq].
        dtype: Type that the weights are rounded to.

    Returns:
        Logits of each window, fp32 [seq, live ids], and the largest change of a logit by the rounding.
    """
    config = checkpoint.config
    with initialize(ParallelSection(), ranks=Ranks(0, 0, 1, "127.0.0.1", 0, "alone")) as context:
        model = build_model(
            config.model.model_copy(update={"attention": "sdpa"}),
            vocabulary=checkpoint.vocabulary,
            sequence_length=config.data.sequence_length,
            parallel=ParallelSection(),
            precision="fp32",
            draw=False,
        )
        load_weights(model, checkpoint.reader, live_rows=checkpoint.vocabulary.size, rank=0, ranks=1)
        model.eval()

        def run() -> list[Tensor]:
            positions = torch.arange(windows.shape[1], device=context.device)[None]
            return [model.logits(w[None].to(context.device), positions)[0].cpu() for w in windows]

        with torch.no_grad():
            logits = run()
            if dtype == torch.float32:
                return logits, 0.0
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
            rounded = run()
    moved = max(float((a - b).abs().max()) for a, b in zip(logits, rounded, strict=True))
    return rounded, moved


def exported_logits(folder: Path, windows: Tensor) -> Iterator[Tensor]:
    """Yield the logits that transformers computes from a folder in fp32.

    Args:
        folder: A transformers folder.
        windows: Token ids, int64 [windows, seq].

    Yields:
        Logits of each window, fp32 [seq, vocab_size].
    """
    gc.collect()  # frees the native model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_with_transformers(folder).to(device)
    with torch.no_grad():
        for window in windows:
            yield model(window[None].to(device)).logits[0].float().cpu()


def load_with_transformers(folder: Path) -> Any:
    """Load the folder's model in fp32 and eval mode, without running code of the folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
        ).eval()
    finally:
        if enabled:
            logging.enable_progress_bar()


def compare_logits(native: list[Tensor], exported: Iterator[Tensor], windows: Tensor) -> tuple[float, float]:
    """Compare logits: a difference of 1e-5 of the largest logit, or of 1 if that is smaller, is allowed.

    Args:
        native: Logits of each window, fp32 [seq, ids].
        exported: Logits of each window, fp32 [seq, ids].
        windows: Token ids, int64 [windows, seq].

    Returns:
        The largest difference and the allowed one.

    Raises:
        CheckpointError: A larger difference. The message has its window, position and id.
    """
    largest, where = 0.0, (0, 0, 0)
    tolerance = _RELATIVE_TOLERANCE * max(1.0, max(float(logits.abs().max()) for logits in native))
    for number, (expected, actual) in enumerate(zip(native, exported, strict=True)):
        if expected.shape != actual.shape:
            raise CheckpointError(
                f"logits: expected {expected.shape[1]} ids, got {actual.shape[1]} of the folder's model"
            )
        difference = (expected - actual).abs().nan_to_num(nan=float("inf"))
        highest = float(difference.max())
        if highest >= largest:
            position, token = divmod(int(difference.argmax()), expected.shape[1])
            largest, where = highest, (number, position, token)
    if largest > tolerance:
        number, position, token = where
        raise CheckpointError(
            f"the exported model computes something else: expected logits within {tolerance:.3g}, got a difference of "
            f"{largest:.3g}, in window {number} at position {position} (input id {int(windows[number, position])}) "
            f"for id {token}"
        )
    return largest, tolerance


def _windows(checkpoint: NativeCheckpoint, tokens: np.ndarray) -> Tensor:
    """Windows of text with pauses, int64 [windows, seq].

    They use the default placement policy, since the configuration of an untrusted checkpoint could name any module.
    """
    config = checkpoint.config
    length = min(config.data.sequence_length, _LONGEST_WINDOW)
    plan = PausePlan(length, config.pause.rate or _DEFAULT_RATE)
    inject = PauseInjector(plan, checkpoint.pause_ids, "parity", "valid")
    texts = [tokens[i * plan.text_length : (i + 1) * plan.text_length] for i in range(WINDOWS)]
    return torch.from_numpy(np.stack([inject(text, i).tokens[:length] for i, text in enumerate(texts)]))


def _lines(checkpoint: NativeCheckpoint, tokens: np.ndarray) -> list[str]:
    """Lines of text: the built-in sentences and those of the corpus."""
    documents = np.split(tokens, np.flatnonzero(tokens == checkpoint.tokenizer.eod) + 1)
    text = "\n".join(checkpoint.tokenizer.decode(document.tolist()) for document in documents)
    return [*SENTENCES, *(f" {text}" for text in SENTENCES), *filter(None, text.split("\n"))][:_LINES]
