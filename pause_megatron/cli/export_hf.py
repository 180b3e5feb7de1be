"""`pause-megatron export-hf`: export a checkpoint to a Hugging Face folder that computes the same logits."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from typing import TYPE_CHECKING

from pause_megatron.cli import at_least
from pause_megatron.cli.support.conversion_options import add_comparison_option
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option

if TYPE_CHECKING:
    from pause_megatron.hf.parity import Parity

HELP = "export a checkpoint to a Hugging Face folder for transformers and vLLM"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=path_option, help="a checkpoint, RUN/checkpoints/latest, or RUN")
    parser.add_argument("output", type=path_option, help="the Hugging Face folder; new or empty")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights (default: fp32)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=size_in_bytes,
        default="5GB",
        metavar="SIZE",
        help="maximum size of a weight file (default: 5GB)",
    )
    parser.add_argument(
        "--finetuned-pauses",
        type=at_least(0),
        metavar="M",
        help="M_ft for config.json (default: M of the finetuning)",
    )
    parser.add_argument(
        "--adapter",
        type=path_option,
        metavar="BASE",
        help="write the LoRA adapters of a run with train.only=lora as a peft folder, for BASE, the exported folder of "
        "its model.from (default: they are merged into the weights)",
    )
    add_comparison_option(parser)


def run(args: argparse.Namespace) -> int:
    """Export, and print the result of the comparison with the native model."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process on the CPU; set before torch is imported
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.terminal.progress import StageProgress

    silence_imports()
    from pause_megatron.hf.adapter import export_adapter
    from pause_megatron.hf.export import export

    if args.adapter is not None and args.no_comparison:
        raise ConfigError("--no-comparison: expected no --adapter beside it: an adapter is compared on its base")
    if args.adapter is not None and (args.dtype != "fp32" or args.finetuned_pauses is not None):
        raise ConfigError("--adapter: expected no --dtype and --finetuned-pauses beside it: the folder is fp32 weights")
    start = time.perf_counter()
    with StageProgress(sys.stderr) as progress:
        if args.adapter is not None:
            done = export_adapter(args.checkpoint, args.output, base=args.adapter, report=progress.report)
        else:
            done = export(
                args.checkpoint,
                args.output,
                dtype=args.dtype,
                max_shard_size=args.max_shard_size,
                finetuned_pauses=args.finetuned_pauses,
                compare=not args.no_comparison,
                report=progress.report,
            )
    print(
        f"{args.output}: {done.bytes / 1e6:,.1f} MB of {args.dtype} weights in {done.files} file"
        f"{'s' if done.files > 1 else ''}, {time.perf_counter() - start:.1f} s\n" + _compared(done.parity, args.dtype)
    )
    return 0


def _compared(parity: Parity | None, dtype: str) -> str:
    if parity is None:
        return "logits and tokenizer: not compared"
    rounding = f"; rounding to {dtype} moved a logit by up to {parity.rounding:.2g}" if parity.rounding else ""
    return (
        f"logits: largest difference from the native model {parity.largest_difference:.2g} (allowed "
        f"{parity.tolerance:.2g}) on {parity.windows[0]} windows of {parity.windows[1]} tokens with pauses "
        f"({parity.source}){rounding}\n"
        f"tokenizer: identical ids on {parity.lines:,} lines"
    )


def size_in_bytes(text: str) -> int:
    """Return a size in bytes.

    Args:
        text: A number with an optional unit, such as "5GB", "200MiB" or "1000000".

    Raises:
        argparse.ArgumentTypeError: Another text, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    factor = _UNITS.get(unit) or _UNITS.get(f"{unit}B")
    if not match or not factor or float(match.group(1)) * factor < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 200MB, got {text!r}")
    return int(float(match.group(1)) * factor)
