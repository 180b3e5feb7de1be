"""A user's own objective, token weights and placement policies, resolved as at the start of a run."""

from __future__ import annotations

from pause_megatron.config.schema import ResolvedConfig


def check_user_code(config: ResolvedConfig) -> None:
    """Import the code that a configuration names, with the errors of a start. Without such keys, nothing is imported.

    Args:
        config: Configuration of the run.

    Raises:
        ConfigError: A module or its attribute is not there, cannot be imported, or is of another kind.
    """
    pause, objective, answers = config.pause, config.objective, config.finetune.answer_placement
    if config.task.name is None and ":" in pause.placement:
        from pause_megatron.data.windows.placement import Placement

        Placement(pause.placement, pause.run)
    if answers is not None and ":" in answers:
        from pause_megatron.data.supervised.answers import AnswerPauses

        AnswerPauses(answers, config.finetune.answer_rate, pause.run)
    if ":" in objective.name or ":" in (objective.token_weights or ""):
        from pause_megatron.objective.plan import loss_plan

        loss_plan(objective)
