"""`pause-megatron score`: write a side array of a corpus, from a model or from values of the user's own."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pause_megatron.cli import at_least
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option, prefix_option

HELP = "write a side array of a corpus: a model's loss or entropy at each token; parallel, resumable"

_OF_MODELS = ("kind", "context", "batch_tokens", "processes", "device", "dtype", "store")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "The value of a token is its loss (or the entropy of its prediction) in nats, given the tokens before it in\n"
        "its document. The first token of a document is predicted from the id that the model's tokenizer puts before\n"
        "a text (BOS), or from EOD if it puts none. A document longer than the context is read in windows that\n"
        "overlap by half, so that each token has at least half a context before it. A model with pauses reads the\n"
        "text without pauses, and their logits take no part. The values do not depend on the number of processes.\n\n"
        "After an interruption, the same command resumes from the finished units in PREFIX.NAME.parts/. Needs disk\n"
        "space for the values twice.\n\n"
        "A run uses the values with data.side=NAME.\n\n"
        "examples:\n"
        "  pause-megatron score data/c4 --model out/ --name loss\n"
        "  pause-megatron score data/c4 --values my_values.npy --name mine"
    )
    parser.add_argument(
        "prefix", type=prefix_option, metavar="PREFIX", help="prefix of a corpus that `prepare` or `adopt` made"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        type=path_option,
        metavar="DIR",
        help="folder that export-hf wrote, or another causal language model of transformers with safetensors, with the "
        "tokenizer of the corpus",
    )
    source.add_argument(
        "--values",
        type=path_option,
        metavar="FILE",
        help="copy your own values instead: a .npy of numpy with one number for each token of the .bin, in its order",
    )
    parser.add_argument("--name", default="score", metavar="NAME", help="writes PREFIX.NAME.npy (default: score)")
    parser.add_argument("--overwrite", action="store_true", help="replace a side array or units of other options")
    model = parser.add_argument_group("with --model")
    model.add_argument("--kind", choices=("loss", "entropy"), help="what a value is (default: loss)")
    model.add_argument(
        "--context",
        type=at_least(2),
        metavar="N",
        help="tokens that the model reads at a time (default: 2048, or the model's positions if fewer)",
    )
    model.add_argument(
        "--batch-tokens",
        type=at_least(2),
        metavar="N",
        help="tokens of a forward pass, padding included (default: 8192, or the context if more)",
    )
    model.add_argument("--store", choices=("float32", "float16"), help="data type of the values (default: float32)")
    machine = parser.add_argument_group("machine, with --model")
    machine.add_argument(
        "--processes",
        type=at_least(1),
        metavar="N",
        help="processes, each with the model and, on a CPU, one thread (default: one each GPU, or one each core that "
        "memory allows)",
    )
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="auto: GPUs if there are any (default: auto)"
    )
    machine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the forward pass; default: as stored")


def run(args: argparse.Namespace) -> int:
    """Write the side array and print a summary."""
    given = {name: getattr(args, name) for name in _OF_MODELS if getattr(args, name) is not None}
    if args.values is not None:
        return _register(args, list(given))
    from pause_megatron.cli.pretrain import silence_imports

    silence_imports()
    from pause_megatron.data.corpus.side import summarize_side
    from pause_megatron.score.run import ScoreOptions, score
    from pause_megatron.terminal.progress import StageProgress

    options = ScoreOptions(name=args.name, overwrite=args.overwrite, **given)
    with _sigterm_ends(), StageProgress(sys.stderr, " tokens") as progress:
        scored = score(args.prefix, args.model, options, progress.report)
    print(f"{scored.side.path}: {summarize_side(scored.side)}")
    if scored.already_done:
        print("already scored with this model and these options: nothing to do")
        return 0
    computed = scored.side.tokens - scored.reused
    print(
        f"time: {scored.seconds:,.1f} s, {computed:,} tokens in {scored.processes} processes "
        f"({computed / scored.seconds:,.0f} tokens/s, start included)"
        + (f"; the values of {scored.reused:,} tokens were kept" if scored.reused else "")
    )
    return 0


def _register(args: argparse.Namespace, given: list[str]) -> int:
    from pause_megatron.data.corpus.side import summarize_side
    from pause_megatron.data.corpus.side_writing import register_values

    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')}: expected --model with it, got --values")
    side = register_values(args.prefix, args.name, Path(args.values), overwrite=args.overwrite)
    print(f"{side.path}: {summarize_side(side)}")
    return 0


@contextlib.contextmanager
def _sigterm_ends() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C: the processes stop after their batch, and locks are released."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
