"""The page and the picture of a declaration: what was declared, what was measured, what holds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from .comparison import Comparison, Measured, compare, verdict
from .declaration import STANDARD_SET, Declared
from .results import Lines, chosen, found, tuned
from .runs import FINAL, TUNING
from .settings import Plan

RULE = (
    "The subject passes a control if its 95 % interval lies above the control's, and the difference paired by seed has "
    'p < 0.05 after Holm\'s correction over all controls. "The same size": at most 5 % more parameters.'
)


NOT_BEFORE = "**Not shown to be declared before the runs.** "


def write_report(
    declared: Declared,
    plans: dict[str, Plan],
    lines: Lines,
    output: Path,
    *,
    committed: str | None,
    command: str,
    machine: str,
) -> None:
    """Writes NAME.md and NAME.png, where the declaration is NAME.yaml.

    Args:
        declared: the declaration.
        plans: its settings in numbers.
        lines: of NAME.jsonl.
        output: folder.
        committed: when the declaration was committed; None outside a repository.
        command: that made the runs.
        machine: processor and versions.
    """
    declaration = declared.content
    measured = found(declaration, lines)
    comparisons = compare(declaration.subject, measured, plans)
    parts = [
        f"# {declaration.title}",
        f"Claim: {declaration.claim}",
        verdict(comparisons, len(measured[declaration.subject].values), len(declaration.seeds)),
        RULE,
        f"![accuracy of each setting]({declared.path.stem}.png)",
        settings_table(declared, plans, measured, chosen(declaration, lines)),
        comparison_table(comparisons, declaration.subject),
        tuning_table(declared, lines),
        absent(declared),
        provenance(declared, lines, committed),
        f"`{command}`",
        machine,
    ]
    (output / f"{declared.path.stem}.md").write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    draw(declared, plans, measured, output / f"{declared.path.stem}.png")


def settings_table(
    declared: Declared, plans: dict[str, Plan], measured: dict[str, Measured], rates: dict[str, float]
) -> str:
    """A row for each setting."""
    declaration = declared.content
    whole = plans[declaration.subject].flops
    rows = [
        "| setting | what | parameters | steps | FLOPs | learning rate | accuracy % | 95 % interval | each seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in declaration.settings.items():
        plan, one = plans[name], measured[name]
        each = " ".join(f"{100 * value:.1f}" for value in one.values)
        rows.append(
            f"| {name} | {setting.what}{_sizes(declared, plan, name)} | {plan.parameters:,} | {plan.steps:,} | "
            f"{plan.flops / whole:.2f} | {rates[name]:g} | {100 * one.mean:.1f} | {_range(one.low, one.high)} | "
            f"{each} |"
        )
    seeds = ", ".join(map(str, declaration.seeds[: len(one.values)]))
    note = (
        f"Seeds {seeds}; {declaration.prompts:,} prompts that neither training nor tuning saw, greedy answers of the "
        f"exported model; chance is {100 * declaration.chance:.1f} %. FLOPs are those of all training, relative to "
        "the subject's. Intervals are t-intervals over seeds on the logit scale."
    )
    return "\n".join(rows) + f"\n\n{note}"


def comparison_table(comparisons: Sequence[Comparison], subject: str) -> str:
    """A row for each control."""
    rows = [
        f"| {subject} minus | difference, points | 95 % interval | p (Holm) | intervals apart | same size | passed |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {one.control} | {100 * one.difference:+.1f} | {_range(one.low, one.high)} | {_p(one.p_value)} | "
        f"{_word(one.apart)} | {_word(one.same_size)} | {_word(one.passed)} |"
        for one in comparisons
    ]
    return "\n".join(rows)


def tuning_table(declared: Declared, lines: Lines) -> str:
    """Mean accuracy in the tuning by setting and learning rate."""
    tuning = declared.content.tuning
    rates, best = tuning.learning_rates, chosen(declared.content, lines)
    rows = [f"| learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    edge = []
    for name, means in tuned(declared.content, lines).items():
        cells = [f"{100 * means[rate]:.1f}{' *' if rate == best[name] else ''}" for rate in rates]
        rows.append(f"| {name} | {' | '.join(cells)} |")
        if best[name] in (rates[0], rates[-1]):
            edge.append(name)
    rule = (
        f"Tuning: mean accuracy % over seeds {', '.join(map(str, tuning.seeds))} on {tuning.prompts:,} other prompts. "
        "The best is marked *; of ties the smaller is taken."
    )
    if edge:
        rule += f" At the edge of the grid: {', '.join(edge)}."
    return f"{rule}\n\n" + "\n".join(rows)


def absent(declared: Declared) -> str:
    """The controls of the standard set without a setting, each with its reason."""
    left = declared.content.left_out
    return "\n".join(
        f"- Left out: {name} ({STANDARD_SET.get(name, 'another control')}): {left[name]}." for name in left
    )


def provenance(declared: Declared, lines: Lines, committed: str | None) -> str:
    """Digest and times of the declaration and of the runs, and what they cost."""
    final, tuning = ([line for line in lines if line["phase"] == phase] for phase in (FINAL, TUNING))
    began = min((line["started"] for line in final), default="never")
    before = committed is not None and (not final or datetime.fromisoformat(committed) < datetime.fromisoformat(began))
    return (
        f"{'' if before else NOT_BEFORE}Declared in `{declared.path.name}`, sha256 `{declared.digest}`, which every "
        f"run below carries; committed {committed or 'nowhere (not in a repository)'}, first final run {began}. "
        f"{len(final)} final runs took {_minutes(final, 'cpu')} CPU minutes ({_minutes(final, 'seconds')} minutes of "
        f"wall clock in them), {len(tuning)} runs of the tuning {_minutes(tuning, 'cpu')}."
    )


def draw(declared: Declared, plans: dict[str, Plan], measured: dict[str, Measured], output: Path) -> None:
    """A row for each setting: seeds as dots, the mean, its 95 % interval; the subject's interval as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    declaration = declared.content
    subject, whole = declaration.subject, plans[declaration.subject].flops
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.48 * len(measured)), constrained_layout=True)
    labels = []
    for row, (name, one) in enumerate(measured.items()):
        color = "C3" if name == subject else "C0"
        axes.plot(
            [100 * one.low, 100 * one.high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt"
        )
        axes.plot([100 * one.mean], [row], "|", color=color, markersize=14, markeredgewidth=2)
        axes.plot([100 * value for value in one.values], [row] * len(one.values), "o", color=color, markersize=4)
        labels.append(f"{name}\n{plans[name].flops / whole:.2f} FLOPs, {plans[name].parameters:,} parameters")
    axes.axvspan(100 * measured[subject].low, 100 * measured[subject].high, color="C3", alpha=0.08)
    axes.axvline(100 * declaration.chance, color="grey", linestyle=":", label="chance")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 101),
        xlabel="accuracy %: seeds (dots), mean (bar), 95 % interval; training FLOPs relative to the subject's (red)",
    )
    axes.set_title(declaration.title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _sizes(declared: Declared, plan: Plan, name: str) -> str:
    """The sizes that were words, in numbers."""
    written = declared.content.settings[name].config
    derived = [key for key, value in written.items() if plan.config[key] != value]
    return f" ({', '.join(f'{_short(key)} {plan.config[key]}' for key in derived)})" if derived else ""


def _short(key: str) -> str:
    return key.split(".")[1]


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} .. {100 * high:.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _minutes(lines: Lines, key: str) -> str:
    return f"{sum(line[key] for line in lines) / 60:.1f}"
