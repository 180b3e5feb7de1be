"""`pause-megatron evaluate`: score a model on tasks with several numbers of pauses."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pause_megatron.cli.support.exported_model import (
    add_decoding_arguments,
    add_machine_arguments,
    add_model_argument,
    add_pause_arguments,
    decoding_pauses,
    default_pauses,
    load_model,
)
from pause_megatron.cli.support.task_records import records_folder
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.paths import path_option

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pause_megatron.evaluate import ResultEntry, ResultsFolder, Settings
    from pause_megatron.evaluate.lm_eval_tasks import Harness
    from pause_megatron.inference import PauseGenerator
    from pause_megatron.tasks import Example, Task

HELP = "score a model on tasks with several numbers of pauses; resumable"

_LM_EVAL = "lm_eval/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from pause_megatron.tasks import task_names

    parser.epilog = (
        "The same command resumes an interrupted evaluation; finished batches are not computed again. Prompts that are "
        "too long for the model are cut from the left, and counted; generate refuses them.\n\nexamples:\n"
        "  pause-megatron evaluate --model out/ --tasks gsm8k,squad --pauses 0,2,5,10,25,50 --output results/\n"
        "  pause-megatron evaluate --model out/ --tasks lambada --task-path data/ --filler . --output results/\n"
        "  pause-megatron evaluate --model out/ --tasks lm_eval/arc_easy --pauses 0,10 --output results/"
    )
    add_model_argument(parser)
    parser.add_argument(
        "--tasks",
        type=_names,
        required=True,
        metavar="NAME,...",
        help=f"one or more of {', '.join(task_names())}, FILE.yaml, module:attribute, lm_eval/NAME (a task of lm-eval)",
    )
    parser.add_argument(
        "--output", type=path_option, required=True, metavar="DIR", help="folder of results.json and samples/"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--task-path",
        type=path_option,
        metavar="ROOT",
        help="folder that holds a folder of JSON lines for each task (default: the Hugging Face Hub)",
    )
    data.add_argument(
        "--limit",
        metavar="N",
        help="score a random sample of N records of each task, in which every article or story has its share; the same "
        "for all models (default: all)",
    )
    data.add_argument(
        "--split",
        choices=("eval", "held-out"),
        default="eval",
        help="eval; or held-out: the part of the train split that finetuning does not train on, to choose the number "
        "of pauses without the records that the result is reported on",
    )
    data.add_argument(
        "--held-out",
        metavar="FRACTION",
        help="task.held_out of the finetuning, with --split held-out (default: 0.05)",
    )
    data.add_argument(
        "--include-path", type=path_option, metavar="DIR", help="folder of further lm-eval task files (*.yaml)"
    )
    pauses = parser.add_argument_group("pauses")
    pauses.add_argument(
        "--pauses", metavar="N,...", help="numbers of pauses, M (default: the number that the model was finetuned with)"
    )
    add_pause_arguments(pauses)
    pauses.add_argument(
        "--seed", metavar="N", default="0", help="label of the results, such as the seed of the finetuning"
    )
    add_decoding_arguments(parser)
    machine = add_machine_arguments(parser)
    machine.add_argument("--batch-size", default="8", metavar="N", help="rows of a forward pass (default: 8)")


def run(args: argparse.Namespace) -> int:
    """Check the options, evaluate task by task, and print a table; return the exit code."""
    counts = None if args.pauses is None else _numbers("--pauses", args.pauses)
    batch_size = _number("--batch-size", args.batch_size, least=1)
    limit = None if args.limit is None else _number("--limit", args.limit, least=1)
    seed = _number("--seed", args.seed, least=0)
    names = list(dict.fromkeys(args.tasks))
    model = Path(args.model)
    if not model.exists():  # records may be downloaded
        raise DataError(f"model {str(model)!r}: expected a folder as export-hf writes it, there is no such folder")
    tasks = _examples([name for name in names if not name.startswith(_LM_EVAL)], args, limit)
    of_lm_eval = [name.removeprefix(_LM_EVAL) for name in names if name.startswith(_LM_EVAL)]
    harness = _harness(of_lm_eval, args)

    from pause_megatron.evaluate import ResultsFolder, model_fingerprint, opened
    from pause_megatron.inference.loading import check_folder
    from pause_megatron.terminal.progress import StageProgress

    check_folder(model)
    with opened(Path(args.output)) as output:
        with StageProgress(sys.stderr) as progress:
            fingerprint = model_fingerprint(model, output / "model.json", progress.report)
        folder = ResultsFolder(output, fingerprint, str(args.model))
        generator = load_model(args)
        settings = _settings(args, generator, counts, seed)
        entries = _evaluate_own(generator, tasks, settings, folder, batch_size)
        if harness is not None:
            for name in of_lm_eval:
                for each in settings:
                    entries += harness.evaluate(generator, name, each, folder, batch_size=batch_size, limit=limit)
    print(_table(entries))
    return 0


def _names(text: str) -> list[str]:
    return [path_option(name.strip()) for name in text.split(",")]


def _examples(names: Sequence[str], args: argparse.Namespace, limit: int | None) -> list[tuple[Task, list[Example]]]:
    from pause_megatron.tasks import load_task, read_examples

    if args.held_out is not None and args.split != "held-out":
        raise ConfigError(f"--held-out {args.held_out}: expected --split held-out with it, got --split {args.split}")
    root, fraction = args.task_path, _fraction("--held-out", args.held_out or "0.05")
    tasks = [load_task(name) for name in names]
    found = []
    for task in tasks:
        found.append((task, read_examples(task, args.split, records_folder(task, root), limit, fraction)))
    return found


def _harness(names: Sequence[str], args: argparse.Namespace) -> Harness | None:
    """Return lm-eval with its tasks and their records loaded; None if no task of lm-eval is given."""
    if not names:
        return None
    if args.split != "eval":
        raise ConfigError(f"lm_eval tasks: expected --split eval, got {args.split}: lm-eval holds out no records")
    if args.prefix_attention == "bidirectional":
        raise ConfigError(
            "lm_eval tasks: expected --prefix-attention causal, got bidirectional, which lm-eval does not support"
        )
    from pause_megatron.evaluate.lm_eval_tasks import Harness

    harness = Harness(args.include_path)
    for name in names:
        harness.load(name)
    return harness


def _settings(
    args: argparse.Namespace, generator: PauseGenerator, counts: list[int] | None, seed: int
) -> list[Settings]:
    """Return checked settings for each M; an option that is not given takes the model's own value."""
    from pause_megatron.evaluate import check_settings, own_settings

    given = {"location": args.location, "filler": args.filler, "prefix_attention": args.prefix_attention}
    counts = counts or [default_pauses(generator)]
    decoding = decoding_pauses(args, generator)
    found = [
        replace(own_settings(generator, **given, pauses=count, seed=seed, decoding=decoding), split=args.split)
        for count in counts
    ]
    for settings in found:
        check_settings(generator, settings)
    return found


