"""A task's records as the loop sees them: steps from epochs, the tokenizer's place, and how a window is shown."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.prose import train_model

from pause_megatron.config.identity import deciding_keys
from pause_megatron.config.load import dump, load, load_saved, scheduled
from pause_megatron.data.batches.batch import collate
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import load_task, read_examples
from pause_megatron.train.finetune import shorter_warmup, show_window, training_data
from pause_megatron.train.inputs.task_data import held_out, open_task
from pause_megatron.train.start.extension import config_differences


@pytest.fixture(scope="module")
def settings(task_records, tmp_path_factory) -> list[str]:
    """A finetuning from initial weights on 40 records."""
    tokenizer = train_model(tmp_path_factory.mktemp("tokenizer") / "t.model")
    task = [
        "task.name=commonsense_qa",
        f"task.path={task_records / 'commonsense_qa'}",
        "task.limit=40",
        "task.held_out=0.15",
    ]
    batch = ["data.sequence_length=256", "batch.global_size=4", "batch.micro_size=4", "validation.samples=6"]
    return [*task, *batch, f"data.tokenizer={tokenizer}", "finetune.pauses=2..4"]


def test_steps_follow_from_epochs_in_the_resolved_configuration(settings, tmp_path):
    data = open_task(load(overrides=[*settings, "finetune.epochs=2.5"]))
    steps = -(-data.windows.windows_in_epochs(2.5) // 4)
    assert data.config.train.steps == steps and data.config.train.tokens == steps * 4 * 256
    (tmp_path / "config.yaml").write_text(dump(data.config))
    again = open_task(load(tmp_path / "config.yaml"))
    assert again.config == data.config and again.fingerprint == data.fingerprint
    given = open_task(load(overrides=[*settings, "train.steps=7"]))
    assert given.config.train.steps == 7


def test_a_warm_up_longer_than_the_epochs_is_shortened_with_a_note(settings, tmp_path):
    """The number of steps is known only once the examples are read, unless train.steps is given."""
    asked = load(overrides=[*settings, "finetune.epochs=1", "optim.warmup_steps=50"])
    data = open_task(asked)
    steps = data.config.train.steps
    assert steps <= 50 and data.config.optim.warmup_steps == min(max(1, steps // 10), steps - 1)
    line = shorter_warmup(asked, data.config)
    assert line.startswith(f"optim.warmup_steps={data.config.optim.warmup_steps}, not 50: finetune.epochs=1 of ")
    assert line.endswith(f" are {steps} steps")
    (tmp_path / "config.yaml").write_text(dump(data.config))
    again = open_task(load(tmp_path / "config.yaml"))
    assert again.config == data.config and shorter_warmup(data.config, again.config) is None
    with pytest.raises(ConfigError, match=r"expected optim\.warmup_steps < train\.steps"):
        load(overrides=[*settings, "train.steps=50", "optim.warmup_steps=50"])


def test_a_finetuning_is_extended_by_epochs(settings):
    """The order depends on the epoch, so the added steps read the examples in new orders."""
    one = open_task(load(overrides=[*settings, "finetune.epochs=1"]))
    ended = one.config.train.steps
    longer = [*settings, "optim.warmup_steps=50", f"train.extended_from={ended}"]
    three = open_task(load(overrides=[*longer, "finetune.epochs=3"]))
    added = three.config.train.steps - ended
    assert added >= ended and three.config.optim.warmup_steps == max(1, added // 10)
    assert all(torch.equal(one.windows[n]["tokens"], three.windows[n]["tokens"]) for n in range(4 * ended))
    with pytest.raises(ConfigError, match=r"expected train\.steps > train\.extended_from"):
        open_task(load(overrides=[*longer, "finetune.epochs=1"]))


def test_the_fingerprint_is_of_the_examples(settings):
    epochs = [*settings, "finetune.epochs=1"]
    one, fewer = (open_task(load(overrides=[*epochs, *more])) for more in ([], ["task.limit=39"]))
    assert one.fingerprint.startswith("xxh3_128:") and one.fingerprint != fewer.fingerprint


def test_finetuning_never_reads_the_evaluation_split_unless_asked(settings, task_records, tmp_path):
    """Where it is asked and there is none: refused before the first step, with the key that does without it."""
    for path in (task_records / "commonsense_qa").iterdir():
        if path.name.startswith("train"):
            shutil.copy(path, tmp_path / path.name)
    alone = [*settings, f"task.path={tmp_path}", "finetune.epochs=1"]
    data = training_data(open_task(load(overrides=alone)))
    trained, held = ({example.id for example in windows.examples} for windows in (data.train, data.valid.windows))
    whole = {example.id for example in read_examples(load_task("commonsense_qa"), "train", str(tmp_path))}
    assert len(trained) == 40 and len(held) == 6
    assert not trained & held and trained | held <= whole
    assert training_data(open_task(load(overrides=[*alone, "task.held_out=0"]))).valid is None
    alone.append("task.held_out=null")
    with pytest.raises(DataError, match=r"no eval split of commonsense_qa.*validation\.every=0 needs none"):
        training_data(open_task(load(overrides=alone)))
    assert training_data(open_task(load(overrides=[*alone, "validation.every=0"]))).valid is None


def test_a_run_from_before_there_was_a_held_out_part_resumes_as_it_was(settings, tmp_path, task_records):
    """Its config.yaml lacks the key: the first records train, and validation reads the evaluation split."""
    asked = [each for each in settings if "held_out" not in each] + [f"run.dir={tmp_path}", "finetune.epochs=1"]
    now = open_task(load(overrides=asked))
    folder = tmp_path / "checkpoints" / "latest"
    folder.mkdir(parents=True)
    before = dump(open_task(load(overrides=[*asked, "task.held_out=null"])).config)
    (folder / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text(before.replace("  held_out: null\n", ""))
    assert "held_out" not in (folder / "config.yaml").read_text()
    resumed = open_task(load(overrides=asked))
    path = str(task_records / "commonsense_qa")
    first = [example.id for example in read_examples(load_task("commonsense_qa"), "train", path)][:40]
    assert [example.id for example in resumed.windows.examples] == first
    assert resumed.config.task.held_out is None and now.config.task.held_out == 0.05
    scored = training_data(resumed).valid.windows.examples
    evaluation = read_examples(load_task("commonsense_qa"), "eval", path)[:6]
    assert [example.id for example in scored] == [example.id for example in evaluation]
    saved = scheduled(load_saved(folder / "config.yaml"))
    assert config_differences(saved, resumed.config, 3) == []
    assert config_differences(saved, now.config, 3) == ["task.held_out: None in the checkpoint, 0.05 in this run"]
    assert "task.held_out" not in deciding_keys(saved)


def test_a_model_needs_a_tokenizer(settings, tmp_path):
    without = [each for each in settings if not each.startswith("data.tokenizer")]
    with pytest.raises(ConfigError, match=r"data\.tokenizer: expected the tokenizer to train with, got none"):
        open_task(load(overrides=[*without, f"run.dir={tmp_path}", "finetune.epochs=1"]))


def test_a_run_resumes_with_its_tokenizer_if_the_original_is_missing(settings, tmp_path):
    whole = load(overrides=[*settings, f"run.dir={tmp_path}", "finetune.epochs=1"])
    folder = tmp_path / "checkpoints" / "latest"
    load_tokenizer(whole.data.tokenizer).save(folder / "tokenizer")
    for name in ("manifest.json", "config.yaml"):
        (folder / name).write_text("{}")
    changes = {
        "data": whole.data.model_copy(update={"tokenizer": None}),
        "model": whole.model.model_copy(update={"from_": str(tmp_path / "gone")}),
    }
    assert open_task(whole.model_copy(update=changes)).fingerprint == open_task(whole).fingerprint


def test_held_out_examples_have_the_most_pauses_or_none(settings):
    data = open_task(load(overrides=[*settings, "finetune.epochs=1"]))
    with_pauses, without = held_out(data)
    assert with_pauses.epoch(0).counts.tolist() == [4] * 6 and without.epoch(0).counts.tolist() == [0] * 6
    valid = training_data(data).valid
    assert valid.count == len(with_pauses.epoch(0).windows)
    same = training_data(open_task(load(overrides=[*settings, "finetune.pauses=0", "finetune.epochs=1"])))
    assert same.valid_without_pauses.windows is same.valid.windows


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_window_is_shown_with_pauses_and_targets(settings, batching):
    data = open_task(load(overrides=[*settings, "finetune.epochs=1", f"finetune.batching={batching}"]))
    batch = collate([data.windows[0], data.windows[1]], sample_ids=[0, 1], pause_ids=data.pause_ids)
    lines = show_window(batch, data.tokenizer).replace("\n", " ").split("]]")[:-1]
    items = data.windows.epoch(0).windows[0]
    assert len(lines) == len(items)
    for line, item in zip(lines, items, strict=True):
        prefix, _, target = line.partition("[[")
        count = int(data.windows.epoch(0).counts[item])
        assert prefix.endswith("Answer:" + "<pause>" * count) and prefix.count("<pause>") == count
        ids = data.windows.examples[item].target
        assert target == data.tokenizer.decode([data.tokenizer.encode("a")[-1], *ids])[1:]
