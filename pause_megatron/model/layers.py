"""Layer specs of the transformer block, derived from megatron-core's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pause_megatron.errors import ConfigError
from pause_megatron.model.attention import SDPACoreAttention
from pause_megatron.model.linear import BiasedColumnParallelLinear, row_parallel
from pause_megatron.model.norm import RMSNorm, WholeKeyNorm, WholeQueryNorm
from pause_megatron.model.window import SlidingWindow


class RecomputedLayer(TransformerLayer):
    """A transformer layer with full activation recomputation: it saves only its input.

    megatron-core's own recomputation saves and restores CUDA random states; nothing here is random. It is reentrant,
    because ZeRO-3 frees parameters between the two forward passes, and non-reentrant checkpointing compares the tensors
    of both. In a looped stack (`loop`) it is not: each inner backward pass would hand DeepSpeed a part of a gradient.
    """

    repeated = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Run the layer as TransformerLayer does.

        Args:
            hidden_states: [seq, batch, hidden].
            *args: As TransformerLayer.
            **kwargs: As TransformerLayer.

        Returns:
            ([seq, batch, hidden], context).
        """
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, *args, **kwargs)
        inner = super().forward

        def run(hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return inner(hidden, *args, **kwargs)

        if not self.repeated:
            return checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False)

        def begun_by_its_output(hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
            output, context = run(hidden)
            return _Begin.apply(output), context

        # ZeRO-3 gathers and frees in hooks of the whole forward pass, so it must not stop at the last saved tensor, and
        # between both passes the saved weights have other shapes.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                begun_by_its_output,
                hidden_states,
                use_reentrant=False,
                preserve_rng_state=False,
                determinism_check="none",
            )


class _Begin(torch.autograd.Function):
    """Identity that saves a tensor, so that non-reentrant recomputation runs before the layer's backward pass begins.

    It would run at the first saved tensor otherwise, which is within a linear layer: ZeRO-3 has gathered its weight for
    the backward pass, and the recomputation would free it.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        _ = ctx.saved_tensors
        return gradient


class LoopedLayers(nn.ModuleList):
    """Layers of a block that iterate in an order of which a range repeats; their modules and names are there once.

    megatron-core's block iterates over its layers and applies the last norm afterwards.

    Args:
        layers: The layers.
        order: Their numbers in the order of a forward pass.
    """

    def __init__(self, layers: Iterable[nn.Module], order: Sequence[int]) -> None:
        super().__init__(layers)
        self.order = tuple(order)

    def __iter__(self) -> Iterator[nn.Module]:
        layers = tuple(self._modules.values())
        for number in self.order:
            yield layers[number]


def loop(block: TransformerBlock, loops: int, looped: range) -> None:
    """Make a block run through a range of its layers several times, with the same weights, and through others once.

    Args:
        block: The transformer block.
        loops: How many times.
        looped: Numbers of the layers that repeat.
    """
    count = len(block.layers)
    order = (*range(looped.start), *(tuple(looped) * loops), *range(looped.stop, count))
    block.layers = LoopedLayers(block.layers, order)
    for number, layer in enumerate(block.layers.children()):
        if isinstance(layer, RecomputedLayer):
            layer.repeated = number in looped


def use_swiglu(block: nn.Module, swiglu: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make a block's feed-forward layers call `swiglu` for activation and product.

    megatron-core's MLP calls its activation in this way under `config.use_te_activation_func`.

    Args:
        block: The transformer block.
        swiglu: [..., 2 ffn] -> [..., ffn].
    """
    for module in block.modules():
        if isinstance(module, MLP) and module.config.use_te_activation_func:
            module.activation_func = swiglu


