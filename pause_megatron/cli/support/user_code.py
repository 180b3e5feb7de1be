"""A user's own objective, token weights and placement policies, resolved as at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable

from pause_megatron.config.schema import ObjectiveSection, ResolvedConfig
from pause_megatron.config.text import read_override

_SECTIONS = ("task.name=", "pause.placement=", "finetune.answer_placement=", "objective.")


def check_user_code(config: ResolvedConfig) -> None:
    """Import the code that a configuration names, with the errors of a start. Without such keys, nothing is imported.

    Args:
        config: Configuration of the run.

    Raises:
        ConfigError: A module or its attribute is not there, cannot be imported, or is of another kind.
    """
    placement = config.pause.placement if config.task.name is None else None
    _check(placement, config.finetune.answer_placement, config.objective)


def check_words(words: Iterable[str]) -> None:
    """Import the code that overrides name, as `check_user_code` does for a whole configuration.

    Args:
        words: Overrides `KEY=VALUE`; other words are left out.

    Raises:
        ConfigError: As `check_user_code`.
    """
    entries = [read_override(word) for word in words if word.startswith(_SECTIONS)]
    given = {entry.path: entry.value for entry in entries}
    placement, answers = (str(given.get(key) or "") for key in ("pause.placement", "finetune.answer_placement"))
    if "task.name" in given:
        placement = ""
    objective = {path.partition(".")[2]: value for path, value in given.items() if path.startswith("objective.")}
    _check(placement, answers, ObjectiveSection.model_validate(objective))


def _check(placement: str | None, answers: str | None, objective: ObjectiveSection) -> None:
    if placement is not None and ":" in placement:
        from pause_megatron.data.windows.placement import Placement

        Placement(placement)
    if answers is not None and ":" in answers:
        from pause_megatron.data.supervised.answers import AnswerPauses

        AnswerPauses(answers, rate=0.0)
    if ":" in objective.name or ":" in (objective.token_weights or ""):
        from pause_megatron.objective.plan import loss_plan

        loss_plan(objective)
