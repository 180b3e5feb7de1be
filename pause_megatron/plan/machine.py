"""Assumptions about a cluster, each with its unit and source."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from pause_megatron.config.gpus import Gpu
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError

# Efficiencies of an A100 where they exceed those of an H100, whose peak is three times as high.
_A100 = {"product_efficiency": 0.85, "attention_efficiency": 0.7}


@dataclass(frozen=True)
class Assumption:
    """An assumed number.

    Attributes:
        value: The number.
        unit: Its unit.
        source: Paper, data sheet or file it comes from.
        ranks: World size of the run in which it was measured, communication and recomputation included; None: assumed.
    """

    value: float
    unit: str
    source: str
    ranks: int | None = None


# Numbers that a plan computes itself, unless they are given or measured.
OPTIONAL = {
    "mfu": Assumption(0.0, "model FLOPs / peak FLOPs while computing", "given"),
    "memory_ratio": Assumption(1.0, "of the tensors that are counted", "given"),
}

# Assumptions that give the seconds of computing; a given or measured MFU replaces them.
SPEEDS = frozenset(
    {
        *("product_efficiency", "product_half_width", "attention_efficiency", "attention_half_width"),
        *("memory_efficiency", "launch_seconds"),
    }
)

SHARES = frozenset(
    {"mfu", "product_efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency", "overlap"}
)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan; `--assume NAME=VALUE` replaces one."""

    mfu: Assumption | None = None
    memory_ratio: Assumption | None = None
    product_efficiency: Assumption = Assumption(
        0.75,
        "of the peak",
        "bf16 matrix products of wide layers: cuBLAS reaches 650 to 750 TFLOP/s on an H100 and 250 to 270 on an A100",
    )
    product_half_width: Assumption = Assumption(
        256.0,
        "hidden channels a rank",
        "at which products reach half of that: chosen so that published runs come out (see plan/README.md)",
    )
    attention_efficiency: Assumption = Assumption(
        0.375,
        "of the peak",
        "causal FlashAttention-2, wide heads: Shah et al. 2024 (at most 0.35 on an H100), Dao 2023 (A100)",
    )
    attention_half_width: Assumption = Assumption(
        32.0,
        "channels a head",
        "at which attention reaches half of that: 64 channels are about 0.83 of 128 (same papers)",
    )
    memory_efficiency: Assumption = Assumption(
        0.85, "of the memory's bandwidth", "what element-wise kernels on large tensors usually reach"
    )
    launch_seconds: Assumption = Assumption(
        8e-6, "s a kernel", "the host's time for an operator of torch and its gradient: 5 to 10 us are usual"
    )
    base_gib: Assumption = Assumption(
        1.5, "GiB a GPU", "CUDA context, cuBLAS and NCCL buffers: a usual figure, not measured here"
    )
    fragmentation: Assumption = Assumption(
        0.06, "of the tensors", "torch's caching allocator with expandable segments: a margin, not measured here"
    )
    link_efficiency: Assumption = Assumption(
        0.8, "of the link's speed", "what NCCL's bandwidth tests reach on large messages"
    )
    overlap: Assumption = Assumption(
        0.7, "of the traffic overlaps with computing", "with overlap_comm, as far as there is computing to overlap with"
    )
    host_adam_bytes: Assumption = Assumption(
        200e9, "bytes/s a node", "memory bandwidth of the host that an optimizer step on the CPU reaches (offload)"
    )
    write_bytes: Assumption = Assumption(1e9, "bytes/s a node", "a parallel file system's client; measure yours")
    write_limit_bytes: Assumption = Assumption(20e9, "bytes/s in all", "the file system; measure yours")
    node_mtbf_hours: Assumption = Assumption(
        6300.0,
        "hours between failures of a node of 8 GPUs",
        "Llama 3 (Dubey et al. 2024, section 3.3.4): 419 unexpected stops of 2,048 nodes in 54 days",
    )
    restart_seconds: Assumption = Assumption(300.0, "s a failure", "requeue, start, load: a usual figure")

    @classmethod
    def of(cls, gpu: Gpu) -> Assumptions:
        """Return the assumptions for a kind of GPU.

        Args:
            gpu: The GPU.
        """
        better = _A100 if gpu.name.startswith(("a100", "a800")) else {}
        return cls(**{name: replace(getattr(cls, name), value=value) for name, value in better.items()})

    def with_values(self, changes: dict[str, float]) -> Assumptions:
        """Return the assumptions with other values, marked as given.

        Args:
            changes: Values by name.

        Raises:
            ConfigError: No assumption has that name, a value is not positive, or a share is above 1.
        """
        names = [field.name for field in fields(self)]
        replaced = {}
        for name, value in changes.items():
            if name not in names:
                hint = nearest(name, names)
                raise ConfigError(f"--assume: expected one of {', '.join(names)}; got {name!r}{hint}")
            if not 0 < value < float("inf"):
                raise ConfigError(f"--assume {name}: expected a number > 0, got {value}")
            if value > 1 and name in SHARES:
                raise ConfigError(f"--assume {name}: expected a fraction between 0 and 1, got {value:g}")
            replaced[name] = replace(getattr(self, name) or OPTIONAL[name], value=value, source="given")
        return replace(self, **replaced)


@dataclass(frozen=True)
class Cluster:
    """Nodes with one kind of GPU.

    Attributes:
        gpu: Kind of GPU.
        nodes: Number of nodes.
        gpus_per_node: GPUs per node.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node
