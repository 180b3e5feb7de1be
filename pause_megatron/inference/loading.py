"""Opening an exported folder, or any Llama-family folder, without running or unpickling anything that lies in it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import torch

from pause_megatron.config.model_from import checkpoint_config
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import custom_generate
from pause_megatron.inference.generate import PauseGenerator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    folder: str | Path, *, device: str = "cpu", dtype: str | None = None, attention: str = "sdpa"
) -> PauseGenerator:
    """A generator of the model in a folder. Safetensors only; code in the folder is never run; no network.

    Args:
        folder: what `export-hf` wrote, or a transformers folder of the Llama family.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: "fp32", "bf16" or "fp16"; None: as stored.
        attention: transformers' attn_implementation: "sdpa", "eager", ...

    Raises:
        DataError: nothing there, no safetensors, an architecture that needs code of its own, damaged files, or a
            device that this machine does not have.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    check_folder(folder)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DataError(f"device {device!r}: this machine has no CUDA device; use --device cpu")
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            use_safetensors=True,
            dtype="auto" if dtype is None else DTYPES[dtype],
            attn_implementation=attention,
            **options,
        ).to(device)
    except Exception as error:  # transformers, safetensors and torch raise many kinds: each means an unusable model
        raise DataError(f"{folder}: the model cannot be loaded: {_first_line(error)}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # as above
        raise DataError(f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: expected a fast tokenizer (tokenizer.json), came {type(tokenizer).__name__}")
    return PauseGenerator(model, tokenizer)


def write_custom_generate(folder: str | Path) -> Path:
    """Put `custom_generate/generate.py` into a model folder, for `model.generate(custom_generate=FOLDER, pauses=10)`.

    transformers runs it only for callers who pass trust_remote_code themselves. It needs nothing of this project.

    Returns:
        the file written.

    Raises:
        DataError: the folder is not a model's.
    """
    check_folder(Path(folder))
    target = Path(folder) / "custom_generate" / "generate.py"
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(custom_generate.__file__, target)
    return target


def check_folder(folder: Path) -> None:
    """Say what is wrong with a folder before transformers guesses.

    Raises:
        DataError: not a transformers folder with safetensors; a run or a checkpoint is told to export it first.
    """
    if not folder.is_dir():
        raise DataError(f"model {str(folder)!r}: expected a folder as export-hf writes it; there is no such folder")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        if _is_of_a_run(folder):
            raise DataError(
                f"{folder}: expected a folder that export-hf wrote, got a run or a checkpoint; export it first: "
                f"pause-megatron export-hf {shlex.quote(str(folder))} OUT"
            ) from None
        raise DataError(f"{path}: not there; expected a transformers model folder, as export-hf writes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected a JSON object, came {type(config).__name__}")
    if not any(folder.glob("*.safetensors")):
        others = sorted(item.name for item in folder.iterdir() if item.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"; {', '.join(others)} would have to be unpickled, which can run code: refused" if others else ""
        raise DataError(f"{folder}: expected *.safetensors, found none{found}")


def _is_of_a_run(folder: Path) -> bool:
    try:
        checkpoint_config(folder)
    except ConfigError:
        return (folder / "config.yaml").is_file()  # no checkpoint yet
    return True


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
