"""Experiments: a grid in YAML, its cells (runs of verbs), and a report beside the paper's numbers."""

from __future__ import annotations
