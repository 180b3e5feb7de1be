"""`pause-megatron export-hf`: a checkpoint in, a Hugging Face folder out, proven to compute the same."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time

from pause_megatron.cli import at_least
from pause_megatron.files.paths import path_option

HELP = "turn a checkpoint into a Hugging Face folder that transformers and vLLM load"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=path_option, help="a checkpoint, RUN/checkpoints/latest, or RUN")
    parser.add_argument("output", type=path_option, help="the folder; new or empty")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (default: fp32)"
    )
    parser.add_argument(
        "--max-shard-size", type=size_in_bytes, default="5GB", metavar="SIZE", help="of one weight file (default: 5GB)"
    )
    parser.add_argument(
        "--finetuned-pauses",
        type=at_least(1),
        metavar="M",
        help="M_ft to write into config.json (default: the finetuning's own)",
    )


def run(args: argparse.Namespace) -> int:
    """Export and say what was found."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process on the CPU; set before torch is imported
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.terminal.progress import StageProgress

    silence_imports()
    from pause_megatron.hf.export import export

    begun = time.perf_counter()
    with StageProgress(sys.stderr) as progress:
        done = export(
            args.checkpoint,
            args.output,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            finetuned_pauses=args.finetuned_pauses,
            report=progress.report,
        )
    parity = done.parity
    print(
        f"{args.output}: {done.bytes / 1e6:,.1f} MB of {args.dtype} weights in {done.files} file"
        f"{'s' if done.files > 1 else ''}, {time.perf_counter() - begun:.1f} s\n"
        f"logits: largest difference from the native model {parity.largest_difference:.2g} (allowed "
        f"{parity.tolerance:.2g}) on {parity.windows[0]} windows of {parity.windows[1]} tokens with pauses "
        f"({parity.source})"
        + (f"; rounding to {args.dtype} moved a logit by up to {parity.rounding:.2g}" if parity.rounding else "")
        + f"\ntokenizer: identical ids on {parity.lines:,} lines"
    )
    return 0


def size_in_bytes(text: str) -> int:
    """ "5GB", "200MiB", "1000000" -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    factor = _UNITS.get(unit) or _UNITS.get(f"{unit}B")
    if not match or not factor or float(match.group(1)) * factor < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 200MB, came {text!r}")
    return int(float(match.group(1)) * factor)
