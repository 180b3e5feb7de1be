"""The dry run of a grid as text: cells, steps, FLOPs and order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pause_megatron.experiment.cell import Cell
from pause_megatron.experiment.folder import LocatedCell


def si(value: float) -> str:
    """Return a number with an SI prefix: 1234567 -> "1.23 M"."""
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def describe(located: Sequence[LocatedCell], baseline: str = "") -> str:
    """Return a line for each cell in the order of the run, then the pretrained models beside the baseline, then sums.

    Args:
        located: The cells, inputs first.
        baseline: Name of the baseline's pretraining cell.
    """
    number = {entry.cell.fingerprint: index for index, entry in enumerate(located, start=1)}
    width = max(len(entry.cell.name) for entry in located)
    lines = [f"{'':>5}  {'cell':{width}}  {'after':>7}  {'steps':>9}  {'raw tokens':>10}  {'FLOP':>8}"]
    for entry in located:
        cell, cost = entry.cell, entry.cell.estimate
        after = ",".join(str(number[source.fingerprint]) for source in cell.inputs)
        steps = "" if cost.steps is None else f"{cost.steps:,}"
        tokens = "" if cost.raw_tokens is None else si(cost.raw_tokens)
        flops = "" if not cost.flops else si(cost.flops)
        done = "  done" if entry.done else ""
        index = number[cell.fingerprint]
        lines.append(f"{index:>5}  {cell.name:{width}}  {after:>7}  {steps:>9}  {tokens:>10}  {flops:>8}{done}")
    lines += [*_models([entry.cell for entry in located], baseline), "", *_sums(located)]
    return "\n".join(lines)


def _models(cells: Sequence[Cell], baseline: str) -> list[str]:
    """Return each pretrained model with its parameters and FLOPs relative to those of the baseline's."""
    models = [cell for cell in cells if cell.verb == "pretrain"]
    base = next((cell.estimate for cell in models if cell.name == baseline), None)
    if base is None or len(models) < 2:
        return []
    width = max(len(cell.name) for cell in models)
    lines = ["", f"{'relative to ' + baseline:{width}}  {'parameters':>10}  {'FLOP a token':>12}  {'FLOP in all':>11}"]
    for cell in models:
        cost = cell.estimate
        ratios = (
            cost.parameters / base.parameters,
            cost.flops_per_token / base.flops_per_token,
            (cost.flops or 0) / (base.flops or 1),
        )
        shown = [f"{ratio:>{room}.3f}" for ratio, room in zip(ratios, (10, 12, 11), strict=True)]
        lines.append("  ".join([f"{cell.name:{width}}", *shown, cost.about]).rstrip())
    return lines


def _sums(located: Sequence[LocatedCell]) -> list[str]:
    cells: dict[str, int] = defaultdict(int)
    flops: dict[str, float] = defaultdict(float)
    for entry in located:
        cells[entry.cell.verb] += 1
        flops[entry.cell.verb] += entry.cell.estimate.flops or 0.0
    parts = [f"{count} {verb}" for verb, count in cells.items()]
    known = ", ".join(f"{verb} {si(value)}FLOP" for verb, value in flops.items() if value)
    unknown = sum(cell.verb == "finetune" and cell.estimate.steps is None for cell in (e.cell for e in located))
    note = f"; {unknown} finetuning cells count epochs, so their steps are unknown" if unknown else ""
    return [
        f"{len(located)} cells: {', '.join(parts)}; {sum(entry.done for entry in located)} done",
        f"estimated: {known}; evaluation depends on the lengths of records and answers{note}",
    ]
