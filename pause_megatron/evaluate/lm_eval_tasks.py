"""Evaluation of lm-eval's tasks with its prompts, filters and metrics, and with this project's pauses and results."""

from __future__ import annotations

import functools
import glob
import json
import logging
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import JsonValue

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.evaluate.identity import HarnessDecoding, Identity, Settings, digest
from pause_megatron.evaluate.journal import dump_samples
from pause_megatron.evaluate.results import ResultsFolder
from pause_megatron.evaluate.statistics import Mean, interval_of
from pause_megatron.evaluate.stored import ResultEntry, Sample, TotalCost
from pause_megatron.files.digest import Hasher
from pause_megatron.files.durable import write_whole
from pause_megatron.inference import DecodingPauses, PauseGenerator
from pause_megatron.seeds import address_digest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class Harness:
    """lm-eval with its own tasks and those of a folder.

    Args:
        include_path: Folder of task files (*.yaml); None for none.

    Attributes:
        version: "lm-eval VERSION", as results record it.

    Raises:
        ConfigError: lm-eval is not installed, or the folder does not exist.
    """

    def __init__(self, include_path: str | None = None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"--include-path {include_path}: expected a folder of lm-eval task files, got none")
        try:
            import accelerate  # noqa: F401 (lm-eval's HFLM imports it, but lm-eval does not depend on it)
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(
                f"tasks of lm-eval need lm-eval and accelerate, which cannot be imported here ({error}): "
                f"pip install 'pause-megatron[evaluate]'"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.version = f"lm-eval {lm_eval.__version__}"
        self._include_path = include_path
        # Indexing lm-eval's own tasks takes seconds, so it is done only for a task that is not in the folder.
        self._included = (
            None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
        )
        self._loaded: dict[str, dict[str, Any]] = {}

    def load(self, name: str) -> dict[str, Any]:
        """Return the lm-eval task objects of a name (a task, a group or a tag), with their records.

        Raises:
            ConfigError: lm-eval has no such task.
            DataError: The records cannot be loaded.
        """
        if name in self._loaded:
            return self._loaded[name]
        manager = self._manager(name)
        known = manager.all_tasks
        if name not in known:
            raise ConfigError(
                f"--tasks: expected a task of lm-eval or --include-path, got {name!r}{nearest(name, known)}"
            )
        try:
            self._loaded[name] = dict(manager.load([name])["tasks"])
        except ModuleNotFoundError as error:
            raise ConfigError(f"lm_eval/{name}: {_needed(error)}") from None
        except Exception as error:  # dataset loaders raise errors of many libraries
            lines = str(error).strip().splitlines() or [""]
            raise DataError(
                f"lm_eval/{name}: its records cannot be loaded ({type(error).__name__}: {lines[0]}). Without network, "
                f"describe the task in a file of --include-path, with dataset_path: json and data_files"
            ) from None
        return self._loaded[name]

    def evaluate(
        self,
        generator: PauseGenerator,
        name: str,
        settings: Settings,
        folder: ResultsFolder,
        *,
        batch_size: int,
        limit: int | None,
    ) -> list[ResultEntry]:
        """Evaluate a task or a group of tasks, and add the results to the folder.

        Answers are cached request by request, so that a killed evaluation resumes.

        Args:
            generator: The model.
            name: lm-eval's name of the task or group.
            settings: Pauses and dtype.
            folder: Output folder; this process must hold its lock.
            batch_size: Rows of a forward pass.
            limit: Number of records of each task, a random sample; None for all. lm-eval knows no groups of records.

        Returns:
            The entries of results.json.

        Raises:
            ConfigError: As `load` and `PauseLM`.
            DataError: The records cannot be loaded, or the folder holds results of something else.
        """
        tasks = self.load(name)
        chosen = _sampled(tasks, limit)
        identity = Identity(
            task=f"lm_eval/{name}",
            model=folder.model,
            data=_fingerprint(tasks, chosen),
            settings=settings,
            decoding=HarnessDecoding(limit=limit, versions={task: tasks[task].VERSION for task in sorted(tasks)}),
            harness=self.version,
        )
        folder.check(identity)
        samples = folder.samples(identity)
        found = folder.finished(identity)
        if found and samples.exists():
            return found
        start = time.perf_counter()
        cache = folder.path / "lm_eval" / samples.stem
        output = self._run(generator, name, settings, cache, batch_size, chosen)
        entries = _entries(output, identity, folder.model_path, time.perf_counter() - start)
        folder.path.joinpath("samples").mkdir(exist_ok=True)
        write_whole(samples.with_suffix(".json"), json.dumps(identity.document(), indent=2).encode() + b"\n")
        write_whole(samples, dump_samples(_samples(output["samples"], digest(identity.document()))))
        folder.add(entries)
        for path in cache.parent.glob(f"{glob.escape(cache.name)}_rank*.db"):
            path.unlink()
        return entries

    def _manager(self, name: str) -> TaskManager:
        """Return the task manager of a name. Groups may name lm-eval's own tasks, so they need the full index."""
        if self._included is not None and name in self._included.all_subtasks:
            return self._included
        return self._all_tasks

    @functools.cached_property
    def _all_tasks(self) -> TaskManager:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self._include_path)

    def _run(
        self,
        generator: PauseGenerator,
        name: str,
        settings: Settings,
        cache: Path,
        batch_size: int,
        chosen: dict[str, list[int]],
    ) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        from pause_megatron.evaluate.lm_eval_model import PauseLM

        if settings.prefix_attention != "causal":
            raise ConfigError(f"lm_eval/{name}: expected prefix_attention causal, got {settings.prefix_attention}")
        if settings.decoding:
            raise ConfigError(f"lm_eval/{name}: expected no pauses within answers, got {settings.decoding}")
        model = PauseLM(
            generator,
            pauses=settings.pauses,
            location=settings.location,
            filler=settings.filler or "",
            batch_size=batch_size,
            quiet=not sys.stderr.isatty(),
            decoding=DecodingPauses(),
        )
        cache.parent.mkdir(exist_ok=True)
        return simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=self._manager(name),
            samples=chosen or None,
            use_cache=str(cache),
            bootstrap_iters=1000,
        )