def block_spec(
    layers: int,
    *,
    attention: Literal["sdpa", "te"] = "sdpa",
    recompute: Literal["none", "full"] = "none",
    qk_norm: Literal["head", "whole"] | None = None,
    norm: Literal["pre", "post"] = "pre",
    proj_bias: bool = False,
    mlp_bias: bool = False,
    windows: Sequence[int | None] = (),
) -> TransformerBlockSubmodules:
    """Return the spec of a Llama-like block: RMSNorm, SwiGLU, self-attention.

    Args:
        layers: Number of layers.
        attention: "sdpa": megatron-core's local linear layers with torch's attention and norm; "te": Transformer
            Engine's fused modules, which have none of the options below.
        recompute: "full" recomputes each layer in the backward pass.
        qk_norm: As `model.qk_norm`; the config then has `qk_layernorm`.
        norm: As `model.norm`.
        proj_bias: As `model.proj_bias`.
        mlp_bias: As `model.mlp_bias`.
        windows: Sliding window of each layer in tokens, None where it has none; () for none at all.

    Raises:
        ConfigError: "te" where Transformer Engine is not installed, or with an option that it does not have.
    """
    if attention == "te":
        options = {"qk_norm": qk_norm, "proj_bias": proj_bias, "mlp_bias": mlp_bias, "norm": norm == "post"}
        options["sliding_window"] = any(windows)
        if named := [f"model.{name}" for name, value in options.items() if value]:
            raise ConfigError(f"model.attention: expected sdpa with {', '.join(named)}, got 'te'")
        layer, final = _transformer_engine()
        specs = [layer] * layers
    else:
        final = RMSNorm
        plain = _local_layer(qk_norm, norm, proj_bias, mlp_bias)
        shared = {size: _with_window(plain, SlidingWindow(size)) for size in set(windows) if size is not None}
        specs = [plain if size is None else shared[size] for size in windows or (None,) * layers]
    if recompute == "full":
        for spec in specs:
            spec.module = RecomputedLayer
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=final)


def _local_layer(qk_norm: str | None, norm: str, proj_bias: bool, mlp_bias: bool) -> ModuleSpec:
    """Return the spec of a layer of megatron-core's local modules; arguments as `block_spec`."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    post = norm == "post"
    changes: dict[str, Any] = {"core_attention": SDPACoreAttention}
    if proj_bias or post:
        changes["linear_proj"] = row_parallel(bias=proj_bias, normed=post)
    if qk_norm is not None:
        whole = qk_norm == "whole"
        changes["q_layernorm"] = WholeQueryNorm if whole else RMSNorm
        changes["k_layernorm"] = WholeKeyNorm if whole else RMSNorm
    attention = _changed(layer.submodules.self_attention, **changes)
    changes = {"linear_fc2": row_parallel(bias=mlp_bias, normed=post)} if mlp_bias or post else {}
    if mlp_bias:
        changes["linear_fc1"] = BiasedColumnParallelLinear
    mlp = _changed(layer.submodules.mlp, **changes)
    outer = IdentityOp if post else RMSNorm
    return _changed(layer, self_attention=attention, mlp=mlp, input_layernorm=outer, pre_mlp_layernorm=outer)


def _with_window(layer: ModuleSpec, window: SlidingWindow) -> ModuleSpec:
    """Return the spec of a layer with a sliding window."""
    core = partial(SDPACoreAttention, window=window)
    return _changed(layer, self_attention=_changed(layer.submodules.self_attention, core_attention=core))


def _changed(spec: Any, **submodules: Any) -> Any:
    """Return a spec with other submodules. Some are partial functions since megatron-core 0.17."""
    if isinstance(spec, partial):
        return partial(spec, submodules=replace(spec.keywords["submodules"], **submodules))
    return replace(spec, submodules=replace(spec.submodules, **submodules))


def _transformer_engine() -> tuple[ModuleSpec, type]:
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        raise ConfigError(
            "model.attention: expected Transformer Engine to be installed for 'te', got none; install "
            "transformer_engine[pytorch] or use 'sdpa'"
        )
    return get_gpt_layer_with_transformer_engine_spec(), transformer_engine.TENorm
