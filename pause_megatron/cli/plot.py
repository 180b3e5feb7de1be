"""`pause-megatron plot`: draw the loss curves of one or more runs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from pause_megatron.cli import note
from pause_megatron.errors import DataError
from pause_megatron.files.metrics_lines import NAME, is_number, read_metrics
from pause_megatron.files.paths import path_option

HELP = "draw the loss curves of runs as a PNG"
SMOOTHING_STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "runs", type=path_option, nargs="+", metavar="RUN", help="run folder (run.dir), or its metrics.jsonl"
    )
    parser.add_argument(
        "--output", type=path_option, required=True, metavar="FILE", help="picture to write (.png, .svg or .pdf)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the curves, print the path of the picture, and return the exit code."""
    runs = [(Path(name).name or name, _read(Path(name))) for name in args.runs]
    _draw(runs, Path(args.output))
    print(f"wrote {args.output}")
    return 0


def _read(path: Path) -> list[dict[str, Any]]:
    file = path / NAME if path.is_dir() else path
    metrics = read_metrics(file)
    # A step whose loss was not finite has none.
    records = metrics.with_numbers("loss", "text_tokens")
    if not records:
        raise DataError(f"{file}: expected the metrics of a run, got no line of a step with a loss")
    if metrics.damaged:
        note(f"{file}: damaged lines left out: {metrics.damaged:,}")
    return records


def _draw(runs: list[tuple[str, list[dict[str, Any]]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (train, valid) = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    for index, (name, records) in enumerate(runs):
        color = f"C{index}"
        tokens = [record["text_tokens"] / 1e6 for record in records]
        losses = [record["loss"] for record in records]
        train.plot(tokens, losses, color=color, alpha=0.2, linewidth=0.8)
        train.plot(tokens, _smooth(losses), color=color, label=name)
        _draw_validation(valid, name, color, records)
    train.set(title=f"training loss (smoothed over {SMOOTHING_STEPS} steps)")
    valid.set(title="validation loss")
    for axes in (train, valid):
        axes.set(xlabel="text tokens seen (millions)", ylabel="nats per text token")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _draw_validation(axes: Any, name: str, color: str, records: list[dict[str, Any]]) -> None:
    scored = [record for record in records if is_number(record.get("valid_loss"))]
    tokens = [record["text_tokens"] / 1e6 for record in scored]
    curves = {
        "valid_loss": (name, "-", "o"),
        "valid_loss_without_pauses": (f"{name}, scored without pauses", "--", "."),
    }
    if any(is_number(record.get("valid_loss_after_pause")) for record in scored):
        curves["valid_loss_after_pause"] = (f"{name}, directly after a pause", ":", "^")
        curves["valid_loss_elsewhere"] = (f"{name}, elsewhere", "-.", "v")
    else:
        del curves["valid_loss_without_pauses"]  # the same as valid_loss in a run without pauses
    for key, (label, style, marker) in curves.items():
        losses = [value if is_number(value := record.get(key)) else math.nan for record in scored]
        axes.plot(tokens, losses, style, marker=marker, color=color, label=label, ms=4)


def _smooth(values: list[float]) -> list[float]:
    """Return the running mean over the last `SMOOTHING_STEPS` values."""
    return [
        sum(values[max(0, stop - SMOOTHING_STEPS) : stop]) / min(stop, SMOOTHING_STEPS)
        for stop in range(1, len(values) + 1)
    ]
