"""Model configurations: a native model to a Hugging Face `config.json`, and back with a check of every option."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pause_megatron.config.families import FAMILIES, Family
from pause_megatron.config.schema import ResolvedModel
from pause_megatron.errors import CheckpointError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_READ = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("attention_bias", "mlp_bias", "initializer_range", "sliding_window", "use_sliding_window"),
    }
)
"""Keys that decide what a model computes and for how many tokens. A missing key has the default of transformers."""


@dataclass(frozen=True)
class Architecture:
    """Content of a `config.json` in native terms.

    Attributes:
        family: "llama", "mistral" or "qwen2".
        model: Sizes of the model.
        rows: Rows of the embedding.
        sequence_length: Longest window for which the native model computes the same.
        pause: The folder's "pause" entry, which exports of this package have; None without one.
        dtype: Type of the weights, "fp32", "bf16" or "fp16"; None without the key.
    """

    family: str
    model: ResolvedModel
    rows: int
    sequence_length: int
    pause: Mapping[str, Any] | None
    dtype: str | None


def config_json(
    model: ResolvedModel,
    *,
    family: Family,
    live_rows: int,
    sequence_length: int,
    dtype: str,
    special_ids: Mapping[str, int | list[int] | None],
    pause: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the `config.json` of a plain LlamaForCausalLM or Qwen2ForCausalLM.

    A looped model is a plain model of layers x loops layers; "loops" notes how often the weights repeat.

    Args:
        model: Sizes of the model.
        family: "llama" or "qwen2".
        live_rows: Rows of the embedding: text and pauses, no padding.
        sequence_length: Becomes max_position_embeddings.
        dtype: "fp32", "bf16" or "fp16".
        special_ids: Ids by role: "eos" (one or several), and "bos" and "pad" where they exist.
        pause: The "pause" entry; transformers keeps keys that it does not know.
    """
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": live_rows,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        # transformers 5 reads rope_parameters; older releases and other programs read rope_theta.
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
        **{f"{role}_token_id": special_ids.get(role) for role in ("bos", "eos", "pad")},
        "pause": dict(pause),
    }
    if family.model_type == "llama":
        config |= {"head_dim": model.channels, "attention_bias": model.qkv_bias, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False}
    if model.loops > 1:
        config["loops"] = model.loops
    return config


def read_architecture(config: Mapping[str, Any], where: str, sequence_length: int | None = None) -> Architecture:
    """Return the native model that computes what a `config.json` describes.

    Args:
        config: Content of the file.
        where: Names the file in messages.
        sequence_length: Longest window; None for max_position_embeddings.

    Raises:
        CheckpointError: Custom code, another architecture, or an option that the native model lacks. The message has
            the key, the expected and the actual value.
    """
    return _ConfigReader(config, where).read(sequence_length)


