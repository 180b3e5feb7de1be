"""Loader of model folders for inference: safetensors only, no code of the folder is run, nothing is unpickled."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch

from pause_megatron.config.model_from import checkpoint_config
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import custom_generate
from pause_megatron.inference.generate import PauseGenerator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    folder: str | Path, *, device: str = "cpu", dtype: str | None = None, attention: str = "sdpa"
) -> PauseGenerator:
    """Load the model of a folder, from safetensors only, without network access and without running the folder's code.

    Args:
        folder: What `export-hf` wrote, or a transformers folder of the Llama family.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: "fp32", "bf16" or "fp16"; None for the stored type.
        attention: transformers' attn_implementation: "sdpa", "eager", ...

    Returns:
        The model, ready to generate and score.

    Raises:
        DataError: No such folder, no safetensors, an architecture that needs custom code, damaged files, or a device
            that this machine lacks.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    check_folder(folder)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DataError(f"device {device!r}: this machine has no CUDA device; use --device cpu")
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            use_safetensors=True,
            dtype="auto" if dtype is None else DTYPES[dtype],
            attn_implementation=attention,
            **options,
        )
        model.to(device)
    except Exception as error:  # transformers, safetensors and torch raise many types: each means an unusable model
        raise DataError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # as above
        raise DataError(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: expected a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    return PauseGenerator(model, tokenizer)


def write_custom_generate(folder: str | Path) -> Path:
    """Write `custom_generate/generate.py` to a model folder, for `model.generate(custom_generate=FOLDER, pauses=10)`.

    transformers runs it only for callers who set trust_remote_code. It does not need this package.

    Args:
        folder: A transformers folder with safetensors.

    Returns:
        The file.

    Raises:
        DataError: Not a transformers folder with safetensors.
    """
    check_folder(Path(folder))
    target = Path(folder) / "custom_generate" / "generate.py"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(custom_generate.__file__, target)
    return target


def check_folder(folder: Path) -> None:
    """Check that a folder is a transformers folder with safetensors, before transformers reads it.

    Args:
        folder: Path of the folder.

    Raises:
        DataError: It is not. For a run or a checkpoint, the message has the export command.
    """
    if not folder.is_dir():
        raise DataError(f"model {str(folder)!r}: expected a folder as export-hf writes it, there is no such folder")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        if _is_run_or_checkpoint(folder):
            raise DataError(
                f"{folder}: expected a folder that export-hf wrote, got a run or a checkpoint; export it first: "
                f"pause-megatron export-hf {shlex.quote(str(folder))} OUT"
            ) from None
        raise DataError(f"{path}: expected a transformers folder, as export-hf writes it, got no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got a file that is not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if not any(folder.glob("*.safetensors")):
        others = sorted(item.name for item in folder.iterdir() if item.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        refused = f"; {', '.join(others)} would have to be unpickled, which can run code: refused" if others else ""
        raise DataError(f"{folder}: expected *.safetensors, got none{refused}")


def _is_run_or_checkpoint(folder: Path) -> bool:
    try:
        checkpoint_config(folder)
    except ConfigError:
        return (folder / "config.yaml").is_file()  # no checkpoint yet
    return True


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
