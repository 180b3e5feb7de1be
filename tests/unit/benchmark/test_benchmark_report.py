"""The table of a measurement: at most 100 columns, on a GPU too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pause_megatron.benchmark import Measurement, as_record, as_table
from pause_megatron.benchmark.kernels import Kernel
from pause_megatron.benchmark.machine import Machine
from pause_megatron.benchmark.record import Memory, StartUp, Waits
from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import load

LONG = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>" * 3


@pytest.fixture
def found() -> Measurement:
    """What a GPU could have given; the numbers are made up, so that each can be told from the others."""
    config = load(recipe="c4-1b-pause")
    packages = {"torch": "2.15.0+cu132", "megatron-core": "0.19.2", "deepspeed": "0.19.8", "triton": "3.9.0"}
    return Measurement(
        config=config,
        batch=batch_plan(config, 8),
        stage=1,
        parameters=1_042_358_272,
        vocabulary=32_001,
        windows="synthetic text of 32,000 ids",
        machine=Machine("cuda", "NVIDIA H100 80GB HBM3", "h100", 8, "3.12.1", packages),
        kernels="triton",
        warmup_steps=3,
        step_seconds=(2.5, 2.0, 4.0),
        raw_tokens=1_048_576.0,
        text_tokens=943_616.0,
        targets=943_616.0,
        flops=8 * 10**15,
        peak_flops=989.4e12,
        memory=Memory(66 * 2**30, 70 * 2**30, 60 * 2**30),
        waits=Waits(per_micro_batch=0.5, per_step=2.0),
        kernels_by_time=(Kernel(LONG, 12, 0.5, 0.25),),
        start_up=StartUp(1.5, 0.25, 8.0, 4.0),
    )


def test_the_table_reads_at_100_columns(found):
    for measurement in (found, replace(found, windows="/a/very/long/prefix/of/a/corpus" * 5, peak_flops=None)):
        assert max(map(len, as_table(measurement).splitlines())) <= 100


def test_every_number_is_there_with_its_unit(found):
    text = " ".join(as_table(found).split())
    for part in (
        *("8 ranks on NVIDIA H100 80GB HBM3 (h100)", "torch 2.15.0+cu132", "triton kernels"),
        "512 windows of 2,048 tokens = 4 micro x 16 accumulation x 8 data parallel; 1 tensor parallel",
        *("2.50 s in the median of 3 (2.00 s to 4.00 s), after 3 of warm-up", "419,430 tokens/s (1,048,576 a step)"),
        *("377,446 tokens/s", "8.000 PFLOP a step, 400.000 TFLOP/s a rank", "40.4% of 989.4 TFLOP/s a rank"),
        "66.00 GiB of tensors at the peak, 60.00 GiB planned (+10.0%); 70.00 GiB reserved",
        *("0.5 a micro-batch, 2 a step besides", "500 ms 25.0% 12 void at::native", "model 8.00 s, engine 4.00 s"),
    ):
        assert part in text, part


def test_what_is_not_known_is_said(found):
    assert "unknown: no peak of this device in bf16 in the table" in as_table(replace(found, peak_flops=None))
    assert as_record(replace(found, peak_flops=None))["mfu"] is None
    cpu = replace(found.machine, device="cpu", cuda_name=None, gpu=None)
    memory = Memory(66 * 2**20, None, 60 * 2**20)
    text = " ".join(as_table(replace(found, machine=cpu, memory=memory, peak_flops=None)).split())
    assert "no peak of a CPU in the table; give log.peak_tflops=N" in text
    assert "66.0 MiB of tensors at the peak, 60.0 MiB planned (+10.0%) host waits" in text
