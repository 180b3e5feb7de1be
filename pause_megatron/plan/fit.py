"""Fit of a run into a GPU's memory, the largest micro-batch that fits, and remedies where none does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Memory of one GPU in bytes.

    Attributes:
        tensors: Peak of tensors in a step, times the measured ratio.
        margin: Margin for fragmentation.
        base: CUDA context, libraries, NCCL.
        capacity: Memory of the GPU.
    """

    tensors: int
    margin: float
    base: float
    capacity: float

    @property
    def total(self) -> float:
        """Memory that the run needs."""
        return self.tensors + self.margin + self.base

    @property
    def fits(self) -> bool:
        """Whether it is within the capacity."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run fit.

    Attributes:
        overrides: `KEY=VALUE` texts.
        total: Bytes of a GPU with them.
    """

    overrides: tuple[str, ...]
    total: float


def footprint(memory: RankMemory, cluster: Cluster, assumptions: Assumptions) -> Footprint:
    """Return the memory of a GPU against its capacity.

    Args:
        memory: Tensors of a rank.
        cluster: Nodes and GPUs.
        assumptions: Fragmentation margin, base and measured ratio.
    """
    tensors = memory.peak_bytes
    if assumptions.memory_ratio is not None:
        tensors = round(tensors * assumptions.memory_ratio.value)
    return Footprint(
        tensors=tensors,
        margin=tensors * assumptions.fragmentation.value,
        base=assumptions.base_gib.value * GIB,
        capacity=cluster.gpu.memory_bytes,
    )


@dataclass(frozen=True)
class _Trial:
    """The vocabulary, cluster and assumptions with which variants of a configuration are tried."""

    text_size: int
    cluster: Cluster
    assumptions: Assumptions

    def total_bytes(self, config: ResolvedConfig) -> float | None:
        """Return the memory of a GPU; None where the configuration is refused or does not fit."""
        try:
            check(config)
            layout = Layout.of(config, self.cluster.ranks, self.text_size)
        except ConfigError:
            return None
        size = footprint(rank_memory(layout), self.cluster, self.assumptions)
        return size.total if size.fits else None

    def remedy(self, config: ResolvedConfig, changes: Mapping[str, object]) -> Remedy | None:
        """Return changes as a remedy; None where the run does not fit with them."""
        total = self.total_bytes(_changed(config, changes))
        if total is None:
            return None
        values = {path: str(value).lower() if isinstance(value, bool) else value for path, value in changes.items()}
        return Remedy(tuple(f"{path}={value}" for path, value in values.items()), total)


def largest_micro_size(
    config: ResolvedConfig, text_size: int, cluster: Cluster, assumptions: Assumptions
) -> int | None:
    """Return the largest batch.micro_size that fits and divides a rank's share of the global batch.

    Args:
        config: Resolved configuration.
        text_size: Ids of the text vocabulary.
        cluster: Nodes and GPUs.
        assumptions: Assumed numbers.

    Returns:
        Windows of a micro-batch; None where not even one fits.
    """
    trial = _Trial(text_size, cluster, assumptions)
    share = config.batch.global_size * config.parallel.tensor // cluster.ranks
    for micro in (size for size in range(share, 0, -1) if share % size == 0):
        if trial.total_bytes(_changed(config, {"batch.micro_size": micro})) is not None:
            return micro
    return None


def memory_micro_size(layout: Layout, cluster: Cluster, assumptions: Assumptions) -> int:
    """Return the largest micro-batch that fits without gradient accumulation, with any global batch.

    Args:
        layout: A run on its ranks.
        cluster: Nodes and GPUs.
        assumptions: Assumed numbers.

    Returns:
        Windows of a micro-batch; 0 where not even one fits.
    """

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
    """Return changes that make a run fit, those that cost least speed first.

    One change is tried at a time; if none fits, each with a micro-batch of 1, and with recomputation as well.

    Args:
        config: Resolved configuration.
        text_size: Ids of the text vocabulary.
        cluster: Nodes and GPUs.
        assumptions: Assumed numbers.
    """
    trial = _Trial(text_size, cluster, assumptions)
    micro = largest_micro_size(config, text_size, cluster, assumptions)
    smaller: list[dict[str, object]] = [{"batch.micro_size": micro}] if micro else []
    alternatives = list(_alternatives(config, cluster))
    fitting = [remedy for changes in [*smaller, *alternatives] if (remedy := trial.remedy(config, changes))]
    if not fitting:
        one = {"batch.micro_size": 1}
        fitting = [
            remedy
            for changes in alternatives
            for more in (one, {**one, "parallel.recompute": "full"})
            if (remedy := trial.remedy(config, {**changes, **more}))
        ]
    return sorted(fitting, key=lambda remedy: len(remedy.overrides))


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
    """Yield another shipped DeepSpeed file in place of a shipped one, with its stage where the run gives one."""
    engine = config.engine
    if not engine.ds_config or engine.ds_config in ds_config_names():
        changes: dict[str, object] = {"engine.ds_config": name}
        if engine.zero_stage is not None:
            changes["engine.zero_stage"] = int(name.removeprefix("zero")[0])
        yield changes


def _changed(config: ResolvedConfig, changes: Mapping[str, object]) -> ResolvedConfig:
    """Return a configuration with other values, by the dotted paths of their keys."""
    nested: dict[str, dict[str, object]] = {}
    for path, value in changes.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    sections = {}
    for section, values in nested.items():
        old = getattr(config, section)
        sections[section] = type(old)(**{**old.model_dump(), **values})
    return config.model_copy(update=sections)
