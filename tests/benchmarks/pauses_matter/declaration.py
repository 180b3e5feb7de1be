"""The declaration of a demonstration: a YAML file, written and committed before the runs that it is judged by.

It names the claim, the setting that the claim is about (the subject), the controls, the seeds, and how learning rates
are chosen. Sizes and steps of controls are words ("equal FLOPs", "equal parameters"), which `settings` turns into
numbers.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pause_megatron.config.section import Section
from pause_megatron.errors import ConfigError

EQUAL_FLOPS, EQUAL_PARAMETERS, EQUAL_STEPS = "equal FLOPs", "equal parameters", "equal steps"
SIZES = ("model.ffn", "model.hidden", "model.layers", "model.loops")

STANDARD_SET = {
    "standard": "the model without pauses, trained for as many steps as the subject",
    "longer": "the model without pauses, trained for as many FLOPs as the subject",
    "wider": "a wider model, whose example costs as many FLOPs as the subject's",
    "wider-equal-parameters": "a model as large as the subject, trained for as many FLOPs",
    "deeper": "more layers, as many FLOPs",
    "more-heads": "more attention heads, as many FLOPs",
    "looped": "the stack of layers runs several times with the same weights; as many parameters and FLOPs",
    "prepended": "the subject's positions before the prompt, which they cannot read",
    "filler": "an ordinary token in place of the pauses, in training and inference",
    "filler-at-inference": "the longer trained model without pauses, asked with fillers that it never saw",
    "one-vector": "pauses of one shared vector, as in the paper",
    "distinct-vectors": "pauses of as many vectors as pauses",
    "auxiliary-heads": "the subject's supervision through heads, without pauses",
}

OWN_KEYS = ("run.", "task.name", "data.sequence_length", "data.tokenizer", "train.", "optim.lr", "optim.warmup_steps")
"""Keys that the runs fill in themselves."""


class Inference(Section):
    """How a trained model is asked, where that is not as it was trained."""

    pauses: int = Field(ge=0)
    location: Literal["append", "prepend"] = "append"
    filler: str | None = None


class Setting(Section):
    """A model, its positions and its training.

    Attributes:
        what: for the report.
        steps: a number (the subject's only), or as many as give the subject's training FLOPs, or its steps.
        config: keys of a run, over those of every run. A size may be "equal FLOPs" (that of an example is nearest to
            the subject's) or "equal parameters" (the smallest model that is no smaller than the subject).
        trained: name of the setting whose models are asked in another way; None: it is trained itself.
        inference: the other way.
    """

    what: str
    steps: int | Literal["equal FLOPs", "equal steps"] = "equal FLOPs"
    config: dict[str, Any] = Field(default_factory=dict)
    trained: str | None = None
    inference: Inference | None = None


class Tuning(Section):
    """The choice of learning rates: for every setting the best mean accuracy of the same grid, ties to the smaller."""

    learning_rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    prompts: int = Field(ge=1, description="the first of the evaluation prompts; the final runs never see them")


class Declaration(Section):
    """See the module. `left_out` gives the reason for each control of `STANDARD_SET` that has no setting."""

    claim: str
    title: str
    task: str
    tokenizer: str = "pause_megatron.tasks.synthetic.base:write_tokenizer"
    chance: float = Field(ge=0, lt=1)
    subject: str
    seeds: list[int] = Field(min_length=5)
    prompts: int = Field(ge=1, description="evaluation prompts of a final run, after those of the tuning")
    tuning: Tuning
    warmup: float = Field(ge=0, lt=1, description="fraction of the steps")
    config: dict[str, Any]
    settings: dict[str, Setting]
    left_out: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Declaration:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        names = set(self.settings)
        if self.subject not in names:
            yield f"subject: expected one of {sorted(names)}, got {self.subject!r}"
            return
        if not isinstance(self.settings[self.subject].steps, int):
            yield f"settings.{self.subject}.steps: expected a number, all others follow from it, got words"
        both = sorted(set(self.seeds) & set(self.tuning.seeds))
        if both or len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: expected each once and none of tuning.seeds, got {both or self.seeds}"
        rates = self.tuning.learning_rates
        if rates != sorted(set(rates)):
            yield f"tuning.learning_rates: expected ascending values, each once, got {rates}"
        absent = [name for name in STANDARD_SET if name not in names and name not in self.left_out]
        if absent:
            yield f"settings: expected {', '.join(absent)} too, or a reason under left_out"
        for name, setting in self.settings.items():
            yield from self._problems_of(name, setting)

    def _problems_of(self, name: str, setting: Setting) -> Iterator[str]:
        if isinstance(setting.steps, int) and name != self.subject:
            yield f"settings.{name}.steps: expected words, the subject's number fixes it, got {setting.steps}"
        if (setting.trained is None) != (setting.inference is None):
            yield f"settings.{name}: expected trained and inference together, got one of them"
        if setting.trained is not None:
            other = self.settings.get(setting.trained)
            if other is None or other.trained is not None or setting.config:
                yield f"settings.{name}.trained: expected a setting that is trained, and no config"
        for key, value in {**self.config, **setting.config}.items():
            if key.startswith(OWN_KEYS):
                yield f"settings.{name}: expected no {key}, the run fills it in, got {value!r}"
            if value in (EQUAL_FLOPS, EQUAL_PARAMETERS) and (key not in SIZES or name == self.subject):
                yield f"settings.{name}.{key}: expected a value; only {', '.join(SIZES)} of a control may be words"


@dataclass(frozen=True)
class Declared:
    """A declaration and the file that it was read from.

    Attributes:
        path: the file.
        digest: sha256 of its bytes.
        content: what it says.
    """

    path: Path
    digest: str
    content: Declaration


def read(path: str | Path) -> Declared:
    """Reads a declaration.

    Args:
        path: a YAML file; a name without a folder may be that of a file beside this module.

    Raises:
        ConfigError: it cannot be read, or contradicts itself; the message names file and field.
    """
    path = Path(path)
    if not path.is_file() and path.name == str(path):
        path = Path(__file__).parent / f"{path.stem}.yaml"
    try:
        data = path.read_bytes()
        content = Declaration.model_validate(yaml.safe_load(data))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected a YAML file, got {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    return Declared(path, hashlib.sha256(data).hexdigest(), content)


def committed(path: Path) -> str | None:
    """When the file, as it is now, was committed (author date, which survives a cherry-pick).

    Returns:
        An ISO 8601 time; None outside a repository.

    Raises:
        ConfigError: the file is in a repository, but not as it is now.
    """

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(path.resolve().parent), *words, "--", path.resolve().name]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        status = git("status", "--porcelain", "--ignored")
    except FileNotFoundError:
        return None
    if status.returncode:
        return None
    if status.stdout.strip():
        raise ConfigError(f"{path}: expected a file that is committed before its final runs, got one that is not")
    return git("log", "-1", "--format=%aI").stdout.strip()
