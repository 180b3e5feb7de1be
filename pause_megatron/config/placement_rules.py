"""Rules about the placement of pauses, and about the side arrays that it and token weights use."""

from __future__ import annotations

from pause_megatron.config.batching import pause_counts
from pause_megatron.config.model_rules import Broken, Rule
from pause_megatron.config.pauses import BY_PATTERN, PLACEMENTS, pattern_error, placement_conflict
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.config.spelling import nearest


def placement_is_known(config: ResolvedConfig) -> Broken:
    """Check that the placement policy ships or is named 'module:attribute'."""
    name = config.pause.placement
    if name not in PLACEMENTS and ":" not in name:
        return ("pause.placement",), f"{', '.join(PLACEMENTS)} or 'module:attribute'{nearest(name, PLACEMENTS)}"
    return None


def pauses_fit_the_window(config: ResolvedConfig) -> Broken:
    """Check that placement, rate and window fit together."""
    return placement_conflict(pause_counts(config))


def patterns_are_used(config: ResolvedConfig) -> Broken:
    """Check that a pattern is a regular expression, and that a policy uses it."""
    pattern = config.pause.pattern
    if pattern is None:
        return None
    if (wrong := pattern_error(pattern)) is not None:
        return ("pause.pattern",), f"a regular expression ({wrong})"
    if config.pause.placement not in BY_PATTERN and config.finetune.answer_placement not in BY_PATTERN:
        keys = ("pause.pattern", "pause.placement", "finetune.answer_placement")
        return keys, "pause.placement (or finetune.answer_placement) after or before with pause.pattern"
    return None


def scores_need_a_side_array(config: ResolvedConfig) -> Broken:
    """Check that a pretraining by scores has them; a finetuning inherits the placement, and has other pauses."""
    pause = config.pause
    if pause.placement == "scored" and pause.rate and config.data.side is None and config.task.name is None:
        keys = ("pause.placement", "data.side")
        return keys, "the name of a side array of the corpora in data.side with scored"
    return None


def side_arrays_are_used(config: ResolvedConfig) -> Broken:
    """Check that a side array is one of corpora, and has a use."""
    if config.data.side is None:
        return None
    if config.data.source:
        return (
            "data.side",
            "data.source",
        ), "a corpus in data.prefix with data.side; a stream has no side arrays"
    if config.task.name is not None:
        return ("data.side", "task.name"), "no data.side with task.name; side arrays are of corpora"
    placement = config.pause.placement
    if placement != "scored" and ":" not in placement and config.objective.token_weights != "side":
        keys = ("data.side", "pause.placement", "objective.token_weights")
        return keys, "pause.placement=scored, a policy of yours or objective.token_weights=side with data.side"
    return None


PLACEMENT_RULES: tuple[Rule, ...] = (
    *(placement_is_known, pauses_fit_the_window, patterns_are_used, scores_need_a_side_array, side_arrays_are_used),
)
