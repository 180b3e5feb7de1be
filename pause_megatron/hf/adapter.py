"""Export of LoRA adapters and pause rows as a peft folder for the exported base, compared with the native model.

peft loads the pause rows as trainable tokens: of the embedding, which a tied output layer follows, and of an untied
output layer. The layers of a looped model share their adapters; in the exported model, as their weights, they repeat.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pause_megatron.config.families import Piece
from pause_megatron.config.lora import adapted_layers, adapters, lora_of
from pause_megatron.config.model_schema import LoraSection, ResolvedModel
from pause_megatron.errors import CheckpointError
from pause_megatron.files.durable import sync_file, sync_folder
from pause_megatron.hf.atomic_dir import atomic_dir, output_folder
from pause_megatron.hf.checkpoint import NativeCheckpoint, open_checkpoint
from pause_megatron.hf.export import Exported, pause_record
from pause_megatron.hf.parity import Parity, check_export, load_with_transformers
from pause_megatron.hf.safetensors_file import SafetensorsWriter, TensorEntry
from pause_megatron.hf.weights import EMBEDDING, HEAD, HFTensor, Rows, layer_rows
from pause_megatron.terminal.progress import Report

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OF_INFERENCE = ("m_ft", "softmax", "prefix_attention", "location", "filler")
_PREFIX = "base_model.model."
_PAUSES = ".token_adapter.trainable_tokens_delta"


def export_adapter(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    report: Report = lambda stage, done, total: None,
) -> Exported:
    """Export the adapters and pause rows of a run with train.only=lora to a folder that peft loads onto its base.

    Then peft loads both folders, and logits and token ids are compared with the native model's. The folder is renamed
    into place only after that.

    Args:
        source: A checkpoint, `.../latest`, or a run folder.
        output: The peft folder; new or empty.
        base: The exported model that the run started from (`export-hf` of its `model.from`), in fp32 or in the type of
            the weights that were imported.
        report: Progress callback: (stage, bytes done, bytes in all).

    Returns:
        The folder and the result of the comparison.

    Raises:
        CheckpointError: The run has no adapters, peft is not installed, `base` is no folder of a model with these
            pauses, or base and adapter do not compute what the run does.
    """
    _check_peft()
    output, base = output_folder(output), Path(base)
    checkpoint = open_checkpoint(source, report)
    lora = lora_of(checkpoint.config)
    if lora is None:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a run with train.only=lora for --adapter, got "
            f"train.only={checkpoint.config.train.only or 'null'}; export it without --adapter"
        )
    changed = _changed_pauses(checkpoint, _pauses_of_base(checkpoint, base))
    with atomic_dir(output) as staging:
        total = _write_weights(checkpoint, lora, staging)
        record = adapter_config(checkpoint.config.model, lora, checkpoint.pause_ids, base)
        (staging / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_card(checkpoint, base, changed), encoding="utf-8")
        for path in staging.iterdir():
            sync_file(path)
        sync_folder(staging)
        report("comparing with peft", 0, 1)
        parity = _compare(checkpoint, base, staging)
        report("comparing with peft", 1, 1)
    return Exported(output, 1, total, parity)


def adapter_config(model: ResolvedModel, lora: LoraSection, pause_ids: range, base: Path) -> dict[str, Any]:
    """Return the adapter_config.json of peft.

    Args:
        model: Sizes of the model.
        lora: The adapters.
        pause_ids: Ids of the pauses, whose rows are trained.
        base: Folder of the base model.
    """
    layers = adapted_layers(lora, model.layers)
    adapted = [layer for layer, number in enumerate(model.order) if number in layers]
    pieces: Iterator[Piece] = (piece for one in adapters(model, lora, layers[0]) for piece in one.pieces)
    modules = sorted({piece.name.split(".")[1] for piece in pieces})
    vocabulary = ("embed_tokens",) if model.tied else ("embed_tokens", "lm_head")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "layers_to_transform": adapted if len(adapted) < model.depth else None,
        "trainable_token_indices": {name: list(pause_ids) for name in vocabulary},
    }


def adapter_tensors(model: ResolvedModel, lora: LoraSection, pause_ids: range) -> list[HFTensor]:
    """Return every tensor of the peft folder, with the native rows that it consists of.

    Args:
        model: Sizes of the model.
        lora: The adapters.
        pause_ids: Ids of the pauses.
    """
    count = len(pause_ids)
    matrices = (("model.embed_tokens", EMBEDDING), *(() if model.tied else (("lm_head", HEAD),)))
    tensors = [
        HFTensor(f"{_PREFIX}{name}{_PAUSES}", (count, model.hidden), (Rows(native, pause_ids.start, count),))
        for name, native in matrices
    ]
    for layer, number in enumerate(model.order):
        table = adapters(model, lora, number)
        tensors += layer_rows(table, f"{_PREFIX}model.layers.{layer}.", f"decoder.layers.{number}.")
    return tensors


def load_with_peft(base: Path, adapter: Path) -> Any:
    """Load a base model and an adapter in fp32 and eval mode, without running code of the folders.

    Args:
        base: Folder of the base model.
        adapter: The peft folder.
    """
    from peft import PeftModel

    model = load_with_transformers(base)
    with warnings.catch_warnings():
        # peft reads a property of the model that transformers renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def _write_weights(checkpoint: NativeCheckpoint, lora: LoraSection, folder: Path) -> int:
    tensors = adapter_tensors(checkpoint.config.model, lora, checkpoint.pause_ids)
    entries = [TensorEntry(tensor.name, tensor.shape, torch.float32) for tensor in tensors]
    with SafetensorsWriter(folder / WEIGHTS, entries) as writer:
        for tensor in tensors:
            for rows in tensor.rows:
                writer.write(checkpoint.reader.rows(rows.name, rows.start, rows.start + rows.count))
    return (folder / WEIGHTS).stat().st_size


def _compare(checkpoint: NativeCheckpoint, base: Path, adapter: Path) -> Parity:
    try:
        return check_export(checkpoint, base, torch.float32, load=lambda folder: load_with_peft(folder, adapter))
    except CheckpointError as error:
        source = checkpoint.config.model.from_ or "BASE"
        raise CheckpointError(
            f"--adapter {base}: expected the fp32 export of the model that the run started from (pause-megatron "
            f"export-hf {source} FOLDER), with which the adapter computes what the run does, got: {error}"
        ) from None


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise CheckpointError(
            "--adapter: expected peft to be installed, which loads the adapter for the comparison, got none; pip "
            "install peft, or export the merged model without --adapter"
        ) from None


def _pauses_of_base(checkpoint: NativeCheckpoint, base: Path) -> dict[str, Any]:
    """Return the base's "pause" entry; before anything is written it must be that of a model with the run's pauses."""
    try:
        pause = json.loads((base / "config.json").read_text(encoding="utf-8")).get("pause") or {}
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(
            f"--adapter {base}: expected the exported folder of the model that the run started from, got no "
            f"config.json; write it first: pause-megatron export-hf {checkpoint.config.model.from_ or 'BASE'} {base}"
        ) from None
    if pause.get("ids") != list(checkpoint.pause_ids):
        raise CheckpointError(
            f"--adapter {base}: config.json: pause.ids: expected {list(checkpoint.pause_ids)}, as in the run, got "
            f"{pause.get('ids')}"
        )
    return pause


def _changed_pauses(checkpoint: NativeCheckpoint, base: dict[str, Any]) -> dict[str, Any]:
    """Return what inference with the adapter does otherwise than with the base: peft loads the base's config.json."""
    run = pause_record(checkpoint, ("",), None)
    changed = {key: run[key] for key in _OF_INFERENCE if run[key] != base.get(key)}
    positions = run.get("positions", "own")
    return changed | ({} if positions == base.get("positions", "own") else {"positions": positions})


def _card(checkpoint: NativeCheckpoint, base: Path, changed: dict[str, Any]) -> str:
    manifest, lora = checkpoint.reader.manifest, checkpoint.config.lora
    entry = ""
    if changed:
        entry = (
            "\nThe base's `config.json` has other pauses than this run. `model`, the base, gets the run's with\n\n"
            f"```python\nmodel.config.pause |= {changed!r}\n```\n"
        )
    return (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(str(base))}\n---\n\n# LoRA adapter with pause tokens\n\n"
        f"Rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}; {manifest.step:,} optimizer steps. The "
        f"rows of the pause ids {list(checkpoint.pause_ids)} are part of the adapter. Written by pause-megatron.\n"
        f"{entry}"
    )
