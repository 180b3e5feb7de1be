"""A finished run is extended with its optimizer state; a run whose checkpoints are missing is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.forked_ranks import TIMING, fork, rank_main, run_config

from pause_megatron.checkpoint import Store
from pause_megatron.config.load import dump, load
from pause_megatron.config.schema import RunConfig
from pause_megatron.engine import learning_rate
from pause_megatron.errors import PauseMegatronError


def rank_that_says_errors(config: RunConfig) -> None:
    """Run a verb as the command line does: an error is a message and exit code 2."""
    try:
        rank_main(config)
    except PauseMegatronError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None


class Run:
    """A run folder and the verbs that start in it."""

    def __init__(self, folder: Path, settings: RunConfig) -> None:
        self.folder, self.settings, self.log = folder, settings, folder.with_suffix(".log")
        self._file = folder.with_suffix(".yaml")
        self._file.write_text(dump(settings))

    def __call__(self, *overrides: str, code: int = 0) -> str:
        """Start the run on one rank; return its output."""
        self.log.unlink(missing_ok=True)
        config = load(self._file, overrides=[f"run.dir={self.folder}", *overrides])
        [process] = fork(rank_that_says_errors, (config,), self.log, ranks=1)
        process.join(120)
        said = self.log.read_text()
        assert process.exitcode == code, said[-4000:]
        return said

    def copy(self, name: str) -> Run:
        """Copy the folder to another name."""
        other = Run(self.folder.with_name(name), self.settings)
        shutil.copytree(self.folder, other.folder, symlinks=True)
        return other

    def back_to(self, step: int) -> None:
        """Remove later checkpoints, as if the run had been killed before."""
        store = Store(self.folder / "checkpoints")
        for later in store.steps():
            if later > step:
                shutil.rmtree(store.path(later))

    @property
    def metrics(self) -> list[dict]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]

    def state(self, step: int) -> dict[str, bytes]:
        folder = Store(self.folder / "checkpoints").path(step)
        return {path.name: path.read_bytes() for path in sorted(folder.glob("state-*.safetensors"))}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Run:
    """A run that ended after 4 steps."""
    folder = tmp_path_factory.mktemp("going-on") / "finished"
    config = run_config(corpus, folder, zero=1)
    changes = {
        "train": config.train.model_copy(update={"steps": 4, "tokens": None}),
        "validation": config.validation.model_copy(update={"every": 0}),
        "log": config.log.model_copy(update={"tensorboard": True, "samples_every": 0}),
    }
    run = Run(folder, config.model_copy(update=changes))
    run()
    return run


def test_a_finished_run_is_extended_and_extended_again(finished):
    run = finished.copy("extended")
    before, metrics = run.state(4), (run.folder / "metrics.jsonl").read_bytes()
    refused = run("train.steps=8", code=2)
    command = f"pause-megatron pretrain --config {run.folder}/config.yaml train.extended_from=4 train.steps=8"
    assert "train.steps: 4 in the checkpoint, 8 in this run" in refused
    assert f"To extend this run: {command}" in refused and run.state(4) == before

    longer = ("train.extended_from=4", "train.steps=8")
    said = run(*longer, "optim.lr=1e-3")
    assert ", after the 4 of the finished run, run folder" in said and "resuming after step 4" in said
    assert (run.folder / "metrics.jsonl").read_bytes().startswith(metrics)
    assert [line["step"] for line in run.metrics] == list(range(1, 9))
    optim = load(run.folder / "config.yaml").optim
    assert [line["lr"] for line in run.metrics[4:]] == [learning_rate(optim, step, 4) for step in range(1, 5)]
    tokens = [line["tokens"] for line in run.metrics]
    assert tokens == [step * tokens[0] for step in range(1, 9)]

    # Killed inside the extension: the same command resumes bit for bit; another one is refused.
    straight, state = run.metrics, run.state(8)
    run.back_to(6)
    assert "optim.lr: 0.001 in the checkpoint" in run(*longer, "optim.lr=2e-3", code=2)
    assert "resuming after step 6" in run(*longer, "optim.lr=1e-3")
    assert run.metrics == straight and run.state(8) == state

    run("train.extended_from=8", "train.steps=10", "optim.lr=1e-3", "optim.schedule=constant")
    assert [line["lr"] for line in run.metrics[8:]] == [1e-3, 1e-3] and run.metrics[:8] == straight


@pytest.mark.parametrize("text", ["corpus", "stream"])
def test_an_extension_continues_optimizer_moments_and_text(finished, shards, text, tmp_path):
    """At a constant rate, within one epoch, an extended run equals one that was longer from the start."""
    keys = ["optim.schedule=constant", "optim.warmup_steps=0"]
    if text == "stream":
        one = min(shards.glob("c4-train.*"))
        keys += ["data.prefix=[]", f"data.source={one}", f"data.tokenizer={shards / 'tokenizer.model'}"]
    short, whole = (Run(tmp_path / name, finished.settings) for name in ("short", "whole"))
    short("train.steps=2", *keys)
    short("train.steps=4", "train.extended_from=2", *keys)
    whole("train.steps=4", *keys)
    assert short.metrics == whole.metrics and short.state(4) == whole.state(4)


def test_a_run_without_its_checkpoints_does_not_start_over_by_itself(finished):
    run = finished.copy("gone")
    shutil.rmtree(run.folder / "checkpoints")
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    said = run(code=2)
    assert f"{run.folder}/metrics.jsonl goes up to step 4" in said and "run.start_over=true" in said
    assert "expected the checkpoint of step" in run("train.extended_from=4", "train.steps=8", code=2)
    (run.folder / "checkpoints").mkdir()
    assert "holds no checkpoint" in run(code=2)
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics

    said = run("run.start_over=true")
    [kept] = run.folder.glob("metrics.before-*.jsonl")
    assert kept.read_bytes() == metrics and kept.name in said
    assert list(run.folder.glob("tensorboard.before-*"))
    assert run.metrics == finished.metrics and run.state(4) == finished.state(4)
    assert not load(run.folder / "config.yaml").run.start_over
    # A job that is requeued with the same command resumes: a complete checkpoint is never discarded.
    run.back_to(2)
    said = run("run.start_over=true")
    assert "resuming after step 2" in said and "run.start_over=true has no effect beside a complete checkpoint" in said
    assert len(list(run.folder.glob("metrics.before-*.jsonl"))) == 1 and run.metrics == finished.metrics


def test_metrics_that_cannot_be_read_do_not_stop_a_resume(finished):
    run = finished.copy("damaged")
    run.back_to(2)
    path = run.folder / "metrics.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([good[0], b"\xff\xfe\n", b"[" * 100_000 + b"\n", good[1], b"17\n", good[2][:30]]))
    said = run()
    assert "damaged lines taken out and kept in metrics.damaged.jsonl: 3" in said
    assert path.read_bytes().startswith(good[0] + good[1]) and run.metrics == finished.metrics
