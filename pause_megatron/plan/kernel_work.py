"""Unit of the work of a GPU: FLOPs, bytes and launches of kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """Work of one GPU.

    Attributes:
        products: FLOPs of matrix products.
        attention: FLOPs of causal attention, with the scores that the backward pass recomputes.
        bytes: Bytes that memory-bound kernels read and write.
        kernels: Kernel launches, without collectives.
    """

    products: int = 0
    attention: int = 0
    bytes: int = 0
    kernels: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(self)))
