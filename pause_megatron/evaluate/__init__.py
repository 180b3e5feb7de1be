"""Evaluation with pauses: scoring of this project's tasks, lm-eval's tasks, stored results and statistics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pause_megatron.evaluate.evaluation import evaluate, identify
    from pause_megatron.evaluate.fingerprint import model_fingerprint
    from pause_megatron.evaluate.identity import HarnessDecoding, Identity, OwnDecoding, Settings
    from pause_megatron.evaluate.journal import read_samples
    from pause_megatron.evaluate.results import ResultsFolder, opened, read_results
    from pause_megatron.evaluate.scoring import Scorer, check_settings, own_settings
    from pause_megatron.evaluate.statistics import (
        Difference,
        Mean,
        PairedT,
        holm,
        interval,
        logit_interval,
        mean,
        paired_bootstrap,
        paired_t,
        wilson,
    )
    from pause_megatron.evaluate.stored import ResultEntry, Sample

__all__ = [
    "Difference",
    "HarnessDecoding",
    "Identity",
    "Mean",
    "OwnDecoding",
    "PairedT",
    "ResultEntry",
    "ResultsFolder",
    "Sample",
    "Scorer",
    "Settings",
    "check_settings",
    "evaluate",
    "holm",
    "identify",
    "interval",
    "logit_interval",
    "mean",
    "model_fingerprint",
    "opened",
    "own_settings",
    "paired_bootstrap",
    "paired_t",
    "read_results",
    "read_samples",
    "wilson",
]

# Imported on first use, so that reading results (experiment/report) does not import torch.
_MODULES = {
    **dict.fromkeys(("evaluate", "identify"), "evaluation"),
    "model_fingerprint": "fingerprint",
    **dict.fromkeys(("HarnessDecoding", "Identity", "OwnDecoding", "Settings"), "identity"),
    "read_samples": "journal",
    **dict.fromkeys(("ResultsFolder", "opened", "read_results"), "results"),
    **dict.fromkeys(("Scorer", "check_settings", "own_settings"), "scoring"),
    **dict.fromkeys(("Difference", "Mean", "PairedT", "holm", "interval", "logit_interval", "mean"), "statistics"),
    **dict.fromkeys(("paired_bootstrap", "paired_t", "wilson"), "statistics"),
    **dict.fromkeys(("ResultEntry", "Sample"), "stored"),
}


if not TYPE_CHECKING:  # type checkers know the names above, and report others

    def __getattr__(name: str) -> object:
        """Return a public name from its module (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value
