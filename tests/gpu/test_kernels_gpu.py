"""Fused kernels on the device: what they compute, against fp64; whole models on them; their time against the memory's.

The cases are those of tests/numerics/test_kernels.py, where Triton's interpreter runs them, and the real sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from clock import seconds_of
from small_runs import DEVICE
from support.tiny_model import SEQ, batch, distance, take_gradients, tiny
from torch import Tensor

from pause_megatron.config.gpus import gpu_of_cuda
from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import initialize

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # a tensor-parallel group of one rank
DTYPES = [torch.float32, torch.bfloat16]
# Of the result, relative to it. A fused kernel rounds once, the plain path after every operation.
FUSED_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
PLAIN_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-5}
MODEL_ROUNDING = 1e-5  # of a whole model in fp32: sums by atomic additions have no fixed order
# tokens, heads, channels, feed-forward width, ids with pauses and padding: of 130M and of 1B
SIZES = {"130m": (16 * 2048, 12, 64, 2048, 32_128), "1b": (4 * 2048, 16, 128, 5504, 32_128)}


@pytest.fixture(params=["plain", "compiled", "triton"])
def form(request: pytest.FixtureRequest) -> str:
    """A form of the three functions that the device has. (The suite interprets and compiles them on a CPU.)"""
    if request.param != "plain":
        request.getfixturevalue("cuda")
    return request.param


def functions(form: str):
    from pause_megatron.model.kernels import load_kernels

    return load_kernels(form, DEVICE)


def error(got: Tensor, exact: Tensor, form: str) -> float:
    """How far `got` is from `exact` (fp64), in units of what rounding allows: at most 1."""
    rounding = (PLAIN_ROUNDING if form == "plain" else FUSED_ROUNDING)[got.dtype]
    allowed = rounding * exact.abs() + (1e-6 if form != "plain" else rounding) * exact.abs().max()
    return float(((got.double() - exact).abs() / allowed.clamp_min(1e-300)).max())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    result = function(x)
    return result.detach(), torch.autograd.grad(result, x, upstream.to(result))[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(form, dtype, figures):
    """Heads and channels that are no powers of two, angles alike or of each sample, slices of a projection."""
    worst = 0.0
    projection = random(9, 2, 3, 70, dtype=dtype)
    long = random(2048, 2, 16, 128, dtype=dtype)
    for x in (projection[..., :60].reshape(9, 2, 9, 20), projection[..., 20:30], long):
        for samples in (1, 2):
            half = x.shape[-1] // 2
            angles = 3 * random(x.shape[0], samples, half, seed=1)
            upstream = random(*x.shape, dtype=dtype, seed=2)
            rotate = functions(form).rotate
            got, gradient = with_gradient(lambda x, a=angles, r=rotate: r(x, a.cos(), a.sin()), x, upstream)
            cos, sin = (part.double()[:, :, None] for part in (angles.cos(), angles.sin()))

            def turned(value: Tensor, sin: Tensor, cos: Tensor = cos, half: int = half) -> Tensor:
                first, second = value.double().split(half, dim=-1)
                return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

            worst = max(worst, error(got, turned(x, sin), form), error(gradient, turned(upstream, -sin), form))
    figures(worst_in_roundings=worst)
    assert worst <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(form, dtype, figures):
    worst = 0.0
    for width in (1, 48, 1100, 5504):
        x, upstream = 2 * random(33, 2, 2 * width, dtype=dtype), random(33, 2, width, dtype=dtype, seed=1)
        got, gradient = with_gradient(functions(form).swiglu, x, upstream)
        exact = x.double().requires_grad_()
        gate, up = exact.chunk(2, dim=-1)
        result = F.silu(gate) * up
        expected = torch.autograd.grad(result, exact, upstream.double())[0]
        worst = max(worst, error(got, result.detach(), form), error(gradient, expected, form))
    figures(worst_in_roundings=worst)
    assert worst <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 50, 9000, 32_128])
def test_cross_entropy(form, dtype, columns, figures):
    """Masked columns, no rows, and without a gradient."""
    logits = 4 * random(65, columns, dtype=dtype)
    dead = [column for column in (5, 6, columns - 3, columns - 2, columns - 1) if columns > 10]
    logits[:, dead] = float("-inf")
    live = torch.tensor([column for column in range(columns) if column not in dead], device=DEVICE)
    targets = live[torch.arange(65, device=DEVICE) * 7919 % len(live)]
    scale = torch.tensor(0.37, device=DEVICE)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    expected = torch.autograd.grad(0.37 * losses.sum(), exact)[0]
    run = functions(form).cross_entropy
    got, gradient = run(logits.clone(), targets, scale, ALONE, True)
    alone, nothing = run(logits.clone(), targets, scale, ALONE, False)
    gap = float((got.double() - losses).abs().max())
    figures(loss_gap=gap, gradient_worst_in_roundings=error(gradient, expected, form))
    assert nothing is None and torch.allclose(alone, got, rtol=1e-6, atol=1e-6)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), losses.detach(), rtol=2e-6, atol=4e-6)
    assert error(gradient, expected, form) <= 1 and not gradient[:, dead].any()
    assert run(logits[:0], targets[:0], scale, ALONE, True)[0].shape == (0,)


# kv heads, pauses, softmax, head chunk, recomputation, share of targets, several documents a window
MODELS = [
    (4, 1, "keep", 7, "none", 0.9, False),
    (2, 3, "exclude", None, "none", 0.4, False),
    (2, 1, "exclude", 7, "full", 0.9, True),
    (4, 1, "keep", 1, "none", 0.3, True),
    (4, 1, "keep", None, "none", 0.0, False),
]


def run_model(form: str, precision: str, case: tuple) -> dict[str, Tensor]:
    """Losses, their sum, and gradients of one batch of a tiny model, in fp32."""
    from pause_megatron.model.variable_length import PackedSegments

    kv_heads, pauses, softmax, chunk, recompute, kept, documents = case
    model = tiny(
        **{"parallel": ParallelSection(recompute=recompute), "kernels": form, "precision": precision},
        **{"pauses": pauses, "softmax": softmax, "kv_heads": kv_heads, "head_chunk": chunk},
    )
    data, options = batch(kept, pauses=pauses), {}
    if documents:
        starts = torch.tensor([[4], [9], [SEQ]])
        segments = (torch.arange(SEQ) >= starts).int()
        data["position_ids"] = torch.arange(SEQ) - segments * starts
        options["attention_mask"] = PackedSegments.of(segments, device=DEVICE)
    data = {name: value.to(DEVICE) for name, value in data.items()}
    rows = {"target_rows": data["rows"], "targets": data["targets"]}
    out = model(data["tokens"], data["position_ids"], loss_scale=0.01, **rows, **options)
    out.loss.backward()
    found = {name: value.float() for name, value in take_gradients(model).items()}
    found["sum"] = out.sum.detach()[None]
    return {**found, "losses": out.token_losses.detach()} if kept else found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_on_them_is_the_plain_one(form, precision, figures):
    gaps = {}
    with initialize(ParallelSection()):
        for case in MODELS:
            reference = run_model("plain", "fp32", case)
            gaps[str(case)] = tuple(distance(run_model(name, precision, case), reference) for name in (form, "plain"))
    worst = max(fused for fused, _ in gaps.values())
    figures(**gaps)
    figures.line(f"kernels: {form} model in {precision}: losses and gradients within {worst:.1e} of plain fp32")
    for case, (fused, plain) in gaps.items():
        assert fused <= (MODEL_ROUNDING if precision == "fp32" else 2 * plain), case


def test_products_of_bf16_are_summed_in_fp32(cuda, figures):
    """What the LM head adds its chunks with: no rounding in between, and not slower than a product in bf16."""
    rows, columns, hidden = 4096, 32_128, 768
    left, right = random(rows, columns, dtype=torch.bfloat16).t(), random(rows, hidden, dtype=torch.bfloat16, seed=1)
    total = torch.mm(left, right, out_dtype=torch.float32)
    torch.addmm(total, left, right, out=total, out_dtype=torch.float32)
    exact = 2 * (left[:64].double() @ right.double())
    gap = float(((total[:64].double() - exact).abs() / exact.abs().max()).max())
    narrow = seconds_of(lambda: left @ right, DEVICE)
    wide = seconds_of(lambda: torch.addmm(total, left, right, out=total, out_dtype=torch.float32), DEVICE)
    figures(gap=gap, bf16_seconds=narrow, fp32_sum_seconds=wide)
    figures.line(f"kernels: addmm into fp32: {wide * 1e3:.2f} ms, bf16 product {narrow * 1e3:.2f} ms, gap {gap:.0e}")
    assert gap < 1e-4 and wide < 2 * narrow


@pytest.mark.parametrize("size", SIZES)
def test_their_time_is_that_of_the_memory(form, size, figures):
    """Bytes that must be read and written once, over the GPU's bandwidth, against the time that it takes."""
    tokens, heads, channels, ffn, columns = SIZES[size] if DEVICE == "cuda" else (64, 2, 16, 48, 130)
    run, dtype = functions(form), torch.bfloat16
    x, angles = random(tokens // 4, 4, heads, channels, dtype=dtype), random(tokens // 4, 1, channels // 2)
    cos, sin = angles.cos(), angles.sin()
    gated = random(tokens, 2 * ffn, dtype=dtype).requires_grad_()
    upstream = random(tokens, ffn, dtype=dtype)
    rows = min(tokens, 4096)
    logits, targets = random(rows, columns, dtype=dtype), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    scale = torch.tensor(1e-4, device=DEVICE)
    out = run.swiglu(gated)
    calls = {
        "rotate": (2 * 2 * x.numel(), lambda: run.rotate(x, cos, sin)),
        "swiglu": (2 * 3 * tokens * ffn, lambda: run.swiglu(gated.detach())),
        "swiglu backward": (
            2 * 5 * tokens * ffn,
            lambda: torch.autograd.grad(out, gated, upstream, retain_graph=True),
        ),
        # Its second reading of a row comes from the L2 cache.
        "cross-entropy": (2 * 2 * logits.numel(), lambda: run.cross_entropy(logits, targets, scale, ALONE, True)),
    }
    gpu = gpu_of_cuda(torch.cuda.get_device_name()) if DEVICE == "cuda" else None
    words = []
    for name, (count, call) in calls.items():
        seconds = seconds_of(call, DEVICE)
        share = count / gpu.memory_bandwidth / seconds if gpu else None
        figures(**{name: {"bytes": count, "seconds": seconds, "share_of_bandwidth": share}})
        words.append(f"{name} {seconds * 1e6:.0f} us" + (f" ({share:.0%})" if share else ""))
    sizes = size if DEVICE == "cuda" else "a few rows on a CPU,"
    figures.line(f"kernels: {sizes} {form}: {', '.join(words)}")
