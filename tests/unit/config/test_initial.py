"""`model.from`: sizes come from the checkpoint unless they are given; a resolved configuration is self-contained."""

from __future__ import annotations

import shutil

import pytest
from support.tiny_config import tiny_model

from pause_megatron.config.load import dump, load
from pause_megatron.config.model_from import SHAPE
from pause_megatron.errors import ConfigError

SIZES = [*tiny_model(layers=3, hidden=48, heads=4, kv_heads=2, ffn=80)]


@pytest.fixture
def run(tmp_path):
    """A run folder with one checkpoint, as far as the configuration looks at it."""
    config = load(
        overrides=[
            "optim.lr=0.5",
            *SIZES,
            "model.tied=true",
            "model.rope_base=5e5",
            "model.qkv_bias=true",
            "model.loops=2",
        ]
    )
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "manifest.json").write_text("{}")
    (folder.parent / "latest").symlink_to(folder.name)
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/latest", "checkpoints/step-00000007"])
def test_sizes_come_from_the_checkpoint(run, place):
    model = load(recipe="tiny-pause", overrides=[f"model.from={run / place}"]).model
    assert (model.layers, model.hidden, model.heads, model.kv_heads, model.ffn) == (3, 48, 4, 2, 80)
    assert (model.tied, model.rope_base, model.qkv_bias, model.preset) == (True, 5e5, True, None)
    assert (model.loops, model.depth) == (2, 6)
    assert model.from_ == str(run / place)


def test_a_looped_recipe_loops_the_weights_of_another_model(run):
    """Loops are no size: a recipe's stay, and those of a plain file give way to the checkpoint's, as its sizes do."""
    model = load(recipe="tiny-looped", overrides=[f"model.from={run}"]).model
    assert (model.loops, model.loop_layers, model.layers, model.hidden) == (2, "1..2", 3, 48)
    plain = run.parent / "plain.yaml"
    plain.write_text(dump(load(recipe="tiny-std")))
    assert load(plain, overrides=[f"model.from={run}"]).model.depth == 6


def test_nothing_else_comes_from_it(run):
    assert load(overrides=[f"model.from={run}"]).optim == load().optim


def test_pause_vectors_come_from_it_and_a_finetuning_takes_the_window_too(tmp_path, run):
    path = run / "checkpoints" / "step-00000007" / "config.yaml"
    written = [
        "pause.embeddings=3",
        "pause.softmax=exclude",
        "pause.rate=0.2",
        "pause.positions=shared",
        "data.sequence_length=96",
    ]
    path.write_text(dump(load(overrides=[*SIZES, *written])))
    pretraining = load(overrides=[f"model.from={run}"])
    assert (pretraining.pause.embeddings, pretraining.pause.softmax) == (3, "exclude")
    assert pretraining.pause.positions == "shared"
    assert (pretraining.pause.rate, pretraining.data.sequence_length) == (0.1, 2048)
    finetuning = load(recipe="finetune-gsm8k", overrides=[f"model.from={run}"])
    assert (finetuning.pause.embeddings, finetuning.pause.rate, finetuning.data.sequence_length) == (3, 0.2, 96)
    assert (
        load(recipe="finetune-gsm8k", overrides=[f"model.from={run}", "data.sequence_length=64"]).data
        != finetuning.data
    )
    path.write_text(dump(load(overrides=[*SIZES, "data.sequence_length=131072"])))
    assert load(recipe="finetune-gsm8k", overrides=[f"model.from={run}"]).data.sequence_length == 2048


def test_a_configuration_from_before_keys_existed_needs_no_initial_checkpoint(tmp_path, run):
    config = load(overrides=[f"model.from={run}", "model.loops=1"])
    written = tmp_path / "config.yaml"
    first = ("layers", "hidden", "heads", "kv_heads", "ffn", "tied", "qkv_bias", "rope_base", "norm_eps")
    later = tuple(f"  {name}:" for name in SHAPE if name not in first)
    written.write_text("".join(line for line in dump(config).splitlines(True) if not line.startswith(later)))
    shutil.rmtree(run)
    assert load(written) == config


def test_a_size_that_is_given_stays(run):
    """The run itself then refuses the weights, and says which size differs."""
    assert load(overrides=[f"model.from={run}", "model.layers=5"]).model.layers == 5


def test_a_resolved_configuration_needs_no_checkpoint(run, tmp_path):
    config = load(overrides=[f"model.from={run}"])
    shutil.rmtree(run)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert "  from: " in dump(config)
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("missing", ["nothing", "run/checkpoints/step-00000008", "x" * 300])
def test_no_checkpoint_there(run, tmp_path, missing):
    with pytest.raises(ConfigError, match=r"model\.from: expected a checkpoint .* got .*"):
        load(overrides=[f"model.from={tmp_path / missing}"])


def test_a_folder_of_transformers_is_to_be_imported_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"import it first: pause-megatron import-hf {tmp_path} CHECKPOINT"):
        load(overrides=[f"model.from={tmp_path}"])


def test_what_is_trained_is_a_key():
    assert (
        load(overrides=["train.only=pause_rows", "train.steps=50", "optim.warmup_steps=1"]).train.only == "pause_rows"
    )
    with pytest.raises(ConfigError, match=r"train\.only: expected one of pause_rows, lora, or null"):
        load(overrides=["train.only=everything"])


def test_a_finetuning_of_a_model_with_scored_pauses_needs_no_side_array(run):
    """It takes the placement of the pretraining, whose windows it does not have."""
    path = run / "checkpoints" / "step-00000007" / "config.yaml"
    path.write_text(dump(load(overrides=[*SIZES, "pause.placement=scored", "pause.run=2", "data.side=ppl"])))
    finetuning = load(recipe="finetune-gsm8k", overrides=[f"model.from={run}"])
    assert (finetuning.pause.placement, finetuning.pause.run, finetuning.data.side) == ("scored", 2, None)
    with pytest.raises(ConfigError, match=r"no data\.side with task\.name; side arrays are of corpora"):
        load(recipe="finetune-gsm8k", overrides=[f"model.from={run}", "data.side=ppl"])
    written = [*SIZES, "pause.placement=after", r"pause.pattern=[.:] # '\s'"]
    path.write_text(dump(load(overrides=written)))
    assert load(recipe="finetune-gsm8k", overrides=[f"model.from={run}"]).pause.pattern == r"[.:] # '\s'"
