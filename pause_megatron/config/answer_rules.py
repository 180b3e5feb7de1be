"""Rules about pauses within the answers of a finetuning."""

from __future__ import annotations

from pause_megatron.config.finetune_schema import FinetuneSection
from pause_megatron.config.model_rules import Broken, Rule
from pause_megatron.config.pauses import PLACEMENTS
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.config.spelling import nearest


def answers_are_of_a_task(config: ResolvedConfig) -> Broken:
    """Check that pauses within answers are of a finetuning, and that their rate is used."""
    finetune = config.finetune
    if finetune.answer_placement is not None and config.task.name is None:
        keys = ("finetune.answer_placement", "task.name")
        return keys, "task.name with finetune.answer_placement; pretraining places pauses by pause.placement"
    unused = finetune.answer_placement is None or finetune.answer_placement == "every"
    if unused and finetune.answer_rate != FinetuneSection.model_fields["answer_rate"].default:
        keys = ("finetune.answer_rate", "finetune.answer_placement")
        return keys, "finetune.answer_placement, and not every, with finetune.answer_rate"
    return None


def answer_placement_is_known(config: ResolvedConfig) -> Broken:
    """Check that the policy of answers ships or is named 'module:attribute', and works on examples."""
    name = config.finetune.answer_placement
    keys = ("finetune.answer_placement",)
    if name is None or ":" in name:
        return None
    if name not in PLACEMENTS:
        return keys, f"{', '.join(PLACEMENTS)} or 'module:attribute'{nearest(name, PLACEMENTS)}"
    if name in ("isolated", "bernoulli") and config.finetune.answer_rate > config.pause.run:
        return (*keys, "finetune.answer_rate", "pause.run"), (
            f"finetune.answer_rate <= pause.run with {name}, which has at most one run after a token"
        )
    return None


def scores_of_answers_are_used(config: ResolvedConfig) -> Broken:
    """Check that placement by score has scores of the task's answers, and that scores have a use."""
    name, scores = config.finetune.answer_placement, config.task.scores
    if name == "scored" and scores is None:
        keys = ("finetune.answer_placement", "task.scores")
        return keys, "the file of `pause-megatron score --task` in task.scores with scored"
    if scores is not None and (name is None or (name != "scored" and ":" not in name)):
        keys = ("task.scores", "finetune.answer_placement")
        return keys, "finetune.answer_placement=scored or a policy of yours with task.scores"
    return None


ANSWER_RULES: list[Rule] = [answers_are_of_a_task, answer_placement_is_known, scores_of_answers_are_used]
