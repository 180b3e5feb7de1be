"""Adam state of an export, in the layout `fully_reshardable` of megatron-core's distributed optimizer.

Each parameter has three tensors of its own shape: the fp32 weights and both moments. Settings of the optimizer (groups,
step) are in common.pt.
"""

from __future__ import annotations

from typing import Any

from pause_megatron.checkpoint.format import ADAM_STATE
from pause_megatron.hf.checkpoint import NativeCheckpoint
from pause_megatron.megatron_lm.dist_writer import StackedTensor
from pause_megatron.megatron_lm.native import stacked_tensors

PREFIX = "optimizer.state."
KINDS = dict(zip(ADAM_STATE, ("param", "exp_avg", "exp_avg_sq"), strict=True))
"""Names in megatron-core of the native kinds of values."""


def optimizer_tensors(checkpoint: NativeCheckpoint, rows: int) -> list[StackedTensor]:
    """Return the tensors of the optimizer's state.

    Args:
        checkpoint: The checkpoint to export.
        rows: Vocabulary rows, padding included.
    """
    return [
        tensor for key, kind in KINDS.items() for tensor in stacked_tensors(checkpoint, rows, key, f"{PREFIX}{kind}.")
    ]


def optimizer_common(checkpoint: NativeCheckpoint) -> dict[str, Any]:
    """Return what common.pt says about the optimizer and the learning-rate schedule.

    Args:
        checkpoint: The checkpoint to export.
    """
    settings, step = checkpoint.config.optim, checkpoint.reader.manifest.optimizer_step
    smallest = settings.lr * settings.min_lr_fraction
    group = {
        "lr": settings.lr,
        "max_lr": settings.lr,
        "min_lr": smallest,
        "bias_correction": True,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "step": step,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
    }
    decayed, plain = ({**group, "wd_mult": wd, "weight_decay": settings.weight_decay * wd} for wd in (1.0, 0.0))
    samples = checkpoint.reader.manifest.step * checkpoint.config.batch.global_size
    return {
        "optimizer": {
            "optimizer": {"param_groups": [decayed, plain]},
            "param_state_sharding_type": "fully_reshardable",
        },
        "opt_param_scheduler": {
            "max_lr": settings.lr,
            "lr_warmup_steps": 0,
            "num_steps": samples,
            "lr_decay_style": "cosine",
            "lr_decay_steps": max(samples, 1),
            "min_lr": smallest,
            "start_wd": settings.weight_decay,
            "end_wd": settings.weight_decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": max(samples, 1),
        },
    }
