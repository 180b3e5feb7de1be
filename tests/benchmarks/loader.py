"""P5: a training step that waits for the loader against one whose batches lie in memory (target: gap <= 1 %).

python -m tests.benchmarks.loader [--steps 4] [--rounds 9]

The real thing on both sides: PauseGPTDataset under the stock builder, StepLoader with its thread, the model under the
DeepSpeed engine, 4 windows of 1024 tokens a step, 10 % pauses, one compute thread. The other side takes the same
micro-batches from a list.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment
from support.corpora import ByteTokenizer, paragraphs, write_corpus

from pause_megatron.config.load import load
from pause_megatron.data.batches.loader import Step, StepLoader
from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.data.windows.build import DatasetOptions, build_datasets
from pause_megatron.distributed import ParallelContext, initialize
from pause_megatron.model import Vocabulary, build_model, parameter_groups
from pause_megatron.train.losses import LossSums
from pause_megatron.train.run import new_engine

WINDOWS, LENGTH = 4, 1024


def contestants(folder: str, steps: int, total: int, context: ParallelContext) -> dict[str, Callable[[], None]]:
    """`steps` training steps, from memory and through the loader."""
    config = load(
        overrides=[
            *(f"train.steps={total}", f"batch.global_size={WINDOWS}", f"batch.micro_size={WINDOWS}"),
            *("model.layers=4", "model.hidden=256", f"data.sequence_length={LENGTH}", "engine.precision=fp32"),
        ]
    )
    datasets = build_datasets(
        DatasetOptions(
            (write_corpus(Path(folder) / "bytes", paragraphs(2000)),),
            split="1,0,0",
            sequence_length=LENGTH,
            tokenizer=ByteTokenizer(),
            pause=config.pause,
            seed=0,
            train_samples=total * WINDOWS,
            valid_samples=0,
        )
    )
    pause_ids = datasets.tokenizer.pause_ids
    model = build_model(
        config.model,
        vocabulary=Vocabulary(datasets.tokenizer.text_size, pause_ids),
        sequence_length=LENGTH,
        parallel=config.parallel,
    )
    engine = new_engine(config, model, parameter_groups(model, 0.1), context)
    loader = StepLoader(datasets.train, StepSampler(WINDOWS, WINDOWS), 0, total, pause_ids=pause_ids)
    in_memory = itertools.cycle([next(loader) for _ in range(8)])

    def train(batches: Iterator[Step]) -> None:
        for _, micro_batches in itertools.islice(batches, steps):
            sums = LossSums(context.device)
            targets = sum(batch.targets_count for batch in micro_batches)
            engine.train_step(micro_batches, sums.forward, lr=1e-4, global_targets=targets)

    return {"batches in memory": lambda: train(in_memory), "through the loader": lambda: train(loader)}


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps in a timed call")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds, at least 7")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load(overrides=["train.steps=1"])
    with tempfile.TemporaryDirectory() as folder, initialize(config.parallel, device="cpu") as context:
        total = arguments.steps * (arguments.rounds + 2) + 16
        timings = compare(contestants(folder, arguments.steps, total, context), rounds=arguments.rounds)
    memory, ours = timings["batches in memory"], timings["through the loader"]
    print(
        f"P5 step through the loader / batches in memory: {ours.ratio:.4f} [{ours.low:.4f} .. {ours.high:.4f}] "
        f"(target <= 1.01); {ours.seconds / arguments.steps * 1e3:.1f} ms against "
        f"{memory.seconds / arguments.steps * 1e3:.1f} ms a step"
    )
    print(
        f"   {WINDOWS} x {LENGTH} tokens a step, {arguments.rounds} rounds of {arguments.steps} steps; "
        f"{environment('torch', 'megatron-core', 'deepspeed')}"
    )


if __name__ == "__main__":
    main()
