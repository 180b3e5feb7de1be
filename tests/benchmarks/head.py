"""P1: the pause-aware head against the head that ignores afterwards, 10 % pauses (target: <= 0.92 of its time).
P2: the chunked head against full logits (targets: <= 0.25 of its peak memory, <= 1.10 of its time).

python -m tests.benchmarks.head [--windows 1] [--vocabulary 32000] [--hidden 512] [--chunk 1024] [--rounds 9]

Forward and backward of the output layer alone, fp32, one thread, hidden states of 2048-token windows. "Ignore after"
is megatron-core's output layer and vocab_parallel_cross_entropy over all positions, then the mask. Peak memory is that
of a fresh process for each contestant: the high-water mark of its resident set during forward and backward, above what
was resident before.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment

from pause_megatron.config.model_schema import ModelSection
from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import initialize
from pause_megatron.model import Vocabulary, build_model
from pause_megatron.model.head import OutputLayer

SEQ = 2048
PAUSES = 205


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Name -> forward and backward, returning the loss and the gradients of hidden states and weight."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    rows = arguments.windows * SEQ
    section = ModelSection(
        preset=None, layers=1, hidden=arguments.hidden, heads=8, kv_heads=8, ffn=64, tied=False,
        head_chunk=arguments.chunk,
    )  # fmt: skip
    vocabulary = Vocabulary(arguments.vocabulary - 1, (arguments.vocabulary - 1,))
    model = build_model(section, vocabulary=vocabulary, sequence_length=SEQ, parallel=ParallelSection())
    layer: OutputLayer = model.output_layer
    hidden = torch.randn(SEQ, arguments.windows, arguments.hidden).requires_grad_()
    labels = torch.randint(0, vocabulary.text_size, (rows,))
    mask = torch.ones(rows, dtype=torch.bool)
    mask[torch.randperm(rows)[: PAUSES * arguments.windows]] = False
    kept = mask.nonzero().squeeze(1)
    targets = labels[kept]
    scale = torch.tensor(1.0 / len(kept))

    def finish(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss.backward()
        gradients = hidden.grad, layer.weight.grad
        hidden.grad = layer.weight.grad = None
        return loss.detach(), *gradients

    def stock(positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if positions is None:
            logits, _ = layer(hidden)
            losses = vocab_parallel_cross_entropy(logits.view(rows, -1), labels) * mask
        else:
            logits, _ = layer(hidden.view(rows, -1)[positions].unsqueeze(1))
            losses = vocab_parallel_cross_entropy(logits.squeeze(1), targets)
        return finish(scale * losses.sum())

    def head(positions: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return finish(layer(hidden.view(rows, -1).index_select(0, positions), targets=wanted, loss_scale=weights)[0])

    return {
        "ignore after": lambda: stock(None),
        "kept rows, full logits": lambda: stock(kept),
        "kept rows, chunked": lambda: head(kept, targets, scale),
        "all rows, chunked": lambda: head(torch.arange(rows), labels, scale),
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest resident set during the call, above what is resident before it. Linux."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but resident would be used first, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def peaks_of(names: list[str]) -> dict[str, int]:
    """Peak bytes of each contestant, each in a process of its own."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def main() -> None:
    """Prints one line for P1, one for P2, and one for each contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1, help="windows of 2048 tokens in the micro-batch")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024, help="rows of logits that exist at one time")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, at least 7")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with initialize(ParallelSection(), device="cpu"):
        calls = contestants(arguments)
        if arguments.peak_of:
            print(peak_bytes(calls[arguments.peak_of]))
            return
        gap = agreement(calls["ignore after"](), calls["kept rows, chunked"]())
        timings = compare(calls, rounds=arguments.rounds)
        full = {name: calls[name] for name in ("kept rows, full logits", "kept rows, chunked")}
        chunked = compare(full, rounds=arguments.rounds)["kept rows, chunked"]
    ours = timings["kept rows, chunked"]
    peaks = peaks_of(list(calls))
    memory = peaks["kept rows, chunked"] / peaks["kept rows, full logits"]
    print(
        f"P1 pause-aware head / ignore-after head: {ours.ratio:.3f} [{ours.low:.3f} .. {ours.high:.3f}] "
        f"(target <= 0.92); loss and gradients differ by {gap:.1e} (target <= 1e-6)"
    )
    print(
        f"P2 chunked head / full logits: peak memory {memory:.3f} (target <= 0.25), "
        f"time {chunked.ratio:.3f} [{chunked.low:.3f} .. {chunked.high:.3f}] (target <= 1.10)"
    )
    print(
        f"   {arguments.windows} x {SEQ} positions, {PAUSES} ignored each, vocabulary {arguments.vocabulary}, "
        f"hidden {arguments.hidden}, chunk {arguments.chunk}, {arguments.rounds} rounds; "
        f"{environment('torch', 'megatron-core')}"
    )
    for name, timing in timings.items():
        print(
            f"   {name:24s} {timing.seconds * 1e3:8.1f} ms  {timing.ratio:.3f} "
            f"[{timing.low:.3f} .. {timing.high:.3f}]  peak {peaks[name] / 2**20:7.1f} MiB"
        )


def agreement(expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> float:
    """Largest difference of loss or gradients, relative to the largest magnitude of each."""
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(expected, got, strict=True))


if __name__ == "__main__":
    main()
