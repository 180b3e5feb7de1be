"""`pause-megatron experiment`: run a grid, show the state of its cells, and write its report."""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pause_megatron.cli import at_least
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import expanded, path_option

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pause_megatron.experiment.execute import Stop
    from pause_megatron.experiment.grid import CellGraph
    from pause_megatron.experiment.schema import Grid

HELP = "run a grid of pretraining, finetuning and evaluation, and compare the results with the paper's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    from pause_megatron.experiment.load import recipe_names

    parser.epilog = (
        "examples:\n"
        "  pause-megatron experiment run --recipe tiny data.prefix=runs/quickstart/english --task-path data/\n"
        "  pause-megatron experiment status runs/experiments/tiny\n"
        "  pause-megatron experiment report runs/experiments/tiny --output report/\n"
        "  pause-megatron experiment diff DIR evaluate-StdPT-piqa-m10-s1@0 evaluate-StdPT-piqa-m10-s1@10\n"
        "  pause-megatron experiment declare --config mine.yaml --output declared.yaml --question 'Do pauses help?'"
    )
    parser.add_argument(
        "action",
        choices=("run", "declare", "status", "report", "diff", "cell"),
        help="declare: write the runs of a grid to a file for its key 'declared'; diff: answers that differ between "
        "two evaluations; cell: one cell, as a job runs it",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="status, report: DIR; diff: DIR CELL CELL, each the beginning of an evaluation's folder in DIR/cells, "
        "with @M for M pauses at inference; run, declare: KEY=VALUE overrides",
    )
    parser.add_argument("--question", default="", metavar="TEXT", help="declare: what the experiment decides, in words")
    parser.add_argument(
        "--examples", type=at_least(0), default=5, metavar="N", help="diff: examples of each direction (default: 5)"
    )
    grid = parser.add_argument_group("run, declare: grid")
    grid.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipe_names())}")
    grid.add_argument("--config", type=path_option, metavar="FILE", help="a grid file, for example DIR/grid.yaml")
    grid.add_argument(
        "--task-path",
        type=path_option,
        metavar="ROOT",
        help="folder with a folder of records per task (data.tasks); report, diff: for prompts (default: as evaluated)",
    )
    grid.add_argument(
        "--output",
        type=path_option,
        metavar="DIR",
        help="default: runs/experiments/NAME; report: default DIR/report; declare: the file",
    )
    grid.add_argument("--dry-run", action="store_true", help="list cells, steps, FLOPs and order, and stop")
    local = parser.add_argument_group("run: local execution")
    local.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="cells at a time (default: 1)")
    local.add_argument(
        "--ranks", type=at_least(1), default=1, metavar="R", help="ranks of a training cell (default: 1)"
    )
    slurm = parser.add_argument_group("run: SLURM")
    slurm.add_argument("--slurm", action="store_true", help="submit a job per cell, with dependencies, and return")
    slurm.add_argument("--partition", metavar="P", help="partition")
    slurm.add_argument("--time", metavar="T", help="time limit of a job, for example 4:00:00")
    slurm.add_argument(
        "--nodes", type=at_least(1), default=1, metavar="N", help="nodes of a training cell (default: 1)"
    )
    slurm.add_argument("--gpus", type=at_least(1), metavar="N", help="GPUs of each task of a job")
    slurm.add_argument("--cpus", type=at_least(1), metavar="N", help="CPUs of each task; default: the site's")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="LINE", help="a further #SBATCH line; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Run the action and return the exit code."""
    actions = {
        "run": _run,
        "declare": _declare,
        "status": _status,
        "report": _report,
        "diff": _diff,
        "cell": _cell,
    }
    return actions[args.action](args)


def _run(args: argparse.Namespace) -> int:
    from pause_megatron.experiment.estimate import describe
    from pause_megatron.experiment.folder import locate_cells, write_plan
    from pause_megatron.experiment.load import grid_path
    from pause_megatron.experiment.provenance import keep_declaration, record_start
    from pause_megatron.experiment.run_local import run_local, set_threads
    from pause_megatron.files.durable import only_writer

    grid, graph = _expanded(args)
    directory = Path(args.output or f"runs/experiments/{grid.name}").resolve()
    if grid.declared and grid.data.prefix:
        _warn_of_undeclared(Path(grid.declared), graph)
    _check_code(graph)
    if args.dry_run:
        baseline = f"pretrain-{grid.variants[grid.baseline].model}"
        print(describe(list(locate_cells(directory, graph).values()), baseline))
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    with only_writer(directory / ".lock", f"the experiment {directory}"):
        keep_declaration(directory, Path(grid.declared) if grid.declared else None)
        record_start(directory, sys.argv[1:], grid_path(args.config, args.recipe))
        located = write_plan(directory, grid, graph, args.ranks)
        if args.slurm:
            from pause_megatron.experiment.slurm import JobOptions, submit

            options = JobOptions(args.partition, args.time, args.nodes, args.gpus, args.cpus, tuple(args.sbatch))
            return submit(directory, located, options)
        set_threads(args.jobs, args.ranks)
        code = run_local(located, jobs=args.jobs, stop=_stop_on_signals())
    if code == 0:
        log.info(f"next: pause-megatron experiment report {shlex.quote(str(directory))}")
    return code


