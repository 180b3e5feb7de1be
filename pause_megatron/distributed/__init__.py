"""Rank discovery, rendezvous and process groups for torch.distributed, megatron-core and DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pause_megatron.distributed.ranks import Ranks, discover

if TYPE_CHECKING:
    from pause_megatron.distributed.context import ParallelContext, initialize

__all__ = ["ParallelContext", "Ranks", "discover", "initialize"]


if not TYPE_CHECKING:  # type checkers know the names above, and report others

    def __getattr__(name: str) -> Any:
        # On demand: rank discovery alone needs no torch.
        if name not in ("ParallelContext", "initialize"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pause_megatron.distributed import context

        return getattr(context, name)
