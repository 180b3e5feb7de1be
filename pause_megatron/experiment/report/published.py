"""Numbers from published.yaml: the paper's, read off its figures to about +-0.1, and those of other methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from pause_megatron.config.text import read_tree
from pause_megatron.files.typed_json import Number

FILE = Path(__file__).resolve().parents[1] / "published.yaml"
VARIANTS = ("StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT")
"""The four variants of the paper, in its order."""


class _Section(BaseModel):
    """A group of published.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedTask(_Section):
    """A task in the paper, with its bars of Figure 3 in per cent.

    Attributes:
        title: Name in print.
        metric: What the paper measures.
        chance: Score of guessing, per cent.
        StdPT_StdFT: Score of the variant, as the next three.
        StdPT_PauseFT: Score of the variant.
        PausePT_StdFT: Score of the variant.
        PausePT_PauseFT: Score of the variant.
    """

    title: str
    metric: str
    chance: Number
    StdPT_StdFT: Number
    StdPT_PauseFT: Number
    PausePT_StdFT: Number
    PausePT_PauseFT: Number


class PublishedCurve(_Section):
    """A curve of the paper's Figure 4.

    Attributes:
        task: Name of the task.
        variant: Name of the variant.
        m_ft: Pauses in finetuning, of a curve over M_inf.
        points: Score in per cent by number of pauses.
    """

    task: str
    variant: str
    m_ft: str | None = None
    points: Mapping[int, Number]

    @property
    def label(self) -> str:
        """Label of the curve."""
        return self.variant if self.m_ft is None else f"{self.variant}, M_ft={self.m_ft}"


class PublishedMethod(_Section):
    """A method of another paper.

    Attributes:
        paper: The paper.
        reported: What it reports, in words; None where no figure is known here.
    """

    paper: str
    reported: str | None


class Published(_Section):
    """The paper's numbers in per cent; None for a number that it does not report.

    Attributes:
        source: Paper and figures.
        precision: Precision of the numbers.
        tasks: Tasks by name.
        fillers: Score with filler "." at inference on StdPT_StdFT, by task.
        m_ft: Curves over pauses in finetuning.
        m_inf: Curves over pauses at inference.
        statements: The paper's statements in words.
        methods: Methods of other papers, by the name of the variant.
        chances: Score of guessing that a grid gives, by task; it counts before the paper's.
    """

    source: str
    precision: str
    tasks: Mapping[str, PublishedTask]
    fillers: Mapping[str, Number]
    m_ft: tuple[PublishedCurve, ...]
    m_inf: tuple[PublishedCurve, ...]
    statements: tuple[str, ...]
    methods: Mapping[str, PublishedMethod]
    chances: Mapping[str, Number] = {}

    def score(self, task: str, variant: str) -> float | None:
        """Return a bar of Figure 3.

        Args:
            task: Name of the task.
            variant: Name of the variant.
        """
        known = self.tasks.get(task)
        return None if known is None or variant not in VARIANTS else getattr(known, variant)

    def title(self, task: str) -> str:
        """Return the task's name in print."""
        known = self.tasks.get(task)
        return task if known is None else known.title

    def chance(self, task: str) -> float | None:
        """Return the score of guessing, per cent; None where neither the grid nor the paper gives it."""
        known = self.tasks.get(task)
        return self.chances.get(task, None if known is None else known.chance)

    def filler(self, task: str) -> float | None:
        """Return the score with filler "." at inference on StdPT_StdFT."""
        return self.fillers.get(task)

    def over_m_ft(self, task: str) -> PublishedCurve | None:
        """Return the task's curve over M_ft."""
        return next((curve for curve in self.m_ft if curve.task == task), None)

    def over_m_inf(self, task: str) -> PublishedCurve | None:
        """Return the task's curve over M_inf."""
        return next((curve for curve in self.m_inf if curve.task == task), None)


def published(chances: Mapping[str, float] = MappingProxyType({})) -> Published:
    """Return the numbers of the file that ships.

    Args:
        chances: Score of guessing of a grid's own tasks, per cent.
    """
    tree, _ = read_tree(FILE.read_text(encoding="utf-8"), str(FILE))
    return Published.model_validate({**tree, "chances": dict(chances)})
