"""One list of losses: the same 20 steps in every split over ranks, micro-batches, shards and ZeRO stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.compiler import needs_compiler
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

STEPS = 20
# Each step's gradient is the same to 1e-6, but sums are rounded in another order, and Adam divides small moments by
# their own size: parameters part slowly. Norms of later steps were up to 9e-6 apart, losses less than 1e-6.
FIRST, LATER_CLOSE = 5, 5e-5
# ranks, tensor, sequence parallel, ZeRO stage, micro-batch, further keys
TOPOLOGIES = [
    (1, 1, False, 1, 2, []),
    (1, 1, False, 3, 4, ["parallel.recompute=full"]),
    (2, 1, False, 0, 4, []),
    (2, 1, False, 1, 1, []),
    (2, 1, False, 2, 2, ["model.head_chunk=37", "engine.ds_config=zero2-overlap"]),
    (2, 1, False, 3, 2, []),
    (2, 2, False, 0, 8, []),
    (2, 2, True, 1, 4, []),
    (2, 2, False, 2, 2, ["model.vocab_multiple=1"]),
    (2, 2, True, 3, 2, ["parallel.recompute=full"]),
    (4, 1, False, 1, 2, []),
    (4, 2, True, 0, 1, []),
    (4, 2, True, 2, 2, []),
    (4, 2, False, 3, 4, []),
    (4, 4, True, 1, 8, []),
    (4, 1, False, 3, 1, ["engine.ds_config=zero3-offload"]),
    pytest.param((1, 1, False, 2, 8, ["engine.kernels=compiled", "model.head_chunk=200"]), marks=needs_compiler),
]


def train(corpus: str, folder: str, zero: int, micro: int, tensor: int, sequence: bool, extra: list[str]) -> int:
    from pause_megatron.config.load import load
    from pause_megatron.train.pretrain import pretrain

    config = load(
        recipe="tiny-pause",
        overrides=[
            *(f"data.prefix={corpus}", f"run.dir={folder}", f"engine.zero_stage={zero}", f"train.steps={STEPS}"),
            *tiny_model(layers=2, hidden=64, heads=4, tied=False),
            *("model.kv_heads=4", "data.sequence_length=64", "batch.global_size=8", f"batch.micro_size={micro}"),
            # The number of pauses differs from window to window, and so does the number of ignored targets.
            *("pause.window=trim", "pause.placement=bernoulli", "pause.rate=0.3", "pause.embeddings=2"),
            *("optim.warmup_steps=4", "checkpoint.every=0", "validation.every=10", "validation.samples=7"),
            *(f"parallel.tensor={tensor}", f"parallel.sequence={str(sequence).lower()}", "log.tensorboard=false"),
            *extra,
        ],
    )
    return pretrain(config)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> list[dict]:
    """One rank, one micro-batch a step, no ZeRO."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_on_ranks(1, train, corpus, str(folder), 0, 8, 1, False, []) == [0]
    return metrics(folder)


def test_the_reference_learns_on_unequal_numbers_of_targets(reference):
    assert len({line["targets"] for line in reference}) > 5
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.3


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: "-".join(map(str, t[:5])))
def test_every_topology_gives_one_loss_list(corpus, tmp_path, reference, topology):
    ranks, tensor, sequence, zero, micro, extra = topology
    assert run_on_ranks(ranks, train, corpus, str(tmp_path), zero, micro, tensor, sequence, extra) == [0] * ranks
    lines = metrics(tmp_path)
    exact = ("step", "lr", "tokens", "text_tokens", "targets", "pause_fraction", "applied")
    close = ("loss", "loss_after_pause", "loss_elsewhere", "grad_norm", "valid_loss", "valid_loss_without_pauses")
    assert [[line[key] for key in exact] for line in lines] == [[line[key] for key in exact] for line in reference]
    for key in close:
        found, expected = ([line[key] for line in given if key in line] for given in (lines, reference))
        first = FIRST if len(found) == STEPS else 0
        assert found[:first] == pytest.approx(expected[:first], rel=1e-6), key
        assert found[first:] == pytest.approx(expected[first:], rel=LATER_CLOSE if key == "grad_norm" else 1e-5), key
