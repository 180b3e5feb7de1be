"""`~`, odd characters and lengths in paths; every key and option that takes a path goes through the one type."""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shlex
import typing
from pathlib import Path

import pytest

from pause_megatron.cli import VERBS, main, parser_of
from pause_megatron.cli.evaluate import _names
from pause_megatron.cli.launch import _container
from pause_megatron.config.keys import keys, sections
from pause_megatron.config.load import dump, load
from pause_megatron.config.schema import RunConfig
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.load import dump_grid, load_grid
from pause_megatron.experiment.schema import Grid, GridSection
from pause_megatron.files.paths import expanded, expanded_pattern, path_option, pattern_option, prefix_option

USER = pwd.getpwuid(os.getuid()).pw_name
HOME = pwd.getpwuid(os.getuid()).pw_dir

# Text that is no path. A new key or option has to be put here, or be of the type of a path.
PLAIN_KEYS = {
    *("data.source_config", "data.source_split", "data.text_key", "data.split", "pause.placement"),
    *("data.side", "pause.pattern", "objective.name", "objective.token_weights", "model.loop_layers"),
    *("finetune.pauses", "finetune.filler", "finetune.answer_placement", "lora.layers", "lora.targets"),
}
PLAIN_GRID_KEYS = {
    *("Grid.name", "Grid.title", "Grid.baseline", "Grid.models", "Grid.tasks", "Grid.variants", "Budget.like"),
    *("Curve.m_ft", "Curve.tasks", "Curve.variants", "Evaluation.device", "Finetuning.set", "Inference.filler"),
    *(
        "Decoding.after",
        "Extra.loop_layers",
        "GridTask.pauses",
        "GridTask.recipe",
        "GridTask.set",
        "Model.recipe",
        "Model.set",
    ),
    *("Variant.about", "Variant.model", "Variant.pauses", "Variant.set", "Variant.tasks"),
}
PLAIN_OPTIONS = {
    *("overrides", "words", "recipe", "text_key", "hf_config", "hf_split", "hf_revision", "eod_token", "gpu", "assume"),
    *(
        "mem",
        "partition",
        "time",
        "sbatch",
        "launcher",
        "prompt",
        "pauses",
        "stop",
        "filler",
        "pause_after",
        "device",
        "limit",
    ),
    *("name", "seed", "batch_size", "pause_token", "max_malformed", "held_out", "question"),
    *("pause.rate", "pause.window", "pause.placement", "pause.seed", "pause.embeddings", "data.sequence_length"),
    *("run.seed", "pause.run", "pause.pattern", "data.side"),
}
PATH_TYPES = {path_option, pattern_option, prefix_option, _container, _names}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder whose name is no pattern, no list and no option, however it looks."""
    folder = tmp_path / "my 'home' [x] é"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def is_path(annotation) -> bool:
    """Whether the texts of a field go through the type of a path."""
    if typing.get_origin(annotation) is typing.Annotated:
        return any(getattr(rule, "func", None) in (expanded, expanded_pattern) for rule in annotation.__metadata__)
    return any(map(is_path, typing.get_args(annotation)))


def has_text(annotation) -> bool:
    return annotation is str or any(has_text(part) for part in typing.get_args(annotation))


def path_keys() -> set[str]:
    hints = {name: typing.get_type_hints(cls, include_extras=True) for name, cls in sections().items()}
    return {
        f"{section}.{field.alias or name}"
        for section, cls in sections().items()
        for name, field in cls.model_fields.items()
        if is_path(hints[section][name])
    }


def test_every_key_of_text_is_a_path_or_known_to_be_none():
    texts = {path for path, key in keys().items() if key.kind in (str, tuple) and not key.choices}
    assert texts - path_keys() == PLAIN_KEYS
    assert {"run.dir", "data.prefix", "model.from", "engine.ds_config", "task.path", "data.cache"} <= path_keys()


def test_every_text_of_a_grid_is_a_path_or_known_to_be_none():
    classes = [Grid, *GridSection.__subclasses__()]
    assert len(classes) > 8
    unknown, paths = set(), set()
    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        for name in filter(lambda name, hints=hints: has_text(hints[name]), cls.model_fields):
            (paths if is_path(hints[name]) else unknown).add(f"{cls.__name__}.{name}")
    assert unknown == PLAIN_GRID_KEYS
    assert paths == {"Data.prefix", "Data.tasks", "Grid.declared", "GridTask.task", "Model.config"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_text_is_a_path_or_known_to_be_none(verb):
    for action in parser_of(verb)._actions:
        if action.nargs == 0 or action.choices or action.type not in (None, str, *PATH_TYPES):
            continue
        assert (action.type in PATH_TYPES) != (action.dest in PLAIN_OPTIONS), f"{verb}: {action.dest}"


@pytest.mark.parametrize("key", sorted(path_keys()))
def test_home_folders_in_every_key(home, key):
    section, name = key.split(".")
    cls, attribute = sections()[section], "from_" if key == "model.from" else name
    listed = keys()[key].kind is tuple
    for given, found in (("~/a b", f"{home}/a b"), (f"~{USER}/x", f"{HOME}/x"), ("a/~/b", "a/~/b"), ("./~", "./~")):
        made = getattr(cls(**{name: (given,) if listed else given}), attribute)
        assert made == ((found,) if listed else found)


def test_command_line_and_yaml_expand_alike_and_dump_writes_the_path(home):
    file = home / "run.yaml"
    file.write_text("run:\n  dir: ~/runs/a\ndata:\n  prefix: [0.3, ~/c4, 0.7, ~/wiki]\n  cache: $HOME/x\n")
    config = load(file)
    assert config.run.dir == f"{home}/runs/a"
    assert config.data.prefix == ("0.3", f"{home}/c4", "0.7", f"{home}/wiki")
    assert config.data.cache == "$HOME/x"  # the shell's business
    given = ["run.dir=~/runs/a", "data.prefix=0.3 ~/c4 0.7 ~/wiki", "data.cache=$HOME/x"]
    assert load(overrides=given) == config
    (home / "again.yaml").write_text(dump(config))
    assert load(home / "again.yaml") == config


@pytest.mark.parametrize(
    "name", ["a #1", "&a b", "a: b", "b, c", "@x", "- x", "x y  z", "%d", "a'b", "[", "{x}", "100", "# x", "*"]
)
def test_a_path_on_the_command_line_is_the_path(name):
    assert load(overrides=[f"run.dir={name}"]).run.dir == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a path, got nothing"),
        ("~nobody-is-called-so/x", "got 'nobody-is-called-so', no such user; for a file, write ./~nobody-is-called-so"),
        ("a\nb", "the character U+000A at 1"),
        ("a\0", "the character U+0000 at 1"),
        ("\x1b[31m", "the character U+001B at 0"),
        ("a\u2028b", "the character U+2028 at 1"),
        ("caf\udce9", "the character U+DCE9 at 3"),
        ("é" * 128, "at most 255 bytes, got one of 256"),
        ("x/" * 2048, "at most 4095 bytes, got 4096"),
    ],
)
def test_what_cannot_be_a_path_is_refused_in_keys_and_options(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        expanded(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig(run={"dir": text})
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        path_option(text)


def test_the_error_names_the_place_and_the_key(tmp_path):
    (tmp_path / "run.yaml").write_text("run:\n  seed: 1\n  dir: ~nobody-is-called-so/x\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: run\.dir: expected a user's name after ~"):
        load(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"command line: data\.prefix: expected a user's name after ~"):
        load(overrides=["data.prefix=ok ~nobody-is-called-so/x"])


@pytest.mark.parametrize("value", ["", "relative/home"])
def test_a_home_that_is_no_folder_is_said(monkeypatch, value):
    monkeypatch.setenv("HOME", value)
    with pytest.raises(ValueError, match="expected a home folder for ~, got none"):
        expanded("~/x")


def test_globs_below_a_home_that_looks_like_one(home):
    from pause_megatron.data.text.sources import find_sources

    (home / "shard-1.jsonl").write_text('{"text": "a"}\n')
    (home / "shard-2.jsonl").write_text('{"text": "b"}\n')
    sources = find_sources([pattern_option("~/shard-*.jsonl")])
    assert [Path(source.name).name for source in sources] == ["shard-1.jsonl", "shard-2.jsonl"]
    assert len(find_sources([pattern_option("~/shard-1.jsonl")])) == 1
    assert load(overrides=["data.source=~/shard-*.jsonl", "data.tokenizer=x", "validation.every=0"]).data.source == (
        expanded_pattern("~/shard-*.jsonl"),
    )


def test_a_folder_is_no_prefix(home):
    for text in ("data/", "~", "..", "~/x/."):
        with pytest.raises(argparse.ArgumentTypeError, match=r"such as data/c4 for data/c4\.bin"):
            prefix_option(text)
    assert prefix_option("~/c4") == f"{home}/c4"


def test_grids_and_the_runs_that_they_make(home):
    from pause_megatron.experiment.models import as_overrides

    grid = load_grid(recipe="tiny", overrides=["data.prefix=[0.5, ~/a, 0.5, ~/b]", "data.tasks=~/tasks"])
    assert grid.data.prefix == ("0.5", f"{home}/a", "0.5", f"{home}/b")
    assert grid.data.tasks == f"{home}/tasks"
    (home / "grid.yaml").write_text(dump_grid(grid))
    assert load_grid(home / "grid.yaml") == grid
    assert load(overrides=as_overrides({"data.prefix": grid.data.prefix})).data.prefix == grid.data.prefix
    odd = "[x], 'y' \"z\""
    assert load(overrides=as_overrides({"run.dir": odd})).run.dir == odd


def test_a_job_gets_the_paths_that_were_meant_where_it_was_written(home, capsys):
    """In a container `~` is another folder."""
    given = ["run.dir=~/r [1]", "data.prefix=0.5 ~/a 0.5 ~/b c~d", "pause.placement=uniform", "optim.lr=1e-3"]
    options = ["--recipe", "tiny-pause", "--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1"]
    assert main(["launch", *options, *given]) == 0
    script = capsys.readouterr().out
    words = shlex.split(next(line for line in script.splitlines() if "run.dir=" in line))
    overrides = [word for word in words if word.partition("=")[0] in {text.partition("=")[0] for text in given}]
    assert load(overrides=overrides).data.prefix == ("0.5", f"{home}/a", "0.5", f"{home}/b", "c~d")
    assert f"run.dir={home}/r [1]" in words and "optim.lr=1e-3" in words


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_name_that_only_just_fits_is_no_traceback(home, capsys, verb):
    assert main([verb, "x" * 250]) == 2
    assert "x.manifest.json: File name too long" in capsys.readouterr().err


def test_a_name_that_begins_with_a_dash(home, monkeypatch, capsys):
    assert main(["export-hf", "--", "-x", "out"]) == 2
    assert "error: -x: expected a checkpoint" in capsys.readouterr().err
    assert main(["plot", "--output=-x.png", "./-run"]) == 2
    assert "error: -run: expected the metrics of a run" in capsys.readouterr().err


def test_a_byte_order_mark_in_a_file_of_keys(home):
    from pause_megatron.config import deepspeed_config

    (home / "run.yaml").write_bytes(b"\xef\xbb\xbfrun:\n  dir: x\nengine:\n  ds_config: ~/ds.json\n")
    (home / "ds.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 2}}')
    config = load(home / "run.yaml")
    assert config.run.dir == "x"
    assert deepspeed_config(config, data_parallel=1)["zero_optimization"]["stage"] == 2


def test_containers_and_lists_of_tasks(home):
    assert _container("apptainer:~/a.sif") == f"apptainer:{home}/a.sif"
    assert _container("pyxis:nvcr.io#nvidia/pytorch:25.01") == "pyxis:nvcr.io#nvidia/pytorch:25.01"
    assert _names("gsm8k, ~/mine.yaml") == ["gsm8k", f"{home}/mine.yaml"]
