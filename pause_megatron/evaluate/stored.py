"""The entries of results.json and the lines of samples files, as typed records."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue

from pause_megatron.evaluate.identity import Identity, OwnDecoding, Settings, Split
from pause_megatron.evaluate.statistics import Mean
from pause_megatron.files.typed_json import Number, TypedJson


class Stored(TypedJson):
    """A record of an evaluation on disk."""

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain JSON, with the keys that were set, in the order of the file."""
        return self.model_dump(mode="json", exclude_unset=True)

    def __getitem__(self, key: str) -> Any:
        """Return a field by its name, as when records were dictionaries."""
        warnings.warn(f'record["{key}"] is now record.{key}; the old form works until 0.2', FutureWarning, stacklevel=2)
        if key not in self.model_fields_set:
            raise KeyError(key)
        return getattr(self, key)


class TokenCounts(Stored):
    """Tokens of one record, or summed over records.

    Attributes:
        prompt: Prompt tokens after cutting.
        pauses: Pauses.
        new: Generated tokens, and tokens of all choices.
        inside: Pauses within prompts and answers; unset for none.
    """

    prompt: int
    pauses: int
    new: int
    inside: int = 0

    @classmethod
    def of(cls, prompt: int, pauses: int, new: int, inside: int) -> TokenCounts:
        """Return the counts; without pauses inside as before there were any."""
        more = {"inside": inside} if inside else {}
        return cls(prompt=prompt, pauses=pauses, new=new, **more)

    @property
    def total(self) -> int:
        """Prompt, pauses and new tokens."""
        return self.prompt + self.pauses + self.new + self.inside


class BatchCost(Stored):
    """The cost of one batch, stored on its last line.

    Attributes:
        records: Records of the batch.
        forward_passes: Calls of the model.
        positions: Token positions computed, without padding.
        seconds: Wall-clock time, seconds.
    """

    records: int
    forward_passes: int
    positions: int
    seconds: Number


class Sample(Stored):
    """The outcome of one record: a line of a samples file.

    Attributes:
        id: The example's id.
        group: The example's group; unset where it has none.
        prediction: The decoded answer; unset for a task that is not decoded. Of lm-eval: its filtered responses.
        log_likelihoods: Log-likelihood of each choice, nats; unset for a task without choices.
        scores: Score by metric, 0..1.
        tokens: Token counts; unset for lm-eval.
        cut: Tokens cut from the left of the prompt; unset for lm-eval.
        of: Digest of the evaluation's identity.
        batch: Cost of the batch that ends with this line.
    """

    id: str
    group: str = ""
    prediction: JsonValue = None
    log_likelihoods: list[float] | None = None
    scores: dict[str, Number]
    tokens: TokenCounts | None = None
    cut: int | None = None
    of: str | None = None
    batch: BatchCost | None = None


@dataclass(frozen=True)
class TotalCost:
    """The cost of a task under one setting, over all runs that contributed. None: lm-eval does not count it.

    Attributes:
        tokens: Token counts summed over the records.
        cut: Records whose prompt was cut.
        positions: Token positions computed, without padding.
        forward_passes: Calls of the model.
        seconds: Wall-clock time, seconds.
    """

    tokens: TokenCounts | None
    cut: int | None
    positions: int | None
    forward_passes: int | None
    seconds: Number

    @classmethod
    def of_samples(cls, samples: list[Sample]) -> TotalCost:
        """Return the sums over the samples of a task of this project."""
        counts = [sample.tokens for sample in samples if sample.tokens is not None]
        batches = [sample.batch for sample in samples if sample.batch is not None]
        return cls(
            tokens=TokenCounts.of(
                prompt=sum(each.prompt for each in counts),
                pauses=sum(each.pauses for each in counts),
                new=sum(each.new for each in counts),
                inside=sum(each.inside for each in counts),
            ),
            cut=sum(bool(sample.cut) for sample in samples),
            positions=sum(batch.positions for batch in batches),
            forward_passes=sum(batch.forward_passes for batch in batches),
            seconds=sum(batch.seconds for batch in batches),
        )


