"""`pause-megatron import-hf`: import a Hugging Face folder as a checkpoint with pause rows."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time

from pause_megatron.cli.support.conversion_options import add_comparison_option, add_import_options
from pause_megatron.files.paths import path_option

HELP = "import a Hugging Face folder (Llama, Qwen2, Mistral, Qwen3, OLMo 2) as a checkpoint with pauses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=path_option, help="folder with config.json, safetensors and a tokenizer")
    parser.add_argument("checkpoint", type=path_option, help="the checkpoint to write; new or empty")
    add_import_options(parser)
    add_comparison_option(parser)


def run(args: argparse.Namespace) -> int:
    """Import, and print the result of the comparison with transformers and the next commands."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process on the CPU; set before torch is imported
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.terminal.progress import StageProgress

    silence_imports()
    from pause_megatron.hf.importing import import_folder

    start = time.perf_counter()
    with StageProgress(sys.stderr) as progress:
        done = import_folder(
            args.folder,
            args.checkpoint,
            pause_token=args.pause_token,
            tensor_parallel=args.tensor_parallel,
            sequence_length=args.sequence_length,
            seed=args.seed,
            compare=not args.no_comparison,
            report=progress.report,
        )
    difference = done.largest_difference
    compared = "not compared" if difference is None else f"largest difference from transformers {difference:.2g}"
    ids = ", ".join(map(str, done.pause_ids))
    print(
        f"{args.checkpoint}: {done.family}, {done.rows:,} vocabulary rows in the source, pause id {ids} ({done.how}), "
        f"tensor parallel {args.tensor_parallel}, {time.perf_counter() - start:.1f} s\n"
        f"logits: {compared}\n"
        f"next: pause-megatron prepare --tokenizer {shlex.quote(os.path.join(args.checkpoint, 'tokenizer'))} ..., then "
        f"pause-megatron pretrain {shlex.quote(f'model.from={args.checkpoint}')} ..."
    )
    return 0
