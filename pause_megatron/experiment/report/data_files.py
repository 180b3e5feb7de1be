"""The numbers of a report as CSV and JSON: a row per summary, per seed, per comparison and per pair of evaluations."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pause_megatron.experiment.report.collect import Score
from pause_megatron.experiment.report.compare import Comparison, Summary
from pause_megatron.experiment.report.flips import Flips

_POINT = {
    "variant": "name of the variant",
    "task": "name of the task in the grid",
    "m_ft": "pauses in finetuning; 0 with standard finetuning",
    "m_inf": "pauses at inference",
}
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "scores.csv": {
        **_POINT,
        "metric": "the task's primary metric",
        "value": "mean over seeds, per cent",
        "low": "lower end of the 95 % interval of the page: the lower one of record_low and seed_low",
        "high": "upper end of that interval",
        "record_low": "95 % interval over records (Wilson, by group), per cent",
        "record_high": "its upper end",
        "seed_low": "95 % interval over seeds (Student's t on the logit scale), per cent; empty with one seed",
        "seed_high": "its upper end",
        "over_seeds": "standard error over seeds, points; empty with one seed",
        "over_records": "standard error over records of one seed, averaged over seeds, points",
        "seeds": "number of seeds",
        "n": "number of records",
        "groups": "number of groups of records that share a text; n without groups",
        "own": "whether this M_inf is the variant's own (else a curve's)",
        "main": "whether it represents the variant in the tables of variants",
        "chosen_from": "number of M_ft and M_inf that it was chosen from",
        "chosen_on": "records on which it was chosen; empty if there was no choice",
    },
    "seeds.csv": {
        **_POINT,
        "seed": "seed of the finetuning",
        "metric": "the task's primary metric",
        "value": "mean over records, per cent",
        "low": "95 % interval over records (Wilson, by group), per cent",
        "high": "its upper end",
        "standard_error": "standard error over records, points",
        "n": "number of records",
        "groups": "number of groups",
        "cell": "folder of the evaluation in DIR/cells",
        "samples": "file of the answers in the cell's results/samples",
        "model": "fingerprint of the model",
        "data": "fingerprint of the records",
    },
    "comparisons.csv": {
        "variant": "name of the variant",
        "baseline": "name of the baseline",
        "task": "name of the task in the grid",
        "difference": "variant - baseline, mean over records and seeds, points",
        "low": "95 % interval over records (paired bootstrap by group), points",
        "high": "its upper end",
        "seed_low": "95 % interval over seeds (paired, Student's t), points; empty with one seed",
        "seed_high": "its upper end",
        "p_records": "two-sided p-value over records",
        "p_seeds": "two-sided p-value over seeds; empty with one seed, or without spread",
        "p": "the larger one of both; empty without p_seeds",
        "p_holm": "p corrected by Holm for the number of comparisons (the rows of this file)",
        "supported": "whether p_holm is below 0.05",
        "seeds": "number of seeds that both have",
    },
    "flips.csv": {
        "variant": "name of the variant",
        "baseline": "name of the baseline",
        "task": "name of the task in the grid",
        "seed": "seed of the finetuning",
        "n": "number of records",
        "same_right": "records with equal scores above 0 (both right)",
        "same_wrong": "records that both score 0 (both wrong)",
        "gained": "records that the variant scores higher (wrong -> right)",
        "lost": "records that the variant scores lower (right -> wrong)",
        "p_mcnemar": "exact two-sided p-value of gained against lost; records count as independent",
        "p_sign_flips": "two-sided p-value of the sign-flip test, by group",
        "baseline_cell": "evaluation of the baseline: folder in DIR/cells, @ pauses",
        "variant_cell": "evaluation of the variant",
    },
}
"""Meaning of every column by file; it is the key "columns" of summary.json too."""

Pair = tuple[str, str, int]
"""Variant, task and seed of a pair of evaluations."""


def score_rows(summaries: Iterable[Summary], choices: Mapping[tuple[str, str], Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of scores.csv.

    Args:
        summaries: Scores over seeds.
        choices: `Choice` by (variant, task).
    """
    for each in summaries:
        choice = choices.get((each.variant, each.task))
        count = len(choice.candidates) if choice and each.own else 0
        known = {name: getattr(each, name, None) for name in COLUMNS["scores.csv"]}
        main = choice is not None and choice.chosen is each
        chosen_on = choice.records if choice and count > 1 else ""
        yield {**known, "main": main, "chosen_from": count, "chosen_on": chosen_on}


def seed_rows(scores: Iterable[Score]) -> Iterator[dict[str, Any]]:
    """Yield the rows of seeds.csv.

    Args:
        scores: Scores of single seeds.
    """
    for each in scores:
        low, high = each.interval
        error = None if each.standard_error is None else 100 * each.standard_error
        percent = {"value": 100 * each.value, "low": 100 * low, "high": 100 * high, "standard_error": error}
        known = {name: getattr(each, name, None) for name in COLUMNS["seeds.csv"]}
        yield {**known, **percent, "groups": each.group_count}


def comparison_rows(found: Mapping[tuple[str, str], Comparison], baseline: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of comparisons.csv.

    Args:
        found: Comparison by (variant, task).
        baseline: Name of the baseline.
    """
    for (variant, task), each in found.items():
        known = {name: getattr(each, name, None) for name in COLUMNS["comparisons.csv"]}
        yield {**known, "variant": variant, "baseline": baseline, "task": task}


def flip_rows(found: Mapping[Pair, Flips], baseline: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of flips.csv.

    Args:
        found: Flips by (variant, task, seed).
        baseline: Name of the baseline.
    """
    for (variant, task, seed), each in found.items():
        yield {
            "variant": variant,
            "baseline": baseline,
            "task": task,
            "seed": seed,
            "n": len(each.one.samples),
            "same_right": each.same,
            "same_wrong": each.neither,
            "gained": len(each.gained),
            "lost": len(each.lost),
            "p_mcnemar": each.p_value,
            "p_sign_flips": each.difference.p_value,
            "baseline_cell": each.one.label,
            "variant_cell": each.other.label,
        }


def as_csv(name: str, rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as CSV with the columns of `COLUMNS`.

    Args:
        name: Name of the file.
        rows: The rows.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS[name]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
