"""Probes of `doctor` for GPU, compiler, machine, SLURM, network and data files; an exception in one is its finding."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from pause_megatron.cli.support import installed
from pause_megatron.cli.support.finding import Finding, Probe
from pause_megatron.errors import ConfigError
from pause_megatron.versions import PACKAGES

GIB = 1024**3
DEFAULT_PORT = 29500  # of torchrun and deepspeed


def examine(probes: Iterable[tuple[str, Probe]] | None = None) -> Iterator[Finding]:
    """Run probes in order, without their output.

    Args:
        probes: Names and probes; None for all of them.

    Yields:
        Their findings; an exception in a probe is a finding too.
    """
    for name, probe in PROBES if probes is None else probes:
        findings: list[Finding] = []
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                findings.extend(probe())
        except (Exception, SystemExit) as error:  # an import may raise anything
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            findings.append(Finding(name, "missing", f"the check failed: {text}", "repair or reinstall it"))
        yield from findings


def _gpu() -> Iterator[Finding]:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        advice = "fine for the tiny recipes"
        if shutil.which("nvidia-smi"):
            advice = "there is a driver: install a torch that was built for CUDA, or check the output of nvidia-smi"
        yield Finding("GPU", "note", f"none usable; {built}", advice)
        yield Finding("bf16", "ok", "on the CPU (slow where the CPU has no AMX or AVX512-BF16: engine.precision=fp32)")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"GPU {index}",
            "ok",
            f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"compute capability {properties.major}.{properties.minor}",
        )
    native = torch.cuda.get_device_capability()[0] >= 8
    yield Finding(
        "bf16",
        "ok" if native else "note",
        "native" if native else "not native on this GPU",
        "" if native else "use engine.precision=fp32",
    )
    yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def _compiler() -> Iterator[Finding]:
    for name, tools in (("C++ compiler", ("c++", "g++", "clang++")), ("ninja", ("ninja",)), ("nvcc", ("nvcc",))):
        path = next((path for tool in tools if (path := shutil.which(tool))), None)
        yield Finding(
            name,
            "ok" if path else "optional",
            path or "absent",
            "" if path else "only DeepSpeed's own kernels (DeepSpeedCPUAdam, FusedAdam) need it",
        )


def _machine() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("CPU", "ok", f"{usable} cores usable of {os.cpu_count()}; OMP_NUM_THREADS {threads}")
    yield Finding("memory", "ok", _memory())
    for name, folder, least in (("disk", ".", 2), ("temporary files", os.environ.get("TMPDIR", "/tmp"), 1)):
        yield _space(name, folder, least)
    if Path("/dev/shm").is_dir():
        yield _space("shared memory", "/dev/shm", 1)


def _memory() -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    limited = limit.read_text().strip() if limit.is_file() else "max"
    words = f"{free:.1f} of {total:.1f} GiB available"
    return words if limited == "max" else f"{words}; limited to {int(limited) / GIB:.1f} GiB here"


def _space(name: str, folder: str, least: float) -> Finding:
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {Path(folder).resolve()}"
    if usage.free < least * GIB:
        advice = (
            "NCCL and data loaders share memory there: start the container with --shm-size" if "shm" in folder else ""
        )
        return Finding(name, "note", text, advice or "a checkpoint takes 12 bytes and more per parameter: make room")
    return Finding(name, "ok", text)


def _slurm() -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        yield Finding("SLURM", "optional", "absent; runs start with deepspeed or torchrun")
        return
    job = os.environ.get("SLURM_JOB_ID")
    where = f"inside job {job}, {os.environ.get('SLURM_NTASKS', '?')} tasks" if job else "outside of a job"
    yield Finding("SLURM", "ok", f"{shutil.which('sbatch')}, {where}")


def _network() -> Iterator[Finding]:
    names = [name for _, name in socket.if_nameindex()]
    chosen = {name: value for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if (value := os.environ.get(name))}
    settings = "".join(f"; {name}={value}" for name, value in chosen.items())
    yield Finding("network interfaces", "ok", f"{', '.join(names)}{settings}")
    try:
        address = socket.gethostbyname(socket.gethostname())
        yield Finding("host name", "ok", f"{socket.gethostname()} is {address}")
    except OSError:
        yield Finding(
            "host name",
            "note",
            f"{socket.gethostname()} does not resolve",
            "runs on several nodes need it; give --master_addr an address instead",
        )
    yield from _endpoints()
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", DEFAULT_PORT)) == 0
    yield Finding(
        f"port {DEFAULT_PORT}",
        "note" if taken else "ok",
        "in use" if taken else "free",
        "another run may use it: choose another --master_port" if taken else "",
    )


def _endpoints() -> Iterator[Finding]:
    """Check the addresses at which other hosts reach a rank of this one."""
    try:
        interfaces = importlib.import_module("pause_megatron.distributed.interfaces")
    except ImportError:  # of torch or megatron-core, whose probes report it
        return
    for backend, variable in interfaces.VARIABLES.items():
        try:
            endpoint = interfaces.own_endpoint(backend)
        except ConfigError as error:
            yield Finding(f"{backend} address", "note", str(error), f"correct or unset {variable}")
            continue
        if endpoint is None:
            yield Finding(f"{backend} address", "note", "none of IPv4", "")
        elif endpoint.address.startswith("127."):
            advice = f"runs on several nodes need {variable}=NAME, the interface of their network"
            yield Finding(f"{backend} address", "note", f"{endpoint}: no other host reaches it", advice)
        else:
            yield Finding(f"{backend} address", "ok", str(endpoint))


def _shipped() -> Iterator[Finding]:
    from pause_megatron.config.deepspeed import ds_config_names
    from pause_megatron.config.load import recipe_names

    for name, files in (("recipes", recipe_names()), ("ds_configs", ds_config_names())):
        yield Finding(
            name,
            "ok" if files else "missing",
            ", ".join(files) or "none",
            "" if files else "reinstall pause-megatron: its data files are not there",
        )


PROBES: tuple[tuple[str, Probe], ...] = (
    ("python", installed.python),
    *(installed.needed(package) for package in PACKAGES),
    ("versions", installed.tried_together),
    ("own modules", installed.own_modules),
    ("triton", installed.triton),
    ("torch backends", installed.torch_backends),
    ("accelerator", installed.accelerator),
    ("GPU", _gpu),
    installed.optional("transformer-engine", "transformer_engine.pytorch", "model.attention=te"),
    installed.optional("apex", "apex", "fused kernels"),
    installed.optional("flash-attn", "flash_attn", "scaled_dot_product_attention has its own"),
    ("compiler", _compiler),
    ("machine", _machine),
    ("SLURM", _slurm),
    ("network", _network),
    ("data files", _shipped),
)
