"""The machine: devices and versions, `doctor`, and measured speed of memory and matrix products."""

from __future__ import annotations

import json
from functools import partial

import torch
from clock import seconds_of

from pause_megatron.cli import main
from pause_megatron.config.gpus import gpu_of_cuda


def test_doctor_finds_all_that_training_needs(capsys, figures):
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    figures(doctor=found)
    wrong = [f"{one['name']}: {one['text']}" for one in found if one["status"] == "missing"]
    for text in wrong:
        figures.line(f"doctor: {text}")
    # A version that was never run is said, and what breaks on it the other parts say.
    assert code == 0 or all("expected" in text for text in wrong), wrong


def test_the_gpu(cuda, figures):
    properties = torch.cuda.get_device_properties(0)
    figures(
        name=properties.name,
        count=torch.cuda.device_count(),
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )
    figures.line(
        f"machine: {torch.cuda.device_count()} x {properties.name}, capability {properties.major}.{properties.minor}, "
        f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    )
    known = gpu_of_cuda(properties.name)
    assert known is not None, f"{properties.name} is not in config/gpus.py: no MFU, no plan"
    assert 0.9 < properties.total_memory / known.memory_bytes <= 1.05


def test_what_the_hardware_gives(figures):
    """A large copy and a large product: the ceilings that the times of other parts are to be read against."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, size = (2**30, 8192) if device == "cuda" else (2**24, 1024)
    source = torch.ones(count, dtype=torch.bfloat16, device=device)
    copy = 2 * 2 * count / seconds_of(partial(torch.empty_like(source).copy_, source), device)
    # Random, because products of zeros draw less power and run faster.
    one, two = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = 2 * size**3 / seconds_of(partial(torch.mm, one, two), device)
    figures(copy_bytes_per_second=copy, product_flops_per_second=product)
    figures.line(f"machine: copy {copy / 1e9:,.0f} GB/s, bf16 product of {size} {product / 1e12:.2f} TFLOP/s")
    known = gpu_of_cuda(torch.cuda.get_device_name()) if device == "cuda" else None
    if known is not None:
        assert 0.5 < copy / known.memory_bandwidth < 1.05 and 0.4 < product / known.peak_flops < 1.05
