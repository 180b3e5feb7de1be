"""Evaluation with pauses: scorers of our own for the nine tasks, lm-eval for the rest, statistics. See README.md."""

from pause_megatron.evaluate.evaluation import evaluate, identify
from pause_megatron.evaluate.fingerprint import model_fingerprint
from pause_megatron.evaluate.journal import read_samples
from pause_megatron.evaluate.results import Identity, ResultsFolder, Settings, opened, read_results
from pause_megatron.evaluate.scoring import Scorer, check_settings, own_settings
from pause_megatron.evaluate.statistics import Difference, Mean, mean, paired_bootstrap

__all__ = [
    "Difference",
    "Identity",
    "Mean",
    "ResultsFolder",
    "Scorer",
    "Settings",
    "check_settings",
    "evaluate",
    "identify",
    "mean",
    "model_fingerprint",
    "opened",
    "own_settings",
    "paired_bootstrap",
    "read_results",
    "read_samples",
]