def _needed(error: ModuleNotFoundError) -> str:
    """Return how to install a package that a task of lm-eval needs; lm-eval's extras list it."""
    wanted = (error.name or "").partition(".")[0].replace("_", "-")
    if not wanted:  # raised by lm-eval itself, with its own advice
        return " ".join(str(error).split())
    for requirement in metadata.requires("lm-eval") or ():
        package = re.match(r"[A-Za-z0-9_.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if package and extra and package[0].replace("_", "-").lower() == wanted.lower():
            return f"needs the package {wanted}, which is not installed: pip install 'lm-eval[{extra[1]}]'"
    return f"needs the package {wanted}, which is not installed: pip install '{wanted}'"


def _sampled(tasks: dict[str, Any], limit: int | None) -> dict[str, list[int]]:
    """Return the numbers of a random sample of the records of each task that has more than `limit`, ascending."""
    chosen = {}
    for name, task in tasks.items():
        count = len(task.eval_docs)
        if limit is not None and limit < count:
            draws = sorted((address_digest("lm_eval", name, number, size=8), number) for number in range(count))
            chosen[name] = sorted(number for _, number in draws[:limit])
    return chosen


def _fingerprint(tasks: dict[str, Any], chosen: dict[str, list[int]]) -> str:
    """Return the digest of the tasks' configurations and of the records that will be scored."""
    hasher = Hasher()
    for name in sorted(tasks):
        task = tasks[name]
        hasher.update(json.dumps([name, task.dump_config()], sort_keys=True, default=str).encode())
        records = task.eval_docs
        for record in (records[number] for number in chosen[name]) if name in chosen else records:
            hasher.update(json.dumps(record, sort_keys=True, default=str).encode())
    return hasher.digest


def _entries(output: dict[str, Any], identity: Identity, model_path: str, seconds: float) -> list[ResultEntry]:
    """Return the entries of results.json.

    Args:
        output: What `simple_evaluate` returned.
        identity: What was evaluated.
        model_path: Path of the model folder.
        seconds: Time of this run, seconds. lm-eval counts neither tokens nor passes.
    """
    cost = TotalCost(tokens=None, cut=None, positions=None, forward_passes=None, seconds=seconds)
    return [
        ResultEntry.of(
            identity,
            model_path,
            score.metric,
            score.mean,
            interval_of(score.mean),
            cost,
            primary=score.primary,
            task=f"lm_eval/{task}",
            asked=identity.task,
        )
        for task in output["results"]
        for score in _scores(output, task)
    ]


class _Score(NamedTuple):
    """One of lm-eval's numbers for a task or group."""

    metric: str
    mean: Mean
    primary: bool


def _scores(output: dict[str, Any], task: str) -> list[_Score]:
    """Return lm-eval's numbers of one task or group; the first one counts as primary."""
    found = output["results"][task]
    sizes = output["n-samples"]
    parts = [task] if task in sizes else [part for part in output["group_subtasks"].get(task, []) if part in sizes]
    n = sum(sizes[part]["effective"] for part in parts)
    scores: list[_Score] = []
    for key, value in found.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{metric}_stderr,{name}")
        mean = Mean(float(value), float(error) if isinstance(error, (int, float)) else None, n)
        scores.append(_Score(_metric(metric, name), mean, primary=not scores))
    return scores


def _metric(metric: str, name: str) -> str:
    return metric if name == "none" else f"{metric},{name}"


def _samples(output: dict[str, list[dict[str, Any]]], of: str) -> list[Sample]:
    """Return one sample a record, with the scores of all filters.

    Args:
        output: lm-eval's samples of each task; a record occurs once for each filter.
        of: Digest of the evaluation's identity.
    """
    scores: dict[str, dict[str, float]] = {}
    predictions: dict[str, JsonValue] = {}
    for task, samples in output.items():
        for sample in samples:
            name = f"{task}/{sample['doc_id']}"
            # Through JSON, because responses hold tuples and may hold objects of lm-eval.
            predictions.setdefault(name, json.loads(json.dumps(sample["filtered_resps"], default=str)))
            of_record = scores.setdefault(name, {})
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (int, float)):
                    of_record[_metric(metric, sample["filter"])] = float(sample[metric])
    return [Sample(id=name, prediction=predictions[name], scores=scores[name], of=of) for name in scores]
