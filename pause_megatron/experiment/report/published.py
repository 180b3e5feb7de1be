"""The paper's numbers, from published.yaml: read off its figures, about +-0.1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.config.text import read_tree

FILE = Path(__file__).resolve().parents[1] / "published.yaml"
# The four variants of the paper, in its order.
VARIANTS = ("StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT")


@dataclass(frozen=True)
class Published:
    """What the paper reports, in per cent; None where it reports nothing.

    Attributes:
        source, precision: where the numbers are from.
        statements: what it says in words.
    """

    source: str
    precision: str
    statements: tuple[str, ...]
    _tree: dict[str, Any]

    def score(self, task: str, variant: str) -> float | None:
        """A bar of Figure 3."""
        return self._task(task).get(variant)

    def title(self, task: str) -> str:
        """The task's name in print."""
        return self._task(task).get("title", task)

    def chance(self, task: str) -> float | None:
        """What guessing gets; None for a task that the paper does not have."""
        return self._task(task).get("chance")

    def filler(self, task: str) -> float | None:
        """Filler "." at inference, on StdPT_StdFT."""
        return self._tree["filler"].get(task)

    def over_m_ft(self, task: str) -> tuple[str, dict[int, float]] | None:
        """What is shown in Figure 4, and M_ft -> score; None where it has none."""
        return self._curve("m_ft", task)

    def over_m_inf(self, task: str) -> tuple[str, dict[int, float]] | None:
        """What is shown in Figure 4, and M_inf -> score; None where it has none."""
        return self._curve("m_inf", task)

    def _task(self, name: str) -> dict[str, Any]:
        return self._tree["tasks"].get(name, {})

    def _curve(self, kind: str, task: str) -> tuple[str, dict[int, float]] | None:
        for curve in self._tree[kind]:
            if curve["task"] == task:
                label = f"{curve['variant']}, M_ft={curve['m_ft']}" if "m_ft" in curve else curve["variant"]
                return label, {int(count): score for count, score in curve["points"].items()}
        return None


def published() -> Published:
    """Read the file that ships."""
    tree, _ = read_tree(FILE.read_text(encoding="utf-8"), str(FILE))
    return Published(tree["source"], tree["precision"], tree["statements"], tree)
