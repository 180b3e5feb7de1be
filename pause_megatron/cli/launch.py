"""`pause-megatron launch`: write or submit the SLURM job of a run, after checks."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pause_megatron.cli import at_least, note
from pause_megatron.errors import ConfigError, PauseMegatronError
from pause_megatron.files.paths import path_option

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pause_megatron.config.schema import ResolvedConfig
    from pause_megatron.slurm.script import TrainingJob
    from pause_megatron.slurm.site import Partition

HELP = "write or submit the SLURM job of a run, after checks"

# Time until the first step: imports, process groups, index caches.
_START_UP_SECONDS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "examples:\n"
        "  pause-megatron launch --recipe c4-1b-pause --nodes 16 --time 24:00:00 data.prefix=c4/en > job.sbatch\n"
        "  pause-megatron launch --recipe c4-1b-pause --nodes 16 --time 24:00:00 data.prefix=c4/en --submit"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help="a recipe that ships, for pretraining or finetuning")
    source.add_argument(
        "--config", type=path_option, metavar="FILE", help="a YAML file, for example a run's own config.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override configuration keys: for example optim.lr=3e-4"
    )
    job = parser.add_argument_group("the job")
    job.add_argument("--nodes", type=at_least(1), default=1, metavar="N", help="number of nodes (default: 1)")
    job.add_argument("--gpus-per-node", type=at_least(0), default=8, metavar="N", help="default: 8; 0: on CPUs")
    job.add_argument("--tasks-per-node", type=at_least(1), metavar="N", help="ranks per node; default: one per GPU")
    job.add_argument(
        "--cpus-per-task",
        type=at_least(1),
        metavar="N",
        help="CPUs of a rank; default: all of a node for a job with all its GPUs, else in proportion to its GPUs",
    )
    job.add_argument(
        "--mem",
        metavar="SIZE",
        help="memory of a node, 0: all; default: in proportion, as the CPUs",
    )
    job.add_argument(
        "--exclusive",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="no other job on the nodes; default: only for a job that uses all GPUs of its nodes",
    )
    job.add_argument("--partition", metavar="P", help="default: the site's")
    job.add_argument("--time", metavar="T", help="time limit, for example 24:00:00; default: the partition's")
    job.add_argument("--name", metavar="NAME", help="default: the verb")
    job.add_argument("--sbatch", action="append", default=[], metavar="LINE", help="a further #SBATCH line; repeatable")
    job.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="GPU model, as in plan; the run must fit (default: h100)",
    )
    start = parser.add_argument_group("how ranks start")
    start.add_argument(
        "--launcher",
        default="srun",
        metavar="HOW",
        help="srun: a task per rank (default); torchrun: a task per node; deepspeed: DeepSpeed's launcher over srun",
    )
    start.add_argument(
        "--hostfile",
        type=path_option,
        metavar="FILE",
        help="DeepSpeed hostfile, checked against the job",
    )
    start.add_argument("--container", type=_container, metavar="KIND:IMAGE", help="pyxis:IMAGE or apptainer:IMAGE")
    start.add_argument(
        "--template", type=path_option, metavar="FILE", help="the site's own pause_megatron/slurm/job.sbatch"
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--dry-run", action="store_true", help="check, print the script, and stop (the default)")
    end.add_argument("--submit", action="store_true", help="check, then submit the script with sbatch")


def run(args: argparse.Namespace) -> int:
    """Check the job, then print its script or submit it.

    Args:
        args: Parsed options.

    Raises:
        ConfigError: The configuration, the job or the site contradict each other, or the run does not fit on a GPU.
    """
    from pause_megatron.config import batch_plan, deepspeed_config, load
    from pause_megatron.slurm import commands
    from pause_megatron.slurm.script import TEMPLATE, render_training

    if args.submit and not commands.installed():
        raise ConfigError("--submit: expected sbatch on PATH, got none; leave --submit out to write the script")
    config = load(args.config, recipe=args.recipe, overrides=args.overrides, notify=note)
    site = _site(args)
    job = _job(args, config, site)
    plan = batch_plan(config, job.nodes * job.tasks_per_node)
    deepspeed_config(config, data_parallel=plan.data_parallel)
    _check_code(args, config)
    _check_site(args, job, config, site)
    if job.gpus_per_node:
        _check_plan(args.gpu, job, config)
    for warning in _warnings(job, config):
        log.warning(warning)
    script = render_training(job, Path(args.template) if args.template else TEMPLATE)
    if not args.submit:
        print(script, end="")
        return 0
    number = commands.submit_script(script)
    ranks, nodes = ("rank" if plan.world_size == 1 else "ranks"), ("node" if job.nodes == 1 else "nodes")
    log.info(f"job {number}: {plan.world_size} {ranks} on {job.nodes} {nodes}, run folder {config.run.dir}")
    return 0


def _job(args: argparse.Namespace, config: ResolvedConfig, site: dict[str, Partition] | None) -> TrainingJob:
    from pause_megatron.slurm.script import SIGNAL_SECONDS, TrainingJob
    from pause_megatron.slurm.site import find_partition, share_of_node

    tasks = args.tasks_per_node or args.gpus_per_node
    if not tasks:
        raise ConfigError("--tasks-per-node: expected the ranks per node, as --gpus-per-node is 0; got none")
    if args.gpus_per_node and tasks != args.gpus_per_node:
        raise ConfigError(f"--tasks-per-node: expected a rank for each of {args.gpus_per_node} GPUs, got {tasks}")
    partition = None if site is None else find_partition(site, args.partition)
    share = share_of_node(partition, tasks=tasks, gpus=args.gpus_per_node, exclusive=args.exclusive)
    source = ["--recipe", args.recipe] if args.recipe else ["--config", args.config] if args.config else []
    return TrainingJob(
        verb="pretrain" if config.task.name is None else "finetune",
        arguments=(*source, *_whole_paths(args.overrides, config)),
        nodes=args.nodes,
        tasks_per_node=tasks,
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task or share.cpus_per_task,
        mem=share.mem if args.mem is None else args.mem,
        exclusive=share.exclusive,
        launcher=args.launcher,
        name=args.name,
        partition=args.partition,
        time=args.time,
        container=args.container,
        signal_seconds=config.checkpoint.before_end_seconds or SIGNAL_SECONDS,
        lines=tuple(args.sbatch),
    )


def _check_code(args: argparse.Namespace, config: ResolvedConfig) -> None:
    """Check that the user's own code can be used; a container may have other code than this machine."""
    from pause_megatron.cli.support.user_code import check_user_code

    try:
        check_user_code(config)
    except ConfigError as error:
        if not args.container:
            raise
        log.warning(f"on this machine, outside the container: {error}")


