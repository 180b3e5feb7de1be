"""`pause-megatron export-megatron`: export a checkpoint as a GPT checkpoint of Megatron-LM."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time

from pause_megatron.cli import at_least
from pause_megatron.files.paths import path_option

HELP = "export a checkpoint as a GPT checkpoint of Megatron-LM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=path_option, help="a checkpoint, RUN/checkpoints/latest, or RUN")
    parser.add_argument("output", type=path_option, help="the folder for Megatron-LM's --load; new or empty")
    parser.add_argument(
        "--tensor-parallel",
        type=at_least(1),
        default=1,
        metavar="N",
        help="tensor-parallel size that the vocabulary is padded for; torch_dist loads at any (default: 1)",
    )
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="with Adam's moments and fp32 weights, for --use-distributed-optimizer",
    )
    parser.add_argument(
        "--format",
        choices=("torch_dist", "torch"),
        default="torch_dist",
        help="torch_dist, or torch for mp_rank_XX folders (default: torch_dist)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print how Megatron-LM loads it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process on the CPU; set before torch is imported
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.terminal.progress import StageProgress

    silence_imports()
    from pause_megatron.megatron_lm.export import export_megatron

    start = time.perf_counter()
    with StageProgress(sys.stderr) as progress:
        done = export_megatron(
            args.checkpoint,
            args.output,
            tensor_parallel=args.tensor_parallel,
            optimizer=args.optimizer,
            format=args.format,
            report=progress.report,
        )
    ids = ", ".join(map(str, done.pause_ids))
    notes = "".join(f"note: {note}\n" for note in done.notes)
    print(
        f"{args.output}: iteration {done.iteration}, {args.format}, {done.bytes / 1e6:,.1f} MB, {done.rows:,} "
        f"vocabulary rows with padding, pause id {ids}, {time.perf_counter() - start:.1f} s\n"
        f"{notes}next: Megatron-LM with --load {shlex.quote(str(args.output))} --use-checkpoint-args "
        f"{shlex.join(done.flags)}; its losses are not those of this project, for its softmax includes padding rows"
    )
    return 0
