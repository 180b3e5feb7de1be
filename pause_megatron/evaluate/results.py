"""The output folder of an evaluation: results.json, samples, one model, one writer.

results.json            every finished (task, metric, setting), see README.md; replaced as a whole
model.json              the model's fingerprint and the digests of its files
samples/NAME.json       identity of NAME.jsonl
samples/NAME.jsonl      one record a line, in batches (journal.py)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from pause_megatron.errors import DataError
from pause_megatron.evaluate.identity import VERSION, Identity, refuse_mismatch
from pause_megatron.evaluate.journal import Journal
from pause_megatron.evaluate.statistics import interval, mean
from pause_megatron.evaluate.stored import ResultEntry, Sample, TotalCost
from pause_megatron.files.durable import only_writer, write_whole
from pause_megatron.files.typed_json import read_object


class ResultsFolder:
    """The results of one model.

    Args:
        path: The folder; `opened` makes it.
        model: Fingerprint of the model.
        model_path: Path of the model folder.

    Attributes:
        entries: The entries of results.json.

    Raises:
        DataError: results.json is damaged, or of another model.
    """

    def __init__(self, path: Path, model: str, model_path: str) -> None:
        self.path = path
        self.model = model
        self.model_path = model_path
        self.entries = read_results(path) if (path / "results.json").exists() else []
        for entry in self.entries:
            if entry.model != model:
                raise DataError(
                    f"{path / 'results.json'}: model: expected {model} ({model_path}), got {entry.model} "
                    f"({entry.model_path}): results of another model; give another --output"
                )

    def samples(self, identity: Identity) -> Path:
        """Return the path of the samples file of a task."""
        return self.path / "samples" / f"{identity.settings.name(identity.task)}.jsonl"

    def check(self, identity: Identity) -> None:
        """Check that the folder holds no outcomes of other data or settings under the same name.

        Raises:
            DataError: It does.
        """
        document = identity.document()
        for entry in self.entries:
            if (entry.asked or entry.task) == identity.task and entry.settings == identity.settings:
                stored = {"data": entry.data, "harness": entry.harness}
                refuse_mismatch(self.path / "results.json", {name: document[name] for name in stored}, stored)
        identity_file = self.samples(identity).with_suffix(".json")
        if identity_file.exists():
            refuse_mismatch(identity_file, document, read_object(identity_file))

    def journal(self, identity: Identity, order: Sequence[str]) -> Journal:
        """Open the samples of a task for appending; see `Journal`.

        Args:
            identity: What is evaluated.
            order: Id of every record, in the order in which they will be appended.
        """
        self.check(identity)
        return Journal(self.samples(identity), identity.document(), order)

    def finished(self, identity: Identity) -> list[ResultEntry]:
        """Return the entries of a finished lm-eval task, or group of tasks; [] if it is not finished."""
        return [entry for entry in self.entries if entry.asked == identity.task and entry.settings == identity.settings]

    def add(self, entries: Sequence[ResultEntry]) -> None:
        """Write entries to results.json; they replace those of the same task, metric and settings."""
        new = {entry.key: entry for entry in entries}
        kept = [entry for entry in self.entries if entry.key not in new]
        self.entries = sorted([*kept, *new.values()], key=lambda entry: json.dumps(entry.key))
        write_whole(self.path / "results.json", dump_results(self.entries))

    def summarise(
        self,
        identity: Identity,
        samples: list[Sample],
        primary: str | None,
        groups: Mapping[str, str] = MappingProxyType({}),
    ) -> list[ResultEntry]:
        """Return the entries of a finished task, one for each metric.

        Args:
            identity: What was evaluated.
            samples: Outcomes of all examples.
            primary: Name of the task's primary metric.
            groups: Group of each example by its id, where samples of an earlier version have none.
        """
        cost = TotalCost.of_samples(samples)
        of_each = [sample.group or groups.get(sample.id, "") for sample in samples]
        scores = {metric: [sample.scores[metric] for sample in samples] for metric in samples[0].scores}
        return [
            ResultEntry.of(
                identity,
                self.model_path,
                metric,
                mean(values, of_each),
                interval(values, of_each),
                cost,
                primary=metric == primary,
            )
            for metric, values in scores.items()
        ]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Make an output folder and hold its lock while the body runs.

    Raises:
        DataError: The folder cannot be made, or another process holds the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output {path}: cannot be made ({error.strerror})") from None
    with only_writer(path / ".lock", f"the results in {path}"):
        yield path


def dump_results(entries: Sequence[ResultEntry]) -> bytes:
    """Return the content of results.json."""
    document = {"version": VERSION, "results": [entry.as_json() for entry in entries]}
    return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def read_results(folder: str | Path) -> list[ResultEntry]:
    """Return the entries of FOLDER/results.json.

    Raises:
        DataError: The file is missing, damaged or of another version.
    """
    path = Path(folder) / "results.json"
    document = read_object(path)
    if document.get("version") != VERSION:
        raise DataError(f"{path}: version: expected {VERSION}, got {document.get('version')!r}")
    entries = document.get("results")
    if not isinstance(entries, list):
        raise DataError(f"{path}: results: expected a list, got {entries!r}")
    return [ResultEntry.parse(entry, f"{path}: results[{index}]") for index, entry in enumerate(entries)]
