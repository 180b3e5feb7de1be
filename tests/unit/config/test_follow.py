"""Defaults follow the keys that a user sets; explicit and still valid values do not change."""

from __future__ import annotations

import pytest

from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import dump, load, recipe_names
from pause_megatron.errors import ConfigError

PRETRAINING = [name for name in recipe_names() if not name.startswith("finetune-")]


def loaded(recipe: str | None, *overrides: str, path=None):
    said: list[str] = []
    return load(path, recipe=recipe, overrides=overrides, notify=said.append), said


@pytest.mark.parametrize("recipe", recipe_names())
def test_train_steps_is_enough_to_shorten_every_recipe(recipe, tmp_path):
    given = load(recipe=recipe).optim.warmup_steps
    for steps in (1, 2, 3, 10, 11, 100, given, given + 1):
        config, said = loaded(recipe, f"train.steps={steps}")
        if given < steps:
            assert (config.optim.warmup_steps, said) == (given, [])
        else:
            assert config.optim.warmup_steps == min(max(1, steps // 10), steps - 1)
            assert len(said) == 1 and f"optim.warmup_steps={config.optim.warmup_steps}, not {given} (" in said[0]
            assert said[0].endswith("it follows train.steps (command line)")
        path = tmp_path / "config.yaml"
        path.write_text(dump(config))
        assert loaded(None, path=path) == (config, [])


@pytest.mark.parametrize("recipe", recipe_names())
def test_batch_and_window_are_enough_to_shrink_every_recipe(recipe):
    given = load(recipe=recipe).batch
    for size in (None, 1, 6, 131072):
        for length in (None, 64, 4096):
            overrides = [f"batch.global_size={size}"] * (size is not None)
            config, said = loaded(recipe, *overrides, *[f"data.sequence_length={length}"] * (length is not None))
            batch_plan(config, config.parallel.tensor)
            assert config.batch.global_size == (size or given.global_size)
            micro = config.batch.micro_size
            whole = given.global_size if size is None else size
            assert whole % micro == 0 and not any(whole % more == 0 for more in range(micro + 1, given.micro_size + 1))
            assert any("batch.micro_size" in line for line in said) == (micro != given.micro_size)


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_few_tokens_give_a_short_run(recipe):
    config, said = loaded(recipe, "train.tokens=1e4")
    assert config.optim.warmup_steps < config.train.steps and len(said) == 1
    assert said[0].endswith("it follows train.tokens (command line)")


def test_the_wsd_decay_keeps_its_steps():
    config, said = loaded("tiny-pause", "train.steps=20", "optim.schedule=wsd", "optim.decay_fraction=0.95")
    assert config.optim.warmup_steps == 1 and said
    config, said = loaded("tiny-pause", "optim.schedule=wsd", "train.steps=30")
    assert config.optim.warmup_steps == 3 and said


def test_tensor_size_1_turns_sequence_parallelism_off():
    config, said = loaded("c4-7b-pause", "parallel.tensor=1")
    assert config.parallel.sequence is False
    assert said[0].startswith("parallel.sequence=false, not true (") and "parallel.tensor (command line)" in said[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=10", "optim.warmup_steps=25"], "optim.warmup_steps < train.steps"),
        (["optim.warmup_steps=250"], "optim.warmup_steps < train.steps"),
        (["batch.micro_size=5"], "batch.global_size to be a multiple of batch.micro_size"),
        (["batch.micro_size=4", "batch.global_size=6"], "batch.global_size to be a multiple of batch.micro_size"),
        (["parallel.sequence=true"], "parallel.tensor > 1 with parallel.sequence"),
        (["train.steps=10", "train.tokens=1e9"], "only one of train.steps and train.tokens"),
    ],
)
def test_contradicting_explicit_keys_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        loaded("tiny-pause", *overrides)
    assert message in str(caught.value)


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 10\noptim:\n  warmup_steps: 25\n")
    for overrides in ([], ["log.every=2"]):
        with pytest.raises(ConfigError, match=r"warmup_steps=25 \(.*run.yaml:4\), train.steps=10 \(.*run.yaml:2\)"):
            loaded(None, *overrides, path=path)


def test_a_finetuning_with_its_own_file_recomputes_its_epochs(tmp_path):
    path = tmp_path / "config.yaml"
    config = load(recipe="finetune-gsm8k")
    train = config.train.model_copy(update={"steps": 40, "tokens": 40 * 8 * 2048})  # as computed from the examples
    path.write_text(dump(config.model_copy(update={"train": train})))
    assert load(path).train.steps == 40
    for override in (
        "finetune.pauses=50",
        "batch.global_size=16",
        "task.limit=10",
        "finetune.answer_placement=uniform",
        "pause.run=2",
    ):
        config, said = loaded(None, override, path=path)
        assert (config.finetune.epochs, config.train.steps, config.train.tokens) == (5, None, None)
        assert len(said) == (override == "pause.run=2")  # which is not used
    config, _ = loaded(None, "run.dir=elsewhere", path=path)
    assert (config.finetune.epochs, config.train.steps) == (5, 40)


def test_keys_of_pretraining_that_are_given_for_a_finetuning_are_noted(tmp_path):
    recipe, unused = "finetune-gsm8k", "a finetuning does not use it"
    config, said = loaded(recipe, "pause.run=2", "pause.rate=0.2")
    assert said == [
        f"pause.rate=0.2 (command line): {unused}",
        "pause.run=2 (command line): a finetuning without finetune.answer_placement does not use it",
    ]
    answers = "finetune.answer_placement=uniform"
    assert loaded(recipe, "pause.run=2", answers)[1] == []
    assert loaded("tiny-pause", "pause.run=2", "pause.placement=uniform")[1] == []
    (tmp_path / "config.yaml").write_text(dump(config))
    assert loaded(None, path=tmp_path / "config.yaml") == (config, [])  # its keys may have been inherited
    assert loaded(None, "pause.seed=7", path=tmp_path / "config.yaml")[1] == [f"pause.seed=7 (command line): {unused}"]
    inheriting = tmp_path / "own.yaml"
    inheriting.write_text(f"model: {{from: {tmp_path / 'model'}}}\ntask: {{name: gsm8k}}\ntrain: {{steps: 100}}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").write_text(dump(loaded("tiny-pause", "pause.run=4")[0]))
    (tmp_path / "model" / "manifest.json").write_text("{}")
    inherited, said = loaded(None, path=inheriting)
    assert inherited.pause.run == 4 and said == []
    inheriting.write_text(inheriting.read_text() + "pause: {run: 3}\n")
    assert loaded(None, path=inheriting)[1] == [
        f"pause.run=3 ({inheriting}:4): a finetuning without finetune.answer_placement does not use it"
    ]
