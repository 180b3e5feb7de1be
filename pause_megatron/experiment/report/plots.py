"""The plots of Figure 3 and of the controls, above the paper's. Figure 4 is in `curve_plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pause_megatron.experiment.report.compare import Summary
from pause_megatron.experiment.report.published import VARIANTS, Published

# Okabe & Ito's colors, distinct for any color vision. Each variant has one color.
COLORS = {
    "StdPT_StdFT": "#7f7f7f",
    "StdPT_PauseFT": "#56b4e9",
    "PausePT_StdFT": "#e69f00",
    "PausePT_PauseFT": "#0072b2",
}
_FURTHER = ("#009e73", "#cc79a7", "#d55e00", "#8c6d31", "#332288", "#117733")
COLUMNS = 3
_SHORT = {"StdPT_StdFT": "Std/Std", "StdPT_PauseFT": "Std/Pause", "PausePT_StdFT": "Pause/Std"}
_SHORT |= {"PausePT_PauseFT": "Pause/Pause"}


def color_of(variant: str, variants: Sequence[str]) -> str:
    """Return the color of a variant.

    Args:
        variant: Name of the variant.
        variants: Names of all variants of the grid.
    """
    if variant in COLORS:
        return COLORS[variant]
    others = [name for name in variants if name not in COLORS]
    return _FURTHER[others.index(variant) % len(_FURTHER)]


def draw_variants(path: Path, main: Mapping[tuple[str, str], Summary], tasks: Sequence[str], paper: Published) -> None:
    """Draw Figure 3: a panel per task with the four variants, above the paper's.

    Args:
        path: PNG to write.
        main: Summary by (variant, task).
        tasks: Tasks, a panel each.
        paper: The published numbers.
    """
    plt = pyplot()
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(3.5 * columns, 3.9 * rows),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [2, 1] * rows},
    )
    for index in range(rows * columns):
        ours, theirs = axes[2 * (index // columns)][index % columns], axes[2 * (index // columns) + 1][index % columns]
        if index >= len(tasks):
            ours.axis("off"), theirs.axis("off")
            continue
        _bars_of_task(ours, tasks[index], main, paper)
        _published_bars(theirs, tasks[index], paper)
    save(figure, path)


def draw_all(
    path: Path,
    main: Mapping[tuple[str, str], Summary],
    tasks: Sequence[str],
    variants: Sequence[str],
    baseline: str,
    paper: Published,
) -> None:
    """Draw every variant and control as a point with its error bar; the dashed line is the baseline.

    Args:
        path: PNG to write.
        main: Summary by (variant, task).
        tasks: Tasks, a panel each.
        variants: Variants, a row each.
        baseline: Name of the baseline.
        paper: The published numbers.
    """
    plt = pyplot()
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    shown = [variant for variant in variants if any((variant, task) in main for task in tasks)]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.6 + 3.2 * columns, rows * (0.9 + 0.3 * len(shown))),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for index, axis in enumerate(axes.flat):
        if index >= len(tasks):
            axis.axis("off")
            continue
        task = tasks[index]
        for row, variant in enumerate(shown):
            if (summary := main.get((variant, task))) is not None:
                axis.errorbar(
                    summary.value, row, xerr=summary.error, fmt="o", color=color_of(variant, variants), capsize=3
                )
        if (base := main.get((baseline, task))) is not None:
            axis.axvline(base.value, color="#7f7f7f", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        found = [main[variant, task] for variant in shown if (variant, task) in main]
        right = max([1.0, *(summary.value + (summary.error or 0.0) for summary in found)])
        axis.set_xlim(-0.03 * right, 1.06 * right)
        axis.set_title(paper.title(task), fontsize=10)
        axis.set_xlabel("per cent", fontsize=8)
        axis.grid(alpha=0.25, axis="x")
    save(figure, path)


def _bars_of_task(axes: Any, task: str, main: Mapping[tuple[str, str], Summary], paper: Published) -> None:
    found = [(variant, main.get((variant, task))) for variant in VARIANTS]
    for position, (variant, summary) in enumerate(found):
        if summary is None:
            axes.text(position, 0, "not run", ha="center", va="bottom", rotation=90, fontsize=7, color="#7f7f7f")
            continue
        axes.bar(position, summary.value, color=COLORS[variant], width=0.7)
        if summary.error is not None:
            axes.errorbar(position, summary.value, yerr=summary.error, color="black", capsize=3, linewidth=1)
        for value in summary.by_seed.values():
            axes.plot(position, value, ".", color="black", markersize=3, alpha=0.6)
        top = max([summary.value + (summary.error or 0), *summary.by_seed.values()])
        _label(axes, position, top, summary.value)
    one = next((summary for _, summary in found if summary), None)
    sizes = f" (n={one.n:,}, {one.seeds} seed{'s' if one.seeds > 1 else ''})" if one else ""
    chance = paper.chance(task)
    dotted = ", dotted: chance" if chance else ""
    axes.set_title(f"{paper.title(task)}{sizes}{dotted}", fontsize=8.5)
    if chance:
        axes.axhline(chance, color="#aa0000", linestyle=":", linewidth=1.5)
    tops = [max([s.value + (s.error or 0.0), *s.by_seed.values()]) for _, s in found if s]
    axes.set_ylim(0, 1.2 * max([1.0, chance or 0.0, *tops]))
    _label_variants(axes, "ours, per cent")


def _published_bars(axes: Any, task: str, paper: Published) -> None:
    scores = {variant: paper.score(task, variant) for variant in VARIANTS}
    values = {variant: value for variant, value in scores.items() if value is not None}
    if not values:
        axes.axis("off")
        return
    for variant, value in values.items():
        position = VARIANTS.index(variant)
        axes.bar(position, value, color="white", edgecolor=COLORS[variant], hatch="///", width=0.7)
        _label(axes, position, value, value)
    axes.set_ylim(0, 1.25 * max(values.values()))
    _label_variants(axes, "paper, 1B")


def _label(axes: Any, position: float, height: float, value: float) -> None:
    """Write a number above a bar."""
    point = (position, height), (0, 2)
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.4}  # the line of chance may cross it
    axes.annotate(f"{value:.1f}", *point, textcoords="offset points", ha="center", fontsize=7, bbox=box)


def _label_variants(axes: Any, label: str) -> None:
    axes.set_xticks(range(len(VARIANTS)), [_SHORT[variant] for variant in VARIANTS], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylabel(label, fontsize=8)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)


def pyplot() -> Any:
    """Return matplotlib.pyplot with the file backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG on white, and close it.

    Args:
        figure: The figure.
        path: PNG to write.
    """
    figure.savefig(path, dpi=130, facecolor="white")
    pyplot().close(figure)
