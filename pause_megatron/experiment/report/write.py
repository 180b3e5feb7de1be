"""Writing the folder of a report: index.html (self-contained), the pictures and summary.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.experiment.cell import VERSION
from pause_megatron.experiment.report import costs, curve_plots, curves, plots, tables
from pause_megatron.experiment.report.collect import Collected, collect
from pause_megatron.experiment.report.compare import Comparison, Key, Summary, compare, main_summaries, summarise
from pause_megatron.experiment.report.page import Part, bullets, paragraph, picture, render
from pause_megatron.experiment.report.published import Published, published
from pause_megatron.experiment.stored import write_json
from pause_megatron.files.durable import write_whole


@dataclass(frozen=True)
class Findings:
    """The findings of an experiment.

    Attributes:
        collected: The data.
        summaries: Scores over seeds by (variant, task, M_ft, M_inf).
        main: The summary that represents (variant, task).
        comparisons: Comparison of `main` with the baseline by (variant, task).
        paper: The published numbers.
    """

    collected: Collected
    summaries: Mapping[Key, Summary]
    main: Mapping[tuple[str, str], Summary]
    comparisons: Mapping[tuple[str, str], Comparison]
    paper: Published

    @property
    def tasks(self) -> list[str]:
        """Tasks with at least one score."""
        known = {task for _, task in self.main}
        return [task for task in self.collected.grid.tasks if task in known]


def write_report(directory: Path, output: Path) -> Iterator[str]:
    """Write the report of an experiment, complete or not.

    Args:
        directory: Folder of the experiment.
        output: Folder of the report.

    Yields:
        A line for each file of the report.

    Raises:
        DataError: The folder holds no experiment, or no evaluation is complete.
    """
    findings = findings_of(directory)
    output.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(findings, output))
    title = findings.collected.grid.title or findings.collected.grid.name
    write_whole(output / "index.html", render(title, _lead(findings), parts).encode())
    write_json(output / "summary.json", summary(findings))
    for path in sorted(output.glob("*")):
        yield f"wrote {path}"


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
    main = main_summaries(collected, summaries)
    comparisons = {}
    for (variant, task), one in main.items():
        baseline = main.get((collected.grid.baseline, task))
        if baseline is not None and variant != collected.grid.baseline:
            comparison = compare(one, baseline)
            if comparison is not None:
                comparisons[variant, task] = comparison
    return Findings(collected, summaries, main, comparisons, published())


def summary(findings: Findings) -> dict[str, Any]:
    """Return the content of summary.json, with scores in per cent."""
    collected = findings.collected
    return {
        "version": VERSION,
        "name": collected.grid.name,
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
        "models": [asdict(model) for model in costs.pretrained(collected)],
        "ledger": {name: each.as_json() for name, each in costs.by_variant(collected).items()},
        "paper": {"source": findings.paper.source, "precision": findings.paper.precision},
    }


def _lead(findings: Findings) -> str:
    collected = findings.collected
    seeds = ", ".join(map(str, collected.grid.seeds))
    text = (
        f"{len(collected.grid.variants)} variants, {len(findings.tasks)} tasks, finetuning seeds {seeds}. Published "
        f"numbers: {findings.paper.source}; {findings.paper.precision}."
    )
    lead = paragraph(text)
    if collected.done < len(collected.cells):
        missing = (
            f"Incomplete: {collected.done} of {len(collected.cells)} cells are done; means are over the complete ones."
        )
        lead += paragraph(missing, "warning")
    return lead


def _parts(findings: Findings, output: Path) -> Iterator[Part]:
    collected, paper, grid = findings.collected, findings.paper, findings.collected.grid
    yield Part("What these numbers can and cannot say", bullets(_caveats(findings)))
    plots.draw_variants(output / "figure3.png", findings.main, findings.tasks, paper)
    figure3 = tables.variants_table(findings.main, findings.comparisons, findings.tasks, grid.baseline, paper)
    figure3 += paragraph("Bars: means over seeds; dots: single seeds; error bars: as in the table.", "quiet")
    alt = "Bars of the four variants on each task with error bars; below each, the paper's bars"
    yield Part(
        "Figure 3: pretraining x finetuning, with and without pauses", figure3 + picture(output / "figure3.png", alt)
    )
    for name, title, figure, axis in (
        (
            "figure4-m-ft.png",
            "Figure 4: pauses in finetuning",
            curves.over_m_ft(collected, findings.summaries, paper),
            "M_ft",
        ),
        (
            "figure4-m-inf.png",
            "Figure 4: pauses at inference",
            curves.over_m_inf(collected, findings.summaries, paper),
            "M_inf",
        ),
    ):
        if figure.panels:
            curve_plots.draw_curves(output / name, figure.panels, f"pauses ({axis})")
            yield Part(title, picture(output / name, f"Scores over {axis}, a panel per task") + figure.tables)
    names = list(grid.variants)
    plots.draw_all(output / "variants.png", findings.main, findings.tasks, names, grid.baseline, paper)
    about = {name: variant.about for name, variant in grid.variants.items()}
    controls = tables.controls_table(findings.main, findings.comparisons, findings.tasks, about, paper)
    controls += bullets(_paper_controls(findings))
    picture_html = picture(output / "variants.png", "Every variant and control as a point with its error bar")
    yield Part("All variants and controls: appending and prepending, fillers, memory tokens", picture_html + controls)
    yield Part("What was pretrained", costs.pretrained_table(costs.pretrained(collected)))
    ledger = tables.ledger_table(costs.by_variant(collected)) + tables.ledger_table(costs.by_verb(collected))
    yield Part("Ledger: what it cost", ledger + bullets(_ledger_notes()))


def _caveats(findings: Findings) -> list[str]:
    grid = findings.collected.grid
    lines = tables.limits(findings.main, findings.tasks, grid.baseline, findings.paper)
    supported = [
        f"{variant} on {findings.paper.title(task)} ({each.difference:+.1f})"
        for (variant, task), each in findings.comparisons.items()
        if each.supported
    ]
    count = len(findings.comparisons)
    lines.append(
        f"Of {count} comparisons with {grid.baseline}, {len(supported)} leave out 0 over records and over seeds"
        + (f": {', '.join(supported)}" if supported else "")
        + f". By chance alone up to {0.05 * count:.1f} would; no correction for their number is made."
    )
    lines.append(
        "Where several M_ft were tried, the best represents the variant, as in the paper. It is selected on the "
        "reported records, which favours variants with more of them. All M_ft and single seeds are in summary.json."
    )
    lines.append(
        "Seeds are those of the finetuning. Each model is pretrained once: what another pretraining seed would change "
        "is not in any error bar."
    )
    return lines


def _paper_controls(findings: Findings) -> list[str]:
    paper = findings.paper
    filler = [
        f"{paper.title(task)} {paper.filler(task):.1f}" for task in findings.tasks if paper.filler(task) is not None
    ]
    lines = [f'Paper, filler "." at inference on StdPT_StdFT: {", ".join(filler)}: no gain.'] if filler else []
    return lines + [f"Paper: {statement}" for statement in paper.statements]


def _ledger_notes() -> list[str]:
    return [
        "Model FLOP: 6 N + 12 L d T for a raw token in training, a third of 6 N for a token in evaluation (N: "
        "parameters that multiply, T: the window). Recomputation does not count.",
        "Variants that share a pretrained model each count it; the last row counts every cell once.",
        "Seconds of work are those of training steps and answering; wall seconds include start-up, over all attempts "
        "that ended.",
    ]


def _plain(each: Summary) -> dict[str, Any]:
    content = asdict(each)
    del content["records"]
    return content


def _comparison(each: Comparison | None) -> dict[str, Any] | None:
    return None if each is None else {**asdict(each), "supported": each.supported}
