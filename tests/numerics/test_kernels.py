"""Rotary embedding, SwiGLU and cross-entropy in one pass: what they compute, keep and compile to.

Triton's kernels run in its interpreter (TRITON_INTERPRET=1, set in conftest.py), and are compiled for GPUs besides.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.compiler import needs_compiler
from support.ranks import run_on_ranks
from support.tiny_model import BATCH, SEQ, batch, distance, take_gradients, tiny

from pause_megatron.config.schema import ParallelSection
from pause_megatron.errors import ConfigError
from pause_megatron.model.kernels import Kernels, choose_implementation, load_kernels
from pause_megatron.model.kernels.fused import Primitives, torch_primitives

TOPOLOGIES = [(1, False), (2, False), (2, True)]
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # a tensor-parallel group of one rank
DTYPES = [torch.float32, torch.bfloat16]
# One rounding of a result, relative to it; in fp32 also that of exp, sigmoid and sums. The interpreter cuts to bf16, a
# GPU rounds to the nearest: half of that.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
FORMS = ["triton", "torch"]  # "torch" is what "compiled" compiles


def functions(form: str) -> Primitives | Kernels:
    return torch_primitives() if form == "torch" else load_kernels(form, "cpu")


def close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `got` is `exact` (fp64) but for one rounding of each element and a little of the largest."""
    error = (got.double() - exact).abs()
    return bool((error <= ROUNDING[dtype] * exact.abs() + 1e-6 * exact.abs().max()).all())


