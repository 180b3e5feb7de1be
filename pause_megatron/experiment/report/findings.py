"""What an experiment found: summaries, choices, comparisons and flipped answers, and the content of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import VERSION
from pause_megatron.experiment.report import costs, data_files
from pause_megatron.experiment.report.choice import Choice, choose
from pause_megatron.experiment.report.collect import Collected, collect
from pause_megatron.experiment.report.compare import Comparison, Key, Summary, compare, corrected, summarise
from pause_megatron.experiment.report.data_files import Pair
from pause_megatron.experiment.report.flips import Flips, flips, read_outcomes
from pause_megatron.experiment.report.head import provenance
from pause_megatron.experiment.report.published import Published, published


@dataclass(frozen=True)
class Findings:
    """The findings of an experiment.

    Attributes:
        collected: The data.
        summaries: Scores over seeds by (variant, task, M_ft, M_inf).
        choices: What represents (variant, task).
        comparisons: Comparison of the chosen summary with the baseline's by (variant, task).
        flips: Record-by-record comparison of the same by (variant, task, seed).
        paper: The published numbers.
        provenance: See `head.provenance`.
    """

    collected: Collected
    summaries: Mapping[Key, Summary]
    choices: Mapping[tuple[str, str], Choice]
    comparisons: Mapping[tuple[str, str], Comparison]
    flips: Mapping[Pair, Flips]
    paper: Published
    provenance: Mapping[str, Any]

    @property
    def main(self) -> dict[tuple[str, str], Summary]:
        """The summary that represents (variant, task)."""
        return {key: choice.chosen for key, choice in self.choices.items()}

    @property
    def tasks(self) -> list[str]:
        """Tasks with at least one score."""
        known = {task for _, task in self.choices}
        return [task for task in self.collected.grid.tasks if task in known]


def findings_of(directory: Path) -> Findings:
    """Return the findings of an experiment.

    Raises:
        DataError: The folder holds no experiment, or no evaluation is complete.
    """
    collected = collect(directory)
    if not collected.scores:
        raise DataError(
            f"{directory}: expected at least one complete evaluation, got none ({collected.done} of "
            f"{len(collected.cells)} cells are done)"
        )
    summaries = summarise(collected.scores)
    choices = choose(collected, summaries)
    comparisons: dict[tuple[str, str], Comparison] = {}
    pairs: dict[Pair, Flips] = {}
    for (variant, task), choice in choices.items():
        baseline = choices.get((collected.grid.baseline, task))
        if baseline is None or variant == collected.grid.baseline:
            continue
        comparison = compare(choice.chosen, baseline.chosen)
        if comparison is not None:
            comparisons[variant, task] = comparison
            pairs |= _flips(collected, choice.chosen, baseline.chosen)
    chances = {name: task.chance for name, task in collected.grid.tasks.items() if task.chance is not None}
    return Findings(
        collected, summaries, choices, corrected(comparisons), pairs, published(chances), provenance(collected)
    )


def summary(findings: Findings) -> dict[str, Any]:
    """Return the content of summary.json, with scores in per cent."""
    collected = findings.collected
    return {
        "version": VERSION,
        "name": collected.grid.name,
        "provenance": findings.provenance,
        "cells": {"done": collected.done, "all": len(collected.cells)},
        "baseline": collected.grid.baseline,
        "scores": [_plain(each) for each in findings.summaries.values()],
        "main": [
            {
                **_plain(each),
                "paper": findings.paper.score(task, variant),
                "against_baseline": _comparison(findings.comparisons.get((variant, task))),
            }
            for (variant, task), each in findings.main.items()
        ],
        "seeds": rows(findings)["seeds.csv"],
        "comparisons": rows(findings)["comparisons.csv"],
        "flips": rows(findings)["flips.csv"],
        "models": [asdict(model) for model in costs.pretrained(collected)],
        "ledger": {name: each.as_json() for name, each in costs.by_variant(collected).items()},
        "methods": {
            name: method.model_dump()
            for name, method in findings.paper.methods.items()
            if name in collected.grid.variants
        },
        "paper": {"source": findings.paper.source, "precision": findings.paper.precision},
        "columns": data_files.COLUMNS,
    }


def rows(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every CSV file by its name."""
    baseline = findings.collected.grid.baseline
    return {
        "scores.csv": list(data_files.score_rows(findings.summaries.values(), findings.choices)),
        "seeds.csv": list(data_files.seed_rows(findings.collected.scores)),
        "comparisons.csv": list(data_files.comparison_rows(findings.comparisons, baseline)),
        "flips.csv": list(data_files.flip_rows(findings.flips, baseline)),
    }


def _flips(collected: Collected, one: Summary, baseline: Summary) -> dict[Pair, Flips]:
    """Return the flipped answers of every seed that both have."""
    found = {}
    for seed in sorted(one.cells.keys() & baseline.cells.keys()):
        before, after = (
            read_outcomes(collected.directory / "cells" / each.cells[seed], each.m_inf) for each in (baseline, one)
        )
        found[one.variant, one.task, seed] = flips(before, after)
    return found


def _plain(each: Summary) -> dict[str, Any]:
    content = asdict(each)
    del content["records"], content["records_by_seed"], content["group_of"]
    return {**content, "low": each.low, "high": each.high}


def _comparison(each: Comparison | None) -> dict[str, Any] | None:
    return None if each is None else {**asdict(each), "p": each.p, "supported": each.supported}
