"""What is assumed about a cluster, each number with its unit and source. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from pause_megatron.config.gpus import Gpu
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError

# Model FLOPs / peak FLOPs while computing (llm-foundry's published 1B runs on 8 GPUs).
_MFU = {"a100-40": 0.56, "a100-80": 0.56, "a800": 0.56}
_MFU_ELSEWHERE = 0.42


@dataclass(frozen=True)
class Assumption:
    """A number that nothing here can know, with its unit and where it comes from."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted. `--assume NAME=VALUE` replaces a value."""

    mfu: Assumption = Assumption(
        0.42,
        "model FLOPs / peak FLOPs while computing",
        "llm-foundry's published 1B runs on 8 GPUs: 0.42 on H100, 0.56 to 0.60 on A100; smaller models reach less; "
        "communication that nothing hides comes on top",
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
        0.7, "of the traffic hides behind computing", "with overlap_comm, as far as there is computing to hide behind"
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
        """Those for a kind of GPU."""
        return cls(mfu=replace(cls.mfu, value=_MFU.get(gpu.name, _MFU_ELSEWHERE)))

    def with_values(self, changes: dict[str, float]) -> Assumptions:
        """The same with other values, marked as given.

        Raises:
            ConfigError: no assumption of that name, or a value that is not positive.
        """
        names = [field.name for field in fields(self)]
        replaced = {}
        for name, value in changes.items():
            if name not in names:
                hint = nearest(name, names)
                raise ConfigError(f"--assume: expected one of {', '.join(names)}; came {name!r}{hint}")
            if not 0 < value < float("inf"):
                raise ConfigError(f"--assume {name}: expected a number > 0, came {value}")
            replaced[name] = replace(getattr(self, name), value=value, source="given")
        return replace(self, **replaced)


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of GPU."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node
