"""What becomes of a system under faults: outcomes counted in named tables, kept as a file until all kinds are there."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Result:
    """Attributes:
    tables: title -> outcome -> how often
    each: what was tried -> its outcome, where every one is a line of its own
    note: what belongs below the tables
    command: what was run, with its versions
    """

    tables: dict[str, Counter] = field(default_factory=dict)
    each: dict[str, str] = field(default_factory=dict)
    note: str = ""
    command: str = ""

    def count(self, title: str, outcome: str) -> None:
        """One more of an outcome."""
        self.tables.setdefault(title, Counter())[outcome] += 1

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(vars(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote."""
        record = json.loads(path.read_text())
        record["tables"] = {title: Counter(counts) for title, counts in record["tables"].items()}
        return cls(**record)


def markdown(columns: dict[str, Result]) -> list[str]:
    """The tables of one kind of fault as lines; a column for each system.

    Args:
        columns: heading -> result
    """
    lines: list[str] = []
    for title in dict.fromkeys(title for result in columns.values() for title in result.tables):
        counts = [result.tables.get(title, Counter()) for result in columns.values()]
        lines += [f"### {title}", "", f"| outcome | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for outcome in sorted({outcome for counter in counts for outcome in counter}):
            lines.append(f"| {outcome} | " + " | ".join(str(counter[outcome]) for counter in counts) + " |")
        lines.append("")
    tried = dict.fromkeys(what for result in columns.values() for what in result.each)
    if tried:
        lines += [f"| what | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for what in tried:
            lines.append(f"| {what} | " + " | ".join(result.each.get(what, "") for result in columns.values()) + " |")
        lines.append("")
    notes = [f"{heading}: {result.note}" for heading, result in columns.items() if result.note]
    return [*lines, "; ".join(notes) + ".", ""] if notes else lines
