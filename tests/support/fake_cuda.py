"""A forward and backward pass of the real model on fake CUDA tensors, without a GPU, counted.

`FakeTensorMode` runs the program on tensors that have a shape, a type and a device but no numbers, and refuses
operators whose tensors are on different devices, as CUDA does. Autograd's C++ engine asks for a CUDA stream where it
sees a CUDA tensor, so C++ is told "meta"; everything in Python sees cuda:0. What C++ decides by device is decided here
as on CUDA: torch's attention takes its flash kernel, RMSNorm and SiLU their kernels (`aten::_fused_rms_norm` and its
backward have CUDA kernels in every torch that this package takes).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from support.counting import CUDA, Counting, Counts, total_size

TEXT_SIZE = 32_000
aten = torch.ops.aten


class _FusedNorm(torch.autograd.Function):
    """torch's RMSNorm as CUDA runs it: a kernel forward; backward one for the input and one for the weight.

    Of inputs that are not contiguous it works on copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Counts) -> Tensor:
        scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        ctx.counts, ctx.saved = counts, (x, weight, scales)  # of a view the view, so that both passes copy it
        x = x.contiguous()
        result = torch.empty_like(x)
        counts.add("rms_norm", total_size(x, weight, result, scales))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved
        x, gradient = x.contiguous(), gradient.contiguous()
        results = torch.empty_like(x), torch.empty_like(weight)
        ctx.counts.add("rms_norm backward", total_size(gradient, x, scales, gradient, x, scales, weight, *results), 2)
        return *results, None


class _Silu(torch.autograd.Function):
    """torch's SiLU as CUDA runs it: one kernel each way. (A build without CUDA composes the gradient.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Counts) -> Tensor:
        ctx.counts, ctx.x = counts, x
        result = torch.empty_like(x)
        counts.add("silu", total_size(x, result))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        result = torch.empty_like(gradient)
        ctx.counts.add("silu backward", total_size(gradient, ctx.x, result))
        return result, None


def _norm(counts: Counts, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    if x.dtype != weight.dtype or x.device != weight.device or list(x.shape[-1:]) != list(shape):
        raise RuntimeError(f"rms_norm: {x.dtype} on {x.device} and {weight.dtype} on {weight.device}: not fused")
    return _FusedNorm.apply(x, weight, counts)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or query.dtype != torch.bfloat16:
        bias = attn_mask if attn_mask is None else attn_mask.expand(*query.shape[:2], -1, -1)
        attend = aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


@dataclass(frozen=True)
class Case:
    """A model and a micro-batch.

    Attributes:
        overrides: keys of the configuration
        ranks: of the fake world, of which this is the first
        texts: texts of a window that do not see each other; 0: one text, causal
    """

    overrides: tuple[str, ...]
    ranks: int = 1
    texts: int = 0


def count(case: Case) -> Counts:
    """Runs the model forward and backward on fake CUDA tensors.

    Raises:
        RuntimeError: an operator's tensors are on different devices, or a parameter has no gradient.
    """
    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize

    config = load(overrides=list(case.overrides))
    counting = Counting()
    with (
        _fake_world(case.ranks),
        initialize(config.parallel, device="cpu"),
        _as_on_cuda(counting.counts),
        FakeTensorMode(),
    ):
        model = _model(config)
        inputs = _inputs(config, case)
        with counting:
            model(**inputs).loss.backward()
    wrong = {
        n: p.grad and p.grad.device for n, p in model.named_parameters() if p.grad is None or p.grad.device != CUDA
    }
    if wrong:
        raise RuntimeError(f"gradients that are not on {CUDA}: {wrong}")
    return counting.counts


def _model(config: Any) -> torch.nn.Module:
    from pause_megatron.model import Vocabulary, build, build_model

    build.check_gradient_sums = lambda *_: None  # compares numbers, of which there are none
    pauses = tuple(range(TEXT_SIZE, TEXT_SIZE + config.pause.embeddings))
    return build_model(
        config.model,
        vocabulary=Vocabulary(TEXT_SIZE, pauses),
        sequence_length=config.data.sequence_length,
        parallel=config.parallel,
        softmax=config.pause.softmax,
        precision=config.engine.precision,
        kernels=config.engine.kernels,
        draw=False,
    )


def _inputs(config: Any, case: Case) -> dict[str, Any]:
    from pause_megatron.model.variable_length import PackedSegments, SegmentLengths
    from pause_megatron.plan.layout import Layout

    layout = Layout.of(config, case.ranks, TEXT_SIZE)
    windows, length, rows = layout.batch.micro_size, layout.batch.sequence_length, layout.target_rows

    def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=CUDA)

    spans = None
    if case.texts:
        lengths = (length // case.texts,) * (case.texts * windows)
        spans = PackedSegments(SegmentLengths(lengths, numbers(len(lengths) + 1, dtype=torch.int32)))
    return dict(
        input_ids=numbers(windows, length),
        position_ids=numbers(windows, length),
        attention_mask=spans,
        target_rows=numbers(rows),
        targets=numbers(rows),
        loss_scale=torch.empty((), dtype=torch.float32, device=CUDA),
    )


@contextlib.contextmanager
def _fake_world(ranks: int) -> Iterator[None]:
    """Rank 0 of a world whose collectives go through and send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _as_on_cuda(counts: Counts) -> Iterator[None]:
    """Report an H100 to every caller, and its choice of kernels where C++ would look at the device."""
    changed: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: CUDA),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.backends.cuda, "is_flash_attention_available", lambda: True),
        (FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")),
        (F, "scaled_dot_product_attention", _flash),
        (F, "rms_norm", partial(_norm, counts)),
        (F, "silu", lambda x, inplace=False: _Silu.apply(x, counts)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def counted(cases: Sequence[Case], output: str) -> None:
    """Counts cases and writes them to a file as JSON."""
    with open(output, "w", encoding="utf-8") as file:
        json.dump([asdict(count(case)) for case in cases], file)


if __name__ == "__main__":
    counted([Case(tuple(c["overrides"]), c["ranks"], c["texts"]) for c in json.loads(sys.argv[1])], sys.argv[2])
