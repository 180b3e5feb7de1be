"""NAME.jsonl: a line for each run, which runs are missing, and which learning rate the tuning chose."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pause_megatron.errors import ConfigError, DataError

from .comparison import Measured, measured
from .declaration import Declaration, Declared
from .runs import FINAL, TUNING, Job

Lines = list[dict[str, Any]]


def read_results(file: Path, digest: str) -> Lines:
    """The lines of NAME.jsonl.

    Raises:
        ConfigError: a line was made under another declaration.
    """
    lines, seen = [], dict[tuple[str, str, int, float], int]()
    whole = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(whole) and not text.endswith("\n"):  # a run was killed while it was written: run it again
                file.write_text("".join(whole[:-1]), encoding="utf-8")
                break
            raise DataError(f"{file}:{number}: expected a line of JSON, got {text[:60]!r} ({error})") from None
        if (before := seen.setdefault(_key(line), number)) != number:
            raise DataError(f"{file}:{number}: expected one line of each run, got that of line {before} again")
        lines.append(line)
        if line["digest"] != digest:
            raise ConfigError(
                f"{file}:{number}: expected runs of the declaration with sha256 {digest[:12]}, got one of "
                f"{line['digest'][:12]}: the declaration has changed; give another --output"
            )
    return lines


def append(file: Path, lines: Lines) -> None:
    """Adds lines to NAME.jsonl."""
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def tuning_jobs(declared: Declared, lines: Lines) -> list[Job]:
    """The runs of the tuning that are missing: every trained setting, learning rate and tuning seed."""
    tuning, done = declared.content.tuning, {_key(line) for line in lines}
    jobs = [
        Job(str(declared.path), TUNING, name, seed, rate)
        for seed in tuning.seeds
        for rate in tuning.learning_rates
        for name in _trained(declared.content)
    ]
    return [job for job in jobs if (TUNING, job.setting, job.seed, job.learning_rate) not in done]


def final_jobs(declared: Declared, lines: Lines) -> list[Job]:
    """The final runs that are missing, seed after seed, each setting with its chosen learning rate."""
    rates, done = chosen(declared.content, lines), {_key(line) for line in lines}
    jobs = [
        Job(str(declared.path), FINAL, name, seed, rates[name])
        for seed in declared.content.seeds
        for name in _trained(declared.content)
    ]
    return [job for job in jobs if (FINAL, job.setting, job.seed, job.learning_rate) not in done]


def tuned(declaration: Declaration, lines: Lines) -> dict[str, dict[float, float]]:
    """Mean accuracy over the tuning seeds by setting and learning rate.

    Raises:
        DataError: a run of the tuning is missing; the message names it.
    """
    found = {(line["setting"], line["learning_rate"], line["seed"]): line for line in lines if line["phase"] == TUNING}
    means: dict[str, dict[float, float]] = {}
    for name in _trained(declaration):
        for rate in declaration.tuning.learning_rates:
            keys = [(name, rate, seed) for seed in declaration.tuning.seeds]
            absent = [key for key in keys if key not in found]
            if absent:
                raise DataError(f"results: expected a tuning run of (setting, rate, seed) {absent[0]}, got none")
            means.setdefault(name, {})[rate] = statistics.fmean(found[key]["accuracy"] for key in keys)
    return means


def chosen(declaration: Declaration, lines: Lines) -> dict[str, float]:
    """The learning rate of each setting; a setting that asks another one's models has that one's."""
    best = {name: best_rate(means) for name, means in tuned(declaration, lines).items()}
    return {name: best[setting.trained or name] for name, setting in declaration.settings.items()}


def best_rate(means: dict[float, float]) -> float:
    """The rule of the tuning: the highest mean, ties to the smaller learning rate."""
    return max(means, key=lambda rate: (means[rate], -rate))


def final_values(declaration: Declaration, lines: Lines) -> dict[str, Sequence[float]]:
    """The accuracies of each setting's final runs, in the order of the seeds; only seeds that all settings have.

    Runs with another learning rate than the chosen one, as of an earlier tuning, do not count.
    """
    rates = chosen(declaration, lines)
    final = [line for line in lines if line["phase"] == FINAL and line["learning_rate"] == rates[line["setting"]]]
    found = {(line["setting"], line["seed"]): line["accuracy"] for line in final}
    names = list(declaration.settings)
    seeds = [seed for seed in declaration.seeds if all((name, seed) in found for name in names)]
    return {name: [found[name, seed] for seed in seeds] for name in names}


def found(declaration: Declaration, lines: Lines) -> dict[str, Measured]:
    """The same with their means and intervals."""
    return {name: measured(of, declaration.prompts) for name, of in final_values(declaration, lines).items()}


def _trained(declaration: Declaration) -> list[str]:
    return [name for name, setting in declaration.settings.items() if setting.trained is None]


def _key(line: dict[str, Any]) -> tuple[str, str, int, float]:
    return line["phase"], line["setting"], line["seed"], line["learning_rate"]
