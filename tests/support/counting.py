"""Counts kernels, bytes and FLOPs of what runs on fake CUDA tensors.

Counted as a GPU runs it: a kernel reads each input from memory once and writes each output once. Views and allocations
are no kernels. Matrix products and attention, which computing bounds, are apart, with their FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META, CUDA = torch.device("meta"), torch.device("cuda:0")

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "_addmm_out"}
# Kernels that CUDA launches for one of these operators; every other one is a single kernel. Flash attention's backward
# prepares, computes, and converts the queries' gradient; an embedding's sorts and segments its tokens.
LAUNCHES = {
    "_flash_attention_backward": 3,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_varlen_attn_backward": 3,
    "embedding_dense_backward": 8,
}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
NO_KERNEL |= {"_unsafe_view", "_reshape_alias", "is_same_size", "sym_size", "sym_numel", "sym_stride", "resize_"}
# Inputs of which a kernel reads as much as it writes: rows are picked.
PICKS = {"index_select", "gather", "embedding", "index", "_index_put_impl_"}
FILLS = {"zeros", "zeros_like", "new_zeros", "ones_like", "ones", "full", "full_like", "fill_", "zero_", "copy_"}
FILLS |= {"new_full", "new_ones", "arange", "scalar_tensor", "_foreach_zero_"}


@dataclass
class Counts:
    """What a GPU does, once.

    Attributes:
        kernels: launches of any kind but collectives
        bytes: that memory-bound kernels read and write
        product_flops: of matrix products
        attention_flops: of attention, the causal half, as flash attention computes it
        collectives: calls
        operations: name -> [kernels, bytes]; matrix products and attention with the bytes of theirs
    """

    kernels: int = 0
    bytes: int = 0
    product_flops: int = 0
    attention_flops: int = 0
    collectives: int = 0
    operations: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, size: int, launches: int = 1, *, bound: str = "memory") -> None:
        """Enters an operator: bytes that it moves, kernels, and whether memory or computing bounds it."""
        self.kernels += launches
        if bound == "memory":
            self.bytes += size
        entry = self.operations.setdefault(name, [0, 0])
        entry[0] += launches
        entry[1] += size

    def __sub__(self, other: Counts) -> Counts:
        names = self.operations.keys() | other.operations.keys()
        zero = [0, 0]
        return Counts(
            *(
                getattr(self, name) - getattr(other, name)
                for name in ("kernels", "bytes", "product_flops", "attention_flops", "collectives")
            ),
            {
                name: difference
                for name in names
                if any(
                    difference := [
                        a - b
                        for a, b in zip(self.operations.get(name, zero), other.operations.get(name, zero), strict=True)
                    ]
                )
            },
        )


class Counting(TorchDispatchMode):
    """Counts operators on a device: fake CUDA tensors (enter it inside a FakeTensorMode), or real ones on a CPU."""

    def __init__(self, device: torch.device = CUDA) -> None:
        super().__init__()
        self.counts = Counts()
        self._device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.prim.device.default:
            device = args[0].fake_device
            return META if device.type == "cuda" else device
        if kwargs.get("device") == META:  # C++ composed this one
            kwargs["device"] = CUDA
        name = function._schema.name.partition("::")[2]
        if function.namespace == "c10d":
            self.counts.collectives += 1
            return function(*args, **kwargs)
        if name == "addmm" and "out" in kwargs:
            return self._addmm_into(args, kwargs["out"])
        result = function(*args, **kwargs)
        if any(t.device == self._device for t in tensors((args, kwargs, result))):
            self._count(function, name, args, kwargs, result)
        return result

    def _addmm_into(self, args: tuple, out: Tensor) -> Tensor:
        """torch's decomposition of it copies on fake tensors, which a build without CUDA cannot; CUDA does not copy."""
        devices = {t.device for t in (out, *tensors(args))}
        if len(devices) != 1:
            raise RuntimeError(f"addmm: expected tensors on the same device, got {devices}")
        self._product("addmm", args, out)
        return out

    def _product(self, name: str, args: tuple, result: Tensor) -> None:
        left, right = [t for t in args if isinstance(t, Tensor)][-2:]
        self.counts.product_flops += 2 * left.numel() * right.shape[-1]
        self.counts.add(name, total_size(*tensors((args, result))), bound="product")

    def _count(self, function: Any, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        base = name.rstrip("_")
        if name in NO_KERNEL or function.is_view:
            return
        if base in PRODUCTS:
            self._product(base, args, result)
        elif "attn" in name or "attention" in name:
            self._attention(name, args, result)
        else:
            self.counts.add(name, moved(name, function, args, kwargs, result), LAUNCHES.get(name, 1))

    def _attention(self, name: str, args: tuple, result: Any) -> None:
        """Two products forward; five backward, which computes the scores anew. Of each, the causal half."""
        backward = name.endswith("backward")
        found = [t for t in tensors(args) if t.is_floating_point() and t.dim() >= 3]
        query = found[1] if backward else found[0]
        if query.dim() == 4:  # [batch, heads, seq, channels]
            scores = query.shape[0] * query.shape[1] * query.shape[2] ** 2 // 2
        else:  # [tokens, heads, channels], texts of equal length
            (texts,) = {t.numel() - 1 for t in tensors(args) if t.dtype == torch.int32 and t.dim() == 1}
            length = query.shape[0] // texts
            spans = [a[0] for a in args if isinstance(a, (list, tuple)) and [type(n) for n in a] == [int, int]]
            window = min([length, *(span + 1 for span in spans if span >= 0)])  # itself included
            scores = query.shape[1] * texts * window * (2 * length - window) // 2
        self.counts.attention_flops += (5 if backward else 2) * 2 * scores * query.shape[-1]
        size = total_size(*tensors((args, result)))
        self.counts.add(name, size, LAUNCHES.get(name, 1), bound="attention")


def moved(name: str, function: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Bytes that a memory-bound operator reads and writes."""
    if name == "_fused_adamw_":  # the schema says that it writes gradients too, which it does for scaled ones only
        weights, gradients, *moments = args[:4]
        return total_size(*gradients) + 2 * total_size(*weights, *tensors(moments))
    written = list(tensors(result))
    given = list(tensors((args, kwargs)))
    mutated = _mutated(function, args, kwargs)
    writes = sum(size_of(t) for t in _unique([*written, *mutated]))
    if name in FILLS:
        reads = sum(size_of(t) for t in given[1:]) if name == "copy_" else 0
        return (size_of(given[0]) if name == "copy_" else writes) + reads
    if name in PICKS and name != "_index_put_impl_":
        return 2 * writes + sum(size_of(t) for t in given if not t.is_floating_point())
    if name == "index_put_" and any(t.dtype == torch.bool for t in given):
        return 2 * size_of(given[0]) + size_of(given[1])  # a number where a mask says so: CUDA fills
    if name in ("index_add_", "index_add", "index_put_", "index_copy_", "scatter_", "scatter_add_", "_index_put_impl_"):
        # Rows that are picked: read, changed, written.
        return 3 * size_of(given[-1]) + sum(size_of(t) for t in given[1:-1])
    return writes + sum(size_of(t) for t in _unique(given))


def _mutated(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """Arguments that the operator's schema says it writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def _unique(found: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in found}.values())


def total_size(*found: Tensor) -> int:
    """Sum of their `size_of`."""
    return sum(map(size_of, found))


def size_of(tensor: Tensor) -> int:
    """Bytes that reading a tensor takes: of an expanded one, those of what was expanded. Host numbers take none."""
    if tensor.dim() == 0 and tensor.device.type == "cpu":
        return 0
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
