"""Triton kernels of rotary embedding, SwiGLU and cross-entropy, and their launches; they compute in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 8192  # logits of a row that a program loads at one time
_CHANNELS = 1024  # channels of a row of SwiGLU that a program computes
_OPTIONS = {"enable_fp_fusion": True}  # off by default from Triton 3.10 on


@triton.jit
def _rotate_kernel(
    x, out, cos, sin, step_seq, step_batch, step_head, batch, angle_batch, heads, half, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position, sample = token // batch, token % batch
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    live = channel < half
    angle = (position * angle_batch + sample % angle_batch) * half + channel
    c = tl.load(cos + angle, mask=live, other=0.0)
    s = tl.load(sin + angle, mask=live, other=0.0) * sign
    live = live & (head < heads)
    at = x + position * step_seq + sample * step_batch + head * step_head + channel
    first = tl.load(at, mask=live, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=live, other=0.0).to(tl.float32)
    to = out + (token * heads + head) * (2 * half) + channel
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=live)
    tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), mask=live)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Launch `Primitives.rotate_by` on x [seq, batch, heads, channels]; the result is contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    seq, batch, heads, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate_kernel[(seq * batch,)](
        x, out, cos, sin, x.stride(0), x.stride(1), x.stride(2), batch, cos.shape[1], heads, channels // 2,
        -1.0 if back else 1.0,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(channels // 2), **_OPTIONS,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu_kernel(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < width
    at = x + row * (2 * width) + channel
    gate = tl.load(at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=live)


@triton.jit
def _swiglu_backward_kernel(gradient, x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = channel < width
    at = row * (2 * width) + channel
    gate = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=live, other=0.0).to(tl.float32)
    g = tl.load(gradient + row * width + channel, mask=live, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    tl.store(out + at, (g * up * slope * (1 + gate * (1 - slope))).to(out.dtype.element_ty), mask=live)
    tl.store(out + at + width, (g * gate * slope).to(out.dtype.element_ty), mask=live)


def swiglu(x: Tensor) -> Tensor:
    """Launch `Primitives.swiglu_forward`."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel():
        _swiglu_kernel[_rows_and_blocks(x, width)](x, out, width, BLOCK=_CHANNELS, **_OPTIONS)
    return out


def swiglu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Launch `Primitives.swiglu_backward`."""
    x, gradient = x.contiguous(), gradient.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _swiglu_backward_kernel[_rows_and_blocks(x, width)](gradient, x, out, width, BLOCK=_CHANNELS, **_OPTIONS)
    return out


def _rows_and_blocks(x: Tensor, width: int) -> tuple[int, int]:
    return x.numel() // (2 * width), triton.cdiv(width, _CHANNELS)


@triton.jit
def _statistics_of(row, columns, BLOCK: tl.constexpr):
    """Return the highest logit of a row and the sum of exp(logit - highest) (Milakov and Gimelshein 2018)."""
    highest = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(logit, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # only masked columns so far
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(logit - shift), axis=0)
        highest = new
    return highest, total


@triton.jit
def _logit_at(row, target, columns):
    here = (target >= 0) & (target < columns)
    return tl.load(row + tl.where(here, target, 0), mask=here, other=0.0).to(tl.float32)


@triton.jit
def _gradient_into(row, target, columns, highest, total, scale, BLOCK: tl.constexpr):
    factor = scale / total
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logit - highest) * factor
        gradient = tl.where(column == target, gradient - scale, gradient)
        tl.store(row + column, gradient.to(row.dtype.element_ty), mask=column < columns)


@triton.jit
def _statistics_kernel(logits, targets, out, rows, columns, step, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row, target = logits + index * step, tl.load(targets + index)
    highest, total = _statistics_of(row, columns, BLOCK)
    tl.store(out + index, highest)
    tl.store(out + rows + index, total)
    tl.store(out + 2 * rows + index, _logit_at(row, target, columns))


@triton.jit
def _gradient_kernel(logits, targets, highest, total, scale, columns, step, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row, target = logits + index * step, tl.load(targets + index)
    _gradient_into(
        row, target, columns, tl.load(highest + index), tl.load(total + index), tl.load(scale), BLOCK
    )  # fmt: skip


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, scale, columns, step, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row, target = logits + index * step, tl.load(targets + index)
    highest, total = _statistics_of(row, columns, BLOCK)
    tl.store(losses + index, tl.log(total) + highest - _logit_at(row, target, columns))
    # The logit at the target must be read before any thread of this program overwrites it.
    tl.debug_barrier()
    _gradient_into(row, target, columns, highest, total, tl.load(scale), BLOCK)


def logit_statistics(logits: Tensor, targets: Tensor) -> Tensor:
    """Launch `Primitives.statistics`."""
    rows, columns = logits.shape
    out = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    if rows:
        _statistics_kernel[(rows,)](
            logits, targets.contiguous(), out, rows, columns, logits.stride(0), **_block(columns)
        )
    return out


def logit_gradient_(logits: Tensor, targets: Tensor, highest: Tensor, total: Tensor, scale: Tensor) -> None:
    """Launch `Primitives.gradient_`."""
    rows, columns = logits.shape
    if rows:
        _gradient_kernel[(rows,)](
            logits, targets.contiguous(), highest.contiguous(), total.contiguous(), scale, columns, logits.stride(0),
            **_block(columns),
        )  # fmt: skip


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Launch `Primitives.loss_and_gradient_`."""
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _cross_entropy_kernel[(rows,)](
            logits, targets.contiguous(), losses, scale, columns, logits.stride(0), **_block(columns)
        )
    return losses


def _block(columns: int) -> dict[str, int | bool]:
    block = min(triton.next_power_of_2(columns), _COLUMNS)
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4, **_OPTIONS}
