"""The report of an experiment: the paper's figures as tables and plots, beside the published numbers."""

from __future__ import annotations

from pause_megatron.experiment.report.write import write_report

__all__ = ["write_report"]
