"""The keys of the model and of its adapters: sizes, and the options of the families in `config.families`."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from pause_megatron.config.blend import split_words
from pause_megatron.config.layer_range import LayerOrder, layer_range
from pause_megatron.config.section import PathText, Section

OurPreset = Literal["tiny", "130m", "1b", "7b"]
PublishedPreset = Literal["llama-3.2-1b", "qwen3-0.6b", "olmo2-1b", "smollm2-135m", "qwen2.5-0.5b", "mistral-7b"]
Preset = Literal[OurPreset, PublishedPreset]
"""Names of `config.presets`."""


class ModelSection(Section):
    """A decoder of the families in `config/families.py`; what is left out comes from the preset."""

    # "from" is a keyword of Python: the attribute is `from_`, the key is model.from.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    from_: PathText | None = Field(
        None,
        alias="from",
        description="checkpoint with the initial weights (a run folder, a checkpoint, or the output of import-hf); "
        "sizes left out come from it. Optimizer state, step and data are reset",
    )
    preset: Preset | None = Field(
        "tiny",
        description="sizes, and for a published model options, of the keys of model: that are not given; null: layers, "
        "hidden and heads must be given",
    )
    layers: int | None = Field(None, ge=1, description="transformer layers")
    loops: int = Field(
        1,
        ge=1,
        le=1024,
        description="how many times a forward pass runs through the layers, or those of model.loop_layers, with the "
        "same weights; an export has as many layers as the forward pass",
    )
    loop_layers: str | None = Field(
        None,
        description="layers that model.loops repeats, a range LOW..HIGH from 0 on, both ends included; those "
        "before and after it run once; null: all",
    )
    hidden: int | None = Field(None, ge=8, description="width of the residual stream")
    heads: int | None = Field(None, ge=1, description="attention heads")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (GQA); default: model.heads")
    head_dim: int | None = Field(None, ge=2, description="channels of a head; default: model.hidden / model.heads")
    ffn: int | None = Field(
        None,
        ge=1,
        description="width of the SwiGLU feed-forward layer; default: 8/3 model.hidden, rounded up to a multiple of 64",
    )
    tied: bool | None = Field(None, description="one weight matrix for input embedding and output layer")
    qkv_bias: bool = Field(False, description="biases on queries, keys and values, as in Qwen2")
    proj_bias: bool = Field(False, description="a bias on the attention's output projection; needs model.qkv_bias")
    mlp_bias: bool = Field(False, description="biases in the feed-forward layer")
    qk_norm: Literal["head", "whole"] | None = Field(
        None,
        description="RMSNorm of queries and keys before rotation; head: over the channels of each head, as in Qwen3; "
        "whole: over all heads together, as in OLMo 2; null: none",
    )
    norm: Literal["pre", "post"] = Field(
        "pre",
        description="RMSNorm of a layer: pre: of the inputs of attention and feed-forward layer; post: of their "
        "outputs, before they are added to the residual stream, as in OLMo 2",
    )
    sliding_window: int | None = Field(
        None, ge=1, description="tokens that a token attends to, itself included, as in Mistral; null: all before it"
    )
    sliding_from: int = Field(
        0, ge=0, description="layers before this one attend without the sliding window, as max_window_layers in Qwen2"
    )
    rope_base: float = Field(10000.0, gt=0, description="base of the rotary position embedding")
    rope_scaling: Literal["linear", "llama3", "yarn"] | None = Field(
        None,
        description="rescaling of the rotary angles for longer windows; linear: all divided by model.rope_factor; "
        "llama3: low frequencies, as in Llama 3.1; yarn: YaRN (Peng et al. 2023)",
    )
    rope_factor: float = Field(1.0, ge=1, description="factor of model.rope_scaling")
    rope_original_length: int | None = Field(
        None, ge=1, description="window before the rescaling, in tokens; required by llama3 and yarn"
    )
    rope_low_freq: float = Field(
        1.0, gt=0, description="llama3: angles that turn fewer times than this in the original window are divided"
    )
    rope_high_freq: float = Field(
        4.0, gt=0, description="llama3: angles that turn more often than this in the original window stay"
    )
    rope_beta_fast: float = Field(
        32.0, gt=0, description="yarn: angles that turn more often than this in the original window stay"
    )
    rope_beta_slow: float = Field(
        1.0, gt=0, description="yarn: angles that turn fewer times than this in the original window are divided"
    )
    rope_truncate: bool = Field(True, description="yarn: whole channel numbers as bounds of the interpolation")
    rope_attention_factor: float | None = Field(
        None,
        gt=0,
        description="yarn: factor of cosines and sines; default: 0.1 ln(model.rope_factor) + 1",
    )
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    positions: int | None = Field(
        None,
        ge=8,
        description="positions that an export states, if more than data.sequence_length; an import takes its source's, "
        "so that training on shorter windows does not shorten the model",
    )
    family: Literal["llama", "qwen2", "mistral", "qwen3", "olmo2"] | None = Field(
        None, description="Hugging Face model type of an export; null: the first one that has the model's options"
    )
    attention: Literal["sdpa", "te"] = Field(
        "sdpa",
        description="attention core: torch's scaled_dot_product_attention, or Transformer Engine where installed",
    )
    vocab_multiple: int = Field(
        128, ge=1, description="multiple, times parallel.tensor, to which the vocabulary is padded"
    )
    head_chunk: int | None = Field(
        None,
        ge=1,
        description="rows of logits that exist at one time in the LM head; null: a multiple of 1024 that takes at most "
        "256 MiB on a GPU, 32 MiB on a CPU, but at least 1024",
    )


class ResolvedModel(ModelSection):
    """The model section with all sizes filled in."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=8)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    ffn: int = Field(ge=1)
    tied: bool

    @property
    def depth(self) -> int:
        """Layers that a forward pass runs through."""
        return self.layers + (self.loops - 1) * len(self.looped)

    @property
    def looped(self) -> range:
        """Numbers of the layers that `loops` repeats.

        Raises:
            ConfigError: `loop_layers` is no range of layers.
        """
        return layer_range("model.loop_layers", self.loop_layers, self.layers)

    @property
    def order(self) -> LayerOrder:
        """Numbers of the layers in the order of a forward pass; looped ones occur several times."""
        return LayerOrder(self.layers, self.looped, self.loops)

    def unrolled(self) -> ResolvedModel:
        """Return the model without loops that computes the same if its layers are copies in `order`.

        Layers without a sliding window must come before those with one, as `config.model_rules` has it.
        """
        first = sum(layer < self.sliding_from for layer in self.order)
        changes = {"layers": self.depth, "loops": 1, "loop_layers": None, "sliding_from": first}
        return self.model_copy(update=changes)

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.channels

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, as of all value heads."""
        return self.kv_heads * self.channels

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens; None where it attends to all tokens before.

        Args:
            layer: Number of the layer, from 0 on.
        """
        return self.sliding_window if layer >= self.sliding_from else None


class LoraSection(Section):
    """LoRA adapters, W x + alpha / rank B A x, for train.only=lora."""

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="scale of the adapters, times lora.rank")
    targets: tuple[str, ...] = Field(
        ("qkv", "proj", "fc1", "fc2"),
        description="adapted matrices of a layer: qkv (queries, keys and values), proj (the attention's output), fc1 "
        "(gate and up projection), fc2 (down projection)",
    )
    layers: str | None = Field(
        None, description="adapted layers, a range LOW..HIGH from 0 on, both ends included; null: all"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _split_targets(cls, value: object) -> object:
        return split_words(value.replace(",", " ") if isinstance(value, str) else value)
