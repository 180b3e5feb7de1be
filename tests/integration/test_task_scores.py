"""`score --task`: the values of a plain loop, at any size of batch; a finetuning that uses them; refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ranks import RankError, run_on_ranks
from support.tiny_llama import write_folder

from pause_megatron.cli import main
from pause_megatron.config.load import load
from pause_megatron.data.supervised.answer_values import AnswerValues
from pause_megatron.errors import DataError
from pause_megatron.files.durable import write_whole
from pause_megatron.inference.loading import load as load_generator
from pause_megatron.tasks import load_task, read_examples
from pause_megatron.train.finetune import task_record, training_data
from pause_megatron.train.inputs.task_data import open_task

TASK = "gsm8k"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("scored") / "model")


@pytest.fixture(scope="module")
def files(model: Path, task_records: Path) -> Path:
    """Folder of the losses and of the entropies of all records."""
    for kind in ("loss", "entropy"):
        assert main(arguments(model, task_records, model.parent / f"{kind}.safetensors", "--kind", kind)) == 0
    return model.parent


def arguments(model: Path, records: Path, output: Path, *options: str, task: str = TASK) -> list[str]:
    words = ["score", "--task", task, "--task-path", str(records), "--model", str(model), "--output", str(output)]
    return [*words, "--device", "cpu", *options]


@torch.no_grad()
def plain_loop(model: Path, kind: str, records: str, context: int | None = None) -> dict[str, np.ndarray]:
    """The values of each record's target by its id, one text after the other, from whole logits in fp64."""
    generator = load_generator(model, dtype="fp32", attention="eager")
    encoder, found = generator.encoder, {}
    for example in read_examples(load_task(TASK), "train", records):
        target = [*encoder.encode_continuation(example.target), encoder.tokenizer.eos_token_id]
        ids = torch.tensor([*encoder.encode(example.prompt), *target])[-(context or 9999) - 1 :]
        logits = generator.model(input_ids=ids[None, :-1]).logits[0, -len(target) :].double()
        logits[:, list(generator.pause.ids)] = -torch.inf
        values = torch.nn.functional.cross_entropy(logits, ids[-len(target) :], reduction="none")
        if kind == "entropy":
            values = torch.distributions.Categorical(logits=logits).entropy()
        found[example.id] = values.numpy()
    return found


def settings(records: Path, tokenizer: Path, folder: Path, *more: str) -> list[str]:
    return [
        *(f"task.name={TASK}", f"task.path={records / TASK}", f"data.tokenizer={tokenizer}", f"run.dir={folder}"),
        *("data.sequence_length=256", "batch.global_size=4", "batch.micro_size=2", "train.steps=3"),
        *("model.layers=1", "model.hidden=32", "model.heads=2", "optim.warmup_steps=1", "engine.precision=fp32"),
        *("finetune.answer_placement=scored", "finetune.answer_rate=0.5", "finetune.pauses=1", "log.tensorboard=false"),
        *("checkpoint.every=2", "checkpoint.keep=2", "validation.every=3", "validation.samples=4", *more),
    ]


def test_values_are_those_of_a_plain_loop_at_any_size_of_batch(files, model, task_records, tmp_path, capsys):
    records = str(task_records / TASK)
    data = open_task(
        load(overrides=settings(task_records, model, tmp_path, f"task.scores={files}/loss.safetensors", "pause.run=1"))
    )
    for kind in ("loss", "entropy"):
        expected = plain_loop(model, kind, records)
        for example in AnswerValues.read(files / f"{kind}.safetensors").of(data.windows.examples):
            np.testing.assert_allclose(example.values, expected[example.id][:-1], rtol=1e-5, atol=1e-5)
    one = tmp_path / "one.safetensors"
    limited = ["--batch-tokens", "256", "--context", "256", "--task-limit", "20", "--held-out", "0.1"]
    assert main(arguments(model, task_records, one, *limited)) == 0
    assert re.search(r"loss of [\d,]+ tokens of 24 answers, mean [\d.]+ nats\ntime", capsys.readouterr().out)
    config = load(
        overrides=settings(
            task_records, model, tmp_path, f"task.scores={one}", "task.limit=20", "task.held_out=0.1", "train.steps=3"
        )
    )
    part = open_task(config)
    training_data(part)  # validation finds its values too
    known = {example.id: example.values for example in data.windows.examples}
    for example in part.windows.examples:
        if example.id in known:
            np.testing.assert_allclose(example.values, known[example.id], rtol=1e-5, atol=1e-5)
    short = tmp_path / "short.safetensors"
    assert main(arguments(model, task_records, short, "--context", "160")) == 0
    assert re.search("; [0-9]+ prompts cut on the left", capsys.readouterr().out)
    cut = plain_loop(model, "loss", records, context=160)
    for example in AnswerValues.read(short).of(data.windows.examples):
        np.testing.assert_allclose(example.values, cut[example.id][:-1], rtol=1e-5, atol=1e-5)


