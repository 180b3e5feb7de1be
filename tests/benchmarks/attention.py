"""Documents that do not see each other: a training step by one mask, by spans, and with the documents joined.

python -m tests.benchmarks.attention [--lengths 512 2048 4096] [--means 493.3 64 16 4] [--layers 2] [--hidden 128]
    [--precision fp32] [--rounds 7] [--peak]

Forward and backward of a small model on one thread, for each length of a window and each mean length of a document.
Lengths of documents are log-normal (sigma 1.1; C4's mean is 493.3 tokens). "One mask" is made once a step, as an
additive mask that all layers share. "Joined" is plain causal attention over the whole window: other losses, and what
the separation of the documents is measured against. With --peak, the peak memory of a step in a fresh process: the
high-water mark of its resident set, the mask's making included, above what was resident before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.c4_scale import MEAN_TOKENS, SIGMA
from benchmarks.head import agreement, peak_bytes
from benchmarks.timing import compare, environment

from pause_megatron.config.model_schema import ModelSection
from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import initialize
from pause_megatron.model import Vocabulary, build_model
from pause_megatron.model.attention import segment_mask
from pause_megatron.model.variable_length import PackedSegments

VOCABULARY = 1024
TOKENS = 2048  # in a step at least

Contestants = dict[str, Callable[[], list[Tensor]]]


def segments_of_documents(length: int, mean: float) -> Tensor:
    """Which document each token is of: int64 [windows, length], consecutive windows of a long row of documents.

    Of all such groups of windows, the one whose share of the joined scores is the median: a few windows differ much.
    """
    windows = max(1, TOKENS // length)
    documents = round(64 * windows * length / mean)
    lengths = np.random.default_rng(1234).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, documents)
    numbers = np.repeat(np.arange(documents), lengths.astype(np.int64).clip(1))
    groups = numbers[: numbers.size // (windows * length) * windows * length].reshape(-1, windows, length)
    scores = [sum((np.unique(window, return_counts=True)[1] ** 2).sum() for window in group) for group in groups]
    return torch.from_numpy(groups[np.argsort(scores)[len(scores) // 2]])


def contestants(arguments: argparse.Namespace, segments: Tensor) -> Contestants:
    """Name -> forward and backward, returning the loss and some gradients."""
    length, hidden = segments.shape[1], arguments.hidden
    section = ModelSection(
        preset=None, layers=arguments.layers, hidden=hidden, heads=hidden // 64, kv_heads=hidden // 64,
        ffn=hidden * 8 // 3 // 16 * 16, tied=True,
    )  # fmt: skip
    model = build_model(
        section,
        vocabulary=Vocabulary(VOCABULARY - 1, (VOCABULARY - 1,)),
        sequence_length=length,
        parallel=ParallelSection(),
        precision=arguments.precision,
    )
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments.diff(dim=1) != 0
    index = torch.arange(length).expand_as(segments)
    positions = index - (index * begins).cummax(dim=1).values
    tokens = torch.randint(0, VOCABULARY - 1, segments.shape)
    rows, targets = torch.arange(tokens.numel()), torch.randint(0, VOCABULARY - 1, (tokens.numel(),))

    def step(mask: Tensor | PackedSegments | None) -> list[Tensor]:
        scale = 1 / tokens.numel()
        loss = model(tokens, positions, mask, target_rows=rows, targets=targets, loss_scale=scale).loss
        loss.backward()
        found = [loss.detach(), *(layer.self_attention.linear_qkv.weight.grad for layer in model.decoder.layers)]
        model.zero_grad(set_to_none=True)
        return found

    return {
        "one mask": lambda: step(segment_mask(segments)),
        "spans": lambda: step(PackedSegments.of(segments)),
        "joined": lambda: step(None),
    }


def peak_of(name: str, length: int, mean: float) -> int:
    """Peak bytes of a contestant, in a process of its own that gives freed tensors back at once."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, str(length), str(mean)]
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_setting(arguments: argparse.Namespace, length: int, mean: float) -> None:
    """A line for the documents and one for each contestant."""
    segments = segments_of_documents(length, mean)
    calls = contestants(arguments, segments)
    gap = agreement(calls["one mask"](), calls["spans"]())
    timings = compare(calls, rounds=arguments.rounds, warmup=0)
    lengths = PackedSegments.of(segments).segments.lengths
    seen = sum(span**2 for span in lengths) / (segments.numel() * length)
    print(
        f"{segments.shape[0]} x {length} tokens, documents of {mean:g} (mean): {len(lengths)} spans, scores {seen:.3f} "
        f"of joined; spans and mask differ by {gap:.1e} (loss, gradients)"
    )
    for name, timing in timings.items():
        peak = f"  peak {peak_of(name, length, mean) / 2**20:7.1f} MiB" if arguments.peak else ""
        print(
            f"   {name:9s} {timing.seconds * 1e3:8.1f} ms  {timing.ratio:.3f} [{timing.low:.3f} .. {timing.high:.3f}]"
            f"{peak}",
            flush=True,
        )


def main() -> None:
    """Prints each setting, and a line for the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096], help="tokens of a window")
    parser.add_argument("--means", type=float, nargs="+", default=[MEAN_TOKENS, 64, 16, 4], help="tokens of a document")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="channels, 64 a head")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, at least 7")
    parser.add_argument("--peak", action="store_true", help="measure peak memory too, a process each")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with initialize(ParallelSection(), device="cpu"):
        if arguments.peak_of:
            name, length, mean = arguments.peak_of
            calls = contestants(arguments, segments_of_documents(int(length), float(mean)))
            calls["joined"]()  # what is set up once and stays does not count
            print(peak_bytes(calls[name]))
            return
        for length in arguments.lengths:
            for mean in arguments.means:
                print_setting(arguments, length, mean)
    print(
        f"{arguments.layers} layers, hidden {arguments.hidden}, vocabulary {VOCABULARY}, {arguments.precision}, "
        f"{arguments.rounds} rounds, median, ratio to one mask [quartiles]; {environment('torch', 'megatron-core')}"
    )


if __name__ == "__main__":
    main()
