"""`pause-megatron launch`: a run as a SLURM job, checked before it waits in the queue. No torch."""

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

# Until the first step: imports, process groups, index caches.
_START_UP_SECONDS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "examples:\n"
        "  pause-megatron launch --recipe c4-1b-pause --nodes 16 --time 24:00:00 data.prefix=c4/en > job.sbatch\n"
        "  pause-megatron launch --recipe c4-1b-pause --nodes 16 --time 24:00:00 data.prefix=c4/en --submit"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help="a recipe that ships; a finetuning's makes a finetuning")
    source.add_argument(
        "--config", type=path_option, metavar="FILE", help="a YAML file, for example a run's own config.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys on top, for example optim.lr=3e-4")
    job = parser.add_argument_group("the job")
    job.add_argument("--nodes", type=at_least(1), default=1, metavar="N", help="machines (default: 1)")
    job.add_argument("--gpus-per-node", type=at_least(0), default=8, metavar="N", help="default: 8; 0: on CPUs")
    job.add_argument(
        "--tasks-per-node", type=at_least(1), metavar="N", help="ranks of a node; default: one for each GPU"
    )
    job.add_argument(
        "--cpus-per-task",
        type=at_least(1),
        metavar="N",
        help="CPUs of a rank; default: all of a node where the job takes all its GPUs, else what belongs to its GPUs",
    )
    job.add_argument("--mem", metavar="SIZE", help="memory of a node, 0: all; default: as for the CPUs")
    job.add_argument(
        "--exclusive",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="nobody else on the nodes; default: where the job takes all GPUs of them",
    )
    job.add_argument("--partition", metavar="P", help="default: the site's")
    job.add_argument("--time", metavar="T", help="time limit, for example 24:00:00; default: the partition's")
    job.add_argument("--name", metavar="NAME", help="default: the verb")
    job.add_argument("--sbatch", action="append", default=[], metavar="LINE", help="a further #SBATCH line; repeatable")
    job.add_argument(
        "--gpu", default="h100", metavar="NAME", help="kind of GPU, as in plan: the run must fit (default: h100)"
    )
    start = parser.add_argument_group("how ranks start")
    start.add_argument(
        "--launcher",
        default="srun",
        metavar="HOW",
        help="srun: a task for each rank (default); torchrun: a task for each node; deepspeed: DeepSpeed's, over srun",
    )
    start.add_argument(
        "--hostfile", type=path_option, metavar="FILE", help="DeepSpeed's: is checked against the job's nodes and ranks"
    )
    start.add_argument("--container", type=_container, metavar="KIND:IMAGE", help="pyxis:IMAGE or apptainer:IMAGE")
    start.add_argument(
        "--template", type=path_option, metavar="FILE", help="the site's own pause_megatron/slurm/job.sbatch"
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--dry-run", action="store_true", help="check, print the script, and stop (the default)")
    end.add_argument("--submit", action="store_true", help="check, and hand the script to sbatch")


def run(args: argparse.Namespace) -> int:
    """Check what can be known, then print or submit."""
    from pause_megatron.config import batch_plan, deepspeed_config, load
    from pause_megatron.slurm import commands
    from pause_megatron.slurm.script import TEMPLATE, render_training

    if args.submit and not commands.installed():
        raise ConfigError("--submit: expected sbatch on PATH, got none; leave --submit out to write the script")
    config = load(args.config, recipe=args.recipe, overrides=args.overrides, say=note)
    site = _site(args)
    job = _job(args, config, site)
    plan = batch_plan(config, job.nodes * job.tasks_per_node)
    deepspeed_config(config, data_parallel=plan.data_parallel)
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
        raise ConfigError("--tasks-per-node: expected the ranks of a node, as --gpus-per-node is 0; came none")
    if args.gpus_per_node and tasks != args.gpus_per_node:
        raise ConfigError(f"--tasks-per-node: expected a rank for each of {args.gpus_per_node} GPUs, came {tasks}")
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


def _whole_paths(overrides: Sequence[str], config: ResolvedConfig) -> list[str]:
    """Overrides with the paths that were meant here: in a container `~` is another folder."""
    from pause_megatron.experiment.models import as_overrides

    found = []
    for override in overrides:
        section, _, name = override.partition("=")[0].strip().partition(".")
        value = config.model_dump(by_alias=True)[section][name]
        meant = value is not None and "~" in override and not isinstance(value, (int, float))
        found += as_overrides({f"{section}.{name}": value}) if meant else [override]
    return found


def _check_time(seconds: int | None, named: str, config: ResolvedConfig) -> None:
    """A job must have time for its start, a step, and the save before its end.

    Args:
        seconds: its time limit; None: no limit. named: what the user calls it.
    """
    needed = config.checkpoint.before_end_seconds + _START_UP_SECONDS
    if seconds is not None and seconds < needed:
        raise ConfigError(
            f"{named}: expected at least {needed} s: {_START_UP_SECONDS} s until the first step, and "
            f"checkpoint.before_end_seconds={config.checkpoint.before_end_seconds} for the last step and its save"
        )


def _check_plan(gpu: str, job: TrainingJob, config: ResolvedConfig) -> None:
    """By the arithmetic of `pause-megatron plan`: memory of a GPU, and time for the last step and its save."""
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
    log.info(f"fits: {size} (pause-megatron plan says more)")


def _site(args: argparse.Namespace) -> dict[str, Partition] | None:
    """What sinfo knows; None where this is no cluster."""
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
    """The time limit and the hostfile; and, where this is a cluster, all that sinfo knows."""
    from pause_megatron.slurm.site import check_hostfile, check_partition, find_partition, megabytes_of, seconds_of

    seconds = seconds_of(job.time) if job.time else None
    memory = megabytes_of(job.mem) if job.mem else 0
    _check_time(seconds, f"--time {job.time}", config)
    if args.hostfile:
        if job.launcher != "deepspeed":
            raise ConfigError(f"--hostfile: belongs to --launcher deepspeed; {job.launcher} needs none")
        check_hostfile(Path(args.hostfile), nodes=job.nodes, tasks_per_node=job.tasks_per_node)
    if site is None:
        return
    check_partition(
        site,
        job.partition,
        nodes=job.nodes,
        gpus_per_node=job.gpus_per_node,
        cpus_per_node=(job.cpus_per_task or 1) * job.tasks_per_node,
        memory_mb=memory,
        seconds=seconds,
    )
    if job.time is None:
        partition = find_partition(site, job.partition)
        named = f"--time: not given, {partition.default_seconds} s by default in partition {partition.name}"
        _check_time(partition.default_seconds, named, config)


def _warnings(job: TrainingJob, config: ResolvedConfig) -> list[str]:
    from pause_megatron.cli.support.dry_run import missing_corpora

    tensor, found = config.parallel.tensor, []
    if job.tasks_per_node % tensor:
        found.append(
            f"parallel.tensor={tensor} does not divide the {job.tasks_per_node} ranks of a node: tensor-parallel ranks "
            "on two machines wait for the network in every layer"
        )
    if not config.checkpoint.every:
        found.append("checkpoint.every=0: a node that fails loses everything since the last stop")
    found += [f"{key}: no corpus at {prefix} on this machine" for key, prefix in missing_corpora(config)]
    return found


def _container(text: str) -> str:
    kind, colon, image = text.partition(":")
    return kind + colon + path_option(image) if image.startswith("~") else path_option(text)
