"""Export of a native checkpoint to a folder that Megatron-LM loads: verified at the source, streamed, atomic."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import sync_file, sync_folder
from pause_megatron.hf.atomic_dir import atomic_dir, output_folder
from pause_megatron.hf.checkpoint import NativeCheckpoint, open_checkpoint
from pause_megatron.hf.tokenizer import convert_tokenizer
from pause_megatron.hf.tokenizer_files import names_class, write_tokenizer
from pause_megatron.megatron_lm.arguments import write_arguments
from pause_megatron.megatron_lm.dist_writer import write_torch_dist
from pause_megatron.megatron_lm.flags import ignored_arguments, needed_flags
from pause_megatron.megatron_lm.importing import TRACKER
from pause_megatron.megatron_lm.legacy_writer import write_legacy
from pause_megatron.megatron_lm.names import extra_states
from pause_megatron.megatron_lm.native import stacked_tensors
from pause_megatron.megatron_lm.optimizer import optimizer_common, optimizer_tensors
from pause_megatron.terminal.progress import Report

Format = Literal["torch_dist", "torch"]
TOKENIZER = "tokenizer"
RELEASE = "release"
_STEP_DIGITS = 7


@dataclass(frozen=True)
class ExportedMegatron:
    """Result of an export.

    Attributes:
        folder: What Megatron-LM's `--load` names.
        iteration: Step of the checkpoint.
        rows: Vocabulary rows, padding included.
        pause_ids: The K pause ids.
        bytes: Size of the folder's files, in bytes.
        flags: What Megatron-LM's command line needs beside `--load` and `--use-checkpoint-args`.
        notes: What its own model provider would compute otherwise.
    """

    folder: Path
    iteration: int
    rows: int
    pause_ids: tuple[int, ...]
    bytes: int
    flags: tuple[str, ...]
    notes: tuple[str, ...]


def export_megatron(
    source: str | Path,
    output: str | Path,
    *,
    tensor_parallel: int = 1,
    optimizer: bool = False,
    format: Format = "torch_dist",
    report: Report = lambda stage, done, total: None,
) -> ExportedMegatron:
    """Export a checkpoint of any tensor-parallel size and ZeRO stage as a GPT checkpoint of Megatron-LM.

    The checkpoint's digests are verified first. A few rows are in memory at a time.

    Args:
        source: A checkpoint, `.../latest`, or a run folder.
        output: The folder for `--load`; new or empty.
        tensor_parallel: The vocabulary is padded for it, and `mp_rank_XX` folders are written for it.
        optimizer: Whether to write Adam moments and fp32 weights for the distributed optimizer.
        format: "torch_dist", or "torch" for `mp_rank_XX` folders.
        report: Progress callback: (stage, bytes done, bytes in all).

    Raises:
        CheckpointError: A checkpoint that is damaged or has no counterpart, an output that is not empty.
    """
    output = output_folder(output)
    checkpoint = open_checkpoint(source, report)
    _check_options(checkpoint, tensor_parallel, optimizer, format)
    step = checkpoint.reader.manifest.step
    rows = checkpoint.vocabulary.padded(checkpoint.config.model.vocab_multiple, tensor_parallel)
    args = _arguments(checkpoint, output, tensor_parallel, rows, optimizer, format)
    with atomic_dir(output) as staging:
        _write_tokenizer(checkpoint, staging / TOKENIZER)
        # Megatron-LM before 0.19 takes no iteration 0; "release" is its name for a checkpoint that was converted.
        folder = staging / (f"iter_{step:0{_STEP_DIGITS}d}" if step else RELEASE)
        common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": step}
        common["num_floating_point_operations_so_far"] = 0
        if format == "torch":
            write_legacy(folder, checkpoint, rows, tensor_parallel, common, report)
        else:
            _write_dist(folder, checkpoint, rows, common, optimizer, report)
        (staging / TRACKER).write_text(str(step) if step else RELEASE, encoding="utf-8")
        for path in staging.rglob("*"):
            (sync_folder if path.is_dir() else sync_file)(path)
        sync_folder(staging)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    flags, notes = tuple(needed_flags(args)), tuple(ignored_arguments(args))
    return ExportedMegatron(output, step, rows, tuple(checkpoint.pause_ids), size, flags, notes)


def _check_options(checkpoint: NativeCheckpoint, ranks: int, optimizer: bool, format: Format) -> None:
    model = checkpoint.config.model
    for name in ("heads", "ffn"):
        if getattr(model, name) % ranks:
            raise CheckpointError(
                f"--tensor-parallel: expected a divisor of model.{name} = {getattr(model, name)}, got {ranks}"
            )
    if model.kv_heads % ranks and (format == "torch" or ranks % model.kv_heads):
        raise CheckpointError(
            f"--tensor-parallel: expected a divisor of model.kv_heads = {model.kv_heads}, got {ranks}"
        )
    if checkpoint.config.pause.positions == "shared":
        raise CheckpointError(
            f"{checkpoint.folder}: expected pause.positions=own, got shared: Megatron-LM rotates by the order of "
            "tokens and ignores position ids, so that its logits after a pause would differ"
        )
    if optimizer and format == "torch":
        raise CheckpointError("--optimizer: expected --format torch_dist with it, got torch")
    if optimizer and checkpoint.reader.adapter_scale is not None:
        raise CheckpointError(
            "--optimizer: expected a run without LoRA adapters, got train.only=lora: they are merged into the weights, "
            "and their moments have no counterpart; export without --optimizer"
        )
    if optimizer and not checkpoint.reader.manifest.step:
        raise CheckpointError(
            "--optimizer: expected a checkpoint after step 0, got step 0, whose moments are 0; export without it"
        )
    if optimizer and model.loops > 1:
        raise CheckpointError(
            f"--optimizer: expected model.loops = 1, got {model.loops}: repeated layers become separate ones"
        )


def _arguments(
    checkpoint: NativeCheckpoint, output: Path, ranks: int, rows: int, optimizer: bool, format: Format
) -> argparse.Namespace:
    args = write_arguments(
        checkpoint.config,
        live_rows=checkpoint.vocabulary.size,
        padded_rows=rows,
        tensor_parallel=ranks,
        iteration=checkpoint.reader.manifest.step,
    )
    args.pause_ids = list(checkpoint.pause_ids)
    args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(output / TOKENIZER)
    args.ckpt_format = format
    args.use_dist_ckpt = format == "torch_dist"
    args.no_save_optim, args.use_distributed_optimizer = not optimizer, optimizer
    return args


def _write_tokenizer(checkpoint: NativeCheckpoint, folder: Path) -> None:
    tokenizer = convert_tokenizer(checkpoint.folder / "tokenizer", checkpoint.tokenizer, checkpoint.pause_ids)
    folder.mkdir()
    companions = checkpoint.tokenizer.companions
    length = checkpoint.config.positions
    write_tokenizer(folder, tokenizer, companions, sequence_length=length, plain=not names_class(companions))


def _write_dist(
    folder: Path,
    checkpoint: NativeCheckpoint,
    rows: int,
    common: dict[str, Any],
    optimizer: bool,
    report: Report,
) -> None:
    tensors = stacked_tensors(checkpoint, rows)
    # The names of megatron-core's content metadata; the loader builds its side from them.
    content: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if optimizer:
        content["distrib_optim_sharding_type"] = "fully_reshardable"
        content["distrib_optim_fully_reshardable_mem_efficient"] = False
        common |= optimizer_common(checkpoint)
        tensors += optimizer_tensors(checkpoint, rows)
    common["content_metadata"] = content
    objects = dict.fromkeys(extra_states(checkpoint.config.model), torch.empty(0, dtype=torch.uint8))
    write_torch_dist(folder, tensors, objects, common, lambda done, total: report("writing weights", done, total))