def _check_code(graph: CellGraph) -> None:
    """Check that the user's own code of all cells can be used, before the first one starts."""
    from pause_megatron.cli.support.user_code import check_words

    for cell in graph.cells:
        try:
            check_words(cell.arguments)
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None


def _warn_of_undeclared(path: Path, graph: CellGraph) -> None:
    """Log how the runs of a grid differ from those declared; the report says so too, but only after the runs."""
    from pause_megatron.experiment.declared import read_declaration

    found = read_declaration(path).differences((point, point.cell.fingerprint) for point in graph.points)
    if found:
        log.warning(f"declared: {path}: {len(found)} runs differ from those declared, such as: {found[0]}")


def _expanded(args: argparse.Namespace) -> tuple[Grid, CellGraph]:
    """Return the grid with the command line's overrides, and its cells."""
    from pause_megatron.experiment.grid import expand
    from pause_megatron.experiment.inputs import assumed_inputs, read_inputs
    from pause_megatron.experiment.load import load_grid
    from pause_megatron.experiment.models import as_overrides

    overrides = list(args.words)
    if args.task_path is not None:
        overrides += as_overrides({"data.tasks": args.task_path})
    grid = load_grid(args.config, recipe=args.recipe, overrides=overrides)
    without_data = args.dry_run and not grid.data.prefix
    if without_data:
        log.info("data.prefix is not given: complete cells are not recognized, and the vocabulary size is assumed")
    return grid, expand(grid, assumed_inputs(grid) if without_data else read_inputs(grid))


def _status(args: argparse.Namespace) -> int:
    from pause_megatron.experiment.folder import counts, state_of
    from pause_megatron.experiment.slurm import job_in_queue
    from pause_megatron.experiment.stored import JobFile, PlanFile
    from pause_megatron.slurm.commands import queued_jobs

    directory = _directory(args)
    folders = [directory / "cells" / name for name in PlanFile.read(directory).cells]
    queue = queued_jobs() if any((folder / JobFile.NAME).exists() for folder in folders) else {}
    states = {folder.name: state_of(folder) for folder in folders}
    for folder in folders:
        if states[folder.name] == "waiting" and job_in_queue(folder, queue):
            states[folder.name] = "queued"
    width = max(map(len, states))
    for name, state in states.items():
        print(f"{name:{width}}  {state}")
    print(f"\n{len(states)} cells: {counts(states.values())}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from pause_megatron.experiment.report import write_report

    directory = _directory(args)
    output = Path(args.output) if args.output else directory / "report"
    for line in write_report(directory, output, args.task_path):
        print(line)
    return 0


def _declare(args: argparse.Namespace) -> int:
    from pause_megatron.experiment.declared import declare
    from pause_megatron.files.durable import write_whole

    if args.output is None:
        raise ConfigError("experiment declare: --output: expected the file to write, got none")
    _, graph = _expanded(args)
    path = Path(args.output)
    if path.exists():
        raise ConfigError(f"experiment declare: --output: expected a new file, got {path}, which exists")
    write_whole(path, declare(graph, args.question).encode())
    log.info(f"wrote {path}, {len(graph.points)} runs; commit it, and give the grid the key declared: {path}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from pause_megatron.experiment.report.flips import find_outcomes, flips, read_records
    from pause_megatron.experiment.report.pairs import diff_text

    if len(args.words) != 3:
        raise ConfigError(f"experiment diff: expected DIR CELL CELL, got {len(args.words)} words")
    directory = _folder(args.words[0], "diff")
    one, other = (find_outcomes(directory, word) for word in args.words[1:])
    for line in diff_text(flips(one, other), read_records(one, args.task_path), args.examples):
        print(line)
    return 0


def _cell(args: argparse.Namespace) -> int:
    from pause_megatron.experiment.execute import run_cell, under_srun

    folder = _directory(args)
    outcome = run_cell(folder, under_srun, _stop_on_signals())
    log.info(f"{folder.name}: {'done before' if outcome.cached else f'exit code {outcome.code}'}")
    return outcome.code


def _directory(args: argparse.Namespace) -> Path:
    """Return the folder that status, report or cell was given."""
    if len(args.words) != 1:
        raise ConfigError(f"experiment {args.action}: expected one folder, got {len(args.words)}")
    return _folder(args.words[0], args.action)


def _folder(word: str, action: str) -> Path:
    try:
        return Path(expanded(word)).resolve()
    except ValueError as error:
        raise ConfigError(f"experiment {action}: {error}") from None


def _stop_on_signals() -> Stop:
    """Return a request to stop that signals trigger; a second Ctrl-C ends this program at once."""
    from pause_megatron.experiment.execute import Stop
    from pause_megatron.terminal.output import write_from_handler

    stop = Stop()

    def request(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        write_from_handler("stopping: the running cells save and end")
        stop.request()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, request)
    return stop
