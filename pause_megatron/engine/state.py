"""The optimizer state of a rank by parameter name, at any ZeRO stage.

Where DeepSpeed keeps fp32 master weights and Adam moments depends on the stage: in the parameters themselves, in a list
of fp32 clones, in flat partitions that cut across parameters, or in padded per-parameter partitions. A checkpoint needs
one view: contiguous pieces of flattened parameters, each owned by one data-parallel rank. With that view, a checkpoint
saved at one stage and data-parallel size loads at any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MASTER = "param"
ADAM_STATE = (MASTER, "exp_avg", "exp_avg_sq")
"""The state of each parameter: the fp32 master weights and AdamW's two moments."""


@dataclass(frozen=True, order=True)
class Address:
    """Elements `[start, start + numel)` of a flattened parameter (of this tensor-parallel rank's shard of it).

    Attributes:
        name: Native parameter name.
        start: First element.
        numel: Number of elements.
    """

    name: str
    start: int
    numel: int


class _Layout(Protocol):
    """The places in which one ZeRO stage keeps the state."""

    def masters(self) -> Iterable[Tensor]:
        """Return the fp32 tensors that the inner optimizer steps: the keys of its state."""
        ...

    def owned(self) -> Iterator[Address]:
        """Yield the pieces that this rank saves; over the data-parallel group they cover each parameter once."""
        ...

    def needed(self) -> Iterator[Address]:
        """Yield the pieces that this rank must restore."""
        ...

    def get(self, address: Address, key: str) -> Tensor:
        """Return a piece, fp32 [numel], possibly a view."""
        ...

    def set(self, address: Address, key: str, values: Tensor) -> None:
        """Overwrite a piece with fp32 [numel]."""
        ...


class OptimizerState:
    """The fp32 master weights and Adam moments of this rank, addressed by parameter name.

    Args:
        engine: A `deepspeed.DeepSpeedEngine` over torch's AdamW.
        dp_rank: Rank in the data-parallel group.
        dp_size: Data-parallel size.
    """

    def __init__(self, engine: Any, dp_rank: int, dp_size: int) -> None:
        self._inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._layout = _layout(engine, self._inner, dp_rank, dp_size)
        self._materialise()

    def owned(self) -> list[Address]:
        """Return the pieces that this rank saves; over the data-parallel group they cover each parameter once."""
        return list(self._layout.owned())

    def needed(self) -> list[Address]:
        """Return the pieces that this rank must restore: the owned ones, and at stage 0 all."""
        return list(self._layout.needed())

    def get(self, address: Address, key: str) -> Tensor:
        """Return a piece of one of `ADAM_STATE`, fp32 [numel] on the CPU.

        Args:
            address: Parameter and its elements.
            key: One of `ADAM_STATE`.
        """
        return self._layout.get(address, key).detach().to("cpu", torch.float32)

    def set(self, address: Address, key: str, values: Tensor) -> None:
        """Overwrite a piece of one of `ADAM_STATE`.

        Args:
            address: Parameter and its elements.
            key: One of `ADAM_STATE`.
            values: New values, fp32 [numel].
        """
        with torch.no_grad():
            self._layout.set(address, key, values)

    @property
    def step(self) -> int:
        """Applied optimizer steps, on which Adam's bias correction depends."""
        counts = {int(state["step"]) for state in self._inner.state.values()}
        if len(counts) != 1:
            raise AssertionError(f"parameters disagree on the optimizer step: {sorted(counts)}")
        return counts.pop()

    @step.setter
    def step(self, value: int) -> None:
        for state in self._inner.state.values():
            state["step"].fill_(value)

    def _materialise(self) -> None:
        """Create AdamW's state as before the first step; torch would create it in the first step.

        DeepSpeed's unfused bf16 optimizer (stage 0) takes a dummy optimizer step when it is built, which would leave
        Adam's bias correction one step ahead.
        """
        for master in self._layout.masters():
            # torch's fused AdamW needs the step counter on the parameter's device.
            self._inner.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }


