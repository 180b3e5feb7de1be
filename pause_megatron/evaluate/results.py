"""The output folder of an evaluation: results.json, samples, one model, one writer.

results.json            every finished (task, metric, setting), see README.md; replaced as a whole
model.json              the model's fingerprint and the digests it was made of
samples/NAME.json       what NAME.jsonl was computed with
samples/NAME.jsonl      one record a line, in batches (journal.py)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pause_megatron.errors import DataError
from pause_megatron.evaluate.journal import Journal, Record, read_object, refuse_others
from pause_megatron.evaluate.statistics import mean
from pause_megatron.files.durable import only_writer, write_whole

VERSION = 1
HARNESS = "pause-megatron"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task was asked.

    Attributes:
        pauses: M.
        location: "append" or "prepend".
        filler: text of the token that stood in place of `<pause>`; None: pauses.
        prefix_attention: "causal" or "bidirectional".
        seed: a label of this evaluation, such as the seed of the finetuning. Answers do not depend on it.
        dtype: type of the weights: "fp32", "bf16" or "fp16".
    """

    pauses: int
    location: str = "append"
    filler: str | None = None
    prefix_attention: str = "causal"
    seed: int = 0
    dtype: str = "fp32"

    def name(self, task: str) -> str:
        """Stem of the files of a task under these settings."""
        filler = "" if self.filler is None else f"-filler-{quote(self.filler, safe='')}"
        attention = "" if self.prefix_attention == "causal" else f"-{self.prefix_attention}"
        dtype = "" if self.dtype == "fp32" else f"-{self.dtype}"
        stem = quote(task.replace("/", "."), safe="")
        return f"{stem}-m{self.pauses}-{self.location}{filler}{attention}{dtype}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that the outcomes of a task depend on.

    Attributes:
        task: its name.
        model, data: fingerprints of the model folder and of the examples.
        settings: how it was asked.
        decoding: what else decides an answer: new tokens, stop texts, metrics.
        harness: "pause-megatron", or "lm-eval VERSION".
    """

    task: str
    model: str
    data: str
    settings: Settings
    decoding: Mapping[str, Any]
    harness: str = HARNESS

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"version": VERSION, **json.loads(json.dumps(asdict(self)))}


class ResultsFolder:
    """What is written for one model.

    Args:
        path: the folder; `opened` makes it.
        model: the model's fingerprint.
        model_path: where the model lay.

    Raises:
        DataError: results.json is damaged, or of another model.
    """

    def __init__(self, path: Path, model: str, model_path: str) -> None:
        self.path = path
        self.model = model
        self.model_path = model_path
        self.entries = read_results(path) if (path / "results.json").exists() else []
        for entry in self.entries:
            if entry["model"] != model:
                raise DataError(
                    f"{path / 'results.json'}: model: expected {model} ({model_path}), got {entry['model']} "
                    f"({entry.get('model_path')}): results of another model; give another --output"
                )

    def samples(self, identity: Identity) -> Path:
        """The samples file of a task."""
        return self.path / "samples" / f"{identity.settings.name(identity.task)}.jsonl"

    def check(self, identity: Identity) -> None:
        """Check that nothing in the folder contradicts what is about to be computed.

        Raises:
            DataError: outcomes of other data or other settings under the same name.
        """
        document = identity.document()
        for entry in self.entries:
            if entry.get("asked", entry["task"]) == identity.task and all(
                entry[k] == v for k, v in document["settings"].items()
            ):
                came = {name: entry.get(name) for name in ("data", "harness")}
                refuse_others(self.path / "results.json", {name: document[name] for name in came}, came)
        beside = self.samples(identity).with_suffix(".json")
        if beside.exists():
            refuse_others(beside, document, read_object(beside))

    def journal(self, identity: Identity, order: Sequence[str]) -> Journal:
        """The samples of a task; see Journal."""
        self.check(identity)
        return Journal(self.samples(identity), identity.document(), order)

    def finished(self, identity: Identity) -> list[Record]:
        """The entries that a task of lm-eval, or a group of tasks, has put here."""
        settings = identity.document()["settings"]
        return [
            entry
            for entry in self.entries
            if entry.get("asked") == identity.task and all(entry[k] == v for k, v in settings.items())
        ]

    def add(self, entries: Sequence[Record]) -> None:
        """Put entries into results.json in place of those of the same task, metric and settings."""
        new = {_key(entry): entry for entry in entries}
        kept = [entry for entry in self.entries if _key(entry) not in new]
        self.entries = sorted([*kept, *new.values()], key=lambda entry: json.dumps(_key(entry)))
        document = {"version": VERSION, "results": self.entries}
        write_whole(self.path / "results.json", json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")

    def summarise(self, identity: Identity, records: Sequence[Record], primary: str | None) -> list[Record]:
        """The entries of a finished task: one for each metric.

        Args:
            records: outcomes of all examples.
            primary: name of the metric that the task is reported by.
        """
        costs = [record["batch"] for record in records if "batch" in record]
        shared = self.shared(identity)
        shared |= {
            "tokens": {kind: sum(record["tokens"][kind] for record in records) for kind in ("prompt", "pauses", "new")},
            "cut": sum(record["cut"] > 0 for record in records),
            "positions": sum(cost["positions"] for cost in costs),
            "forward_passes": sum(cost["forward_passes"] for cost in costs),
            "seconds": sum(cost["seconds"] for cost in costs),
        }
        entries = []
        for metric in records[0]["scores"]:
            found = mean([record["scores"][metric] for record in records])
            entry = {"task": identity.task, "metric": metric, "primary": metric == primary}
            entries.append({**entry, **asdict(found), **shared})
        return entries

    def shared(self, identity: Identity) -> Record:
        """What all entries of a task have in common."""
        return {
            **asdict(identity.settings),
            "model": identity.model,
            "model_path": self.model_path,
            "data": identity.data,
            "harness": identity.harness,
        }


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Make an output folder, and be its only writer while the body runs.

    Raises:
        DataError: it cannot be made, or another process writes to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output {path}: cannot be made ({error.strerror})") from None
    with only_writer(path / ".lock", f"the results in {path}"):
        yield path


def read_results(folder: str | Path) -> list[Record]:
    """Entries of FOLDER/results.json.

    Raises:
        DataError: it is missing, damaged or of another version.
    """
    path = Path(folder) / "results.json"
    document = read_object(path)
    if document.get("version") != VERSION:
        raise DataError(f"{path}: version: expected {VERSION}, got {document.get('version')!r}")
    entries = document.get("results")
    required = {"task", "metric", "value", "n", "model", "data", *Settings.__dataclass_fields__}
    for index, entry in enumerate(entries if isinstance(entries, list) else [None]):
        if not isinstance(entry, dict) or not required <= entry.keys():
            raise DataError(f"{path}: results[{index}]: expected an object with {', '.join(sorted(required))}")
    return entries


def _key(entry: Record) -> tuple[Any, ...]:
    """What two entries must not share. A task of lm-eval may be asked for alone and as part of a group."""
    return (
        entry["task"],
        entry["metric"],
        entry.get("asked"),
        *(entry[name] for name in Settings.__dataclass_fields__),
    )
