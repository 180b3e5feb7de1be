"""A run that is stopped and resumed, compared with an uninterrupted one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_runs import DEVICE, furthest, keys
from support.forked_ranks import metrics

from pause_megatron.checkpoint import Store
from pause_megatron.config.load import load
from pause_megatron.train.guards.signals import StopRequest
from pause_megatron.train.pretrain import pretrain
from pause_megatron.train.run import EXIT_STOPPED

# cuBLAS reads it once a process, and this process trains in both ways.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

STOP, STEPS = 4, 8
NUMBERS = ("step", "lr", "loss", "grad_norm", "tokens", "targets", "valid_loss")  # of a step; not its seconds


class StopAfter(StopRequest):
    """Asks a run to stop as soon as its log has so many steps."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__()
        self._log, self._steps = folder / "metrics.jsonl", steps

    def __bool__(self) -> bool:
        if self._log.exists() and len(self._log.read_text().splitlines()) >= self._steps:
            self.reason = "the test"
        return self.reason is not None


def final_state(folder: Path) -> dict[str, bytes]:
    last = Store(folder / "checkpoints").path(STEPS)
    return {path.name: path.read_bytes() for path in sorted(last.glob("state-*.safetensors"))}


@pytest.mark.parametrize(
    ("precision", "deterministic", "masking"),
    [("bf16", False, "false"), ("bf16", True, "false"), ("bf16", True, "true"), ("fp32", True, "false")],
)
def test_a_resumed_run_equals_the_uninterrupted_one(corpus, tmp_path, figures, precision, deterministic, masking):
    more = [f"engine.precision={precision}", f"data.intra_document_masking={masking}"]
    more.append(f"engine.deterministic={str(deterministic).lower()}")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert pretrain(load(recipe="tiny-pause", overrides=keys(corpus, straight, *more))) == 0
    config = load(recipe="tiny-pause", overrides=keys(corpus, stopped, *more))
    assert pretrain(config, StopAfter(stopped, STOP)) == EXIT_STOPPED
    assert [line["step"] for line in metrics(stopped)] == list(range(1, STOP + 1))
    assert pretrain(config) == 0
    found, expected = (
        [{name: line[name] for name in NUMBERS if name in line} for line in metrics(folder)]
        for folder in (stopped, straight)
    )
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    gap = furthest([line["loss"] for line in found], [line["loss"] for line in expected])
    same = found == expected and final_state(stopped) == final_state(straight)
    figures(gap=gap, same_bits=same)
    how = "deterministic" if deterministic else "by default"
    figures.line(
        f"resume: {precision}, intra-document masking {masking}, {how}: losses {gap:.1e} apart, same bits: {same}"
    )
    assert gap < 1e-3
    if deterministic or DEVICE == "cpu":
        assert same