def _layout(engine: Any, inner: torch.optim.Optimizer, dp_rank: int, dp_size: int) -> _Layout:
    parameters: dict[str, Any] = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_optimization_partition_weights():
        return _Zero3(parameters, engine.optimizer.fp32_partitioned_groups_flat, dp_rank)
    if engine.zero_optimization():
        flat = getattr(engine.optimizer, "fp32_groups_flat_partition", None)  # ZeRO-1 with fp32 accumulation of bf16
        return _Zero12(parameters, flat or engine.optimizer.single_partition_of_fp32_groups, inner)
    masters: dict[str, Tensor] = dict(parameters)
    if hasattr(engine.optimizer, "fp32_groups"):  # bf16 without ZeRO: DeepSpeed's unfused optimizer
        clones = {
            id(low): high
            for lows, highs in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }
        masters = {name: clones[id(p)] for name, p in parameters.items()}
    return _Replicated(masters, inner, dp_rank, dp_size)


class _Replicated:
    """Stage 0: every rank holds the whole state and saves its share."""

    def __init__(self, masters: dict[str, Tensor], inner: torch.optim.Optimizer, dp_rank: int, dp_size: int) -> None:
        self._masters, self._inner, self._dp_rank, self._dp_size = masters, inner, dp_rank, dp_size

    def masters(self) -> Iterable[Tensor]:
        return self._masters.values()

    def owned(self) -> Iterator[Address]:
        for name, master in self._masters.items():
            share = -(-master.numel() // self._dp_size)
            start = min(share * self._dp_rank, master.numel())
            if stop := min(share, master.numel() - start):
                yield Address(name, start, stop)

    def needed(self) -> Iterator[Address]:
        for name, master in self._masters.items():
            yield Address(name, 0, master.numel())

    def _view(self, address: Address, key: str) -> Tensor:
        master = self._masters[address.name]
        tensor = master if key == MASTER else self._inner.state[master][key]
        return tensor.detach().view(-1).narrow(0, address.start, address.numel)

    def get(self, address: Address, key: str) -> Tensor:
        return self._view(address, key)

    def set(self, address: Address, key: str, values: Tensor) -> None:
        self._view(address, key).copy_(values)


class _Zero12:
    """Stages 1 and 2: flat fp32 partitions that cut across parameters."""

    def __init__(self, parameters: dict[str, Any], flat: list[Tensor], inner: torch.optim.Optimizer) -> None:
        self._parameters, self._flat, self._inner = parameters, flat, inner

    def masters(self) -> Iterable[Tensor]:
        return self._flat

    def owned(self) -> Iterator[Address]:
        for name, parameter in self._parameters.items():
            if parameter._hp_mapping is not None:
                piece = parameter._hp_mapping.lp_fragment_address
                yield Address(name, piece.start, piece.numel)

    needed = owned

    def _view(self, address: Address, key: str) -> Tensor:
        mapping = self._parameters[address.name]._hp_mapping
        flat = self._flat[mapping.param_group_index]
        tensor = flat if key == MASTER else self._inner.state[flat][key]
        return tensor.detach().narrow(0, mapping.hp_fragment_address.start, address.numel)

    def get(self, address: Address, key: str) -> Tensor:
        return self._view(address, key)

    def set(self, address: Address, key: str, values: Tensor) -> None:
        self._view(address, key).copy_(values)


class _Zero3:
    """Stage 3: equal partitions of each parameter, the last ones padded."""

    def __init__(self, parameters: dict[str, Any], flat: list[Tensor], dp_rank: int) -> None:
        self._parameters, self._flat, self._dp_rank = parameters, flat, dp_rank

    def masters(self) -> Iterable[Tensor]:
        return self._flat

    def owned(self) -> Iterator[Address]:
        for name, parameter in self._parameters.items():
            share = parameter.ds_tensor.ds_numel
            start = min(share * self._dp_rank, parameter.ds_numel)
            if numel := min(share, parameter.ds_numel - start):
                yield Address(name, start, numel)

    needed = owned

    def get(self, address: Address, key: str) -> Tensor:
        return self._partition(address, key).narrow(0, 0, address.numel)

    def set(self, address: Address, key: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        partition = self._partition(address, key).clone()
        partition.narrow(0, 0, address.numel).copy_(values)
        parameter = self._parameters[address.name]
        if key == MASTER:
            safe_set_local_fp32_param(parameter, partition)
        else:
            safe_set_local_optimizer_state(parameter, partition, key)

    def _partition(self, address: Address, key: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._parameters[address.name]
        if key == MASTER:
            return safe_get_local_fp32_param(parameter)
        return safe_get_local_optimizer_state(parameter, key)
