"""The FLOPs of pauses spent in another way: on layers, feed-forward width, loops, or longer training."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.presets import flops_per_token
from pause_megatron.experiment.schema import Extra, Keys

_FFN_STEP = 64


@dataclass(frozen=True)
class Spent:
    """What a model gets in place of pauses.

    Attributes:
        keys: Keys of the model that change.
        longer: Factor of its training, pretraining and finetuning alike.
        about: The change, and its FLOPs over those of the pauses, as text.
    """

    keys: Keys
    longer: float
    about: str


def spend(model: ResolvedModel, wanted: Extra, vocabulary: int) -> Spent:
    """Return the change whose FLOPs are nearest to those of the pauses.

    A prefix of P tokens without pauses then costs the changed model what P + M tokens cost the model as it is. Goyal et
    al. compare 10 pauses after 100 tokens with 2 layers in addition to 24. Longer training leaves the model as it is
    and multiplies all of its training: cost(P + M) / cost(P) x (FLOPs of pretraining + FLOPs of finetuning).

    Args:
        model: The model as it is.
        wanted: Numbers of pauses and of prefix tokens, and where their FLOPs go.
        vocabulary: Number of text tokens.
    """
    with_pauses = _cost(model, wanted.prefix_tokens + wanted.pauses, vocabulary)
    pauses = f"{wanted.pauses} pauses after {wanted.prefix_tokens} tokens"
    if wanted.spend == "training":
        longer = with_pauses / _cost(model, wanted.prefix_tokens, vocabulary)
        return Spent({}, longer, f"trained {longer:.3f} times as long, 1.000 of the FLOPs of {pauses}")

    range_of = {} if wanted.loop_layers is None else {"loop_layers": wanted.loop_layers}
    model = model.model_copy(update=range_of)

    def cost(size: int) -> int:
        changed = model.model_copy(update={wanted.spend: size})
        return _cost(changed, wanted.prefix_tokens, vocabulary)

    # The cost grows by the same amount with each step of a size.
    step = _FFN_STEP if wanted.spend == "ffn" else 1
    first = getattr(model, wanted.spend) + step
    size = first + step * max(0, round((with_pauses - cost(first)) / (cost(first + step) - cost(first))))
    change = f"{wanted.spend} {getattr(model, wanted.spend)} -> {size}"
    if wanted.spend == "loops" and model.loop_layers is not None:
        change += f" of layers {model.loop_layers}"
    keys: Keys = {f"model.{wanted.spend}": size, **{f"model.{name}": value for name, value in range_of.items()}}
    return Spent(keys, 1.0, f"{change}, {cost(size) / with_pauses:.3f} of the FLOPs of {pauses}")


def _cost(model: ResolvedModel, tokens: int, vocabulary: int) -> int:
    return flops_per_token(model, vocabulary, tokens) * tokens
