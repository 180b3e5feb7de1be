"""`pause-megatron score`: write a side array of a corpus, or the values of a task's answers."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pause_megatron.cli import at_least
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option, prefix_option

if TYPE_CHECKING:
    from pause_megatron.score.run import Scored
    from pause_megatron.score.task import TaskScored

HELP = "write a model's loss or entropy at each token of a corpus (parallel, resumable) or of a task's answers"

_OF_MODELS = ("kind", "context", "batch_tokens", "processes", "device", "dtype", "store")
_OF_CORPORA = ("values", "name", "store")
_OF_TASKS = ("output", "task_path", "task_limit", "held_out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "The value of a token is its loss (or the entropy of its prediction) in nats, given the tokens before it in\n"
        "its document. The first token of a document is predicted from the id that the model's tokenizer puts before\n"
        "a text (BOS), or from EOD if it puts none. A document longer than the context is read in windows that\n"
        "overlap by half, so that each token has at least half a context before it. A model with pauses reads the\n"
        "text without pauses, and their logits take no part. The values do not depend on the number of processes.\n\n"
        "After an interruption, the same command resumes from the finished units in PREFIX.NAME.parts/ (with --task,\n"
        "in FILE.parts/). Needs disk space for the values twice.\n\n"
        "A run uses the values with data.side=NAME.\n\n"
        "With --task, a value is that of a token of a training record's answer, given its prompt. No pauses are read.\n"
        "Values differ by less than 1e-5 between sizes of a batch (fp32). A\n"
        "finetuning uses them with task.scores=FILE finetune.answer_placement=scored.\n\n"
        "examples:\n"
        "  pause-megatron score data/c4 --model out/ --name loss\n"
        "  pause-megatron score data/c4 --values my_values.npy --name mine\n"
        "  pause-megatron score --task gsm8k --model out/ --output gsm8k.safetensors"
    )
    parser.add_argument(
        "prefix",
        nargs="?",
        type=prefix_option,
        metavar="PREFIX",
        help="prefix of a corpus that `prepare` or `adopt` made; or --task",
    )
    _add_task_arguments(parser)
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
    parser.add_argument("--name", metavar="NAME", help="writes PREFIX.NAME.npy (default: score)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a side array or --output, and unfinished units, of other options",
    )
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


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    task = parser.add_argument_group("with --task, in place of PREFIX")
    task.add_argument(
        "--task",
        type=path_option,
        metavar="NAME",
        help="the answers of a task: one that ships, a YAML file, or 'module:attribute'",
    )
    task.add_argument("--output", type=path_option, metavar="FILE", help="the file of values, such as x.safetensors")
    task.add_argument(
        "--task-path",
        type=path_option,
        metavar="DIR",
        help="folder with the task's records in a folder of its name (default: the Hugging Face Hub)",
    )
    task.add_argument(
        "--task-limit",
        type=at_least(1),
        metavar="N",
        help="the records that task.limit=N of the finetuning trains on, and those held out (default: all)",
    )
    task.add_argument(
        "--held-out",
        type=float,
        metavar="X",
        help="task.held_out of the finetuning, for --task-limit and few-shot prompts (default: 0.05)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the side array or the values of answers, and print a summary."""
    _check_source(args)
    if args.task is not None:
        return _score_task(args)
    args.name = args.name or "score"
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
    _print_end(scored, scored.side.tokens)
    return 0


def _check_source(args: argparse.Namespace) -> None:
    """Check that there is a corpus or a task, and that each option belongs to it."""
    if (args.prefix is None) == (args.task is None):
        got = "neither" if args.task is None else "both"
        raise ConfigError(f"PREFIX, --task: expected one of them, a corpus or a task, got {got}")
    of_others = _OF_TASKS if args.task is None else _OF_CORPORA
    for name in of_others:
        if getattr(args, name) is not None:
            expected = "--task" if args.task is None else "PREFIX"
            raise ConfigError(f"--{name.replace('_', '-')}: expected {expected} with it, got the other")
    if args.task is not None and args.output is None:
        raise ConfigError("--output: expected the file to write with --task, got none")
    if args.held_out is not None and not 0 <= args.held_out < 1:
        raise ConfigError(f"--held-out: expected at least 0 and below 1, got {args.held_out}")


def _score_task(args: argparse.Namespace) -> int:
    from pause_megatron.cli.pretrain import silence_imports

    silence_imports()
    from pause_megatron.cli.support.task_records import records_folder
    from pause_megatron.score.task import TaskScoreOptions, score_task
    from pause_megatron.tasks import load_task
    from pause_megatron.terminal.progress import StageProgress

    given = {name: getattr(args, name) for name in (*_OF_MODELS, "held_out") if name != "store"}
    options = TaskScoreOptions(
        path=records_folder(load_task(args.task), args.task_path),
        limit=args.task_limit,
        overwrite=args.overwrite,
        **{name: value for name, value in given.items() if value is not None},
    )
    with _sigterm_ends(), StageProgress(sys.stderr, " tokens") as progress:
        scored = score_task(args.task, args.model, args.output, options, progress.report)
    cut = f"; {scored.truncated:,} prompts cut on the left" if scored.truncated else ""
    mean = "" if scored.mean is None else f", mean {scored.mean:.4f} nats"
    print(f"{args.output}: {options.kind} of {scored.values:,} tokens of {scored.examples:,} answers{mean}{cut}")
    _print_end(scored, scored.values)
    return 0


def _print_end(scored: Scored | TaskScored, values: int) -> None:
    """Print what was computed, and how fast.

    Args:
        scored: The result.
        values: Number of its values.
    """
    if not scored.processes:
        print("already scored with this model and these options: nothing to do")
        return
    computed = values - scored.reused
    print(
        f"time: {scored.seconds:,.1f} s, {computed:,} tokens in {scored.processes} processes "
        f"({computed / scored.seconds:,.0f} tokens/s, start included)"
        + (f"; the values of {scored.reused:,} tokens were kept" if scored.reused else "")
    )


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