class _ConfigReader:
    """Reader of one config.json, key by key."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where
        self._assumed: frozenset[str] = frozenset()

    def read(self, sequence_length: int | None) -> Architecture:
        family = self._family()
        defaults = _defaults(family)
        self._assumed = frozenset(defaults) - self._config.keys()
        self._config = {**defaults, **self._config}
        self._refuse_options(family)
        heads, hidden = self._size("num_attention_heads"), self._size("hidden_size")
        self._expect("head_dim", self._config.get("head_dim"), (None, hidden // heads))
        if hidden % (2 * heads):
            raise self._wrong("hidden_size", f"a multiple of 2 x num_attention_heads = {2 * heads}", hidden)
        kv_heads = self._size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._wrong("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
        model = ResolvedModel(
            preset=None,
            layers=self._size("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            ffn=self._size("intermediate_size"),
            tied=self._flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or (family == "llama" and self._flag("attention_bias")),
            rope_base=self._rope_base(),
            norm_eps=self._number("rms_norm_eps", 1e-6),
            init_std=self._number("initializer_range", 0.02),
        )
        length = self._size("max_position_embeddings") if sequence_length is None else sequence_length
        self._check_window(family, length)
        native_dtypes = {name: key for key, name in DTYPES.items()}
        dtype = native_dtypes.get(str(self._config.get("dtype") or self._config.get("torch_dtype")))
        pause = self._config.get("pause")
        pause = pause if isinstance(pause, Mapping) else None
        return Architecture(family, model, self._size("vocab_size"), length, pause, dtype)

    def _family(self) -> str:
        for key in ("auto_map", "custom_generate", "trust_remote_code"):
            if self._config.get(key):
                raise CheckpointError(
                    f"{self._where}: {key} requires code from the folder, which is never executed. "
                    "If the model is a plain Llama, Mistral or Qwen2, remove the key"
                )
        family = self._config.get("model_type")
        if family not in FAMILIES:
            raise self._wrong("model_type", f"one of {', '.join(FAMILIES)}", family)
        self._expect("architectures", self._config.get("architectures"), (None, [FAMILIES[family].architecture]))
        return family

    def _refuse_options(self, family: str) -> None:
        get = self._config.get
        self._expect("hidden_act", get("hidden_act", "silu"), ("silu", "swish"))
        self._expect("quantization_config", get("quantization_config"), (None,))
        self._expect("mlp_bias", get("mlp_bias", False), (False,))
        for key in ("attention_dropout", "residual_dropout"):
            self._expect(key, get(key) or 0, (0,))
        self._expect("partial_rotary_factor", get("partial_rotary_factor", 1), (1,))

    def _rope_base(self) -> float:
        parameters: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            record = self._config.get(key) or {}
            if not isinstance(record, Mapping):
                raise self._wrong(key, "a group of keys, or null", record)
            kind = record.get("rope_type", record.get("type", "default"))
            if kind != "default" or record.get("partial_rotary_factor", 1) != 1:
                raise self._wrong(key, "plain rotary positions (type default): the native model has no scaling", record)
            parameters |= record
        return self._number("rope_theta", 10000.0, parameters.get("rope_theta", self._config.get("rope_theta")))

    def _check_window(self, family: str, length: int) -> None:
        positions, window = self._size("max_position_embeddings"), self._config.get("sliding_window")
        if not 8 <= length <= positions:
            raise self._wrong(
                "max_position_embeddings", f"at least the {length} positions requested (8 or more)", positions
            )
        if family == "qwen2" and not self._flag("use_sliding_window"):
            window = None
        if family != "llama" and window is not None:
            window = self._size("sliding_window")
            if window < length:
                assumed = ", the default of transformers for a missing key" if "sliding_window" in self._assumed else ""
                raise CheckpointError(
                    f"{self._where}: sliding_window: expected null or at least {length} (the native model attends to "
                    f"the whole window), got {window}{assumed}. For windows of up to {window} tokens, pass "
                    f"--sequence-length {window}"
                )
        kinds = self._config.get("layer_types") or []
        if not isinstance(kinds, (list, tuple)):
            raise self._wrong("layer_types", "a list of layer types, or null", kinds)
        others = [kind for kind in kinds if kind != "full_attention" and (kind != "sliding_attention" or not window)]
        layers = self._size("num_hidden_layers")
        if others or len(kinds or range(layers)) != layers:
            raise self._wrong("layer_types", f"full_attention in each of num_hidden_layers = {layers}", kinds)

    def _expect(self, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if value not in allowed:
            raise self._wrong(key, " or ".join(map(repr, allowed)), value)

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(key, "a whole number above 0 and below 2**31", value)
        return value

    def _number(self, key: str, default: float, value: Any = None) -> float:
        value = self._config.get(key) if value is None else value
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._wrong(key, "a number above 0", value)
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self._config.get(key, False)
        if type(value) is not bool:
            raise self._wrong(key, "true or false", value)
        return value

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self._where}: {key}: expected {expected}, got {str(value)[:200]!r}")


def _defaults(family: str) -> dict[str, Any]:
    """Return the defaults of transformers' configuration class, for keys that a config.json leaves out.

    A default of None follows from other keys (num_key_value_heads, head_dim).
    """
    import transformers

    cls = getattr(transformers, FAMILIES[family].architecture.replace("ForCausalLM", "Config"))
    parameters = inspect.signature(cls.__init__).parameters.items()
    defaults = {
        name: parameter.default
        for name, parameter in parameters
        if name in _READ and parameter.default is not inspect.Parameter.empty
    }
    default_config = cls().to_dict()
    theta = (default_config.get("rope_parameters") or default_config).get("rope_theta")
    return {**defaults, **({} if theta is None else {"rope_theta": theta})}
