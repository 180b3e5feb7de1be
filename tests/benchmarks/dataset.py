"""P4: `PauseGPTDataset[i]` against `GPTDataset[i]`, 2048 tokens, 10 % pauses. Target: <= 1.5.

python -m tests.benchmarks.dataset [--samples 100] [--rounds 41]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment
from support.corpora import make_config, make_dataset, paragraphs, write_corpus

from pause_megatron.data.windows import pieces

TARGET = 1.5


def main() -> None:
    """Prints the target's line, then one for each other setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100, help="windows read in one round")
    parser.add_argument("--rounds", type=int, default=41, help="counted rounds, at least 7")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_corpus(Path(folder) / "speeches", paragraphs(3000))
        # The corpus has no manifest, in which a side array is recorded.
        scores = np.random.default_rng(0).random(sum(map(len, paragraphs(3000))), dtype=np.float32)
        pieces.open_side = lambda prefix, name: scores

        def reader(cls: type | None = None, embeddings: int = 1, **settings: object) -> Callable[[], None]:
            config = make_config(prefix, 2048, embeddings, **settings)
            dataset = make_dataset(prefix, config, arguments.samples, cls=cls)

            def read() -> None:
                for sample in range(arguments.samples):
                    dataset[sample]

            return read

        stock_reader = reader(GPTDataset, pause_rate=0.0)
        pair = compare({"GPTDataset": stock_reader, "exact, uniform": reader()}, arguments.rounds)
        others = compare(
            {
                "GPTDataset": stock_reader,
                "rate 0": reader(pause_rate=0.0),
                "trim, uniform": reader(pause_window="trim"),
                "exact, isolated": reader(pause_placement="isolated"),
                "exact, with_replacement": reader(pause_placement="with_replacement"),
                "trim, bernoulli": reader(pause_placement="bernoulli", pause_window="trim"),
                "exact, interval": reader(pause_placement="interval"),
                "exact, uniform, K=4": reader(embeddings=4),
                "exact, runs of 5": reader(pause_run=5),
                "exact, after": reader(pause_placement="after"),
                "exact, scored": reader(pause_placement="scored", side="score"),
                "exact, every": reader(pause_placement="every"),
            },
            arguments.rounds,
        )
    stock, ours = pair["GPTDataset"], pair["exact, uniform"]
    each = 1e6 / arguments.samples
    print(
        f"P4 PauseGPTDataset[i] / GPTDataset[i], 2048 tokens: {ours.ratio:.2f} "
        f"[{ours.low:.2f} .. {ours.high:.2f}] (target <= {TARGET}), {ours.seconds * each:.1f} us against "
        f"{stock.seconds * each:.1f} us, {ours.rounds} rounds of {arguments.samples} windows; "
        f"{environment('numpy', 'torch', 'megatron-core')}"
    )
    for name, timing in others.items():
        print(
            f"   {name:24s} {timing.seconds * each:6.1f} us  {timing.ratio:.2f} [{timing.low:.2f} .. {timing.high:.2f}]"
        )


if __name__ == "__main__":
    main()
