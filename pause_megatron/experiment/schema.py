"""The sections of a grid file as frozen, typed models.

A grid declares pretrained models, variants of them, tasks, numbers of pauses and seeds. `load.py` reads a grid, and
`grid.py` expands it into cells.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from pause_megatron.config.blend import split_words
from pause_megatron.config.section import PathText

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
# M_ft: a number, or a range such as "0..50" from which each example draws (pause dropout).
Pauses = Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(pattern=r"^\d+(\.\.\d+)?$")]
Scalar = bool | int | float | str | None
Keys = dict[str, Scalar | tuple[Scalar, ...]]


class GridSection(BaseModel):
    """A frozen group of keys. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class Data(GridSection):
    """The inputs: a prepared corpus, and the folder of the tasks' records."""

    prefix: tuple[PathText, ...] = Field((), description="data.prefix of every pretraining run")
    tasks: PathText | None = Field(None, description="folder that holds a folder per task; null: the Hugging Face Hub")

    @field_validator("prefix", mode="before")
    @classmethod
    def _split_prefix(cls, value: object) -> object:
        return split_words(value)


class Extra(GridSection):
    """The FLOPs of this many pauses after a prefix of this length, spent in another way."""

    spend: Literal["layers", "ffn", "loops", "training"]
    pauses: int = Field(ge=1)
    prefix_tokens: int = Field(ge=1)
    loop_layers: str | None = Field(
        None, description="layers that spend=loops repeats, as model.loop_layers; null: those of the model, or all"
    )

    @model_validator(mode="after")
    def _loops_layers(self) -> Extra:
        if self.loop_layers is not None and self.spend != "loops":
            raise ValueError(f"expected spend: loops with loop_layers, got {self.spend}")
        return self


class Budget(GridSection):
    """The training budget of another model, in one of three measures."""

    like: Name
    equal: Literal["total_tokens", "text_tokens", "flops"]


class Model(GridSection):
    """One pretraining run: a recipe or a file, overrides, an extra, and the budget of another model."""

    recipe: str | None = None
    config: PathText | None = None
    set: Keys = {}
    extra: Extra | None = Field(None, description="what the model gets in place of pauses")
    budget: Budget | None = None


class Finetuning(GridSection):
    """Keys of every finetuning run."""

    set: Keys = {}


class Evaluation(GridSection):
    """Options of every evaluation; batch size and device affect speed only."""

    limit: int | None = Field(None, ge=1, description="records of a task that are scored; null: all")
    batch_size: int | None = Field(None, ge=1)
    device: str | None = None
    select: Literal["held_out", "eval"] = Field(
        "held_out",
        description="records on which a variant with several M_ft or M_inf chooses one: the held-out part of train, "
        "which is then scored too, or the evaluation split, which biases the result upwards",
    )


class GridTask(GridSection):
    """One task: its M_ft, and its differences from the other tasks."""

    task: PathText | None = Field(None, description="name, file or module:attribute of the task; null: the key")
    recipe: str | None = Field(None, description="recipe of the finetuning run; null: finetune-TASK")
    pauses: tuple[Pauses, ...] = Field((10,), min_length=1)
    set: Keys = {}
    limit: int | None = Field(None, ge=1, description="records that are scored; null: evaluate.limit")
    chance: float | None = Field(None, ge=0, le=100, description="score of guessing, per cent; null: the paper's")


class Decoding(GridSection):
    """Pauses within generated answers, as the options --pause-* of `evaluate`; null: the model's own."""

    every: int | None = Field(None, ge=0)
    after: str | None = None
    entropy: float | None = Field(None, ge=0)
    requests: bool | None = None
    count: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)
    in_prompt: bool | None = None

    @model_validator(mode="after")
    def _limits_pauses(self) -> Decoding:
        if self.limit is not None and self.requests is False and self.entropy is None:
            raise ValueError("expected entropy or requests with limit, got requests: false")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Values that were given, by the option of `evaluate`."""
        given = self.model_dump(exclude_none=True)
        return {f"--pause-{name.replace('_', '-')}": value for name, value in given.items()}


class Inference(GridSection):
    """Pauses at inference that differ from those of the finetuning."""

    pauses: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    location: Literal["append", "prepend"] | None = None
    filler: str | None = None
    decoding: Decoding = Decoding()


class Variant(GridSection):
    """A way of training and prompting: a model, its finetuning and its prompting."""

    model: Name
    finetune: Literal["standard", "pauses"]
    pauses: tuple[Pauses, ...] | None = Field(None, min_length=1, description="M_ft instead of the tasks'")
    set: Keys = {}
    scores: Literal["loss", "entropy"] | None = Field(
        None, description="values of the answers by the row's own pretrained model, computed first: its task.scores"
    )
    inference: Inference = Inference()
    tasks: tuple[Name, ...] | None = Field(None, description="null: all")
    about: str = Field("", description="a line in the report")

    @model_validator(mode="after")
    def _scores_once(self) -> Variant:
        if self.scores is not None and "task.scores" in self.set:
            raise ValueError("expected scores, or a file of task.scores in set, got both")
        return self


class Curve(GridSection):
    """Further M_inf for variants on tasks and M_ft (null: all)."""

    pauses: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=2)
    variants: tuple[Name, ...] = Field(min_length=1)
    tasks: tuple[Name, ...] | None = None
    m_ft: tuple[Pauses, ...] | None = None


class Grid(GridSection):
    """An experiment."""

    name: Name
    title: str = ""
    data: Data = Data()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    finetune: Finetuning = Finetuning()
    evaluate: Evaluation = Evaluation()
    tasks: dict[Name, GridTask] = Field(min_length=1)
    variants: dict[Name, Variant] = Field(min_length=1)
    baseline: Name = Field("StdPT_StdFT", description="variant that others are compared with")
    curves: tuple[Curve, ...] = ()
    declared: PathText | None = Field(None, description="file that `experiment declare` wrote before the runs")


def highest(pauses: int | str) -> int:
    """Return the upper end of an M_ft, the default M_inf: 10 -> 10, "0..50" -> 50."""
    return int(str(pauses).split("..")[-1])
