"""Export of a checkpoint to a Hugging Face folder: streamed, checked against the native model, written atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pause_megatron.checkpoint.merge import MergedReader
from pause_megatron.config.batching import pause_counts, pause_range
from pause_megatron.config.families import Family, families_of
from pause_megatron.config.objective_rules import requests
from pause_megatron.config.pauses import PATTERN
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import sync_file, sync_folder
from pause_megatron.hf.architecture import config_json
from pause_megatron.hf.atomic_dir import atomic_dir, output_folder
from pause_megatron.hf.chat_template import add_variant
from pause_megatron.hf.checkpoint import NativeCheckpoint, open_checkpoint
from pause_megatron.hf.model_card import model_card
from pause_megatron.hf.parity import Parity, check_export
from pause_megatron.hf.safetensors_file import SafetensorsWriter, TensorEntry, split_into_files
from pause_megatron.hf.tokenizer import HFTokenizer, convert_tokenizer, pause_entry
from pause_megatron.hf.tokenizer_files import generation_config, names_class, write_tokenizer
from pause_megatron.hf.tokenizer_parity import tokenizer_agrees
from pause_megatron.hf.weights import HFTensor, hf_tensors
from pause_megatron.terminal.progress import Report

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK_BYTES = 16 << 20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        folder: The Hugging Face folder.
        files: Number of safetensors files.
        bytes: Size of the weights, in bytes.
        parity: Result of the comparison with the native model; None without one.
    """

    folder: Path
    files: int
    bytes: int
    parity: Parity | None


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "fp32",
    max_shard_size: int = 5_000_000_000,
    finetuned_pauses: int | None = None,
    compare: bool = True,
    report: Report = lambda stage, done, total: None,
) -> Exported:
    """Export a checkpoint of any tensor-parallel size and ZeRO stage to a plain LlamaForCausalLM folder.

    A model with biases on queries, keys and values and Qwen2's tokenizer becomes a Qwen2ForCausalLM. The checkpoint's
    digests are verified first. The weights are streamed, with a few rows in memory. Then transformers loads the folder,
    and its logits and token ids are compared with the native ones. The folder is renamed into place only after that.

    Args:
        source: A checkpoint, `.../latest`, or a run folder.
        output: The Hugging Face folder; new or empty.
        dtype: "fp32", "bf16" or "fp16".
        max_shard_size: Maximum size of a safetensors file, in bytes; a larger tensor gets a file of its own.
        finetuned_pauses: M_ft, the number of pauses in finetuning; None for that of the run's configuration.
        compare: Whether logits and ids are compared at the end, for which the whole model is in memory in fp32.
        report: Progress callback: (stage, bytes done, bytes in all).

    Returns:
        The folder and the result of the comparison.

    Raises:
        CheckpointError: A checkpoint that is damaged or has no exact counterpart, an output that is not empty, or an
            export that does not compute the same.
    """
    output = output_folder(output)
    checkpoint = open_checkpoint(source, report)
    tokenizer = convert_tokenizer(checkpoint.folder / "tokenizer", checkpoint.tokenizer, checkpoint.pause_ids)
    with atomic_dir(output) as staging:
        family = _write_metadata(checkpoint, tokenizer, staging, dtype, finetuned_pauses)
        files = write_weights(checkpoint, staging, TORCH_DTYPES[dtype], max_shard_size, report, family)
        for path in staging.rglob("*"):
            sync_file(path)
        sync_folder(staging)
        parity = None
        if compare:
            report("comparing with transformers", 0, 1)
            parity = check_export(checkpoint, staging, TORCH_DTYPES[dtype])
            report("comparing with transformers", 1, 1)
    total = sum((output / name).stat().st_size for name in files)
    return Exported(output, len(files), total, parity)


def write_weights(
    checkpoint: NativeCheckpoint,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: int,
    report: Report,
    family: Family | None = None,
) -> list[str]:
    """Stream all tensors into safetensors files, with an index if there are several.

    Args:
        checkpoint: The checkpoint to export.
        folder: The Hugging Face folder.
        dtype: Type of the weights.
        max_shard_size: Maximum size of a file, in bytes.
        report: Progress callback.
        family: Family of the model; None for the preferred one.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: Values beyond the range of fp16.
    """
    model = checkpoint.config.model
    tensors = hf_tensors(model, checkpoint.vocabulary.size, family or families_of(model)[0])
    by_name = {tensor.name: tensor for tensor in tensors}
    files = split_into_files([TensorEntry(t.name, t.shape, dtype) for t in tensors], max_shard_size)
    total, done = sum(entry.bytes for file in files for entry in file), 0
    weight_map, names = {}, []
    for number, entries in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        names.append(name)
        with SafetensorsWriter(folder / name, entries) as writer:
            for entry in entries:
                _stream(by_name[entry.name], checkpoint.reader, writer, dtype)
                weight_map[entry.name] = name
                done += entry.bytes
                report("writing weights", done, total)
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return names


