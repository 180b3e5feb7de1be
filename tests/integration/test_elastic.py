"""World size 1 -> 2 -> 4 -> 2 -> 1, TP 1 -> 2 -> 1, ZeRO 1 -> 3 -> 0: a resumed run equals the uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.log_lines import captured_log
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.checkpoint import MergedReader, Store
from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.engine import ADAM_STATE
from pause_megatron.train.guards.signals import StopRequest

EACH = 2
# ranks, tensor parallel, ZeRO stage of each part of the run
PARTS = [(1, 1, 1), (2, 2, 3), (4, 2, 0), (2, 1, 2), (1, 1, 0)]
MORE_PARTS = [(1, 1, 1), (2, 2, 3), (4, 2, 0), (2, 1, 2), (4, 4, 1), (2, 1, 3), (1, 1, 0)]
IN_BF16 = [(2, 2, 3), (1, 1, 0), (2, 1, 2)]
STEPS = EACH * len(MORE_PARTS)
TEXT, PAUSES = 1000, 2


class StopAfter(StopRequest):
    """A stop request that comes when `steps` have been taken."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def __bool__(self) -> bool:
        self._left -= 1
        return self._left < 0


class Recorded:
    """Windows that remember which of them were asked for."""

    def __init__(self, windows) -> None:
        self._windows, self.numbers = windows, []

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int):
        self.numbers.append(number)
        return self._windows[number]


def run_config(corpus: str, folder: str, precision: str, tensor: int, zero: int) -> RunConfig:
    return load(
        recipe="tiny-pause",
        overrides=[
            *(f"data.prefix={corpus}", f"run.dir={folder}", f"train.steps={STEPS}", "data.prefetch=0"),
            *tiny_model(layers=2, hidden=32, heads=4, kv_heads=4),
            *("model.tied=false", "model.qkv_bias=true", "data.sequence_length=64", "batch.global_size=8"),
            *("batch.micro_size=1", "pause.placement=bernoulli", "pause.window=trim", f"pause.embeddings={PAUSES}"),
            *(f"engine.precision={precision}", f"engine.zero_stage={zero}", f"parallel.tensor={tensor}"),
            *("checkpoint.every=0", "validation.every=0", "optim.warmup_steps=2"),
            *("log.tensorboard=false", "log.samples_every=0"),
        ],
    )


def part(corpus: str, folder: str, precision: str, tensor: int, zero: int, steps: int) -> list[int]:
    """Resume for some steps. Returns the numbers of the windows that this rank read."""
    from pause_megatron.distributed import initialize
    from pause_megatron.train.pretrain import corpus_data
    from pause_megatron.train.run import open_run
    from pause_megatron.train.training import train

    config = run_config(corpus, folder, precision, tensor, zero)
    with initialize(config.parallel) as context:
        data = corpus_data(config, context.world_size)
        windows = Recorded(data.train)
        with open_run(config, dataclasses.replace(data, train=windows), context, StopAfter(steps)) as run:
            train(run)
    return windows.numbers if context.tp_rank == 0 else []


def load_and_save(corpus: str, folder: str, precision: str, tensor: int, zero: int, output: str) -> str:
    """Save what a resumed run starts with, before it takes a step. Returns its log."""
    from pause_megatron.checkpoint import save
    from pause_megatron.distributed import initialize
    from pause_megatron.model import parameter_groups
    from pause_megatron.train import run
    from pause_megatron.train.pretrain import corpus_data
    from pause_megatron.train.start.start import find_start

    config = run_config(corpus, folder, precision, tensor, zero)
    with initialize(config.parallel) as context, captured_log() as said:
        data = corpus_data(config, context.world_size)
        model = run.new_model(config, data)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        store = Store(Path(folder) / "checkpoints", context.rank, context.world_size)
        start = find_start(store, config, data, context)
        shards = start.load_weights(model, context)
        with run.new_engine(config, model, parameter_groups(model, config.optim.weight_decay), context) as engine:
            start.load_state(engine, shards)
            save(
                Store(output, context.rank, context.world_size),
                engine,
                context,
                step=start.progress.step,
                corpus=data.fingerprint,
                progress={},
                config_yaml="",
                save_tokenizer=data.tokenizer.save,
                keep=1,
            )
    return said.getvalue()


def assert_same_state(before: Path, after: Path) -> None:
    """Every live element of masters and moments bit for bit, and padding rows that are zero."""
    one, two = MergedReader(before), MergedReader(after)
    assert one.manifest.optimizer_step == two.manifest.optimizer_step > 0
    assert one.manifest.parameters.keys() == two.manifest.parameters.keys()
    for name in one.manifest.parameters:
        rows = TEXT + PAUSES if name in VOCABULARY else one.shape(name)[0]
        for key in ADAM_STATE:
            assert torch.equal(one.rows(name, 0, rows, key), two.rows(name, 0, rows, key)), (name, key)
            for reader in (one, two):
                assert not reader.rows(name, rows, reader.shape(name)[0], key).any() if name in VOCABULARY else True


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("precision", "parts", "tolerance"),
    [
        ("fp32", PARTS, 1e-6),
        ("bf16", IN_BF16, 2e-2),
        pytest.param("fp32", MORE_PARTS, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_a_run_over_many_topologies_is_the_run_at_one(corpus, tmp_path, precision, parts, tolerance):
    straight, folder, steps = tmp_path / "straight", tmp_path / "elastic", EACH * len(parts)
    order = run_on_ranks(1, part, corpus, str(straight), precision, 1, 0, steps)[0][
        : 8 * steps
    ]  # and what it read ahead
    assert len(set(order)) == 8 * steps

    seen: list[int] = []
    for index, (ranks, tensor, zero) in enumerate(parts):
        if index:
            newest = Store(folder / "checkpoints").path(EACH * index)
            output = tmp_path / f"loaded-{index}"
            arguments = (corpus, str(folder), precision, tensor, zero, str(output))
            said = run_on_ranks(ranks, load_and_save, *arguments)[0]
            assert f"tensor parallel {parts[index - 1][1]} -> {tensor}" in said or parts[index - 1][1] == tensor
            assert f"ZeRO stage {parts[index - 1][2]} -> {zero}" in said
            assert_same_state(newest, Store(output).path(EACH * index))
        numbers = run_on_ranks(ranks, part, corpus, str(folder), precision, tensor, zero, EACH)
        for step in range(EACH):  # the data-parallel ranks' shares of a step, together
            share = 8 * tensor // ranks
            seen += sorted(number for mine in numbers for number in mine[step * share : (step + 1) * share])
    assert seen == [number for step in range(steps) for number in sorted(order[8 * step : 8 * step + 8])]

    got, expected = metrics(folder), metrics(straight)
    exact = ("step", "lr", "tokens", "text_tokens", "targets", "applied")
    assert [[line[key] for key in exact] for line in got] == [[line[key] for key in exact] for line in expected]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in expected], rel=tolerance)


def matrices_drawn(corpus: str, folder: str) -> list[int]:
    """How many matrices a run draws when it starts, and when it resumes."""
    from unittest import mock

    from pause_megatron.model import init

    counts = []
    for _ in range(2):
        with mock.patch.object(init, "normal", side_effect=init.normal) as drawing:
            part(corpus, folder, "fp32", 1, 1, 2)
        counts.append(drawing.call_count)
    return counts


def test_weights_that_are_about_to_be_loaded_are_not_drawn(corpus, tmp_path):
    ((fresh, resumed),) = run_on_ranks(1, matrices_drawn, corpus, str(tmp_path))
    assert fresh > 8
    assert resumed == 0
