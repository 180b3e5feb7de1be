"""Rules about the objective: its keys are used, and what it reads is there."""

from __future__ import annotations

from pause_megatron.config.batching import pause_range
from pause_megatron.config.model_rules import Broken, Rule
from pause_megatron.config.pauses import OBJECTIVES
from pause_megatron.config.schema import ObjectiveSection, ResolvedConfig
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError

CYB = tuple(name for name in OBJECTIVES if name.startswith("cyb_"))
"""Catch Your Breath's objectives; a module of yours may have a name that begins like theirs."""

_USERS = {"discount": ("anytime", "cyb_anytime"), "stop_rate": ("cyb_variational",), "step_cost": ("cyb_budget",)}


def requests(config: ResolvedConfig) -> int | None:
    """Return how many pauses in a row a model learned to ask for at most, as far as its configuration tells.

    Args:
        config: Configuration of the run.

    Returns:
        `pause.run` in a pretraining, and where answers have pauses, for generation grants requests within answers; else
        `finetune.pauses`, or its upper end. None: the objective has no requests.
    """
    if config.objective.name not in CYB:
        return None
    if config.task.name is None or config.finetune.answer_placement is not None:
        return config.pause.run
    return _most_pauses(config)


def _most_pauses(config: ResolvedConfig) -> int:
    """Return the largest number of pauses in a row before a target of a finetuning; 0 where there are none."""
    finetune = config.finetune
    try:
        appended = pause_range(finetune.pauses)[-1] if finetune.location == "append" else 0
    except ConfigError:
        return 1  # another rule says so
    return max(appended, config.pause.run if finetune.answer_placement is not None else 0)


def objective_is_known(config: ResolvedConfig) -> Broken:
    """Check that the objective ships or is named 'module:attribute'."""
    name = config.objective.name
    if name not in OBJECTIVES and ":" not in name:
        return ("objective.name",), f"{', '.join(OBJECTIVES)} or 'module:attribute'{nearest(name, OBJECTIVES)}"
    return None


def objective_uses_its_keys(config: ResolvedConfig) -> Broken:
    """Check that no key of an objective is given that another one reads."""
    objective, defaults = config.objective, ObjectiveSection()
    for key, users in _USERS.items():
        changed = getattr(objective, key) != getattr(defaults, key)
        if changed and objective.name in OBJECTIVES and objective.name not in users:
            return (f"objective.{key}", "objective.name"), f"objective.name={' or '.join(users)} with objective.{key}"
    return None


def token_weights_have_a_source(config: ResolvedConfig) -> Broken:
    """Check that weights of targets are there: a side array of a corpus, or a function."""
    weights = config.objective.token_weights
    if weights is None:
        return None
    if weights != "side":
        return None if ":" in weights else (("objective.token_weights",), "side, 'module:attribute' or null")
    if config.task.name is not None:
        keys = ("objective.token_weights", "task.name")
        return keys, "a function 'module:attribute' in objective.token_weights for a task, whose examples have no side"
    if config.data.side is None:
        return ("objective.token_weights", "data.side"), "a name in data.side with objective.token_weights=side"
    return None


def requests_are_logits(config: ResolvedConfig) -> Broken:
    """Check that the logit of the pause, which is the request, is in the softmax."""
    if config.objective.name in CYB and config.pause.softmax != "keep":
        return ("objective.name", "pause.softmax"), "pause.softmax=keep, whose pause logit is the request"
    return None


def runs_have_pauses(config: ResolvedConfig) -> Broken:
    """Check that targets have pauses directly before them, without which these objectives are the cross-entropy."""
    name = config.objective.name
    if name not in OBJECTIVES[1:]:
        return None
    if config.task.name is None:
        if config.pause.rate == 0:
            return ("objective.name", "pause.rate"), f"pause.rate > 0 with {name}, which is about runs of pauses"
        return None
    if not _most_pauses(config):
        keys = ("objective.name", "finetune.pauses", "finetune.location", "finetune.answer_placement")
        return keys, f"pauses after the prompt or within the answer with {name}, which is about runs of pauses"
    return None


def steps_see_no_later_pause(config: ResolvedConfig) -> Broken:
    """Check that a loss at a pause is that of an answer given there, by a pause token with no other target."""
    if config.task.name is None or config.objective.name not in OBJECTIVES[1:]:
        return None
    finetune = config.finetune
    if finetune.filler is not None:
        keys = ("objective.name", "finetune.filler")
        return keys, "finetune.filler=null with it: a filler is an ordinary token, also of answers, and no request"
    if finetune.prefix_attention == "bidirectional":
        keys = ("objective.name", "finetune.prefix_attention")
        return keys, "a causal prefix with it: a step must not see the pauses after it"
    if finetune.pause_targets:
        keys = ("objective.name", "finetune.pause_targets")
        return keys, "finetune.pause_targets=false with it: a pause has either a hint or the answer as its target"
    return None


OBJECTIVE_RULES: tuple[Rule, ...] = (
    objective_is_known,
    objective_uses_its_keys,
    token_weights_have_a_source,
    requests_are_logits,
    runs_have_pauses,
    steps_see_no_later_pause,
)
