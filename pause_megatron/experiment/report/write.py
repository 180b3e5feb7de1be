"""Writing the folder of a report: index.html, the pages of flipped answers, pictures, CSV files and summary.json."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path

from pause_megatron.experiment.report import costs, curve_plots, curves, plots, tables
from pause_megatron.experiment.report.data_files import COLUMNS, as_csv
from pause_megatron.experiment.report.findings import Findings, findings_of, rows, summary
from pause_megatron.experiment.report.flips import Flips, read_records
from pause_megatron.experiment.report.head import cells_table, head, settings_table
from pause_megatron.experiment.report.methods import methods_table
from pause_megatron.experiment.report.page import Part, bullets, figures, link, paragraph, picture, render, table
from pause_megatron.experiment.report.pairs import pair_page
from pause_megatron.experiment.report.published import VARIANTS
from pause_megatron.experiment.stored import write_json
from pause_megatron.files.durable import write_whole

PAIRS = "pairs"


def write_report(directory: Path, output: Path, task_path: str | None = None) -> Iterator[str]:
    """Write the report of an experiment, complete or not.

    Args:
        directory: Folder of the experiment.
        output: Folder of the report.
        task_path: Folder that holds a folder of records per task, for prompts; None: that of the evaluations.

    Yields:
        A line for each file of the report.

    Raises:
        DataError: The folder holds no experiment, or no evaluation is complete.
    """
    findings = findings_of(directory)
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / PAIRS, ignore_errors=True)
    pages = _write_pairs(findings, output, task_path)
    for name, content in rows(findings).items():
        write_whole(output / name, as_csv(name, content))
    write_json(output / "summary.json", summary(findings))

    def where(cell: str) -> str:
        return os.path.relpath(directory / "cells" / cell, output)

    parts = list(_parts(findings, output, where, pages))
    title = findings.collected.grid.title or findings.collected.grid.name
    write_whole(output / "index.html", render(title, _lead(findings), parts).encode())
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        yield f"wrote {path}"


def _write_pairs(findings: Findings, output: Path, task_path: str | None) -> dict[tuple[str, str], str]:
    """Write a page for each variant and task, and return their relative paths."""
    by_pair: dict[tuple[str, str], dict[int, Flips]] = {}
    for (variant, task, seed), each in findings.flips.items():
        by_pair.setdefault((variant, task), {})[seed] = each
    pages = {}
    baseline = findings.collected.grid.baseline
    for (variant, task), by_seed in by_pair.items():
        records = read_records(next(iter(by_seed.values())).one, task_path)
        title = f"{findings.paper.title(task)}: answers of {variant} that differ from those of {baseline}"
        pages[variant, task] = f"{PAIRS}/{variant}-{task}.html"
        path = output / pages[variant, task]
        path.parent.mkdir(exist_ok=True)
        write_whole(path, pair_page(title, by_seed, records, "../index.html").encode())
    return pages


def _lead(findings: Findings) -> str:
    collected = findings.collected
    seeds = ", ".join(map(str, collected.grid.seeds))
    text = f"{len(collected.grid.variants)} variants, {len(findings.tasks)} tasks, finetuning seeds {seeds}."
    if any(task in findings.paper.tasks for task in findings.tasks):
        text += f" Published numbers: {findings.paper.source}; {findings.paper.precision}."
    lead = paragraph(text)
    if collected.done < len(collected.cells):
        missing = (
            f"Incomplete: {collected.done} of {len(collected.cells)} cells are done; means are over the complete ones."
        )
        lead += paragraph(missing, "warning")
    return lead + head(findings.provenance)


def _parts(
    findings: Findings, output: Path, where: Callable[[str], str], pages: Mapping[tuple[str, str], str]
) -> Iterator[Part]:
    collected, paper, main = findings.collected, findings.paper, findings.main
    yield Part("What these numbers can and cannot say", bullets(_caveats(findings)))
    if any(variant in VARIANTS for variant, _ in main):
        drawn = []
        for task in findings.tasks:
            path = output / f"figure3-{task}.png"
            alt = plots.draw_variants(path, main, task, paper)
            drawn.append(picture(path, alt, "Bars: means over seeds; lines: 95 % intervals; dots: single seeds."))
        html = figures(drawn) + tables.variants_table(main, findings.tasks, paper)
        yield Part("Figure 3: pretraining x finetuning, with and without pauses", html)
    yield _all_variants(findings, output, where, pages)
    for name, title, draw in (
        ("figure4-m-ft", "Figure 4: pauses in finetuning (M_ft)", curves.over_m_ft),
        ("figure4-m-inf", "Figure 4: pauses at inference (M_inf)", curves.over_m_inf),
    ):
        figure = draw(collected, findings.summaries, paper, where)
        drawn = []
        for task, panel in figure.panels.items():
            path = output / f"{name}-{task}.png"
            alt = curve_plots.draw_curves(path, panel, f"pauses ({figure.axis})")
            drawn.append(picture(path, alt, "Square-root axis; lines join measured points; 95 % intervals."))
        yield Part(title, figures(drawn) + figure.tables if drawn else "")
    yield Part("What was pretrained", costs.pretrained_table(costs.pretrained(collected)))
    yield Part("Settings", settings_table(collected))
    by_variant, by_verb = costs.by_variant(collected), costs.by_verb(collected)
    ledger = tables.ledger_table(by_variant, "variant") + tables.ledger_table(by_verb, "verb")
    yield Part("Ledger: what it cost", ledger + bullets(_ledger_notes()))
    listing = cells_table(collected, where)
    yield Part(
        "Cells", f"<details><summary>{len(collected.cells)} cells, with fingerprints</summary>{listing}</details>"
    )
    yield Part("Data", _data())


def _all_variants(
    findings: Findings, output: Path, where: Callable[[str], str], pages: Mapping[tuple[str, str], str]
) -> Part:
    grid, paper, main = findings.collected.grid, findings.paper, findings.main
    drawn = []
    for task in findings.tasks:
        path = output / f"variants-{task}.png"
        alt = plots.draw_all(path, main, task, list(grid.variants), grid.baseline, paper)
        caption = "Points: means over seeds; lines: 95 % intervals; dots: single seeds; dashed: the baseline."
        drawn.append(picture(path, alt, caption))
    html = figures(drawn) + tables.all_table(main, findings.comparisons, findings.tasks, paper, where, pages)
    html += tables.choice_table(findings.choices, paper)
    html += bullets([f"{name}: {variant.about}" for name, variant in grid.variants.items() if variant.about])
    html += bullets(_paper_controls(findings))
    html += methods_table(list(grid.variants), findings.comparisons, grid.baseline, paper)
    return Part("All variants and controls, against the baseline", html)


def _caveats(findings: Findings) -> list[str]:
    grid, chosen = findings.collected.grid, [each for each in findings.choices.values() if len(each.candidates) > 1]
    lines = tables.limits(findings.main, findings.tasks, grid.baseline, findings.paper)
    supported = [
        f"{variant} on {findings.paper.title(task)} ({each.difference:+.1f})"
        for (variant, task), each in findings.comparisons.items()
        if each.supported
    ]
    count = len(findings.comparisons)
    lines.append(
        f"Comparisons with {grid.baseline}: {count}, of which supported: {len(supported)}"
        + (f" ({', '.join(supported)})" if supported else "")
        + ". Supported means p < 0.05 over records and over seeds, corrected for the number of comparisons (Holm)."
    )
    if any(each.biased for each in chosen):
        lines.append(
            "Where several M_ft were tried, the best represents the variant, as in the paper. It is chosen on the "
            "evaluation records: biased upwards, which favours variants with more of them. A table below has all."
        )
    elif chosen:
        lines.append("Where several M_ft were tried, the best on the held-out part of train represents the variant.")
    lines.append(
        "Seeds are those of the finetuning. Each model is pretrained once: what another pretraining seed would change "
        "is not in any interval."
    )
    return lines


def _paper_controls(findings: Findings) -> list[str]:
    paper = findings.paper
    known = [task for task in findings.tasks if task in paper.tasks]
    filler = [f"{paper.title(task)} {paper.filler(task):.1f}" for task in known if paper.filler(task) is not None]
    lines = [f'Paper, filler "." at inference on StdPT_StdFT: {", ".join(filler)}: no gain.'] if filler else []
    return lines + [f"Paper: {statement}" for statement in paper.statements] if known else []


def _ledger_notes() -> list[str]:
    return [
        "Model FLOP: 6 N + 12 L d T for a raw token in training, a third of 6 N for a token in evaluation (N: "
        "parameters that multiply, T: the window). Recomputation does not count.",
        "Variants that share a pretrained model each count it; the last row counts every cell once.",
        "Seconds of work are those of training steps and answering; wall seconds include start-up, over all attempts "
        "that ended.",
    ]


def _data() -> str:
    files = ", ".join(link(name, name) for name in [*COLUMNS, "summary.json"])
    html = f"<p>All numbers of this page: {files}. summary.json holds the same rows, and the head of this page.</p>"
    for name, columns in COLUMNS.items():
        body = [[f"<code>{escape(column)}</code>", escape(meaning)] for column, meaning in columns.items()]
        listing = table(["column", "meaning"], body, sortable=False)
        html += f"<details><summary>Columns of {escape(name)}</summary>{listing}</details>"
    return html
