"""The figure of `inspect`: histograms of document lengths and of runs of pauses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pause_megatron.data.windows.inspection import RUN_LENGTHS, Lengths, PolicyStatistics
from pause_megatron.errors import DataError


def draw(name: str, lengths: Lengths, policies: Sequence[PolicyStatistics], output: Path) -> None:
    """Draw document lengths on the left, and run lengths of each policy on the right.

    Args:
        name: Name of the corpus, for the title.
        lengths: Lengths of its documents.
        policies: Statistics of the placement policies.
        output: Path of the figure; its suffix is the format.

    Raises:
        DataError: The file cannot be written, or matplotlib does not know its format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (documents, runs) = plt.subplots(1, 2, figsize=(14, 4.8), constrained_layout=True)
    documents.stairs(lengths.counts, lengths.edges, fill=True, alpha=0.5)
    documents.axvline(lengths.quantiles[50], color="C1", label=f"median {lengths.quantiles[50]:,}")
    documents.axvline(lengths.mean, color="C3", linestyle="--", label=f"mean {lengths.mean:,.0f}")
    documents.set_xscale("log", base=2)
    documents.set(title=f"{name}: length of documents", xlabel="tokens, EOD included", ylabel="documents")
    width = 0.8 / max(len(policies), 1)
    for index, policy in enumerate(policies):
        places = [size + (index - (len(policies) - 1) / 2) * width for size in range(1, RUN_LENGTHS + 1)]
        label = f"{policy.placement} ({policy.window}), {policy.rate:.2%} pauses"
        runs.bar(places, policy.runs, width, label=label)
    runs.set_yscale("log")
    runs.set_xticks(range(1, RUN_LENGTHS + 1), [*map(str, range(1, RUN_LENGTHS)), f"{RUN_LENGTHS}+"])
    runs.set(title="runs of pauses", xlabel="pauses in a run", ylabel="share of the runs")
    for axes in (documents, runs):
        axes.grid(alpha=0.3)
    documents.legend(fontsize=8)
    runs.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, of which there are many
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"--png {output}: cannot be written ({error})") from None
    finally:
        plt.close(figure)
