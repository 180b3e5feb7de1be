"""Features of megatron-core's GPTModel that PauseGPTModel does not support."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from pause_megatron.errors import ConfigError

_POSITIONS = ("rope", "learned_absolute", "none")


def check_supported(
    config: TransformerConfig,
    position_embedding_type: str,
    fp16_loss: bool,
    mtp_block_spec: object,
    given_positions: bool,
) -> None:
    """Check that the arguments of GPTModel ask for no feature that PauseGPTModel does not have.

    Args:
        config: As GPTModel.
        position_embedding_type: As GPTModel.
        fp16_loss: `fp16_lm_cross_entropy` of GPTModel.
        mtp_block_spec: As GPTModel.
        given_positions: As PauseGPTModel.

    Raises:
        ConfigError: Names the feature.
    """
    if position_embedding_type not in _POSITIONS:
        raise ConfigError(f"position_embedding_type: expected one of {_POSITIONS}, got {position_embedding_type!r}")
    if fp16_loss:
        raise ConfigError("fp16_lm_cross_entropy: expected False, got True: the loss of PauseGPTModel is fp32")
    if mtp_block_spec is not None:
        raise ConfigError("mtp_block_spec: expected None, got a spec: PauseGPTModel has no multi-token prediction")
    for name in ("multi_latent_attention", "mtp_num_layers", "use_mup", "defer_embedding_wgrad_compute"):
        if value := getattr(config, name, None):
            raise ConfigError(f"{name}: expected it to be off for PauseGPTModel, got {value!r}")
    if given_positions and config.context_parallel_size > 1:  # its ranks rotate by the order of tokens
        raise ConfigError(f"context_parallel_size: expected 1 with given_positions, got {config.context_parallel_size}")


def check_loops(loops: int, looped: range | None, config: TransformerConfig, *, whole: bool) -> None:
    """Check that the layers can run several times.

    Args:
        loops: How many times.
        looped: Numbers of the layers that repeat; None: all.
        config: As GPTModel.
        whole: Whether this pipeline stage has both the embedding and the head.

    Raises:
        ConfigError: No range of layers, pipeline parallelism, or recomputation that megatron-core runs by layer number.
    """
    if looped is not None and not (looped.step == 1 and 0 <= looped.start < looped.stop <= config.num_layers):
        raise ConfigError(f"loop_layers: expected a range within 0..{config.num_layers - 1}, got {looped}")
    if loops < 1:
        raise ConfigError(f"loops: expected 1 or more, got {loops}")
    if loops > 1 and not whole:
        raise ConfigError(f"loops: expected 1 under pipeline parallelism, got {loops}")
    if loops > 1 and config.recompute_granularity == "full":
        raise ConfigError(
            f"loops: expected 1 with recompute_granularity='full', got {loops}; use block_spec(recompute='full')"
        )
