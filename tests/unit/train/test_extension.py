"""When train.extended_from may extend a checkpoint, and the command that a refusal names."""

from __future__ import annotations

import pytest

from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.train.start.extension import check_extends_nothing, config_differences, how_to_extend


def config(*overrides: str) -> RunConfig:
    return load(overrides=["train.steps=100", "optim.warmup_steps=10", "run.dir=my runs/a", *overrides])


FINISHED = config()
EXTENDED = config("train.extended_from=100", "train.steps=150")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.lr=1e-5", "optim.schedule=wsd", "optim.min_lr_fraction=0.5", "optim.decay_fraction=0.3"],
        ["optim.warmup_steps=0"],
        ["checkpoint.every=7", "parallel.tensor=2"],
    ],
)
def test_length_and_schedule_may_change_where_a_finished_run_is_extended(overrides):
    longer = ["train.extended_from=100", "train.steps=150"]
    assert config_differences(FINISHED, config(*longer, *overrides), 100) == []
    again = config("train.extended_from=150", "train.steps=170", *overrides)
    assert config_differences(EXTENDED, again, 150) == []


@pytest.mark.parametrize("change", ["run.seed=1", "optim.beta2=0.9", "batch.global_size=64", "model.loops=2"])
def test_nothing_else_may(change):
    [key, _] = change.split("=")
    differences = config_differences(FINISHED, config("train.extended_from=100", "train.steps=150", change), 100)
    assert [line.split(":")[0] for line in differences] == [key]


def test_the_name_of_a_corpus_decides_its_pauses_and_its_folder_does_not():
    before, moved = config("data.prefix=[2, a/en, 1, a/de]"), config("data.prefix=[2.0, b/en, 1, c/d/de]")
    renamed = config("data.prefix=[2, a/english, 1, a/de]")
    assert config_differences(before, moved, 40) == []
    (line,) = config_differences(before, renamed, 40)
    assert line.startswith("data.prefix: corpora named en de in the checkpoint, english de in this run")
    assert (
        config_differences(config("pause.rate=0", "data.prefix=a/en"), config("pause.rate=0", "data.prefix=b"), 4) == []
    )


@pytest.mark.parametrize("change", ["optim.lr=1e-5", "optim.warmup_steps=3", "optim.schedule=wsd", "train.steps=160"])
@pytest.mark.parametrize("step", [120, 150])
def test_inside_the_extension_nothing_may(change, step):
    now = config("train.extended_from=100", "train.steps=150", change)
    assert next(line.split(":")[0] for line in config_differences(EXTENDED, now, step)) == change.split("=")[0]
    assert config_differences(EXTENDED, EXTENDED, step) == []


@pytest.mark.parametrize(
    ("before", "step", "extended_from", "message"),
    [
        (FINISHED, 100, 90, r"expected the step at which the finished run ended, 100\. Give train\.extended_from=100"),
        (FINISHED, 100, 110, r"expected the step at which the finished run ended, 100"),
        (FINISHED, 40, 100, r"got a run at step 40 of 100\. Finish it first: .*extended_from=null train\.steps=100$"),
        (EXTENDED, 120, 150, r"got a run at step 120 of 150\. Finish it first: .*extended_from=100 train\.steps=150$"),
        (
            config("train.extended_from=100", "train.steps=150", "optim.schedule=constant", "optim.lr=0.5"),
            *(120, 150, r"extended_from=100 train\.steps=150 optim\.lr=0\.5 optim\.schedule=constant$"),
        ),
        (EXTENDED, 150, 120, r"expected the step at which the finished run ended, 150"),
    ],
)
def test_a_run_is_extended_only_from_the_step_at_which_it_ended(before, step, extended_from, message):
    now = config(f"train.extended_from={extended_from}", "train.steps=200")
    with pytest.raises(CheckpointError, match=message):
        config_differences(before, now, step)


def test_more_steps_without_the_key_are_refused_with_the_command_to_type():
    now = config("train.steps=150", "optim.lr=1e-5")
    assert config_differences(FINISHED, now, 100)
    assert how_to_extend(FINISHED, now, 100) == (
        "\nTo extend this run: pause-megatron pretrain --config 'my runs/a/config.yaml' train.extended_from=100 "
        "train.steps=150"
    )
    assert "finish it first (pause-megatron pretrain --config 'my runs/a/config.yaml'" in how_to_extend(
        FINISHED, now, 60
    )
    assert "train.extended_from=150 train.steps=200" in how_to_extend(EXTENDED, config("train.steps=200"), 150)
    assert how_to_extend(FINISHED, config("train.steps=90"), 100) == ""
    assert how_to_extend(FINISHED, config("train.steps=150", "run.seed=1"), 100) == ""  # not by this key alone


def test_the_command_that_extends_a_finetuning_gives_epochs():
    task = ["task.name=gsm8k", "finetune.epochs=2", "train.steps=null"]
    before, now = (
        each.model_copy(update={"train": each.train.model_copy(update={"steps": steps})})
        for each, steps in ((config(*task), 100), (config(*task, "finetune.epochs=3"), 150))
    )
    assert how_to_extend(before, now, 100).endswith(
        "pause-megatron finetune --config 'my runs/a/config.yaml' train.extended_from=100 finetune.epochs=3.0"
    )
    extended = now.model_copy(update={"train": now.train.model_copy(update={"extended_from": 100})})
    assert config_differences(before, extended, 100) == []


def test_a_run_without_a_checkpoint_extends_nothing():
    check_extends_nothing(FINISHED)
    with pytest.raises(ConfigError, match=r"step 100 in my runs/a/checkpoints, got none.*extended_from=null"):
        check_extends_nothing(EXTENDED)


def test_a_warm_up_that_the_added_steps_leave_no_room_for_is_shortened():
    said: list[str] = []
    extended = load(
        recipe="tiny-pause",
        overrides=["train.extended_from=1000", "train.steps=1010", "data.prefix=x"],
        notify=said.append,
    )
    assert extended.optim.warmup_steps == 1
    [line] = said
    assert line.startswith("optim.warmup_steps=1, not ") and "train.extended_from" in line
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps < train\.steps - train\.extended_from"):
        config("train.extended_from=100", "train.steps=110")
