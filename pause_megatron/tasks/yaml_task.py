"""A task declared by a YAML file: its keys, and how its records become examples."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from pause_megatron.config.section import Section
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.tasks.few_shot import FewShot, with_shots
from pause_megatron.tasks.metrics.registry import Metric, find_metric
from pause_megatron.tasks.record_files import Dataset, file_records, find_file, hub_records
from pause_megatron.tasks.records import Record
from pause_megatron.tasks.task import Decoding, Example, FinetuneDefaults, Split
from pause_megatron.tasks.template import ANSWER, names_in, render
from pause_megatron.tasks.transforms import TRANSFORMS


class Splits(Section):
    """The dataset's names of the two splits."""

    train: str | None = Field(None, description="split for finetuning; null: none")
    eval: str = Field(description="split for evaluation")


_LONGEST_GROUP = 100


class DeclaredTask(Section):
    """A task declared by a YAML file, which gives the task its name.

    Code is executed only where `metrics` name it ('module:function', beside the file or in the working folder).

    `transform` turns a record into one or several records; without it, the record stays. Each becomes an Example. Names
    in braces in `prompt` and `target` stand for text fields, and `{answer}` in `target` for an accepted answer. Dotted
    paths (`answers.text`) lead to a text or a list of texts.
    """

    ordered: ClassVar[bool] = True  # a dataset may be sorted, so that a limit must draw a sample

    name: str = Field(min_length=1, description="the file's name without .yaml")
    kind: Literal["generate", "choice"] = Field(description="generate: decode the answer; choice: score the options")
    dataset: Dataset
    folder: str = Field(min_length=1, description="the task's folder under a folder of all tasks; default: the name")
    splits: Splits
    transform: str | None = Field(None, description="named function of tasks/transforms.py that prepares a record")
    prompt: str = Field(min_length=1, description="template of the prompt")
    target: str = Field(" {answer}", description="template of the training target, and of each choice")
    references: str | None = Field(None, description="path of the accepted answers; default: the right choice")
    choices: tuple[str, ...] = Field((), description="path of a list of options, or several paths of one each")
    gold: str | None = Field(None, description="path of the right option's index, from 0")
    group: tuple[str, ...] = Field(
        (), description="field of the record that names the text it shares with others; of several, the first not empty"
    )
    metrics: tuple[str, ...] = Field(min_length=1, description="names in METRICS, or 'module:function'")
    primary: str = Field(description="the metric that tables show")
    decoding: Decoding = Field(Decoding(max_new_tokens=1), description="needed by metrics that read a decoded answer")
    few_shot: FewShot | None = Field(None, description="solved examples before each prompt; null: none")
    finetune: FinetuneDefaults = FinetuneDefaults()
    _found_metrics: dict[str, Metric] = PrivateAttr(default_factory=dict)  # two files may have modules of one name

    @field_validator("choices", "group", "metrics", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("transform")
    @classmethod
    def _known_transform(cls, name: str | None) -> str | None:
        if name is not None and name not in TRANSFORMS:
            raise ValueError(f"expected one of {', '.join(TRANSFORMS)}, got {name!r}{nearest(name, TRANSFORMS)}")
        return name

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for name in names:
            try:
                find_metric(name, (info.context or {}).get("folders", ()))
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return names

    @field_validator("prompt")
    @classmethod
    def _prompt_without_answer(cls, template: str) -> str:
        if ANSWER in names_in(template):
            raise ValueError(f"expected no {{{ANSWER}}} in the prompt: it would give the answer away")
        return template

    @field_validator("target")
    @classmethod
    def _target_with_answer(cls, template: str) -> str:
        if ANSWER not in names_in(template):
            raise ValueError(f"expected {{{ANSWER}}} in the target, got {template!r}")
        return template

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> DeclaredTask:
        folders = (info.context or {}).get("folders", ())
        self._found_metrics.update({name: find_metric(name, folders) for name in self.metrics})
        if bool(self.choices) != (self.gold is not None):
            raise ValueError("choices and gold: expected both or neither")
        if not self.choices and self.references is None:
            raise ValueError("references: expected the path of the accepted answers, or choices and gold")
        if self.kind == "choice" and not self.choices:
            raise ValueError("kind choice: expected choices and gold")
        if self.primary not in self.metrics:
            raise ValueError(f"primary: expected one of metrics ({', '.join(self.metrics)}), got {self.primary!r}")
        for name in self.metrics:
            if self._found_metrics[name].reads == "choices" and not self.choices:
                raise ValueError(f"metrics: {name} compares choices; expected choices and gold")
        if self._found_metrics[self.primary].reads != ("choices" if self.kind == "choice" else "text"):
            raise ValueError(f"primary: {self.primary} does not score kind {self.kind}")
        decoded = [name for name in self.metrics if self._found_metrics[name].reads == "text"]
        if decoded and "decoding" not in self.model_fields_set:
            raise ValueError(f"expected the key 'decoding', got none ({decoded[0]} reads a decoded answer)")
        if self.few_shot and (self.few_shot.from_ or self.splits.train) in (None, self.splits.eval):
            raise ValueError(f"few_shot.from: expected a split besides that of evaluation ({self.splits.eval})")
        return self

    @property
    def found_metrics(self) -> Mapping[str, Metric]:
        """The metrics by their names in `metrics`."""
        return self._found_metrics

    def examples(
        self, split: Split, path: str | None = None, limit: int | None = None, *, unseen: Container[str] = ()
    ) -> list[Example]:
        """Return examples of a split; see `Task.examples`.

        Args:
            split: "train" or "eval".
            path: Folder of JSON lines; None reads the Hugging Face Hub.
            limit: Number of examples from the start; None returns all.
            unseen: Ids of held-out training records, which no few-shot prompt contains.
        """
        examples = list(islice(self._examples(self._records(split, path)), limit))
        if self.few_shot is None:
            return examples
        shots, pool = self.few_shot, self._examples(self._records("train", path, self.few_shot.from_))
        if shots.from_ in (None, self.splits.train):
            pool = (example for example in pool if example.id not in unseen)
        return with_shots(examples, list(pool), count=shots.count, seed=shots.seed, separator=shots.separator)

    def _records(self, split: Split, path: str | None, name: str | None = None) -> Iterator[Record]:
        """Yield the records of a split, or of the dataset's split of that name."""
        given, name = name, name or (self.splits.train if split == "train" else self.splits.eval)
        if name is None:
            raise ConfigError(f"task {self.name}: its dataset {self.dataset.path} has no split for finetuning")
        if path is None:
            hint = (
                f"Without network, give a folder with its records as JSON lines ({name}.jsonl or {name}.jsonl.gz): "
                f"task.path=DIR, or --task-path ROOT with ROOT/{self.folder}/"
            )
            return hub_records(self.dataset, name, hint)
        names = (name, "train") if split == "train" and given is None else (name,)
        return file_records(find_file(self.name, split, names, Path(path)))

    def _examples(self, records: Iterable[Record]) -> Iterator[Example]:
        transform = TRANSFORMS[self.transform] if self.transform else lambda record: [record]
        for number, record in enumerate(records, start=1):
            group = self._group(record)
            for part in transform(record):
                yield self._example(part, str(number) if part.part is None else f"{number}.{part.part}", group)

    def _group(self, record: Record) -> str:
        """Return the name of a record's group; a digest in place of a long text."""
        name = record.first_label(self.group) if self.group else ""
        return name if len(name) <= _LONGEST_GROUP else bytes_digest(name.encode())

    def _example(self, record: Record, name: str, group: str = "") -> Example:
        choices, gold = self._choices(record)
        references = record.texts(self.references) if self.references else ()
        if gold is not None:
            references = references or (choices[gold],)
        fields = _Fields(record, prepared=self.transform is not None)

        def written(answer: str) -> str:
            return render(self.target, _Fields(record, fields.prepared, answer))

        return Example(
            id=name,
            prompt=render(self.prompt, fields).rstrip(),
            target=written(references[0] if gold is None else choices[gold]),
            references=references,
            choices=tuple(map(written, choices)),
            gold=gold,
            group=group,
        )

    def _choices(self, record: Record) -> tuple[tuple[str, ...], int | None]:
        if not self.choices or self.gold is None:
            return (), None
        one = len(self.choices) == 1
        choices = record.texts(self.choices[0]) if one else tuple(map(record.text, self.choices))
        return choices, record.index(self.gold, len(choices))


@dataclass(frozen=True)
class _Fields:
    """The fields of a record as templates read them, and the answer."""

    record: Record
    prepared: bool
    answer: str | None = None

    def __getitem__(self, name: str) -> str:
        """Return a field: an integer's digits, or a text that is not blank, stripped of white space."""
        if name == ANSWER and self.answer is not None:
            return self.answer
        value = self.record.get(name)
        if type(value) is int:
            return str(value)
        # A transform's fields stay as they are and may be empty (the conversation before the first turn).
        return self.record.any_text(name) if self.prepared else self.record.text(name)