def _stream(tensor: HFTensor, reader: MergedReader, writer: SafetensorsWriter, dtype: torch.dtype) -> None:
    if not tensor.rows:
        writer.zeros(tensor.shape[0], dtype)
    width = tensor.shape[1] if len(tensor.shape) > 1 else 1
    block = max(_BLOCK_BYTES // (4 * width), 1)
    for rows in tensor.rows:
        stop = rows.start + rows.count
        for start in range(rows.start, stop, block):
            values = reader.rows(rows.name, start, min(start + block, stop)).to(dtype)
            if dtype == torch.float16 and not torch.isfinite(values).all():
                raise CheckpointError(f"{tensor.name}: expected values in the range of fp16; export as bf16 or fp32")
            writer.write(values)


def _write_metadata(
    checkpoint: NativeCheckpoint, tokenizer: HFTokenizer, folder: Path, dtype: str, finetuned_pauses: int | None
) -> Family:
    """Write everything but the weights, and compare the tokenizer. Return the model family."""
    config, manifest = checkpoint.config, checkpoint.reader.manifest
    length, live_rows = config.positions, checkpoint.vocabulary.size
    pause = pause_record(checkpoint, tokenizer.pauses, finetuned_pauses)
    companions, eod = checkpoint.tokenizer.companions, checkpoint.tokenizer.eod
    generation = generation_config(companions, tokenizer.special_ids, checkpoint.pause_ids, eod)
    ids = {role: generation.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}

    def write_as(family: Family, plain: bool) -> None:
        write_tokenizer(folder, tokenizer, companions, sequence_length=length, plain=plain)
        add_variant(folder, pause)
        record = config_json(
            config.model,
            family=family,
            live_rows=live_rows,
            sequence_length=length,
            dtype=dtype,
            special_ids=ids,
            pause=pause,
        )
        _write_json(folder / "config.json", record)
        card = model_card(
            config,
            family=family,
            progress=manifest.progress,
            pause=pause,
            step=manifest.step,
            live_rows=live_rows,
            dtype=dtype,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    _write_json(folder / "generation_config.json", generation)
    # transformers reads the tokenizer of any folder of type qwen2 as Qwen2's, independently of its files. Where that
    # gives other ids, the model becomes a Llama with attention biases. Classes named after models rebuild parts of a
    # tokenizer.json: where that gives other ids, the class that reads the file unchanged is used.
    classes = (False, True) if names_class(companions) else (True,)
    *preferred, last = [(family, plain) for family in families_of(config.model) for plain in classes]
    for family, plain in preferred:
        write_as(family, plain)
        if tokenizer_agrees(checkpoint, folder):
            return family
    write_as(*last)  # compared at the end of the export, which raises
    return last[0]


def pause_record(checkpoint: NativeCheckpoint, names: Sequence[str], finetuned_pauses: int | None) -> dict[str, Any]:
    """Return the "pause" entry of config.json: tokens, ids, training settings and defaults of inference.

    `m_ft`, `location`, `filler` and `prefix_attention` are those of the finetuning, and the defaults of inference. m_ft
    is the upper end of a range. `realised_rate` is that of a pretraining. `pause_targets` and `auxiliary_heads` tell
    that the finetuning had them; the heads themselves are not exported. `positions` is there where pauses have none of
    their own, `decoding` where answers get pauses at the places of training, `answer_placement` where training had them
    at places that no decoding has, and `requests` with Catch Your Breath: the most pauses in a row that the model
    learned to ask for.

    Args:
        checkpoint: The checkpoint to export.
        names: Names of the pause tokens.
        finetuned_pauses: M_ft; None for that of the run's configuration.
    """
    config, progress = checkpoint.config, checkpoint.reader.manifest.progress
    pause, finetune, finetuned = config.pause, config.finetune, config.task.name is not None
    if finetuned and finetuned_pauses is None:
        finetuned_pauses = pause_range(finetune.pauses)[-1]
    tokens = 0 if finetuned else progress.get("tokens", 0)
    count, decoding = requests(config), decoding_record(config)
    placement = None if count or decoding else _answer_placement(config)
    return {
        **pause_entry(names, checkpoint.pause_ids),
        "m_ft": finetuned_pauses,
        "rate": pause_counts(config).nominal_rate if config.model.from_ or not finetuned else 0.0,
        "realised_rate": 1 - progress.get("text_tokens", 0) / tokens if tokens else None,
        "window": pause.window,
        "placement": pause.placement,
        "softmax": pause.softmax,
        "prefix_attention": finetune.prefix_attention if finetuned else "causal",
        "location": finetune.location if finetuned else "append",
        "filler": finetune.filler if finetuned else None,
        **({"positions": "shared"} if pause.positions == "shared" else {}),
        **({"requests": count} if count else {}),
        **({"decoding": decoding} if decoding else {}),
        **({"answer_placement": placement} if placement else {}),
        **{name: True for name in ("pause_targets", "auxiliary_heads") if getattr(finetune, name)},
    }


def decoding_record(config: ResolvedConfig) -> dict[str, int | bool | str]:
    """Return where generation puts pauses by default: at the places of training; {} where the text does not tell them.

    A pretraining has them after the tokens of prompts too, a finetuning only within answers. `every` is that of
    training. `after` has a run after each token of the pattern, of which training drew a part. A model that requests
    pauses gets none at places: a run of training is what it may ask for.

    Args:
        config: Configuration of the run.
    """
    pause, finetuned = config.pause, config.task.name is not None
    placement = _answer_placement(config) if finetuned else pause.placement if pause.rate else None
    if placement not in ("every", "after") or requests(config):
        return {}
    places: dict[str, int | str] = {"every": 1}
    if placement == "after":  # an empty pattern is in every text, but as an option it would be none
        places = {"after": PATTERN if pause.pattern is None else pause.pattern or "(?:)"}
    return {**places, "count": pause.run, **({} if finetuned else {"in_prompt": True})}


def _answer_placement(config: ResolvedConfig) -> str | None:
    """Return the placement of pauses within the answers of a finetuning; None where they have none."""
    placement = config.finetune.answer_placement
    return placement if placement == "every" or config.finetune.answer_rate else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
