"""What an experiment is: frozen, typed sections of a grid file. No torch.

A grid says which models are pretrained, which variants are made of them, on which tasks, with how many pauses and
seeds. `load.py` reads one, `grid.py` turns it into cells.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from pause_megatron.config.blend import split_words
from pause_megatron.config.schema import PathText

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]
# M_ft: a number, or a range such as "0..50" that is drawn from for each example (pause dropout).
Pauses = Annotated[int, Field(ge=0)] | Annotated[str, StringConstraints(pattern=r"^\d+(\.\.\d+)?$")]
Scalar = bool | int | float | str | None
Keys = dict[str, Scalar | tuple[Scalar, ...]]


class GridSection(BaseModel):
    """A frozen group. Unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class Data(GridSection):
    """What the user gives: a prepared corpus, and where the tasks' records lie."""

    prefix: tuple[PathText, ...] = Field((), description="data.prefix of every pretraining run")
    tasks: PathText | None = Field(None, description="folder that holds a folder per task; null: the Hugging Face Hub")

    @field_validator("prefix", mode="before")
    @classmethod
    def _split_prefix(cls, value: object) -> object:
        return split_words(value)


class ExtraLayers(GridSection):
    """Layers that cost what pauses cost: on a prefix of this length, this many pauses."""

    pauses: int = Field(ge=1)
    prefix_tokens: int = Field(ge=1)


class Budget(GridSection):
    """Training as long as another model, measured in one of three ways."""

    like: Name
    equal: Literal["total_tokens", "text_tokens", "flops"]


class Model(GridSection):
    """One pretraining run: a recipe or a file, keys on top, and how large and long compared with another model."""

    recipe: str | None = None
    config: PathText | None = None
    set: Keys = {}
    extra_layers: ExtraLayers | None = None
    budget: Budget | None = None


class Finetuning(GridSection):
    """Keys of every finetuning run."""

    set: Keys = {}


class Evaluation(GridSection):
    """Options of every evaluation; the batch size and the device decide nothing but the speed."""

    limit: int | None = Field(None, ge=1, description="records of a task that are scored; null: all")
    batch_size: int | None = Field(None, ge=1)
    device: str | None = None


class GridTask(GridSection):
    """One task: the M_ft to finetune with, and what differs from the other tasks."""

    task: PathText | None = Field(None, description="name, file or module:attribute of the task; null: the key")
    recipe: str | None = Field(None, description="recipe of the finetuning run; null: finetune-TASK")
    pauses: tuple[Pauses, ...] = Field((10,), min_length=1)
    set: Keys = {}
    limit: int | None = Field(None, ge=1, description="records that are scored; null: evaluate.limit")


class Inference(GridSection):
    """Pauses at inference where they are not those of the finetuning."""

    pauses: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    location: Literal["append", "prepend"] | None = None
    filler: str | None = None


class Variant(GridSection):
    """A way of training and prompting: which model, finetuned how, prompted how."""

    model: Name
    finetune: Literal["standard", "pauses"]
    pauses: tuple[Pauses, ...] | None = Field(None, min_length=1, description="M_ft in place of the tasks'")
    set: Keys = {}
    inference: Inference = Inference()
    tasks: tuple[Name, ...] | None = Field(None, description="null: all")
    about: str = Field("", description="a line for the report")


class Curve(GridSection):
    """Further M_inf for variants, over tasks and M_ft (null: all of them)."""

    pauses: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=2)
    variants: tuple[Name, ...] = Field(min_length=1)
    tasks: tuple[Name, ...] | None = None
    m_ft: tuple[Pauses, ...] | None = None


class Grid(GridSection):
    """A whole experiment."""

    name: Name
    title: str = ""
    data: Data = Data()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    finetune: Finetuning = Finetuning()
    evaluate: Evaluation = Evaluation()
    tasks: dict[Name, GridTask] = Field(min_length=1)
    variants: dict[Name, Variant] = Field(min_length=1)
    baseline: Name = Field("StdPT_StdFT", description="the variant that others are compared with")
    curves: tuple[Curve, ...] = ()


def highest(pauses: int | str) -> int:
    """The upper end of an M_ft: 10 -> 10, "0..50" -> 50; what a finetuned model is prompted with by default."""
    return int(str(pauses).split("..")[-1])
