"""Pause-token pretraining (Goyal et al., ICLR 2024) for Megatron datasets and models under DeepSpeed.

A run from Python:

    config = load_config(recipe="tiny-pause", overrides=["data.prefix=data/c4", "run.dir=runs/a"])
    pretrain(config)
    export_hf("runs/a", "out/")
    load_generator("out/").generate(["My fellow citizens,"], pauses=10)

- Configuration and runs: `load_config`, `ResolvedConfig`, `pretrain`, `finetune`.
- Corpora and windows: `prepare`, `Tokenizer`, `load_tokenizer`, `PausePlan`, `PauseInjector`, `inject`, `add_pauses`.
- Megatron-LM scripts: `PauseGPTDatasetConfig`, `PauseGPTDataset`, `PauseTokenizer`, `PauseGPTModel`, `build_model`.
- transformers: `add_pause_token`, `pause_windows`, `PauseTransform`, `PauseExamples`, `pad_batch`, `PauseLoss`.
- Hugging Face folders and generation: `export_hf`, `import_hf`, `load_generator`, `PauseGenerator`.
- Errors that a user can act on: `PauseMegatronError`, `ConfigError`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from pause_megatron import moved

if TYPE_CHECKING:
    from pause_megatron.config.load import load as load_config
    from pause_megatron.config.schema import ResolvedConfig
    from pause_megatron.data.prepare.run import prepare
    from pause_megatron.data.tokenizer.pause_tokenizer import PauseTokenizer
    from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
    from pause_megatron.data.windows.dataset import PauseGPTDataset
    from pause_megatron.data.windows.dataset_config import PauseGPTDatasetConfig
    from pause_megatron.data.windows.pause import PauseInjector, PausePlan, add_pauses, inject
    from pause_megatron.errors import ConfigError, PauseMegatronError
    from pause_megatron.hf.examples import PauseExamples
    from pause_megatron.hf.export import export as export_hf
    from pause_megatron.hf.importing import import_folder as import_hf
    from pause_megatron.hf.loss import PauseLoss
    from pause_megatron.hf.pause_token import add_pause_token
    from pause_megatron.hf.transform import PauseTransform, pad_batch
    from pause_megatron.hf.windows import pause_windows
    from pause_megatron.inference.generate import PauseGenerator
    from pause_megatron.inference.loading import load as load_generator
    from pause_megatron.model.build import build_model
    from pause_megatron.model.gpt import PauseGPTModel
    from pause_megatron.train.finetune import finetune
    from pause_megatron.train.pretrain import pretrain

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "PauseExamples",
    "PauseGPTDataset",
    "PauseGPTDatasetConfig",
    "PauseGPTModel",
    "PauseGenerator",
    "PauseInjector",
    "PauseLoss",
    "PauseMegatronError",
    "PausePlan",
    "PauseTokenizer",
    "PauseTransform",
    "ResolvedConfig",
    "Tokenizer",
    "add_pause_token",
    "add_pauses",
    "build_model",
    "export_hf",
    "finetune",
    "import_hf",
    "inject",
    "load_config",
    "load_generator",
    "load_tokenizer",
    "pad_batch",
    "pause_windows",
    "prepare",
    "pretrain",
]

# Imported when they are asked for: the command line prints --help at once, and `inject` needs only numpy.
# Public name -> module, and ":attribute" where it has another name there.
_PLACES = {
    "ConfigError": "errors",
    "PauseExamples": "hf.examples",
    "PauseGPTDataset": "data.windows.dataset",
    "PauseGPTDatasetConfig": "data.windows.dataset_config",
    "PauseGPTModel": "model.gpt",
    "PauseGenerator": "inference.generate",
    "PauseInjector": "data.windows.pause",
    "PauseLoss": "hf.loss",
    "PauseMegatronError": "errors",
    "PausePlan": "data.windows.pause",
    "PauseTokenizer": "data.tokenizer.pause_tokenizer",
    "PauseTransform": "hf.transform",
    "ResolvedConfig": "config.schema",
    "Tokenizer": "data.tokenizer.tokenizer",
    "add_pause_token": "hf.pause_token",
    "add_pauses": "data.windows.pause",
    "build_model": "model.build",
    "export_hf": "hf.export:export",
    "finetune": "train.finetune",
    "import_hf": "hf.importing:import_folder",
    "inject": "data.windows.pause",
    "load_config": "config.load:load",
    "load_generator": "inference.loading:load",
    "load_tokenizer": "data.tokenizer.tokenizer",
    "pad_batch": "hf.transform",
    "pause_windows": "hf.windows",
    "prepare": "data.prepare.run",
    "pretrain": "train.pretrain",
}

moved.install()


if not TYPE_CHECKING:  # type checkers know the names above, and report others

    def __getattr__(name: str) -> object:
        """Return a public name, from the module that has it (PEP 562)."""
        if name in _PLACES:
            module, _, attribute = _PLACES[name].partition(":")
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
            return value
        # Asked for by importlib, copy and inspect, of every module; and by `from pause_megatron import MODULE`, which
        # imports the module next: nothing else may be imported before it.
        if name.startswith("__") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pause_megatron.config.spelling import nearest

        raise AttributeError(f"{__name__}: expected one of {', '.join(__all__)}, got {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