def _whole_paths(overrides: Sequence[str], config: ResolvedConfig) -> list[str]:
    """Return overrides with `~` expanded, which is another folder in a container."""
    from pause_megatron.experiment.models import as_overrides

    words: list[str] = []
    for override in overrides:
        section, _, name = override.partition("=")[0].strip().partition(".")
        value = config.model_dump(by_alias=True)[section].get(name)
        expanded = value is not None and "~" in override and not isinstance(value, (int, float))
        words += as_overrides({f"{section}.{name}": value}) if expanded else [override]
    return words


def _check_time(seconds: int | None, named: str, config: ResolvedConfig) -> None:
    """Check that a time limit leaves room for the start, a step, and the save before the end.

    Args:
        seconds: Time limit; None for no limit.
        named: Name of the limit in the message.
        config: Resolved configuration.
    """
    needed = config.checkpoint.before_end_seconds + _START_UP_SECONDS
    if seconds is not None and seconds < needed:
        raise ConfigError(
            f"{named}: expected at least {needed} s: {_START_UP_SECONDS} s until the first step, and "
            f"checkpoint.before_end_seconds={config.checkpoint.before_end_seconds} for the last step and its save"
        )


def _check_plan(gpu: str, job: TrainingJob, config: ResolvedConfig) -> None:
    """Check with the arithmetic of `pause-megatron plan` that the run fits, and that its last save ends in time."""
    from pause_megatron.cli.support.dry_run import text_vocabulary
    from pause_megatron.plan import Cluster, gpu_named, make_plan
    from pause_megatron.plan.report import needed, remedy_lines

    cluster = Cluster(gpu_named(gpu), job.nodes, job.gpus_per_node)
    plan = make_plan(config, cluster, text_size=text_vocabulary(config, None)[0])
    size = f"{needed(plan)} on {cluster.gpu.name}"
    if not plan.fits:
        remedies = "\n".join(remedy_lines(plan))
        raise ConfigError(f"the run does not fit: {size}. Any of these would:\n{remedies}")
    seconds = plan.time.seconds + plan.saving.seconds
    if 0 < config.checkpoint.before_end_seconds < seconds:
        raise ConfigError(
            f"checkpoint.before_end_seconds={config.checkpoint.before_end_seconds}: expected at least {seconds:.0f}, "
            f"for a step of {plan.time.seconds:.0f} s and a save of {plan.saving.seconds:.0f} s (pause-megatron plan)"
        )
    log.info(f"fits: {size} (details: pause-megatron plan)")


