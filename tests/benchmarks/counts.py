"""P11: kernels and bytes of a micro-batch, plain and fused, and the MFU that `plan` predicts from them (P10).

python -m tests.benchmarks.counts

Counted on fake CUDA tensors (`support/fake_cuda.py`), on a CPU; nothing here was measured on a GPU. A layer is the
difference of two layers and one; a micro-batch is the rest of one layer, and all layers. The fused kernels want triton.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.counting import Counts
from support.fake_cuda import TEXT_SIZE, Case, count

from pause_megatron.config.load import load
from pause_megatron.plan import GPUS, Cluster, Plan, make_plan
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.roofline import computing
from pause_megatron.plan.work import step_work

MODELS = {"130M, micro 16": ("130m", 16), "1B, micro 16": ("1b", 16), "1B, micro 4": ("1b", 4)}
FORMS = {
    "plain, head_chunk 1024": ("engine.kernels=plain", "model.head_chunk=1024"),
    "plain, by memory": ("engine.kernels=plain", "model.head_chunk=null"),
    "fused, head_chunk 1024": ("engine.kernels=triton", "model.head_chunk=1024"),
    "fused, by memory": ("engine.kernels=triton", "model.head_chunk=null"),
}
STEP_WINDOWS = 64  # of one GPU


def keys(preset: str, micro: int, form: str) -> tuple[str, ...]:
    """Overrides of a model in a form."""
    return (
        *(f"model.preset={preset}", f"batch.micro_size={micro}", f"batch.global_size={STEP_WINDOWS}"),
        *("data.sequence_length=2048", "pause.rate=0.1", "engine.zero_stage=1"),
        *FORMS[form],
    )


def counted(preset: str, micro: int, form: str) -> tuple[Counts, Counts, int]:
    """Of a layer, of all else, and how many layers there are."""
    given = keys(preset, micro, form)
    one, two = (count(Case((*given, f"model.layers={layers}"))) for layers in (1, 2))
    layer = two - one
    return layer, one - layer, load(overrides=list(given)).model.layers


def table_of_counts() -> None:
    """Print counts before and after."""
    columns = (
        *("micro-batch, forward and backward", "kernels a layer", "GB a layer", "GB else"),
        *("bytes a logit, head's weight gradient included", "kernels in all", "GB in all"),
        *("TFLOP products", "TFLOP attention"),
    )
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, (preset, micro) in MODELS.items():
        for form in FORMS:
            layer, rest, layers = counted(preset, micro, form)
            layout = Layout.of(load(overrides=list(keys(preset, micro, form))), 1, TEXT_SIZE)
            logits = layout.target_rows * layout.rows
            head = rest.bytes - step_work(layout).ends.bytes
            print(
                f"| {name}, {form} | {layer.kernels} | {layer.bytes / 1e9:.2f} | {rest.bytes / 1e9:.2f} | "
                f"{head / logits:.1f} | {layers * layer.kernels + rest.kernels:,} | "
                f"{(layers * layer.bytes + rest.bytes) / 1e9:.1f} | "
                f"{(layers * layer.product_flops + rest.product_flops) / 1e12:.1f} | "
                f"{(layers * layer.attention_flops + rest.attention_flops) / 1e12:.1f} |",
                flush=True,
            )


def mfu_if_gradients_are_held(plan: Plan) -> float:
    """MFU without DeepSpeed's `immediate_grad_update`."""
    engine = {**plan.layout.engine, "bf16": {"enabled": True, "immediate_grad_update": False}}
    parts = computing(replace(plan.layout, engine=engine), plan.cluster.gpu, plan.assumptions)
    return plan.time.model_flops / (parts.seconds * plan.cluster.gpu.peak_flops)


def table_of_mfu() -> None:
    """Print what follows for one GPU."""
    columns = (
        *(f"predicted MFU, one GPU, {STEP_WINDOWS} windows a step", "GPU", *FORMS, "and gradients let go of at once"),
        "of the last: products, attention, memory, optimizer, waiting",
    )
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, (preset, micro) in MODELS.items():
        for gpu in ("h100", "h200"):
            plans = [
                make_plan(
                    load(overrides=list(keys(preset, micro, form))), Cluster(GPUS[gpu], 1, 1), text_size=TEXT_SIZE
                )
                for form in FORMS
            ]
            last = plans[-1]
            held = [mfu_if_gradients_are_held(plan) for plan in plans]
            parts = last.time.parts
            shares = ", ".join(
                f"{getattr(parts, part) / parts.seconds:.0%}"
                for part in ("products", "attention", "memory", "update", "waiting")
            )
            cells = " | ".join(
                f"{mfu:.1%}{'' if plan.fits else ' (no room)'}" for mfu, plan in zip(held, plans, strict=True)
            )
            print(f"| {name} | {gpu} | {cells} | {last.computing_mfu:.1%} | {shares} |")


if __name__ == "__main__":
    table_of_counts()
    print()
    table_of_mfu()
