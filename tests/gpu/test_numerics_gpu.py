"""A model of the 130M recipe's width on the device against fp32 on a CPU, and which kernels a training step runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics_reference import batch_of, loss_and_gradients, model_of
from small_runs import DEVICE, environment, keys

from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import initialize

SIZES = ["model.preset=130m", "model.layers=3", "data.sequence_length=512"]
SAMPLES, LENGTH = 4, 512
if DEVICE == "cpu":
    SIZES = [*SIZES, "model.layers=2", "model.hidden=128", "model.heads=4", "model.ffn=320"]
    SAMPLES, LENGTH = 2, 64
# Of the loss, and of a gradient's norm: what rounding to 8 bits of mantissa leaves over a few layers.
LOSS_GAP = {"fp32": 1e-5, "bf16": 2e-3}
GRADIENT_GAP = {"fp32": 1e-4, "bf16": 0.1}


@pytest.fixture(scope="module")
def given() -> dict:
    """Keys, weights that bf16 holds, and a batch."""
    with initialize(ParallelSection()):
        model = model_of([*SIZES, "engine.precision=bf16", "engine.kernels=plain"])
        weights = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    return {"overrides": SIZES, "weights": weights, "batch": batch_of(SAMPLES, LENGTH)}


@pytest.fixture(scope="module")
def reference(given, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Loss and gradients in fp32 on the CPU, in a process that sees no GPU."""
    folder: Path = tmp_path_factory.mktemp("reference")
    torch.save(given, folder / "given.pt")
    script = Path(__file__).with_name("numerics_reference.py")
    cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
    subprocess.run(
        [sys.executable, script, folder / "given.pt", folder / "found.pt"],
        env={**environment(), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": cores},
        check=True,
        timeout=90,
    )
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["plain", "triton", "compiled"])
def test_loss_and_gradients_are_those_of_a_cpu(given, reference, kernels, precision, figures, request):
    if kernels != "plain":
        request.getfixturevalue("cuda")
    with initialize(ParallelSection()):
        model = model_of([*SIZES, f"engine.precision={precision}", f"engine.kernels={kernels}"])
        assert next(model.parameters()).device.type == DEVICE
        found = loss_and_gradients(model, given["weights"], given["batch"])
    gaps = {
        name: float((value - reference[name]).norm() / reference[name].norm())
        for name, value in found.items()
        if name != "loss"
    }
    worst = max(gaps, key=gaps.__getitem__)
    loss, expected = float(found["loss"]), float(reference["loss"])
    figures(loss=loss, reference_loss=expected, gradient_gaps=gaps)
    figures.line(
        f"numerics: {kernels} {precision}: loss {loss:.6f}, on a CPU {expected:.6f} nats; "
        f"gradients within {gaps[worst]:.1e} ({worst})"
    )
    assert all(value.isfinite().all() for value in found.values())
    assert abs(loss - expected) / expected < LOSS_GAP[precision]
    assert gaps[worst] < GRADIENT_GAP[precision]


def test_which_kernels_a_step_runs(corpus, tmp_path, figures):
    """Attention without a matrix of scores, AdamW in one kernel for many tensors, RMSNorm in one."""
    from torch.profiler import ProfilerActivity, profile

    from pause_megatron.config.load import load
    from pause_megatron.train.pretrain import pretrain

    more = ["engine.precision=bf16", "train.steps=3", "validation.every=0", "model.hidden=256"]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities) as recording:
        assert pretrain(load(recipe="tiny-pause", overrides=keys(corpus, tmp_path, *more))) == 0
    averages = recording.key_averages()
    names = {event.key for event in averages}
    device = {event.key: event.count for event in averages if event.device_type == torch.autograd.DeviceType.CUDA}
    operators = sorted(name for name in names if name.startswith(("aten::_", "pause_megatron::")))
    figures(operators=operators, device_kernels=device)

    def ran(*parts: str) -> list[str]:
        return [name for name in names if all(part in name for part in parts)]

    attention = ran("aten::_scaled_dot_product", "_attention")
    figures.line(f"numerics: attention by {', '.join(sorted(name.removeprefix('aten::') for name in attention))}")
    assert ran("aten::_scaled_dot_product", "backward") and not ran("_scaled_dot_product_attention_math")
    assert ran("aten::_fused_adamw")
    if DEVICE == "cuda":
        assert ran("flash") or ran("cudnn")
        assert ran("aten::_fused_rms_norm") and ran("aten::_fused_rms_norm_backward")
        for operator in ("rotate", "swiglu", "swiglu_backward", "cross_entropy_"):
            assert ran(f"pause_megatron::{operator}"), operator
        for kernel in ("_rotate_kernel", "_swiglu_kernel", "_swiglu_backward_kernel", "_cross_entropy_kernel"):
            assert kernel in device, kernel
