"""megatron-core's own GPTModel on ranks: it saves checkpoints as Megatron-LM does, loads them, and computes logits."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SIZES = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
LENGTH = 24


def arguments(rows: int, tensor: int, **changes: Any) -> argparse.Namespace:
    """Arguments of a Llama-like GPT as Megatron-LM's parser names them, among others that no model depends on."""
    import signal

    from megatron.core.transformer.enums import AttnBackend

    values: dict[str, Any] = {
        **SIZES,
        "group_query_attention": True,
        "kv_channels": 8,
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "init_method_std": 0.02,
        "num_experts": None,
        "mtp_num_layers": None,
        "make_vocab_size_divisible_by": 8,
        "padded_vocab_size": rows,
        "tensor_model_parallel_size": tensor,
        "attention_backend": AttnBackend.auto,
        "exit_signal": signal.SIGTERM,
        "params_dtype": torch.float32,
        "bf16": False,
    }
    return argparse.Namespace(**{**values, **changes})


@contextlib.contextmanager
def groups(tensor: int) -> Iterator[None]:
    """Process groups of a size, on gloo."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection(tensor=tensor), device="cpu"):
        yield


def gpt(args: argparse.Namespace, rows: int | None = None, **stage: bool) -> Any:
    """The GPTModel that Megatron-LM builds from arguments, with its layers for CPUs."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        ffn_hidden_size=args.ffn_hidden_size,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        window_size=getattr(args, "window_size", None),
        window_attn_skip_freq=getattr(args, "window_attn_skip_freq", None),
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=getattr(args, "pipeline_model_parallel_size", 1) if stage else 1,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        init_method_std=0.2,
    )
    spec = get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm)
    torch.manual_seed(11)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=rows or args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=getattr(args, "use_rope_scaling", False),
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        **stage,
    ).eval()


def fill(model: Any) -> None:
    """Give every parameter values that a mix-up would change, equal on all ranks where they hold the same."""
    for name, parameter in model.named_parameters():
        seed = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
        whole = torch.randn(parameter.shape, generator=seed) * 0.2
        if getattr(parameter, "tensor_model_parallel", False):
            rank = torch.Generator().manual_seed(seed.initial_seed() + 7 * (1 + torch.distributed.get_rank()))
            whole = torch.randn(parameter.shape, generator=rank) * 0.2
        parameter.data.copy_(whole + ("norm" in name))


@torch.no_grad()
def logits(model: Any, tokens: list[list[int]], live: int) -> torch.Tensor:
    """Logits of the live ids, gathered over tensor-parallel ranks."""
    ids = torch.tensor(tokens)
    length = ids.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), diagonal=1)
    positions = torch.arange(length).expand_as(ids)
    with on_the_cpu():
        return model(ids, positions, mask, runtime_gather_output=True)[..., :live].float()


def load_dist(folder: str, tensor: int, tokens: list[list[int]], live: int, rows: int | None = None) -> torch.Tensor:
    """What megatron-core's own model computes after megatron-core's own load, on one rank."""
    from megatron.core import dist_checkpointing

    with groups(tensor):
        args = dist_checkpointing.load_common_state_dict(folder)["args"]
        args.tensor_model_parallel_size = tensor
        model = gpt(args, rows)
        fill(model)
        content = dist_checkpointing.load_content_metadata(folder)
        state = {"model": model.sharded_state_dict(metadata=with_group(content))}
        loaded = dist_checkpointing.load(state, folder)  # as Megatron-LM does by default; a missing key is an error
        model.load_state_dict(loaded["model"])
        return logits(model, tokens, live)


