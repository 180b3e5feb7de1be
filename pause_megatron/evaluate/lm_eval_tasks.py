"""lm-eval's tasks, through lm-eval: its prompts, its filters, its metrics; our pauses, results and resumption."""

from __future__ import annotations

import functools
import glob
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.evaluate.journal import Record, digest
from pause_megatron.evaluate.results import Identity, ResultsFolder, Settings
from pause_megatron.files.durable import write_whole
from pause_megatron.inference import PauseGenerator

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


class Harness:
    """lm-eval with the tasks that it ships and those of a folder.

    Args:
        include_path: folder of task files (*.yaml); None: none.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such folder.
    """

    def __init__(self, include_path: str | None = None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"--include-path {include_path}: expected a folder of lm-eval task files; there is none")
        try:
            import accelerate  # noqa: F401 (lm-eval's model for transformers imports it, and does not depend on it)
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
        # Reading all that lm-eval ships takes seconds, so it waits until a task is not in the folder.
        self._own = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
        self._loaded: dict[str, dict[str, Any]] = {}

    def load(self, name: str) -> dict[str, Any]:
        """The tasks that a name stands for (a task, a group, a tag), with their records.

        Raises:
            ConfigError: unknown. DataError: the records cannot be had.
        """
        if name in self._loaded:
            return self._loaded[name]
        manager = self._manager(name)
        known = manager.all_tasks
        if name not in known:
            raise ConfigError(f"--tasks: lm-eval has no task {name!r}{nearest(name, known)}; see also --include-path")
        try:
            self._loaded[name] = dict(manager.load([name])["tasks"])
        except Exception as error:  # data set loaders raise whatever their formats' and the network's libraries raise
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
    ) -> list[Record]:
        """Evaluate a task, or a group of them, and put the results into the folder.

        Answers are kept request by request while lm-eval works, so that a killed evaluation goes on.

        Raises:
            ConfigError, DataError: as `load` and `PauseLM`; or results of something else in the folder.
        """
        tasks = self.load(name)
        identity = Identity(
            task=f"lm_eval/{name}",
            model=folder.model,
            data=_fingerprint(tasks, limit),
            settings=settings,
            decoding={"limit": limit, "versions": {task: tasks[task].VERSION for task in sorted(tasks)}},
            harness=self.version,
        )
        folder.check(identity)
        samples = folder.samples(identity)
        found = folder.finished(identity)
        if found and samples.exists():
            return found
        begun = time.perf_counter()
        store = folder.path / "lm_eval" / samples.stem
        output = self._run(generator, name, settings, store, batch_size, limit)
        # lm-eval counts neither; and seconds are those of this run alone.
        unknown = dict.fromkeys(("tokens", "cut", "positions", "forward_passes"))
        shared = {**folder.shared(identity), **unknown, "seconds": time.perf_counter() - begun}
        entries = [entry for task in output["results"] for entry in _entries(output, task, shared)]
        folder.path.joinpath("samples").mkdir(exist_ok=True)
        write_whole(samples.with_suffix(".json"), json.dumps(identity.document(), indent=2).encode() + b"\n")
        write_whole(samples, _sample_lines(output["samples"], digest(identity.document())))
        folder.add([{**entry, "asked": identity.task} for entry in entries])
        for path in store.parent.glob(f"{glob.escape(store.name)}_rank*.db"):
            path.unlink()
        return entries

    def _manager(self, name: str) -> TaskManager:
        """Who knows a task; groups may name tasks that lm-eval ships, so that they are looked for in all."""
        own = self._own is not None and name in self._own.all_subtasks
        return self._own if own else self._everything

    @functools.cached_property
    def _everything(self) -> TaskManager:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self._include_path)

    def _run(
        self, generator: PauseGenerator, name: str, settings: Settings, store: Path, batch_size: int, limit: int | None
    ) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        from pause_megatron.evaluate.lm_eval_model import PauseLM

        if settings.prefix_attention != "causal":
            raise ConfigError(f"lm_eval/{name}: expected prefix_attention causal, got {settings.prefix_attention}")
        model = PauseLM(
            generator,
            pauses=settings.pauses,
            location=settings.location,
            filler=settings.filler or "",
            batch_size=batch_size,
            quiet=not sys.stderr.isatty(),
        )
        store.parent.mkdir(exist_ok=True)
        return simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=self._manager(name),
            limit=limit,
            use_cache=str(store),
            bootstrap_iters=1000,
        )


def _fingerprint(tasks: dict[str, Any], limit: int | None) -> str:
    """Digest of the records that will be asked and of how they are asked."""
    hasher = xxhash.xxh3_128()
    for name in sorted(tasks):
        task = tasks[name]
        hasher.update(json.dumps([name, task.dump_config()], sort_keys=True, default=str).encode())
        for index, record in enumerate(task.eval_docs):
            if limit is not None and index >= limit:
                break
            hasher.update(json.dumps(record, sort_keys=True, default=str).encode())
    return f"xxh3_128:{hasher.hexdigest()}"


def _entries(output: dict[str, Any], task: str, shared: Record) -> list[Record]:
    """lm-eval's numbers of one task or group, as entries of results.json."""
    found = output["results"][task]
    sizes = output["n-samples"]
    parts = [task] if task in sizes else [part for part in output["group_subtasks"].get(task, []) if part in sizes]
    n = sum(sizes[part]["effective"] for part in parts)
    entries = []
    for key, value in found.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = found.get(f"{metric}_stderr,{name}")
        entries.append(
            {
                "task": f"lm_eval/{task}",
                "metric": _metric(metric, name),
                "primary": not entries,
                "value": float(value),
                "standard_error": float(error) if isinstance(error, (int, float)) else None,
                "n": n,
                **shared,
            }
        )
    return entries


def _metric(metric: str, name: str) -> str:
    return metric if name == "none" else f"{metric},{name}"


def _sample_lines(samples: dict[str, list[dict[str, Any]]], of: str) -> bytes:
    """One record a line, the scores of all filters in it."""
    records: dict[str, Record] = {}
    for task, of_task in samples.items():
        for sample in of_task:
            name = f"{task}/{sample['doc_id']}"
            new = {"id": name, "prediction": sample["filtered_resps"], "scores": {}}
            record = records.setdefault(name, new)
            for metric in sample["metrics"]:
                if isinstance(sample[metric], (int, float)):
                    record["scores"][_metric(metric, sample["filter"])] = float(sample[metric])
            record["of"] = of
    return "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records.values()).encode()
