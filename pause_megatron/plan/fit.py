"""Whether a run fits on a GPU, the largest micro-batch that does, and what else would make it fit. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pause_megatron.config.deepspeed import ds_config_names
from pause_megatron.config.gpus import GIB
from pause_megatron.config.rules import check
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError
from pause_megatron.plan.layout import Layout
from pause_megatron.plan.machine import Assumptions, Cluster
from pause_megatron.plan.memory import RankMemory, rank_memory


@dataclass(frozen=True)
class Footprint:
    """Bytes of one GPU.

    Attributes:
        tensors: the largest sum of tensors in a step, corrected by what was measured
        margin: for fragmentation
        base: context, libraries, NCCL
        capacity: of the GPU
    """

    tensors: int
    margin: float
    base: float
    capacity: float

    @property
    def total(self) -> float:
        """What must be there."""
        return self.tensors + self.margin + self.base

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Remedy:
    """Keys that make a run fit, and the bytes that it then takes."""

    overrides: tuple[str, ...]
    total: float


def footprint(memory: RankMemory, cluster: Cluster, assumptions: Assumptions) -> Footprint:
    """Tensors, margin and base against the GPU's memory."""
    tensors = memory.peak_bytes
    if assumptions.memory_ratio is not None:
        tensors = round(tensors * assumptions.memory_ratio.value)
    return Footprint(
        tensors=tensors,
        margin=tensors * assumptions.fragmentation.value,
        base=assumptions.base_gib.value * GIB,
        capacity=cluster.gpu.memory_bytes,
    )


def largest_micro_size(
    config: ResolvedConfig, text_size: int, cluster: Cluster, assumptions: Assumptions
) -> int | None:
    """Largest batch.micro_size that divides this rank's share of the global batch and fits; None: not even 1."""
    share = config.batch.global_size * config.parallel.tensor // cluster.ranks
    for micro in (size for size in range(share, 0, -1) if share % size == 0):
        if _fits(_changed(config, {"batch": {"micro_size": micro}}), text_size, cluster, assumptions):
            return micro
    return None


def memory_micro_size(layout: Layout, cluster: Cluster, assumptions: Assumptions) -> int:
    """Largest micro-batch that memory allows where a step has one of them, of any size; 0: not even one window."""

    def fits(micro: int) -> bool:
        batch = replace(layout.batch, micro_size=micro, accumulation=1, global_size=micro * layout.data_parallel)
        larger = replace(layout, batch=batch)
        return footprint(rank_memory(larger), cluster, assumptions).fits

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedies(config: ResolvedConfig, text_size: int, cluster: Cluster, assumptions: Assumptions) -> list[Remedy]:
    """Changes that make a run fit, one key at first, then with a micro-batch of 1 on top; cheapest for speed first."""
    found: list[Remedy] = []
    micro = largest_micro_size(config, text_size, cluster, assumptions)
    singles = [{"batch.micro_size": micro}] if micro else []
    singles += list(_alternatives(config, cluster))
    for changes in singles:
        _try(config, changes, text_size, cluster, assumptions, found)
    if not found:
        for changes in _alternatives(config, cluster):
            combined = {**changes, "batch.micro_size": 1}
            _try(config, combined, text_size, cluster, assumptions, found)
            _try(config, {**combined, "parallel.recompute": "full"}, text_size, cluster, assumptions, found)
    return sorted(found, key=lambda remedy: len(remedy.overrides))


def _alternatives(config: ResolvedConfig, cluster: Cluster) -> Iterator[dict[str, object]]:
    if config.parallel.recompute == "none":
        yield {"parallel.recompute": "full"}
    for name in ("zero1", "zero2", "zero3"):
        yield from _with_file(config, name)
    for tensor in (2, 4, 8):
        if config.parallel.tensor < tensor <= cluster.gpus_per_node:
            yield {"parallel.tensor": tensor, "parallel.sequence": True}
    yield from _with_file(config, "zero3-offload")


def _with_file(config: ResolvedConfig, name: str) -> Iterator[dict[str, object]]:
    """Another shipped DeepSpeed file, in place of a shipped one only; its stage too, where the run names one."""
    engine = config.engine
    if not engine.ds_config or engine.ds_config in ds_config_names():
        stage = {} if engine.zero_stage is None else {"engine.zero_stage": int(name.removeprefix("zero")[0])}
        yield {"engine.ds_config": name} | stage


def _try(
    config: ResolvedConfig,
    changes: dict[str, object],
    text_size: int,
    cluster: Cluster,
    assumptions: Assumptions,
    found: list[Remedy],
) -> None:
    nested: dict[str, dict[str, object]] = {}
    for path, value in changes.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    size = _fits(_changed(config, nested), text_size, cluster, assumptions)
    if size:
        keys = tuple(
            f"{path}={str(value).lower() if isinstance(value, bool) else value}" for path, value in changes.items()
        )
        found.append(Remedy(keys, size))


def _changed(config: ResolvedConfig, changes: dict[str, dict[str, object]]) -> ResolvedConfig:
    sections = {
        section: type(old)(**{**old.model_dump(), **values})
        for section, values in changes.items()
        for old in [getattr(config, section)]
    }
    return config.model_copy(update=sections)


def _fits(config: ResolvedConfig, text_size: int, cluster: Cluster, assumptions: Assumptions) -> float:
    """Bytes in all where the run can be laid out and fits, else 0."""
    try:
        check(config)
        layout = Layout.of(config, cluster.ranks, text_size)
    except ConfigError:
        return 0.0
    size = footprint(rank_memory(layout), cluster, assumptions)
    return size.total if size.fits else 0.0
