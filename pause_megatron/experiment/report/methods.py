"""What the papers of other methods report, beside what the grid found for its rows of these methods."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pause_megatron.experiment.report.page import Row, breakable, table
from pause_megatron.experiment.report.published import Published
from pause_megatron.experiment.report.tables import Comparisons

UNKNOWN = "no figure known here"


def methods_table(variants: Sequence[str], comparisons: Comparisons, baseline: str, paper: Published) -> str:
    """Return a row for each variant that is a published method; "" if there is none.

    Args:
        variants: Names of the variants.
        comparisons: Comparison with the baseline by (variant, task).
        baseline: Name of the baseline.
        paper: The published numbers, and titles of tasks.
    """
    rows: list[Row] = []
    for variant in variants:
        if (method := paper.methods.get(variant)) is None:
            continue
        ours = [
            f"{escape(paper.title(task))} {found.difference:+.1f} ({found.low:+.1f} .. {found.high:+.1f})"
            for (name, task), found in comparisons.items()
            if name == variant
        ]
        reported = f"<span class=paper>{escape(method.reported or UNKNOWN)}</span>"
        rows.append([breakable(variant), escape(method.paper), reported, "<br>".join(ours) or "not run"])
    caption = (
        "Methods of other papers, with other models, data, tasks and budgets: what is claimed, beside what was found "
        "here. Differences are in points, with the 95 % interval over records."
    )
    head = ["variant", "paper", "it reports", f"here, against {escape(baseline)}"]
    return table(head, rows, caption, sortable=False) if rows else ""
