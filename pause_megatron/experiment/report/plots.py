"""The pictures of Figure 3 and of all variants, one for each task. Figure 4 is in `curve_plots`."""

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
CHANCE = "#aa0000"
WIDTH = 4.2
"""Width of every picture in inches; a phone shows one below the other, a wide page several side by side."""
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


def draw_variants(path: Path, main: Mapping[tuple[str, str], Summary], task: str, paper: Published) -> str:
    """Draw a task of Figure 3: the four variants as bars with intervals and single seeds, above the paper's.

    Args:
        path: PNG to write.
        main: Summary by (variant, task).
        task: The task.
        paper: The published numbers.

    Returns:
        The alternative text.
    """
    known = any(paper.score(task, variant) is not None for variant in VARIANTS)
    figure, axes = pyplot().subplots(
        1 + known,
        1,
        figsize=(WIDTH, 4.2 if known else 2.9),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": [2, 1][: 1 + known]},
    )
    found = {variant: main[variant, task] for variant in VARIANTS if (variant, task) in main}
    _bars_of_task(axes[0][0], task, found, paper)
    if known:
        _published_bars(axes[1][0], task, paper)
    save(figure, path)
    return described(paper.title(task), found, paper.chance(task))


def draw_all(
    path: Path,
    main: Mapping[tuple[str, str], Summary],
    task: str,
    variants: Sequence[str],
    baseline: str,
    paper: Published,
) -> str:
    """Draw every variant and control on a task as a point with its interval.

    Args:
        path: PNG to write.
        main: Summary by (variant, task).
        task: The task.
        variants: Names of all variants of the grid, a row for each that was run.
        baseline: Name of the baseline, a dashed line.
        paper: The published numbers.

    Returns:
        The alternative text.
    """
    found = {variant: main[variant, task] for variant in variants if (variant, task) in main}
    figure, axes = pyplot().subplots(figsize=(WIDTH, 1.1 + 0.32 * len(found)), layout="constrained")
    for row, (variant, summary) in enumerate(found.items()):
        color = color_of(variant, variants)
        axes.errorbar(summary.value, row, xerr=lengths([summary]), fmt="o", color=color, capsize=3)
        axes.plot([*summary.by_seed.values()], [row + 0.22] * summary.seeds, ".", color="black", markersize=3)
    if baseline in found:
        axes.axvline(found[baseline].value, color="#7f7f7f", linestyle="--", linewidth=1)
    chance = paper.chance(task)
    if chance:
        axes.axvline(chance, color=CHANCE, linestyle=":", linewidth=1.5)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    right = max([1.0, chance or 0.0, *(max(each.high, *each.by_seed.values()) for each in found.values())])
    axes.set_xlim(-0.03 * right, min(1.05 * right, 103.0))
    axes.set_title(_title(paper.title(task), found, chance), fontsize=9)
    axes.set_xlabel("per cent", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25, axis="x")
    save(figure, path)
    return described(paper.title(task), found, chance)


def described(title: str, found: Mapping[str, Summary], chance: float | None) -> str:
    """Return the values of a picture as its alternative text.

    Args:
        title: Title of the task.
        found: Summary by label.
        chance: Score of guessing, per cent.
    """
    values = "; ".join(f"{name} {one.value:.1f} ({one.low:.1f} to {one.high:.1f})" for name, one in found.items())
    return f"{title}, per cent with 95 % intervals: {values}" + (f"; chance {chance:g}" if chance else "")


def _title(title: str, found: Mapping[str, Summary], chance: float | None) -> str:
    one = next(iter(found.values()), None)
    sizes = f"n={one.n:,}, {one.seeds} seed{'s' if one.seeds > 1 else ''}" if one else ""
    return f"{title} ({sizes})" + (", red: chance" if chance else "")


def lengths(summaries: Sequence[Summary]) -> list[list[float]]:
    """Return the lengths of the 95 % intervals below and above the values, as matplotlib takes them.

    Args:
        summaries: The summaries.
    """
    below = [max(each.value - each.low, 0.0) for each in summaries]
    return [below, [max(each.high - each.value, 0.0) for each in summaries]]


def _bars_of_task(axes: Any, task: str, found: Mapping[str, Summary], paper: Published) -> None:
    tops = [1.0]
    for position, variant in enumerate(VARIANTS):
        if (summary := found.get(variant)) is None:
            axes.text(position, 0, "not run", ha="center", va="bottom", rotation=90, fontsize=7, color="#595959")
            continue
        axes.bar(position, summary.value, color=COLORS[variant], width=0.7)
        axes.errorbar(position, summary.value, yerr=lengths([summary]), color="black", capsize=3, linewidth=1)
        axes.plot([position + 0.22] * summary.seeds, [*summary.by_seed.values()], ".", color="black", markersize=4)
        tops.append(max(summary.high, *summary.by_seed.values()))
        _label(axes, position, 0, summary.value)  # not at the interval's end, which is another number
    chance = paper.chance(task)
    axes.set_title(_title(paper.title(task), found, chance), fontsize=9)
    if chance:
        axes.axhline(chance, color=CHANCE, linestyle=":", linewidth=1.5)
    axes.set_ylim(0, 1.15 * max([chance or 0.0, *tops]))
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
    """Write a bar's number at a height."""
    point = (position, height), (0, 2)
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.4}  # the line of chance may cross it
    axes.annotate(f"{value:.1f}", *point, textcoords="offset points", ha="center", fontsize=8, bbox=box)


def _label_variants(axes: Any, label: str) -> None:
    axes.set_xticks(range(len(VARIANTS)), [_SHORT[variant] for variant in VARIANTS], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
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