def test_any_number_of_processes_and_of_interruptions(model, task_records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pause_megatron.score.task.unit_tokens", lambda tokens: 512)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = [*arguments(model, task_records, two, "--batch-tokens", "256"), "--processes"]
    assert main([str(one) if word == str(two) else word for word in [*words, "1"]]) == 0
    parts = tmp_path / "two.safetensors.parts"

    def then_interrupt(path: Path, data: bytes) -> None:
        write_whole(path, data)
        if path.name == "000001.values":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pause_megatron.score.plan.write_whole", then_interrupt)
        assert main([*words, "1"]) == 130
    assert sorted(path.name for path in parts.iterdir()) == ["000000.values", "000001.values", "plan.json"]
    assert not two.exists()
    capsys.readouterr()
    for other in (["--kind", "entropy"], ["--task-limit", "9"]):
        assert main([*words, "1", *other]) == 2
        assert "there is an unfinished scoring" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("pause_megatron.score.plan.Parts.remove", pytest.fail)
        with pytest.raises(pytest.fail.Exception):  # an end between the file and the removal of the units
            main([*words, "2"])
    assert one.read_bytes() == two.read_bytes() and parts.is_dir()
    assert main([*words, "2"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, two.name]
    assert main([*words, "2", "--kind", "entropy"]) == 2
    assert "one that exists; --overwrite replaces a file" in capsys.readouterr().err
    parts.mkdir()
    (parts / "mine.txt").write_text("")
    assert main([*words, "2", "--kind", "entropy", "--overwrite"]) == 2
    assert "two.safetensors.parts: expected the units of a scoring, or no such folder, got mine.txt" in (
        capsys.readouterr().err
    )


def tune(words: list[str]) -> int:
    from pause_megatron.train.finetune import finetune

    return finetune(load(overrides=words))


def test_a_finetuning_places_pauses_before_the_answers_least_expected_tokens(files, model, task_records, tmp_path):
    scores = tmp_path / "moved.safetensors"
    shutil.copy(files / "loss.safetensors", scores)
    words = settings(task_records, model, tmp_path / "run", f"task.scores={files}/loss.safetensors")
    assert run_on_ranks(1, tune, words) == [0]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["valid_loss"] != lines[-1]["valid_loss_without_pauses"]
    data = open_task(load(overrides=words))
    epoch = data.windows.epoch(0)
    assert sum(gaps.size for gaps in epoch.answers) > 20
    for example, gaps in zip(data.windows.examples, epoch.answers, strict=True):
        if example.values.size > 1:
            highest = np.argsort(-example.values[1:], kind="stable")[: gaps.size] + 1
            assert gaps.tolist() == sorted(highest.tolist())
    # The content of the file is compared, not its path.
    resumed = [word for word in words if not word.startswith("task.scores")]
    assert run_on_ranks(1, tune, [*resumed, f"task.scores={scores}"]) == [0]
    other = [*resumed, f"task.scores={files}/entropy.safetensors"]
    changed = open_task(load(overrides=other))
    assert changed.fingerprint != data.fingerprint
    with pytest.raises(RankError, match=r"(?s)another configuration.*corpus: xxh3_128:") as refused:
        run_on_ranks(1, tune, [*other, "train.steps=5"])
    assert "train.steps: 3 in the checkpoint" in str(refused.value) and "To extend" not in str(refused.value)
    records = [task_record(each, training_data(each)) for each in (data, changed)]
    assert {name for name in records[0] if records[0][name] != records[1][name]} == {
        *("content of task.path", "content of task.path for validation", "content of task.scores")
    }
    plain = [word for word in resumed if not word.startswith("finetune.answer")]
    assert "content of task.scores" not in task_record(open_task(load(overrides=plain)), training_data(data))


def test_what_does_not_fit_is_refused_before_work_starts(files, model, task_records, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    (out.parent / "there").write_text("")
    right = arguments(model, task_records, out)
    for words, message in (
        (["score", "--model", str(model)], "PREFIX, --task: expected one of them, a corpus or a task, got neither"),
        ([*right, str(tmp_path / "c")], "a corpus or a task, got both"),
        (["score", str(tmp_path / "c"), "--model", "m", "--output", "f"], "--output: expected --task with it"),
        ([*right, "--name", "x"], "--name: expected PREFIX with it"),
        ([*right, "--store", "float16"], "--store: expected PREFIX with it"),
        (["score", "--task", TASK, "--model", str(model)], "--output: expected the file to write with --task"),
        ([*right, "--held-out", "1"], "--held-out: expected at least 0 and below 1"),
        (arguments(model, task_records, tmp_path / "there"), "one that exists; --overwrite replaces a file"),
        (arguments(model, task_records, tmp_path / "no" / "x"), "expected a file in a folder that exists"),
        (arguments(model, task_records, out, task="nothing"), "task.name: expected one of"),
        (arguments(model, tmp_path, out), f"expected the folder {TASK} with the records"),
        ([*right, "--context", "3"], "expected at most 3 target tokens for --context 3"),
        ([*right, "--context", "999"], "--context: expected 2 to 256"),
    ):
        assert main(words) == 2, words
        assert message in capsys.readouterr().err, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]

    other = write_folder(tmp_path / "prefix")
    config = json.loads((other / "config.json").read_text())
    config["pause"]["prefix_attention"] = "bidirectional"
    (other / "config.json").write_text(json.dumps(config))
    assert main(arguments(other, task_records, out)) == 2
    assert "score with the model that it was finetuned from" in capsys.readouterr().err
    words = settings(task_records, model, tmp_path / "run", f"task.scores={files}/loss.safetensors")
    path = next(word for word in words if word.startswith("task.path"))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    (fewer / "train.jsonl").write_text((task_records / TASK / "train.jsonl").read_text().replace("each", "apiece"))
    words[words.index(path)] = f"task.path={fewer}"
    with pytest.raises(
        DataError, match=r"task\.scores: .*expected values of example \d+, got none; \d+ of 38 examples"
    ):
        open_task(load(overrides=words))
