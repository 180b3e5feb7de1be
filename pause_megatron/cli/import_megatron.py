"""`pause-megatron import-megatron`: import a GPT checkpoint of Megatron-LM as a checkpoint with pause rows."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time

from pause_megatron.cli.support.conversion_options import add_import_options
from pause_megatron.files.paths import path_option

HELP = "import a GPT checkpoint of Megatron-LM as a checkpoint with pauses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "folder", type=path_option, help="iter_XXXXXXX (torch_dist or mp_rank_XX), or the folder above it"
    )
    parser.add_argument("checkpoint", type=path_option, help="the checkpoint to write; new or empty")
    parser.add_argument(
        "--tokenizer",
        type=path_option,
        required=True,
        metavar="T",
        help="tokenizer of the run: a folder with tokenizer.json or tokenizer.model, or such a file",
    )
    parser.add_argument(
        "--keep-pause-row",
        action="store_true",
        help="the run used PauseTokenizer: the row after the tokenizer's ids is a trained pause row",
    )
    add_import_options(parser)


def run(args: argparse.Namespace) -> int:
    """Import, and print what was read and the next commands."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one process on the CPU; set before torch is imported
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.terminal.progress import StageProgress

    silence_imports()
    from pause_megatron.megatron_lm.importing import import_megatron

    start = time.perf_counter()
    with StageProgress(sys.stderr) as progress:
        done = import_megatron(
            args.folder,
            args.checkpoint,
            tokenizer=args.tokenizer,
            pause_token=args.pause_token,
            keep_pause_row=args.keep_pause_row,
            tensor_parallel=args.tensor_parallel,
            sequence_length=args.sequence_length,
            seed=args.seed,
            report=progress.report,
        )
    ids = ", ".join(map(str, done.pause_ids))
    notes = "".join(f"note: {note}\n" for note in done.notes)
    print(
        f"{args.checkpoint}: {done.source} ({done.format}), {done.rows:,} vocabulary rows with padding, "
        f"{done.text_rows:,} ids of the tokenizer, pause id {ids} ({done.how}), tensor parallel "
        f"{args.tensor_parallel}, {time.perf_counter() - start:.1f} s\n"
        "not imported: optimizer state, random states, iteration. Losses are not those of Megatron-LM, whose softmax "
        f"includes padding rows\n{notes}"
        f"next: pause-megatron prepare --tokenizer {shlex.quote(os.path.join(args.checkpoint, 'tokenizer'))} ..., then "
        f"pause-megatron pretrain {shlex.quote(f'model.from={args.checkpoint}')} ..."
    )
    return 0
