"""Options that Megatron-LM needs on its command line beside `--use-checkpoint-args`.

`--use-checkpoint-args` copies only some of a checkpoint's arguments. Of the others, a model built without them loads
the checkpoint without an error and computes something else.
"""

from __future__ import annotations

import argparse

_EPSILON, _FACTOR = 1e-5, 8.0
"""Defaults of `--norm-epsilon` and `--rope-scaling-factor`."""


def needed_flags(args: argparse.Namespace) -> list[str]:
    """Return the words that Megatron-LM's command line needs for the model of an export.

    Args:
        args: Arguments of the export, from `write_arguments`.
    """
    flags: list[str] = []
    if args.norm_epsilon != _EPSILON:
        flags += ["--norm-epsilon", str(args.norm_epsilon)]
    if args.qk_layernorm:
        flags += ["--qk-layernorm"]
    if args.use_rope_scaling:
        flags += ["--use-rope-scaling", "--rope-scaling-factor", str(args.rope_scaling_factor)]
    if args.rotary_seq_len_interpolation_factor is not None:
        flags += ["--rotary-seq-len-interpolation-factor", str(args.rotary_seq_len_interpolation_factor)]
    if args.window_size is not None:
        flags += ["--window-size", ",".join(map(str, args.window_size))]
    if args.window_attn_skip_freq is not None:
        flags += ["--window-attn-skip-freq", str(args.window_attn_skip_freq).replace(" ", "")]
    if args.bf16:
        flags += ["--bf16"]
    if args.ckpt_format == "torch" and args.tensor_model_parallel_size > 1:
        flags += ["--tensor-model-parallel-size", str(args.tensor_model_parallel_size)]
    if args.no_save_optim:
        return [*flags, "--finetune"]
    return [*flags, "--use-distributed-optimizer", "--no-load-rng", "--override-opt_param-scheduler"]


def ignored_arguments(args: argparse.Namespace) -> list[str]:
    """Return a sentence for each argument that Megatron-LM's own model provider does not hand to the model.

    Args:
        args: Arguments of a checkpoint.
    """
    ignored = []
    factor = getattr(args, "rope_scaling_factor", None)
    if getattr(args, "use_rope_scaling", None) is True and factor not in (None, _FACTOR):
        ignored.append(("rope_scaling_factor", factor, f"computes with {_FACTOR:g}", "rope_scaling_factor"))
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if factor not in (None, 1):
        ignored.append(
            (
                "rotary_seq_len_interpolation_factor",
                factor,
                "before 0.19 computes with 1",
                "seq_len_interpolation_factor",
            )
        )
    return [
        f"args.{name} is {factor:g}, but Megatron-LM's own model provider drops it and {instead}; one that passes "
        f"{keyword}={factor:g} to GPTModel computes what this checkpoint says"
        for name, factor, instead, keyword in ignored
    ]