def with_group(content: dict[str, Any] | None) -> dict[str, Any]:
    """Content metadata as Megatron-LM hands it to a model."""
    from megatron.core import parallel_state

    return {**(content or {}), "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def save_both(root: str, tensor: int, tokens: list[list[int]], live: int, changes: dict[str, Any]) -> torch.Tensor:
    """Write one model as torch_dist and as mp_rank folders, and return its logits."""
    with groups(tensor):
        args = arguments(-(-live // (8 * tensor)) * 8 * tensor, tensor, **changes)
        model = gpt(args)
        fill(model)
        _save(Path(root), model, args, f"mp_rank_{torch.distributed.get_rank():02d}")
        return logits(model.float(), tokens, live)


def save_stages(root: str, tokens: list[list[int]], live: int, changes: dict[str, Any]) -> torch.Tensor:
    """Write one model of two pipeline stages, as `save_both`, and return its logits, which the last stage has."""
    from megatron.core import parallel_state

    with groups(1), mock.patch.object(torch.Tensor, "cuda", lambda self: self):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(1, 2)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        args = arguments(-(-live // 8) * 8, 1, num_layers=4, pipeline_model_parallel_size=2, **changes)
        model = gpt(args, pre_process=stage == 0, post_process=stage == 1)
        fill(model)
        if not args.untie_embeddings_and_output_weights:  # the last stage has a copy
            torch.distributed.broadcast(model.shared_embedding_or_output_weight().data, 0)
        _save(Path(root), model, args, f"mp_rank_00_{stage:03d}")
        hidden = torch.empty(len(tokens[0]), len(tokens), args.hidden_size)
        if stage == 0:
            hidden = logits(model, tokens, args.hidden_size)
        torch.distributed.broadcast(hidden, 0)
        if stage == 1:
            model.set_input_tensor(hidden)
            return logits(model, tokens, live)
        return hidden


def _save(root: Path, model: Any, args: argparse.Namespace, name: str) -> None:
    """Write the model of this rank as Megatron-LM does, as torch_dist and under a name of a rank."""
    from megatron.core import dist_checkpointing

    folder = root / "dist" / "iter_0000100"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("100")
    torch.distributed.barrier()
    if args.bf16:
        model.bfloat16()
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 100}
    apart = getattr(args, "singleton", False)
    content = {"singleton_local_shards": apart, "chained_optim_avoid_prefix": True}
    state = {**common, "model": model.sharded_state_dict(metadata=with_group(content))}
    with may_have_children():
        dist_checkpointing.save(state, str(folder), content_metadata=content)
    legacy = root / "legacy" / "iter_0000100" / name
    legacy.mkdir(parents=True)
    state = {**common, "model": model.state_dict_for_save_checkpoint(), "rng_state": [{"np": _numpy_state()}]}
    torch.save(state, legacy / "model_optim_rng.pt")


@contextlib.contextmanager
def may_have_children() -> Iterator[None]:
    """Let this process, a daemon of the pool without a GPU, start those that megatron-core writes files with."""
    settings = multiprocessing.current_process()._config  # there is no public way for a running process
    daemon = settings.get("daemon")
    settings["daemon"] = False
    try:
        with mock.patch.object(torch.cuda, "synchronize", lambda *_: None):  # called without asking for a device
            yield
    finally:
        settings["daemon"] = daemon


def _numpy_state() -> Any:
    import numpy as np

    return np.random.RandomState(1).get_state()


def load_legacy(folder: str, tensor: int, tokens: list[list[int]], live: int) -> torch.Tensor:
    """What megatron-core's own model computes from the mp_rank folders of an export, on one rank."""
    with groups(tensor):
        rank = torch.distributed.get_rank()
        state = torch.load(Path(folder) / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=False)
        model = gpt(state["args"])
        names = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
        names["mlp.linear_fc1.layer_norm_weight"] = "pre_mlp_layernorm.weight"
        weights = state["model"]
        for fused, local in names.items():
            weights = {name.replace(fused, local): value for name, value in weights.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.endswith("_extra_state") for name in missing), (missing, unexpected)
        return logits(model, tokens, live)


def code(path: Path) -> None:
    """A pickle that would run code, as a .pt file."""
    import os

    class Runs:
        def __reduce__(self):
            return os.system, ("echo ran",)

    torch.save({"args": Runs()}, path)


def index_with_code(path: Path) -> None:
    """A `.metadata` that would run code."""
    import os
    import pickle

    class Runs:
        def __reduce__(self):
            return os.system, ("echo ran",)

    path.write_bytes(pickle.dumps(Runs()))


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Let optimizers and windows of megatron-core, which name the device "cuda" and compare types with it, run here."""
    tensor, ones, kind = torch.tensor, torch.ones, torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = kind(self, *args, **options)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    def on_cpu(make: Any) -> Any:
        def made(*values: Any, **options: Any) -> torch.Tensor:
            return make(*values, **({**options, "device": "cpu"} if options.get("device") == "cuda" else options))

        return made

    with (
        mock.patch.object(torch, "tensor", on_cpu(tensor)),
        mock.patch.object(torch, "ones", on_cpu(ones)),
        mock.patch.object(torch.Tensor, "type", cuda_type),
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
    ):
        yield


def load_optimizer(folder: str, tensor: int) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Weights, fp32 weights and moments of each parameter after megatron-core's distributed optimizer loaded them."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    with groups(tensor):
        common = dist_checkpointing.load_common_state_dict(folder)
        saved = common["optimizer"]["optimizer"]["param_groups"][0]
        model = gpt(common["args"])
        fill(model)
        wrapped = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False),
            module=model,
        )
        settings = OptimizerConfig(
            optimizer="adam", lr=saved["max_lr"], min_lr=saved["min_lr"], weight_decay=saved["weight_decay"]
        )
        settings.use_distributed_optimizer = True
        with on_the_cpu():
            optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
            inner = getattr(optimizer, "chained_optimizers", [optimizer])[0]
            for group in inner.optimizer.param_groups:  # torch's Adam has no state before its first step
                for values in group["params"]:
                    values.grad = torch.zeros_like(values)
            inner.optimizer.step()
            content = with_group(dist_checkpointing.load_content_metadata(folder))
            state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=content)}
            state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True, metadata=content)
            loaded = dist_checkpointing.load(state, folder)
            model.load_state_dict(loaded["model"])
            # The fused Adam of GPUs has its step in a group, as the checkpoint; torch's has it beside the moments.
            put, step = inner._set_main_param_and_optimizer_states, torch.tensor(float(saved["step"]))
            with mock.patch.object(
                inner,
                "_set_main_param_and_optimizer_states",
                lambda parameter, values: put(parameter, {"step": step, **values}),
            ):
                optimizer.load_state_dict(loaded["optimizer"])
        found: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            kept = inner._get_main_param_and_optimizer_states(parameter)
            found[name] = {
                key: kept[key].detach().reshape(parameter.shape).clone() for key in ("param", "exp_avg", "exp_avg_sq")
            }
            found[name]["weight"] = parameter.detach().clone()
        return found


def load_as_megatron_lm(folder: str, flags: list[str], tokens: list[list[int]], live: int) -> torch.Tensor:
    """Logits after Megatron-LM's own arguments, model builder and load_checkpoint, which megatron-core 0.19 ships."""
    import sys

    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import checkpointing, global_vars
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    cpu = "--transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion --no-rope-fusion"
    cpu += " --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-persist-layer-norm"
    run = f"--micro-batch-size 1 --train-iters 1 --lr 0.001 --load {folder} --use-checkpoint-args".split()
    with (
        groups(1),
        on_the_cpu(),
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", *run, *cpu.split(), *flags]),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
    ):
        args = parse_args()
        args.rank, args.world_size = 0, 1
        args, _ = checkpointing.load_args_from_checkpoint(args)
        validate_args(args)
        global_vars.set_global_variables(args, build_tokenizer=False)
        try:
            model = GPTModelBuilder(gpt_config_from_args(args)).build_model(
                ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True
            )
            checkpointing.load_checkpoint([model], None, None)
            return logits(model.eval(), tokens, live)
        finally:
            global_vars.destroy_global_vars()
