"""Parity check of exports and imports: native logits and those of transformers, on windows with pauses."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pause_megatron.checkpoint import MergedReader, load_weights
from pause_megatron.checkpoint.layout import is_adapter
from pause_megatron.config.lora import lora_of
from pause_megatron.config.schema import ParallelSection, ResolvedConfig
from pause_megatron.data.windows.boundaries import shared_positions
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.distributed import initialize
from pause_megatron.distributed.ranks import Ranks
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.checkpoint import NativeCheckpoint
from pause_megatron.hf.tokenizer_parity import compare_tokenizers, corpus_tokens, text_lines
from pause_megatron.model import build_model

WINDOWS = 2
_COMPARED = 512
"""Positions of a window that are compared: the last ones."""
_LONGEST_WINDOW = 4096
_LARGEST_LOGITS = 1 << 28
_RELATIVE_TOLERANCE = 1e-5
_DEFAULT_RATE = 0.1
_LEAST_TOKENS = WINDOWS * (_COMPARED + 1) + _LONGEST_WINDOW


@dataclass(frozen=True)
class Parity:
    """Result of a comparison.

    Attributes:
        largest_difference: Largest difference of a logit.
        tolerance: Largest difference allowed.
        rounding: Largest change of a native logit when the weights are rounded to the folder's type.
        windows: Number of the windows compared, and length of the longest.
        lines: Number of texts with identical ids.
        source: "corpus" or "built-in sentences".
    """

    largest_difference: float
    tolerance: float
    rounding: float
    windows: tuple[int, int]
    lines: int
    source: str


def check_export(
    checkpoint: NativeCheckpoint, folder: Path, dtype: torch.dtype, load: Callable[[Path], Any] | None = None
) -> Parity:
    """Compare the token ids and the logits of an export with the native ones.

    The native model gets weights rounded to the folder's type, and both models compute in fp32, so only the conversion
    is compared. The two models are in memory one after the other.

    Args:
        checkpoint: The checkpoint that was exported.
        folder: The export.
        dtype: Type of the export's weights.
        load: Loads the model of the folder; None for transformers.

    Raises:
        CheckpointError: Logits or ids differ. The message has the largest difference and its place, or the text.
    """
    tokens, source = corpus_tokens(checkpoint, _LEAST_TOKENS)
    lines = compare_tokenizers(checkpoint.tokenizer, checkpoint.pause_ids, folder, text_lines(checkpoint, tokens))
    windows = _windows(checkpoint, tokens)
    native, rounding = native_logits(checkpoint, windows, dtype)
    exported = exported_logits(folder, windows, load, positions_of(checkpoint, windows))
    difference, tolerance = compare_logits(native, exported, windows)
    return Parity(difference, tolerance, rounding, (len(windows), max(map(len, windows))), lines, source)


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
    tokens, _ = corpus_tokens(checkpoint, _LEAST_TOKENS)
    lengths = window_lengths(checkpoint.config, rows)
    ends = np.cumsum(lengths)
    windows = [torch.from_numpy(tokens[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    both = torch.tensor([row for row in range(rows) if row not in set(new_rows)])
    native, _ = native_logits(checkpoint, windows, torch.float32)
    native = [logits[:, both] for logits in native]
    exported = (logits[:, both] for logits in exported_logits(source, windows))
    return compare_logits(native, exported, windows)[0]


def window_lengths(config: ResolvedConfig, rows: int) -> list[int]:
    """Return the lengths of the windows that are compared, in tokens.

    Two are short. Where rotary angles are rescaled or layers have a sliding window, a third is twice as long as the
    original window or the sliding one, as far as the model's positions and the cost of a comparison allow.

    Args:
        config: Configuration of the checkpoint.
        rows: Vocabulary rows.
    """
    model, positions = config.model, config.data.sequence_length
    lengths = [min(positions, _COMPARED)] * WINDOWS
    edges = [edge for edge in (model.sliding_window, model.rope_original_length) if edge is not None]
    bound = max(min(_LONGEST_WINDOW, _LARGEST_LOGITS // rows), lengths[0])
    longest = max((min(positions, 2 * edge, bound) for edge in edges), default=0)
    return [*lengths, longest] if longest > lengths[0] else lengths


def positions_of(checkpoint: NativeCheckpoint, windows: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the positions of the tokens of windows; None where they are 0, 1, 2, ...

    Args:
        checkpoint: The checkpoint.
        windows: Token ids of each window, int64 [seq].
    """
    ids = checkpoint.pause_ids
    if checkpoint.config.pause.positions == "own":
        return None
    return [shared_positions(((window < ids.start) | (window >= ids.stop)).numpy()) for window in windows]


