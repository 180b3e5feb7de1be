"""The paper's numbers from published.yaml, read off its figures to about +-0.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pause_megatron.config.text import read_tree

FILE = Path(__file__).resolve().parents[1] / "published.yaml"
VARIANTS = ("StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT")
"""The four variants of the paper, in its order."""


class PublishedCurve(NamedTuple):
    """A curve of the paper's Figure 4.

    Attributes:
        label: What the curve shows.
        points: Score in per cent by number of pauses.
    """

    label: str
    points: Mapping[int, float]


@dataclass(frozen=True)
class Published:
    """The paper's numbers in per cent; None for a number that it does not report.

    Attributes:
        source: Paper and figures.
        precision: Precision of the numbers.
        statements: The paper's statements in words.
    """

    source: str
    precision: str
    statements: tuple[str, ...]
    _tree: dict[str, Any]

    def score(self, task: str, variant: str) -> float | None:
        """Return a bar of Figure 3."""
        return self._task(task).get(variant)

    def title(self, task: str) -> str:
        """Return the task's name in print."""
        return self._task(task).get("title", task)

    def chance(self, task: str) -> float | None:
        """Return the score of guessing; None for a task that is not in the paper."""
        return self._task(task).get("chance")

    def filler(self, task: str) -> float | None:
        """Return the score with filler "." at inference on StdPT_StdFT."""
        return self._tree["filler"].get(task)

    def over_m_ft(self, task: str) -> PublishedCurve | None:
        """Return the task's curve over M_ft."""
        return self._curve("m_ft", task)

    def over_m_inf(self, task: str) -> PublishedCurve | None:
        """Return the task's curve over M_inf."""
        return self._curve("m_inf", task)

    def _task(self, name: str) -> dict[str, Any]:
        return self._tree["tasks"].get(name, {})

    def _curve(self, kind: str, task: str) -> PublishedCurve | None:
        for curve in self._tree[kind]:
            if curve["task"] == task:
                label = f"{curve['variant']}, M_ft={curve['m_ft']}" if "m_ft" in curve else curve["variant"]
                return PublishedCurve(label, {int(count): score for count, score in curve["points"].items()})
        return None


def published() -> Published:
    """Return the numbers of the file that ships."""
    tree, _ = read_tree(FILE.read_text(encoding="utf-8"), str(FILE))
    return Published(tree["source"], tree["precision"], tree["statements"], tree)
