"""Scoring of a corpus: the loss or the entropy of a model at each token, as a side array of the corpus."""

from __future__ import annotations
