"""Host waits for the device in all code: none per micro-batch, one per step."""

from __future__ import annotations

from unittest import mock

import pytest
from support.host_waits import waits_of_steps
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

SMALL = [
    *tiny_model(layers=2, hidden=64, heads=4, tied=False),
    *("data.sequence_length=32", "pause.rate=0.1", "batch.global_size=8", "batch.micro_size=2"),
    *("optim.warmup_steps=1", "optim.clip=0.05"),
]
PARALLEL = ["parallel.tensor=2", "parallel.sequence=true"]
# Waits of DeepSpeed's own, in a micro-batch and in a step, where its gradients stay on the GPU.
OWN = {
    "zero0": (0, 0),
    "zero1": (0, 0),
    "zero2": (0, 0),
    "zero2-overlap": (1, 0),  # the whole device, for each bucket and before it lets go of reduced gradients
    "zero3": (1, 1),  # its reduction stream; the whole device, when it gathers the parameters that it does not split
}


def keys(engine: str, precision: str) -> list[str]:
    return [f"engine.ds_config={engine}", f"engine.precision={precision}"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_waits_are_one_per_step_and_those_of_deepspeed(precision):
    for engine, (micro_batch, step) in OWN.items():
        for counted in run_on_ranks(2, waits_of_steps, [*SMALL, *keys(engine, precision)]):
            assert counted["micro_batch"] == micro_batch, (engine, counted["table"])
            assert counted["step"] == 1 + step <= 2, (engine, counted["table"])


def test_waits_with_tensor_and_sequence_parallelism():
    for counted in run_on_ranks(2, waits_of_steps, [*SMALL, *keys("zero1", "bf16"), *PARALLEL]):
        assert (counted["micro_batch"], counted["step"]) == (0, 1), counted["table"]


def test_waits_with_intra_document_masking():
    for counted in run_on_ranks(
        1, waits_of_steps, [*SMALL, *keys("zero1", "bf16"), "data.intra_document_masking=true"]
    ):
        assert (counted["micro_batch"], counted["step"]) == (0, 1), counted["table"]


def waits_with(place: str) -> tuple[float, float, str]:
    """Return the waits of steps with one added wait."""
    from pause_megatron.engine.engine import Engine
    from pause_megatron.model.head import OutputLayer
    from pause_megatron.model.layers import TransformerLayer
    from pause_megatron.train.losses import LossSums

    owner, name = {
        "forward": (TransformerLayer, "forward"),
        "loss": (OutputLayer, "forward"),
        "sums": (LossSums, "add"),
        "engine": (Engine, "_optimizer_step"),
        "loop": (LossSums, "reduced"),
    }[place]
    original = getattr(owner, name)

    def reading(*args, **kwargs):
        result = original(*args, **kwargs)
        next(p for p in _parameters(args)).sum().item()
        return result

    with mock.patch.object(owner, name, reading):
        counted = waits_of_steps([*SMALL, "engine.ds_config=zero1"])
    return counted["micro_batch"], counted["step"], counted["table"]


def _parameters(args):
    import torch

    for value in (*args, getattr(args[0], "deepspeed", None), getattr(args[0], "_sums", None)):
        if isinstance(value, torch.nn.Module):
            yield from value.parameters()
        if isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize("place", ["forward", "loss", "sums", "engine", "loop"])
def test_one_more_wait_anywhere_is_detected(place):
    ((micro_batch, step, table),) = run_on_ranks(1, waits_with, place)
    assert (micro_batch, step) == ((0, 2) if place in ("engine", "loop") else (1 + (place == "forward"), 1)), table
    assert "test_host_waits.py" in table