def _evaluate_own(
    generator: PauseGenerator,
    tasks: Sequence[tuple[Task, list[Example]]],
    settings: Sequence[Settings],
    folder: ResultsFolder,
    batch_size: int,
) -> list[ResultEntry]:
    """Evaluate this project's tasks, each with every number of pauses."""
    from pause_megatron.evaluate import identify

    for task, examples in tasks:
        for each in settings:
            folder.check(identify(task, examples, each, folder))
    entries: list[ResultEntry] = []
    for task, examples in tasks:
        for each in settings:
            entries += _score(generator, task, examples, each, folder, batch_size)
    return entries


def _score(
    generator: PauseGenerator,
    task: Task,
    examples: list[Example],
    settings: Settings,
    folder: ResultsFolder,
    batch_size: int,
) -> list[ResultEntry]:
    """Score one task with one number of pauses, and show how far it is."""
    from pause_megatron.evaluate import evaluate
    from pause_megatron.terminal.progress import StageProgress

    name, counts = f"{task.name} M={settings.pauses}", (0, 0)
    with StageProgress(sys.stderr, " records") as progress:

        def report(done: int, total: int, earlier: int) -> None:
            nonlocal counts
            counts = total, earlier
            progress.report(name, done, total)

        entries = evaluate(generator, task, examples, settings, folder, batch_size=batch_size, report=report)
    log.info(f"{name}: {counts[0]} records" + (f", {counts[1]} of them from an earlier run" if counts[1] else ""))
    return entries


def _table(entries: Sequence[ResultEntry]) -> str:
    """Return a table with a line for each task, metric and M."""
    head: tuple[str, ...] = ("task", "metric", "M", "value", "95 % interval", "+- s.e.", "n", "groups")
    rows: list[tuple[str, ...]] = [
        (
            entry.task,
            entry.metric,
            str(entry.pauses),
            f"{entry.value:.4f}",
            "" if entry.low is None or entry.high is None else f"{entry.low:.4f} .. {entry.high:.4f}",
            "" if entry.standard_error is None else f"{entry.standard_error:.4f}",
            f"{entry.n:,}",
            "" if entry.groups is None else f"{entry.groups:,}",
        )
        for entry in entries
    ]
    if any(entry.decoding for entry in entries):
        head = (*head, "within answers")
        rows = [(*row, entry.decoding or "none") for row, entry in zip(rows, entries, strict=True)]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        left = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]))
    cut = dict.fromkeys(f"{e.task} M={e.pauses}: {e.cut:,}" for e in entries if e.cut)
    return "\n".join(lines) + (f"\nprompts cut from the left to fit the model: {', '.join(cut)}" if cut else "")


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{option}: expected numbers, 0 or more, with commas between them, got {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _number(option: str, text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{option}: expected a number, {least} or more, got {text!r}")
    return int(text)


def _fraction(option: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise ConfigError(f"{option}: expected a number above 0 and below 1, got {text!r}")