def with_gradient(function, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    result = function(x)
    return result.detach(), torch.autograd.grad(result, x, upstream.to(result))[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_rounds_once(form, dtype):
    """Heads and channels that are no powers of two; angles of all samples alike, or of each; slices of a projection."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(9, 2, 3, 70, generator=generator).to(dtype)
    queries, key = projection[..., :60].reshape(9, 2, 9, 20).contiguous(), projection[..., 20:30]
    for x, samples in itertools.product((queries, key), (1, 2)):
        half = x.shape[-1] // 2
        angles = 3 * torch.randn(9, samples, half, generator=generator)
        upstream = torch.randn(x.shape, generator=generator).to(dtype)
        got, gradient = with_gradient(lambda x, a=angles: functions(form).rotate(x, a.cos(), a.sin()), x, upstream)
        turn = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[:, :, None]

        def turned(value: torch.Tensor, by: torch.Tensor, half: int = half) -> torch.Tensor:
            pairs = torch.complex(value[..., :half].double(), value[..., half:].double()) * by
            return torch.cat((pairs.real, pairs.imag), dim=-1)

        assert got.dtype == gradient.dtype == dtype
        assert close(got, turned(x, turn), dtype)
        assert close(gradient, turned(upstream, turn.conj()), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_rounds_once_and_keeps_only_its_input(form, dtype):
    generator = torch.Generator().manual_seed(1)
    for width in (1, 48, 1100):  # less and more than a program's block
        x = 2 * torch.randn(3, 2, 2 * width, generator=generator).to(dtype)
        upstream = torch.randn(3, 2, width, generator=generator).to(dtype)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            got, gradient = with_gradient(functions(form).swiglu, x, upstream)
        assert [tuple(tensor.shape) for tensor in kept] == [x.shape]
        exact = x.double().requires_grad_()
        gate, up = exact.chunk(2, dim=-1)
        result = F.silu(gate) * up
        assert close(got, result.detach(), dtype)
        assert close(gradient, torch.autograd.grad(result, exact, upstream.double())[0], dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 50, 9000])  # a program looks at 8,192 at a time
def test_cross_entropy_of_a_whole_vocabulary(form, dtype, columns):
    generator = torch.Generator().manual_seed(2)
    logits = (4 * torch.randn(7, columns, generator=generator)).to(dtype)
    if columns > 1:
        logits[:, columns - 3 :] = logits[:, 5:7] = float("-inf")
    targets = torch.tensor([0, 1, 2, columns - 4, 7, 9, 0]).clamp(0, max(columns - 4, 0))
    scale = torch.tensor(0.37)
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    gradient = torch.autograd.grad(0.37 * losses.sum(), exact)[0]
    run = functions(form).cross_entropy
    for differentiable in (True, False):
        got, got_gradient = run(logits.clone(), targets, scale, ALONE, differentiable)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), losses.detach(), rtol=1e-6, atol=2e-6)
        assert (got_gradient is None) is not differentiable
        if differentiable:
            assert got_gradient.dtype == dtype
            assert close(got_gradient, gradient, dtype)
            assert not got_gradient[logits == float("-inf")].any()
    assert run(logits[:0], targets[:0], scale, ALONE, True)[0].shape == (0,)


@pytest.mark.parametrize("form", FORMS)
def test_no_stride_matters(form):
    """Targets out of a table of pairs, angles out of a longer row."""
    generator = torch.Generator().manual_seed(5)
    logits, pairs = torch.randn(6, 9, generator=generator), torch.randint(0, 9, (6, 2), generator=generator)
    run, scale = functions(form), torch.tensor(1.0)
    for differentiable in (True, False):
        got, expected = (
            run.cross_entropy(logits.clone(), targets, scale, ALONE, differentiable)
            for targets in (pairs[:, 1], pairs[:, 1].contiguous())
        )
        assert torch.equal(got[0], expected[0])
        assert not differentiable or torch.equal(got[1], expected[1])
    x, angles = torch.randn(4, 2, 3, 6, generator=generator), torch.randn(4, 1, 7, generator=generator)
    cos, sin = angles.cos()[..., 1:4], angles.sin()[..., 1:4]
    assert torch.equal(run.rotate(x, cos, sin), run.rotate(x, cos.contiguous(), sin.contiguous()))


def cross_entropy_in_shards(form: str) -> list[torch.Tensor]:
    """This rank's losses and gradient, of logits whose first shard has no live column in one case."""
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(3)
    results, run = [], functions(form).cross_entropy
    for dead in (0, 6):
        logits = torch.randn(5, 12, generator=generator)
        logits[:, :dead] = float("-inf")
        shard = logits.chunk(2, dim=1)[dist.get_rank()].contiguous()
        targets = torch.tensor([6, 7, 8, 11, 6]) if dead else torch.tensor([0, 5, 6, 11, 3])
        results += run(shard.clone(), targets, torch.tensor(0.5), dist.group.WORLD, True)
        results += run(shard.clone(), targets, torch.tensor(0.5), dist.group.WORLD, False)[:1]
    return results


@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_in_shards_is_that_of_megatron_core(form):
    got, expected = (run_on_ranks(2, cross_entropy_in_shards, name) for name in (form, "plain"))
    for ours, theirs in zip(got, expected, strict=True):
        assert len(ours) == 6
        for value, reference in zip(ours, theirs, strict=True):
            assert not value.isnan().any()
            # megatron-core subtracts -inf from -inf in a shard without a live column.
            known = ~reference.isnan()
            assert torch.allclose(value[known], reference[known], rtol=1e-6, atol=1e-6)


def run_model(form: str, kept: float, documents: bool, precision: str, **changes: object) -> tuple:
    """Loss, token losses and gradients of one batch."""
    from pause_megatron.model.variable_length import PackedSegments

    model = tiny(kernels=form, precision=precision, **changes)
    assert model.kernels.name == form
    data = batch(kept, pauses=changes["pauses"])
    options = {}
    if documents:
        starts = torch.tensor([[4], [9], [SEQ]])
        segments = (torch.arange(SEQ) >= starts).int()
        data["position_ids"] = torch.arange(SEQ) - segments * starts
        options["attention_mask"] = PackedSegments.of(segments)
    rows = {"target_rows": data["rows"], "targets": data["targets"]}
    out = model(data["tokens"], data["position_ids"], loss_scale=0.01, **rows, **options)
    out.loss.backward()
    return out.sum.detach(), out.token_losses.detach(), take_gradients(model)


def model_differences(
    form: str, tensor: int, sequence: bool, precision: str, cases: int | None = None
) -> dict[str, tuple[float, float]]:
    """For each case the largest relative difference from the plain path in fp32: of this form, and of the plain one."""
    from pause_megatron.distributed import initialize

    found = {}
    with initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu"):
        for kv_heads, (pauses, softmax), chunk, recompute, kept, documents in (
            (4, (1, "keep"), 7, "none", 0.9, False),
            (2, (3, "exclude"), None, "none", 0.4, False),
            (2, (1, "exclude"), 7, "full", 0.9, True),
            (4, (1, "keep"), 1, "none", 0.3, True),
            (4, (1, "keep"), None, "none", 0.0, False),
        )[:cases]:
            parallel = ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute)
            changes = dict(parallel=parallel, pauses=pauses, softmax=softmax, kv_heads=kv_heads, head_chunk=chunk)
            reference = run_model("plain", kept, documents, "fp32", **changes)
            gaps = []
            for name in (form, "plain"):
                total, losses, gradients = run_model(name, kept, documents, precision, **changes)
                gradients = {key: value.float() for key, value in gradients.items()}
                ours = {"losses": losses, "sum": total[None], **gradients}
                theirs = {"losses": reference[1], "sum": reference[0][None], **reference[2]}
                if not losses.numel():
                    del ours["losses"], theirs["losses"]
                gaps.append(distance(ours, theirs))
            found[f"kv={kv_heads} K={pauses} {softmax} chunk={chunk} {recompute} kept={kept} {documents}"] = tuple(gaps)
    return found


@pytest.mark.parametrize(
    ("tensor", "sequence", "precision"),
    [
        # Interpreted kernels are slow: in bf16 one rank and the topology that has everything, the others with --full.
        pytest.param(
            *topology, precision, marks=[pytest.mark.slow] * (precision == "bf16" and topology in TOPOLOGIES[1:-1])
        )
        for topology in TOPOLOGIES
        for precision in ("fp32", "bf16")
    ],
)
def test_fused_model_is_the_plain_one(tensor, sequence, precision):
    """In fp32 to 1e-6; in bf16 no further from fp32 than three times the plain path: the interpreter cuts to bf16."""
    cases = 5 if precision == "fp32" else 3
    for found in run_on_ranks(tensor, model_differences, "triton", tensor, sequence, precision, cases):
        assert len(found) == cases
        for case, (fused, plain) in found.items():
            assert fused <= (1e-6 if precision == "fp32" else 3 * plain), f"{case}: {fused:.1e}, plain {plain:.1e}"


@needs_compiler
def test_compiled_model_is_the_plain_one():
    (found,) = run_on_ranks(1, model_differences, "compiled", 1, False, "fp32", timeout=300)
    assert max(fused for fused, _ in found.values()) <= 1e-6


def test_weight_gradient_of_many_chunks_is_rounded_once():
    """In bf16 the sum over chunks is that of the whole product but for the last bit, and nearer than a sum of bf16s."""
    from pause_megatron.model.chunks import WeightGradient

    generator = torch.Generator().manual_seed(4)
    grad_logits = torch.randn(400, 30, generator=generator).bfloat16()
    rows = torch.randn(400, 16, generator=generator).bfloat16()
    exact = grad_logits.double().t() @ rows.double()
    weight = torch.zeros(30, 16, dtype=torch.bfloat16)
    chunked, rounded = WeightGradient(weight, chunks=40), torch.zeros(30, 16)
    for start in range(0, 400, 10):
        part = slice(start, start + 10)
        chunked.add(grad_logits[part], rows[part])
        rounded += grad_logits[part].t() @ rows[part]
    once, often = ((value.bfloat16().double() - exact).abs().mean() for value in (chunked.result(), rounded))
    assert torch.equal(chunked.result(), exact.bfloat16())
    assert once < often
    single = WeightGradient(weight, chunks=1)
    single.add(grad_logits, rows)
    assert torch.equal(single.result(), grad_logits.t() @ rows)
    assert not WeightGradient(weight, chunks=0).result().any()


def test_operators_have_the_shapes_that_they_compute():
    """What fake tensors are told is what comes out, and only what the schema says is written to."""
    from pause_megatron.model.kernels.operators import SCHEMAS, registered

    ops = registered()
    logits, targets = torch.randn(5, 12), torch.tensor([0, 3, 11, 4, 2])
    row = torch.ones(5)
    x, angles = torch.randn(4, 2, 3, 6), torch.randn(4, 1, 3)
    arguments = {
        "rotate": (x, angles.cos(), angles.sin(), True),
        "swiglu": (x,),
        "swiglu_backward": (torch.randn(4, 2, 3, 3), x),
        "logit_statistics": (logits, targets),
        "logit_gradient_": (logits, targets, row, row, torch.tensor(2.0)),
        "cross_entropy_": (logits, targets, torch.tensor(2.0)),
    }
    assert arguments.keys() == SCHEMAS.keys()
    for name, values in arguments.items():
        torch.library.opcheck(getattr(ops, name), values, test_utils=("test_schema", "test_faketensor"))


_COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pause_megatron.model.kernels import triton_kernels as k
count = 0
for capability in (80, 90, 100):
    for dtype in ("bf16", "fp32"):
        number = {"x", "out", "gradient", "logits"}
        wide = {"cos", "sin", "losses", "highest", "total", "scale"}
        for kernel, constants, warps in (
            (k._rotate_kernel, {"HEADS": 16, "HALF": 64}, 4),
            (k._rotate_kernel, {"HEADS": 1, "HALF": 32}, 4),
            (k._swiglu_kernel, {"BLOCK": k._CHANNELS}, 4),
            (k._swiglu_backward_kernel, {"BLOCK": k._CHANNELS}, 4),
            (k._statistics_kernel, {"BLOCK": k._COLUMNS}, 8),
            (k._gradient_kernel, {"BLOCK": k._COLUMNS}, 8),
            (k._cross_entropy_kernel, {"BLOCK": k._COLUMNS}, 8),
        ):
            signature = {}
            for name in kernel.arg_names:
                if name in constants:
                    signature[name] = "constexpr"
                elif name in wide or (name == "out" and kernel is k._statistics_kernel):
                    signature[name] = "*fp32"
                else:
                    others = {"targets": "*i64", "sign": "fp32"}
                    signature[name] = "*" + dtype if name in number else others.get(name, "i32")
            source = ASTSource(kernel, signature, constants)
            options = {"num_warps": warps, **k._OPTIONS}
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert len(made.asm["cubin"]) > 1000 and made.metadata.shared < 48 * 1024, (kernel, made.metadata)
            assert ".local" not in made.asm["ptx"], kernel
            count += 1
print(count)
"""


def test_kernels_compile_for_gpus_without_spills(tmp_path):
    """A100, H100 and B200: PTX and machine code, without a GPU; no kernel keeps its numbers in local memory."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Triton's own check of a cubin wants the source as a file.
    script = tmp_path / "compile_kernels.py"
    script.write_text(_COMPILE, encoding="utf-8")
    made = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert made.stdout.split() == ["42"]


def test_what_auto_means_and_what_is_refused(monkeypatch):
    assert choose_implementation("auto", "cpu") == "plain"
    assert choose_implementation("auto", "cuda:1") == "triton"
    named = ["plain", "compiled", "triton"]
    assert [choose_implementation(name, "cuda") for name in named] == named
    assert choose_implementation("triton", "cpu") == "triton"  # in the interpreter
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"engine\.kernels: expected a CUDA device for triton, got cpu"):
        choose_implementation("triton", "cpu")
    monkeypatch.setattr("pause_megatron.model.kernels.find_spec", lambda name: None)
    assert choose_implementation("auto", "cuda") == "plain"
    with pytest.raises(ConfigError, match="expected triton to be installed"):
        load_kernels("triton", "cuda")


def test_batch_is_what_the_documents_above_assume():
    assert BATCH == 3 and SEQ > 9


@pytest.mark.parametrize("form", ["compiled", "triton"])
def test_a_machine_without_a_compiler_is_an_error_before_step_1(form, monkeypatch):
    from pause_megatron.model.kernels import fused

    def without_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    broken = Primitives(*[without_compiler] * 6)
    monkeypatch.setattr(fused, f"{form}_primitives", lambda: broken)
    with pytest.raises(
        ConfigError, match=rf"engine\.kernels: {form} cannot compile here \(RuntimeError: Failed to find"
    ):
        load_kernels(form, "cpu")
