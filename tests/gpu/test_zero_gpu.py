"""ZeRO stages on the device: one list of losses, one gradient, and a step that is not finite changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_runs import DEVICE, furthest, keys
from support.forked_ranks import metrics
from wheels import ROOT

from pause_megatron.config.load import load
from pause_megatron.train.pretrain import pretrain

sys.path.insert(0, str(ROOT / "tests" / "distributed"))
import test_engine as engine_tests

SETTINGS = {
    **{f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in range(4)},
    "zero2-overlap": ["engine.ds_config=zero2-overlap"],
    "zero3-offload": ["engine.ds_config=zero3-offload"],
}
# fp32: sums are rounded in another order. bf16: weights are rounded after each step.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


def losses(corpus: str, folder: Path, *more: str) -> list[float]:
    assert pretrain(load(recipe="tiny-pause", overrides=keys(corpus, folder, *more))) == 0
    return [line["loss"] for line in metrics(folder)]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> list[float]:
    """ZeRO 0 in fp32 with the plain kernels."""
    found = losses(corpus, tmp_path_factory.mktemp("reference"), "engine.zero_stage=0", "engine.kernels=plain")
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_one_list_of_losses(corpus, reference, tmp_path, figures, name, precision):
    found = losses(corpus, tmp_path, f"engine.precision={precision}", *SETTINGS[name])
    gap = furthest(found, reference)
    figures(losses=found, gap=gap)
    figures.line(f"zero: {name} in {precision}: losses within {gap:.1e} of ZeRO 0 in fp32")
    assert gap < TOLERANCE[precision]


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_skipped(figures, zero, precision):
    applied, untouched, good_applied, norm = engine_tests.poisoned(zero, precision)
    figures(applied=applied, untouched=untouched, next_applied=good_applied, next_norm=norm)
    assert (applied, untouched, good_applied) == (False, True, True) and norm > 0


@pytest.mark.parametrize("zero", range(4))
def test_one_gradient_however_it_is_accumulated(figures, zero):
    expected = engine_tests.grad_norms(0, "fp32", engine_tests.WINDOWS)
    found = engine_tests.grad_norms(zero, "fp32", 2)
    figures(gap=furthest(found, expected))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_runs_were_on_the_device():
    if DEVICE == "cuda":
        assert torch.cuda.max_memory_allocated() > 0
