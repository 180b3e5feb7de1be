"""The keys of a finetuning: its task, and the pauses in its examples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pause_megatron.config.section import PathText, Section


class TaskSection(Section):
    """The finetuning task; a run with task.name is a finetuning run."""

    name: PathText | None = Field(
        None, description="a task that ships, a YAML file, or 'module:attribute'; null: pretraining"
    )
    path: PathText | None = Field(
        None, description="folder with train.jsonl[.gz] and the evaluation file; default: the Hugging Face Hub"
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="maximum number of training records, a random sample in which every article or story has its "
        "share; default: all",
    )
    held_out: float | None = Field(
        0.05,
        ge=0,
        lt=1,
        description="fraction of the training records, by article or story, that validates and is not trained on; "
        "0: no validation; null: as before this key existed (a limit counts from the start, validation reads the "
        "evaluation split)",
    )
    scores: PathText | None = Field(
        None,
        description="file of `score --task`: a value for each token of the answers, for "
        "finetune.answer_placement=scored or a policy of yours",
    )


class FinetuneSection(Section):
    """Pauses after prompts, loss on targets only (Goyal et al., ICLR 2024, section 3.2)."""

    pauses: str = Field(
        "0",
        description="pauses per example, M_ft, or a range LOW..HIGH from which each example and epoch draws",
    )
    location: Literal["append", "prepend"] = Field("append", description="pauses after or before the prompt")
    prefix_attention: Literal["causal", "bidirectional"] = Field(
        "causal",
        description="attention within prompt and pauses; bidirectional: a prefix LM, as in the paper",
    )
    filler: str | None = Field(None, description="text of one ordinary token in place of <pause>, as a control")
    batching: Literal["packed", "padded"] = Field(
        "packed",
        description="packed: several examples per window, each with attention to itself only; padded: one per window",
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the examples; alternative to train.steps and train.tokens"
    )
    pause_targets: bool = Field(
        False,
        description="loss on the task's hints at the pauses: pause k predicts hint k. The last pause predicts the "
        "answer, so n hints need n + 1 appended pauses or more; further pauses have no target",
    )
    auxiliary_heads: bool = Field(
        False,
        description="loss on the task's hints without pauses for them, as a control: one linear head a hint, at the "
        "position that predicts the answer. Checkpoints hold the heads, an export does not",
    )
    answer_placement: str | None = Field(
        None,
        description="placement of pauses within the answer, as pause.placement with pause.run and pause.pattern; null: "
        "none there",
    )
    answer_rate: float = Field(
        0.1, ge=0, description="pauses within the answer, as a fraction of its tokens; not used by every"
    )
    hint_weight: float = Field(
        1.0, ge=0, description="weight of a hint in the loss; a token of the answer has weight 1"
    )