def _site(args: argparse.Namespace) -> dict[str, Partition] | None:
    """Return the partitions that sinfo reports; None where SLURM is not installed."""
    from pause_megatron.slurm.site import partitions

    try:
        return partitions()
    except PauseMegatronError as error:
        if args.submit:
            raise PauseMegatronError(f"--submit: SLURM does not answer, nothing was submitted. {error}") from None
        first = str(error).splitlines()[0]
        log.info(f"the site is not checked (partition, its GPUs, CPUs, memory, nodes and time limit): {first}")
        return None


def _check_site(
    args: argparse.Namespace, job: TrainingJob, config: ResolvedConfig, site: dict[str, Partition] | None
) -> None:
    """Check the time limit and the hostfile and, on a cluster, the job against its partition."""
    from pause_megatron.slurm import site as slurm_site

    seconds = slurm_site.seconds_of(job.time) if job.time else None
    memory = slurm_site.megabytes_of(job.mem) if job.mem else 0
    _check_time(seconds, f"--time {job.time}", config)
    if args.hostfile:
        if job.launcher != "deepspeed":
            raise ConfigError(f"--hostfile: belongs to --launcher deepspeed; {job.launcher} needs none")
        slurm_site.check_hostfile(Path(args.hostfile), nodes=job.nodes, tasks_per_node=job.tasks_per_node)
    if site is None:
        return
    partition = slurm_site.find_partition(site, job.partition)
    cpus_per_node = (job.cpus_per_task or 1) * job.tasks_per_node
    request = slurm_site.Request(job.nodes, job.gpus_per_node, cpus_per_node, memory, seconds)
    slurm_site.check_partition(partition, request)
    if job.time is None:
        named = f"--time: not given, {partition.default_seconds} s by default in partition {partition.name}"
        _check_time(partition.default_seconds, named, config)


def _warnings(job: TrainingJob, config: ResolvedConfig) -> list[str]:
    from pause_megatron.cli.support.dry_run import missing_corpora

    tensor = config.parallel.tensor
    warnings: list[str] = []
    if job.tasks_per_node % tensor:
        warnings.append(
            f"parallel.tensor={tensor} does not divide the {job.tasks_per_node} ranks of a node: tensor-parallel "
            "ranks on two nodes communicate over the network in every layer"
        )
    if not config.checkpoint.every:
        warnings.append("checkpoint.every=0: a failing node loses everything since the last stop")
    for key, path in missing_corpora(config):
        kind = "side array" if key == "data.side" else "corpus"
        warnings.append(f"{key}: no {kind} at {path} on this machine")
    if config.task.scores is not None and not Path(config.task.scores).is_file():
        warnings.append(f"task.scores: no file at {config.task.scores} on this machine")
    return warnings


def _container(text: str) -> str:
    kind, colon, image = text.partition(":")
    return kind + colon + path_option(image) if image.startswith("~") else path_option(text)