def native_logits(
    checkpoint: NativeCheckpoint, windows: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], float]:
    """Compute logits of the native model at tensor-parallel size 1 in fp32, with weights rounded to `dtype`.

    LoRA adapters are beside the weights, as in training; only to be rounded they are merged.

    Args:
        checkpoint: The checkpoint.
        windows: Token ids of each window, int64 [seq].
        dtype: Type that the weights are rounded to.

    Returns:
        Logits of the last positions of each window, fp32 [positions, live ids], and the largest change of a
        logit by the rounding.
    """
    config, lora, positions = checkpoint.config, lora_of(checkpoint.config), positions_of(checkpoint, windows)
    with initialize(ParallelSection(), ranks=Ranks(0, 0, 1, "127.0.0.1", 0, "alone")) as context:
        model = build_model(
            config.model.model_copy(update={"attention": "sdpa"}),
            vocabulary=checkpoint.vocabulary,
            sequence_length=config.data.sequence_length,
            parallel=ParallelSection(),
            precision="fp32",
            draw=False,
            lora=lora,
            given_positions=positions is not None,
        )
        stored = checkpoint.reader if lora is None else MergedReader(checkpoint.folder)
        load_weights(model, stored, live_rows=checkpoint.vocabulary.size, rank=0, ranks=1)
        model.eval()

        def run() -> list[Tensor]:
            places = positions or [torch.arange(window.numel()) for window in windows]
            return [last(w.to(context.device), p.to(context.device)) for w, p in zip(windows, places, strict=True)]

        def last(tokens: Tensor, places: Tensor) -> Tensor:
            return model.logits(tokens[None], places[None])[0, -_COMPARED:].cpu()

        with torch.no_grad():
            logits = run()
            if dtype == torch.float32:
                return logits, 0.0
            if lora is not None:  # the merged weights are rounded, not the adapters
                load_weights(model, checkpoint.reader, live_rows=checkpoint.vocabulary.size, rank=0, ranks=1, own=False)
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.zeros_like(parameter) if is_adapter(name) else parameter.to(dtype))
            rounded = run()
    moved = max(float((a - b).abs().max()) for a, b in zip(logits, rounded, strict=True))
    return rounded, moved


def exported_logits(
    folder: Path,
    windows: Sequence[Tensor],
    load: Callable[[Path], Any] | None = None,
    positions: Sequence[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the logits that transformers computes from a folder in fp32.

    Args:
        folder: A transformers folder.
        windows: Token ids of each window, int64 [seq].
        load: Loads the model of the folder; None for transformers.
        positions: Positions of the tokens, int64 [seq] of each window; None: transformers counts them.

    Yields:
        Logits of the last positions of each window, fp32 [positions, vocab_size].
    """
    gc.collect()  # frees the native model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (load or load_with_transformers)(folder).to(device)
    with torch.no_grad():
        for number, window in enumerate(windows):
            tokens, given = window[None].to(device), {}
            if positions is not None:
                # Without a mask, transformers takes repeated positions for the beginnings of other texts.
                given = {"position_ids": positions[number][None].to(device), "attention_mask": torch.ones_like(tokens)}
            yield model(tokens, **given, logits_to_keep=_COMPARED, use_cache=False).logits[0].float().cpu()


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


def compare_logits(native: list[Tensor], exported: Iterator[Tensor], windows: Sequence[Tensor]) -> tuple[float, float]:
    """Compare logits: a difference of 1e-5 of the largest logit, or of 1 if that is smaller, is allowed.

    Args:
        native: Logits of each window, fp32 [seq, ids].
        exported: Logits of each window, fp32 [seq, ids].
        windows: Token ids of each window, int64 [tokens]; the logits are those of its last positions.

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
        position += len(windows[number]) - len(native[number])
        raise CheckpointError(
            f"the exported model's logits differ: expected a difference of at most {tolerance:.3g}, got {largest:.3g}, "
            f"in window {number} at position {position} (input id {int(windows[number][position])}) "
            f"for id {token}"
        )
    return largest, tolerance


def _windows(checkpoint: NativeCheckpoint, tokens: np.ndarray) -> list[Tensor]:
    """Return windows of text with pauses, each int64 [seq].

    They use the default placement policy, since the configuration of an untrusted checkpoint could name any module.
    """
    config, start, windows = checkpoint.config, 0, []
    for number, length in enumerate(window_lengths(config, checkpoint.vocabulary.size)):
        plan = PausePlan(length, config.pause.rate or _DEFAULT_RATE)
        inject = PauseInjector(plan, checkpoint.pause_ids, "parity", "valid")
        text = tokens[start : start + plan.text_length]
        windows.append(torch.from_numpy(inject(text, number).tokens[:length]))
        start += plan.text_length
    return windows
