"""Pause-token pretraining (Goyal et al., ICLR 2024) for Megatron datasets and models under DeepSpeed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from pause_megatron import moved

if TYPE_CHECKING:
    from pause_megatron.data.tokenizer.pause_tokenizer import PauseTokenizer
    from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseGPTDatasetConfig
    from pause_megatron.data.windows.pause import PauseInjector, PausePlan, add_pauses, inject
    from pause_megatron.errors import PauseMegatronError
    from pause_megatron.hf.examples import PauseExamples
    from pause_megatron.hf.loss import PauseLoss
    from pause_megatron.hf.pause_token import add_pause_token
    from pause_megatron.hf.transform import PauseTransform, pad_batch
    from pause_megatron.hf.windows import pause_windows
    from pause_megatron.model.gpt import PauseGPTModel

__version__ = "0.1.0"

__all__ = [
    "PauseExamples",
    "PauseGPTDataset",
    "PauseGPTDatasetConfig",
    "PauseGPTModel",
    "PauseInjector",
    "PauseLoss",
    "PauseMegatronError",
    "PausePlan",
    "PauseTokenizer",
    "PauseTransform",
    "add_pause_token",
    "add_pauses",
    "inject",
    "pad_batch",
    "pause_windows",
]

# Imported when they are asked for: the command line says --help at once, and `inject` needs numpy alone.
_PLACES = {
    **dict.fromkeys(("PauseGPTDataset", "PauseGPTDatasetConfig"), "data.windows.dataset"),
    "PauseTokenizer": "data.tokenizer.pause_tokenizer",
    **dict.fromkeys(("PauseInjector", "PausePlan", "add_pauses", "inject"), "data.windows.pause"),
    "PauseMegatronError": "errors",
    "PauseExamples": "hf.examples",
    "PauseLoss": "hf.loss",
    "add_pause_token": "hf.pause_token",
    **dict.fromkeys(("PauseTransform", "pad_batch"), "hf.transform"),
    "pause_windows": "hf.windows",
    "PauseGPTModel": "model.gpt",
}

moved.install()


def __getattr__(name: str) -> object:
    """A public name, from the module that has it (PEP 562)."""
    place = _PLACES.get(name)
    if place is not None:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{place}"), name)
        return value
    # Asked for by importlib, copy and inspect, of every module; and by `from pause_megatron import MODULE`, which
    # imports the module next: nothing else may be imported before it.
    if name.startswith("__") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pause_megatron.config.spelling import nearest

    raise AttributeError(f"{__name__}: expected one of {', '.join(__all__)}, got {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
