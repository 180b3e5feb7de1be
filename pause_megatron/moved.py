"""Aliases of modules at their earlier names: they work until 0.2, with a warning that names the new module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_PACKAGE = __name__.rpartition(".")[0]

MOVED = {
    "data.documents": "data.text.documents",
    "data.shard_file": "data.text.shard_file",
    "data.sources": "data.text.sources",
    "data.hub": "data.text.hub",
    "data.malformed_limit": "data.text.malformed_limit",
    "data.tokenizer": "data.tokenizer.tokenizer",
    "data.tokenizer_backends": "data.tokenizer.backends",
    "data.tokenizer_companions": "data.tokenizer.companions",
    "data.train_tokenizer": "data.tokenizer.train",
    "data.continuation": "data.tokenizer.continuation",
    "data.pause_tokenizer": "data.tokenizer.pause_tokenizer",
    "data.sentencepiece_proto": "data.tokenizer.fast.sentencepiece_proto",
    "data.document_cuts": "data.tokenizer.fast.document_cuts",
    "data.gigatoken_documents": "data.tokenizer.fast.gigatoken_documents",
    "data.encoders": "data.tokenizer.fast.encoders",
    "data.manifest": "data.corpus.manifest",
    "data.indexed": "data.corpus.index_file",
    "data.corpus": "data.corpus.corpus",
    "data.corpora": "data.corpus.corpora",
    "data.verify": "data.corpus.verify",
    "data.first_use": "data.corpus.first_use",
    "data.adopt": "data.adopt.run",
    "data.adopt_scan": "data.adopt.scan",
    "data.adopt_tokenizer": "data.adopt.tokenizer_check",
    "data.prepare": "data.prepare.run",
    "data.prepare_shard": "data.prepare.shard",
    "data.prepare_pool": "data.prepare.pool",
    "data.prepare_joined": "data.prepare.joined",
    "data.prepare_merge": "data.prepare.publish",
    "data.pause": "data.windows.pause",
    "data.boundaries": "data.windows.boundaries",
    "data.dataset": "data.windows.dataset",
    "data.build": "data.windows.build",
    "data.inspection": "data.windows.inspection",
    "data.model_rows": "data.windows.model_rows",
    "data.index_cache": "data.windows.index_cache",
    "data.split_text": "data.windows.split_text",
    "data.extension": "data.windows.extension",
    "data.stream_documents": "data.stream.documents",
    "data.stream": "data.stream.windows",
    "data.stream_server": "data.stream.server",
    "data.examples": "data.supervised.examples",
    "data.packing": "data.supervised.packing",
    "data.supervised": "data.supervised.windows",
    "data.batch": "data.batches.batch",
    "data.sampler": "data.batches.sampler",
    "data.loader": "data.batches.loader",
    "train.start": "train.start.start",
    "train.initial": "train.start.initial_weights",
    "train.resume": "train.start.resume",
    "train.start_over": "train.start.start_over",
    "train.extension": "train.start.extension",
    "train.inputs": "train.inputs.inputs",
    "train.task_data": "train.inputs.task_data",
    "train.streaming": "train.inputs.streaming",
    "train.cache_folder": "train.inputs.cache_folder",
    "train.metrics_file": "train.logs.metrics_file",
    "train.tensorboard": "train.logs.tensorboard",
    "train.appending": "train.logs.appending",
    "train.monitoring": "train.logs.monitoring",
    "train.signals": "train.guards.signals",
    "train.watch": "train.guards.watch",
    "train.ownership": "train.guards.ownership",
    "train.same_run": "train.guards.same_run",
    "tasks.read": "tasks.examples",
    "tasks.imports": "config.user_code",
    "tasks.declared": "tasks.yaml_task",
    "tasks.metrics": "tasks.metrics.registry",
    "tasks.choice_metrics": "tasks.metrics.choice",
    "tasks.number_metrics": "tasks.metrics.number",
    "tasks.text_metrics": "tasks.metrics.text",
    "tasks.made": "tasks.synthetic.base",
    "tasks.codewords": "tasks.synthetic.codewords",
    "tasks.counting": "tasks.synthetic.counting",
    "cli.probes": "cli.support.probes",
    "cli.dry_run": "cli.support.dry_run",
    "cli.installed": "cli.support.installed",
    "cli.inspect_report": "cli.support.inspect_report",
    "cli.prepare_progress": "cli.support.prepare_progress",
    "cli.exported_model": "cli.support.exported_model",
    "cli.inspect_figure": "cli.support.inspect_figure",
    "cli.packages": "cli.support.packages",
    "cli.finding": "cli.support.finding",
    "hf.appearing": "hf.atomic_dir",
    "config.initial": "config.model_from",
    "config.plan": "config.batching",
    "distributed.meeting": "distributed.rendezvous",
    "model.spans": "model.variable_length",
    "durable": "files.durable",
    "holding": "files.locks",
    "paths": "files.paths",
    "lines": "files.lines",
    "metrics_lines": "files.metrics_lines",
    "output": "terminal.output",
    "byte_progress": "terminal.progress",
    "processes": "host.processes",
    "launcher": "host.launcher",
    "launcher_search": "host.launcher_search",
    "job_step": "host.job_step",
}
"""Earlier module names -> current names, both within the package."""


def _renamed(name: str) -> str | None:
    new = MOVED.get(name.removeprefix(f"{_PACKAGE}."))
    return None if new is None else f"{_PACKAGE}.{new}"


class _Alias:
    """A loader that returns the module of the new name."""

    def __init__(self, new: str) -> None:
        self._new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has set that of the old name


class MovedModules:
    """A finder for `sys.meta_path`. It is the last one, so that it gets only names without a module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a moved module under its new name, with a FutureWarning; return None for every other name.

        Args:
            fullname: Name of the module.
            path: Not used.
            target: Not used.
        """
        if not fullname.startswith(f"{_PACKAGE}.") or (new := _renamed(fullname)) is None:
            return None
        _warn(fullname, new)
        return ModuleSpec(fullname, _Alias(new))  # type: ignore[arg-type]  # a loader by its methods (PEP 451)


def install() -> None:
    """Install the finder; a second call does nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())


def forward(package: str) -> Callable[[str], object]:
    """Make the `__getattr__` of a package that was a module; it looks names up in the moved module.

    Args:
        package: Name of the package.
    """

    def __getattr__(name: str) -> object:
        new = _renamed(package)
        # importlib and inspect look up dunder names; `from PACKAGE import MODULE` looks up MODULE, and imports it next.
        if name.startswith("__") or new is None or importlib.util.find_spec(f"{package}.{name}") is not None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(new), name)
        except AttributeError:
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        _warn(f"{package}.{name}", f"{new}.{name}")
        return value

    return __getattr__


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name works until 0.2", FutureWarning, stacklevel=3)
