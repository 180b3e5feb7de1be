"""Rules about pauses within the answers of a finetuning."""

from __future__ import annotations

from pause_megatron.config.model_rules import Broken, Rule
from pause_megatron.config.pauses import PLACEMENTS
from pause_megatron.config.schema import FinetuneSection, ResolvedConfig
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
    fitting = [each for each in PLACEMENTS if each != "scored"]
    if name not in fitting:
        said = "; side arrays are of corpora" if name == "scored" else nearest(name, fitting)
        return keys, f"{', '.join(fitting)} or 'module:attribute'{said}"
    if name == "isolated" and config.finetune.answer_rate > 1:
        return (*keys, "finetune.answer_rate"), "finetune.answer_rate <= 1 with isolated, so that no two pauses touch"
    return None


ANSWER_RULES: list[Rule] = [answers_are_of_a_task, answer_placement_is_known]
