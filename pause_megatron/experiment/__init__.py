"""The paper's experiments as one program: a grid in YAML becomes cells, cells become results, results become a report."""

from __future__ import annotations