class ResultEntry(Stored):
    """One entry of results.json: a task, a metric and a setting.

    Attributes:
        task: Name of the task.
        metric: Name of the metric.
        primary: Whether it is the task's primary metric.
        value: Mean of the per-record scores.
        standard_error: Standard error of the mean, clustered by group; None for one group. Earlier versions: by record.
        low: Lower end of the 95 % interval of the value (`statistics.interval`); unset in files of earlier versions.
        high: Upper end of that interval.
        n: Number of records.
        groups: Number of groups of records; unset for lm-eval and in files of earlier versions.
        pauses: See `Settings`, as for the next six.
        location: See `Settings`.
        filler: See `Settings`.
        prefix_attention: See `Settings`.
        seed: See `Settings`.
        dtype: See `Settings`.
        split: See `Settings`; unset for "eval".
        decoding: See `Settings`; unset for "".
        model: Fingerprint of the model.
        model_path: Path of the model folder at that time.
        data: Fingerprint of the examples.
        harness: "pause-megatron", or "lm-eval VERSION".
        tokens: See `TotalCost`, as for the next four.
        cut: See `TotalCost`.
        positions: See `TotalCost`.
        forward_passes: See `TotalCost`.
        seconds: See `TotalCost`.
        asked: Of lm-eval only: the name in `--tasks`, which may be a group's.
        few_shot: Solved examples before each prompt, as the task's file has them; unset for none.
    """

    task: str
    metric: str
    primary: bool = True
    value: Number
    standard_error: Number | None = None
    low: Number | None = None
    high: Number | None = None
    n: int
    groups: int | None = None
    pauses: int
    location: str
    filler: str | None
    prefix_attention: str
    seed: int
    dtype: str
    split: Split = "eval"
    decoding: str = ""
    model: str
    model_path: str | None = None
    data: str
    harness: str | None = None
    tokens: TokenCounts | None = None
    cut: int | None = None
    positions: int | None = None
    forward_passes: int | None = None
    seconds: Number | None = None
    asked: str | None = None
    few_shot: int | None = None

    @classmethod
    def of(
        cls,
        identity: Identity,
        model_path: str,
        metric: str,
        score: Mean,
        interval: tuple[float, float],
        cost: TotalCost,
        *,
        primary: bool,
        **more: str,
    ) -> ResultEntry:
        """Return the entry of a metric.

        Args:
            identity: What was evaluated.
            model_path: Path of the model folder.
            metric: Name of the metric.
            score: Mean of its scores.
            interval: 95 % interval of the mean.
            cost: Cost of the evaluation, shared by all metrics of a task.
            primary: Whether it is the primary metric.
            **more: Other values of `task` and `asked`, for lm-eval's groups.
        """
        fields = {
            "task": identity.task,
            "metric": metric,
            "primary": primary,
            **{name: value for name, value in asdict(score).items() if name != "groups" or value is not None},
            "low": interval[0],
            "high": interval[1],
            **identity.settings.document(),
            "model": identity.model,
            "model_path": model_path,
            "data": identity.data,
            "harness": identity.harness,
            **vars(cost),
        }
        if isinstance(identity.decoding, OwnDecoding) and identity.decoding.few_shot:
            fields["few_shot"] = identity.decoding.few_shot
        return cls(**{**fields, **more})

    @property
    def settings(self) -> Settings:
        """The settings of the evaluation."""
        return Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})

    @property
    def key(self) -> tuple[str | int | None, ...]:
        """Key that is unique among entries. An lm-eval task may be requested by itself and as part of a group."""
        *settings, decoding = asdict(self.settings).values()
        return self.task, self.metric, self.asked, *settings, *([decoding] if decoding else [])
