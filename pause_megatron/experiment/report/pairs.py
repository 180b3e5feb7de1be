"""The pages of flipped answers, one for each variant and task, and the text of `pause-megatron experiment diff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from pause_megatron.experiment.report.flips import Flips, Records, answer, references
from pause_megatron.experiment.report.page import Cell, Part, Row, link, paragraph, render, table
from pause_megatron.experiment.report.tables import probability

SHOWN = 12
"""Examples of each direction on a page."""
_PROMPT = 1200


def pair_page(title: str, by_seed: Mapping[int, Flips], records: Records, back: str) -> str:
    """Return the page of a variant's flipped answers.

    Args:
        title: Title, plain text.
        by_seed: Flips by seed of the finetuning.
        records: Prompts and references.
        back: Relative path of the report.
    """
    first = next(iter(by_seed.values()))
    words = ("wrong → right", "right → wrong") if first.binary else ("score rises", "score falls")
    head = ["seed", "records", "same, above 0", "both 0", *words, "p, McNemar exact", "p, sign flips by group"]
    rows: list[Row] = [
        [
            str(seed),
            f"{len(each.one.samples):,}",
            f"{each.same:,}",
            f"{each.neither:,}",
            f"{len(each.gained):,}",
            f"{len(each.lost):,}",
            probability(each.p_value),
            probability(each.difference.p_value),
        ]
        for seed, each in by_seed.items()
    ]
    caption = (
        "McNemar's exact test (of fractions: the sign test) treats records as independent; sign flips and intervals "
        "keep records of a text together. Each seed compares two finetuned models: what another seed would flip "
        "is in neither. None of these p-values is corrected for the number of seeds and pairs."
    )
    lead = f"<p>{link(back, 'The report')}</p>"
    if records.missing:
        lead += paragraph(f"Prompts and references are not shown: {records.missing}.", "warning")
    parts = [Part("Counts", table(head, rows, caption))]
    gained = Counter(name for each in by_seed.values() for name in each.gained)
    lost = Counter(name for each in by_seed.values() for name in each.lost)
    for word, found, against in ((words[0], gained, lost), (words[1], lost, gained)):
        chosen = _most_flipped(found, against)[:SHOWN]
        note = f"{len(found)} records in at least one of {len(by_seed)} seeds; those of most seeds first."
        parts.append(Part(word.capitalize(), paragraph(note) + _examples(chosen, by_seed, records)))
    return render(title, lead, parts)


def diff_text(found: Flips, records: Records, shown: int) -> Iterator[str]:
    """Yield the lines of `experiment diff`.

    Args:
        found: The comparison.
        records: Prompts and references.
        shown: Examples of each direction.
    """
    words = ("wrong -> right", "right -> wrong") if found.binary else ("score rises", "score falls")
    difference = found.difference
    yield f"from  {found.one.label}"
    yield f"to    {found.other.label}"
    yield (
        f"{found.one.metric}: {difference.n:,} records in {difference.groups:,} groups, {100 * difference.value:+.1f} "
        f"points [{100 * difference.low:.1f} .. {100 * difference.high:.1f}], p = {difference.p_value:.4f} "
        "(sign flips by group)"
    )
    yield f"same, above 0: {found.same:,}; both 0: {found.neither:,}"
    counts = f"{words[0]}: {len(found.gained):,}; {words[1]}: {len(found.lost):,}"
    yield f"{counts}; McNemar's exact p = {found.p_value:.4f}"
    if records.missing:
        yield f"prompts are not shown: {records.missing}"
    for word, names in zip(words, (found.gained, found.lost), strict=True):
        for name in names[:shown]:
            example = records.examples.get(name)
            yield f"\n{word}: record {name}"
            if example:
                yield f"  prompt:     {_end(example.prompt)!r}"
                yield f"  references: {', '.join(map(repr, references(example)))}"
            yield f"  from:       {answer(found.one.samples[name], example)!r}"
            yield f"  to:         {answer(found.other.samples[name], example)!r}"


def _examples(names: Sequence[str], by_seed: Mapping[int, Flips], records: Records) -> str:
    """Return examples as a table: the prompt, the references and both answers of every seed."""
    rows: list[Row] = []
    for name in names:
        example = records.examples.get(name)
        prompt = ""
        if example:
            shown = _end(example.prompt)
            prompt = f"<details><summary>{escape(shown[-90:])}</summary><pre>{escape(shown)}</pre></details>"
        answers = [
            f"<span class=quiet>{seed}:</span> {escape(answer(each.one.samples[name], example))} → "
            f"{escape(answer(each.other.samples[name], example))}{_mark(each, name)}"
            for seed, each in by_seed.items()
        ]
        accepted = "; ".join(references(example)) if example else ""
        rows.append([escape(name), _text(prompt), _text(escape(accepted)), _text("<br>".join(answers))])
    head = ["record", "prompt (its end)", "references", "seed: baseline → variant"]
    return table(head, rows, sortable=False) if rows else ""


def _most_flipped(found: Counter[str], against: Counter[str]) -> list[str]:
    """Return records by the number of seeds in which they flip in this direction and not in the other."""
    return sorted(found, key=lambda name: (against[name] - found[name], _order(name)))


def _text(html: str) -> Cell:
    return Cell(f"<div class=text>{html}</div>", None)


def _mark(each: Flips, name: str) -> str:
    return " ▲" if name in each.gained else " ▼" if name in each.lost else ""


def _end(prompt: str) -> str:
    return prompt if len(prompt) <= _PROMPT else f"… {prompt[-_PROMPT:]}"


def _order(name: str) -> tuple[float, ...] | tuple[float, str]:
    """Return what sorts ids: as numbers ("2" before "17.3") where they are numbers."""
    parts = name.split(".")
    return tuple(map(float, parts)) if all(part.isdecimal() for part in parts) else (float("inf"), name)
