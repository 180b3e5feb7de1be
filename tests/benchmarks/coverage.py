"""Coverage of the 95 % intervals of scores and of paired differences, on simulated data sets whose groups correlate.

    python tests/benchmarks/coverage.py --data-sets 1000 --write tests/benchmarks/results/coverage.md

A data set has G groups of 1 to 19 records, or sizes from a log-normal distribution (a few groups have most records). A
group has its own success probability, from a beta distribution with mean p and correlation rho within groups. A record
is right (1) or wrong (0); an F1-like score is a fraction instead. A paired difference is between two models, each with
its own group effect beside the shared one. The truth is known, so that intervals can be counted that hold it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pause_megatron.evaluate.statistics import interval, mean, paired_bootstrap, wilson

Z = 1.959964


@dataclass(frozen=True)
class Setting:
    """One kind of data sets.

    Attributes:
        what: "right or wrong", "fractions" or "difference".
        groups: G; 0: every record is a group of its own, 200 records.
        share: p, the mean score; for a difference that of the first model, whose gain is 0.05.
        rho: Correlation within groups.
        skewed: Whether sizes are log-normal.
    """

    what: str
    groups: int
    share: float
    rho: float
    skewed: bool = False


SETTINGS = (
    Setting("right or wrong", 0, 0.3, 0.0),
    Setting("right or wrong", 48, 0.3, 0.1),
    Setting("right or wrong", 48, 0.5, 0.3),
    Setting("right or wrong", 10, 0.3, 0.1),
    Setting("right or wrong", 48, 0.3, 0.1, skewed=True),
    Setting("fractions", 48, 0.3, 0.2),
    Setting("fractions", 10, 0.5, 0.2),
    Setting("difference", 0, 0.4, 0.0),
    Setting("difference", 48, 0.4, 0.2),
    Setting("difference", 12, 0.4, 0.2),
    Setting("difference", 48, 0.4, 0.2, skewed=True),
    Setting("right or wrong", 0, 0.03, 0.0),
    Setting("right or wrong", 48, 0.05, 0.1),
    Setting("right or wrong", 200, 0.02, 0.1),
    Setting("right or wrong", 200, 0.01, 0.05),
)


def group_names(rng: np.random.Generator, setting: Setting) -> np.ndarray:
    """Return the group of every record of a data set, [records]."""
    if not setting.groups:
        return np.arange(200)
    if setting.skewed:
        sizes = np.maximum(1, rng.lognormal(1.5, 1.0, setting.groups).astype(int))
    else:
        sizes = rng.integers(1, 20, setting.groups)
    return np.repeat(np.arange(setting.groups), sizes)


def probabilities(rng: np.random.Generator, count: int, share: float, rho: float) -> np.ndarray:
    """Return a success probability for each group, [groups]."""
    if not rho:
        return np.full(count, share)
    return rng.beta(share * (1 - rho) / rho, (1 - share) * (1 - rho) / rho, count)


def covered(rng: np.random.Generator, setting: Setting, seed: int) -> tuple[bool, bool]:
    """Return whether the interval, and the one that takes records for independent, hold the truth of one data set."""
    of = group_names(rng, setting)
    names = [f"g{number}" for number in of]
    chance = probabilities(rng, of.max() + 1, setting.share, setting.rho)[of]
    if setting.what == "difference":
        other = probabilities(rng, of.max() + 1, setting.share, setting.rho)[of]
        hardness = rng.random(of.size)
        one = (hardness < np.clip(0.5 * chance + 0.5 * other + 0.05, 0, 1)).astype(float)
        two = (np.where(rng.random(of.size) < 0.5, hardness, rng.random(of.size)) < other).astype(float)
        truth = 0.05
        scores, base = ({str(n): float(v) for n, v in enumerate(each)} for each in (one, two))
        groups = {str(number): name for number, name in enumerate(names)}
        found = paired_bootstrap(scores, base, groups, seed, resamples=2000)
        low, high = found.low, found.high
        plain = mean(list(one - two))
        naive = (plain.value - Z * plain.standard_error, plain.value + Z * plain.standard_error)
    else:
        truth = setting.share
        if setting.what == "fractions":
            scores = rng.binomial(4, chance) / 4
        else:
            scores = (rng.random(of.size) < chance).astype(float)
        low, high = interval(scores, names)
        naive = wilson(scores.sum(), of.size)
    return low <= truth <= high, naive[0] <= truth <= naive[1]


def coverage(setting: Setting, data_sets: int, seed: int = 0) -> tuple[float, float]:
    """Return the fractions of data sets whose interval holds the truth: by group, and as if all were independent."""
    rng = np.random.default_rng(seed)
    held = np.array([covered(rng, setting, number) for number in range(data_sets)])
    return float(held[:, 0].mean()), float(held[:, 1].mean())


def table(data_sets: int) -> str:
    """Return the coverage of all settings as a Markdown table."""
    lines = [
        "| score | groups | sizes | mean | correlation | by group, % | as if independent, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        ours, naive = coverage(setting, data_sets)
        sizes = "1" if not setting.groups else "log-normal" if setting.skewed else "1 to 19"
        lines.append(
            f"| {setting.what} | {setting.groups or 200} | {sizes} | {setting.share:g} | {setting.rho:g} "
            f"| {100 * ours:.1f} | {100 * naive:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it with its heading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-sets", type=int, default=1000)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    found = table(args.data_sets)
    print(found)
    if args.write:
        args.write.write_text(
            f"# Coverage of 95 % intervals\n\nOn {args.data_sets:,} simulated data sets each, seed 0 "
            "(`tests/benchmarks/coverage.py`, which says how they are made). One standard error of a coverage is "
            f"{100 * (0.05 * 0.95 / args.data_sets) ** 0.5:.1f} %.\n\n{found}\n"
        )


if __name__ == "__main__":
    main()
