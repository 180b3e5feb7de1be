"""A grid in YAML becomes cells, cells become results, results become a report that stands beside the paper's."""

from __future__ import annotations
