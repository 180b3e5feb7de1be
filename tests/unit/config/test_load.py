"""Configuration files and overrides: what is refused and with which message; dump is the inverse of load."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pause_megatron.config.keys import keys
from pause_megatron.config.load import dump, load, recipe_names
from pause_megatron.config.presets import PRESETS
from pause_megatron.config.schema import RunConfig
from pause_megatron.config.text import read_entries, read_override, write_yaml
from pause_megatron.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def error_of(**arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**arguments)
    return str(caught.value)


# What a key may be set to so that no cross-field rule breaks: the text that belongs to the property test below.
PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=60).filter(str.strip)
PATHS = PATHS.filter(lambda text: not text.startswith("~"))
VALUES = {
    "run.dir": PATHS,
    "run.seed": st.integers(0, 2**63),
    "data.prefix": st.lists(PATHS, max_size=3),
    "data.tokenizer": st.none() | PATHS,
    "data.cache": st.none() | PATHS,
    "data.text_key": PLAIN_TEXT,
    "model.preset": st.sampled_from([name for name in PRESETS if PRESETS[name]["heads"] % 4 == 0]),
    "model.rope_base": st.floats(1e-3, 1e9),
    "model.init_std": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    "model.tied": st.none() | st.booleans(),
    "pause.rate": st.floats(0, 0.5),
    "pause.window": st.sampled_from(["exact", "trim"]),
    "pause.placement": st.sampled_from(["uniform", "with_replacement", "interval", "my.module:policy"]),
    "train.tokens": st.none() | st.integers(1, 10**13),
    "batch.global_size": st.integers(1, 4096).map(lambda n: 4 * n),
    "optim.eps": st.floats(min_value=0, exclude_min=True, max_value=1),
    "parallel.tensor": st.sampled_from([1, 2, 4]),
    "log.peak_tflops": st.none() | st.floats(0.1, 1e6),
}


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_load_of_dump_is_the_identity(tmp_path_factory, values):
    nested: dict = {}
    for path, value in values.items():
        section, name = path.split(".")
        nested.setdefault(section, {})[name] = value
    folder = tmp_path_factory.getbasetemp()
    config = load(write(folder, write_yaml(nested)))
    again = load(write(folder, dump(config)))
    assert again == config
    assert dump(again) == dump(config)
    for path, value in values.items():
        section, name = path.split(".")
        expected = tuple(value) if isinstance(value, list) else value
        if not (value is None and section in ("model", "train")):  # those are filled in
            assert getattr(getattr(config, section), name) == expected


@settings(max_examples=200)
@given(st.text())
def test_any_text_is_a_configuration_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(ConfigError):
        load(path)


@settings(max_examples=200)
@given(st.sampled_from(sorted(keys())), st.text(st.characters(exclude_categories=["Cs"])))
def test_any_override_is_a_configuration_or_a_config_error(path, text):
    try:
        load(overrides=[f"{path}={text}"])
    except ConfigError as error:
        assert path.split(".")[-1] in str(error) or "train" in path


def test_a_resolved_configuration_is_frozen_and_complete():
    config = load(overrides=["train.tokens=1e6"])
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0
    assert (config.model.layers, config.model.hidden, config.model.heads, config.model.kv_heads) == (4, 128, 4, 4)
    assert config.train.steps == -(-1_000_000 // (32 * 2048))


def test_steps_give_tokens_and_tokens_give_steps_upwards():
    assert load(overrides=["train.steps=10", "data.sequence_length=64"]).train.tokens == 10 * 32 * 64
    per_step = 32 * 2048
    for tokens, steps in ((per_step, 1), (per_step + 1, 2), (1, 1)):
        assert load(overrides=[f"train.tokens={tokens}"]).train.steps == steps


def test_a_later_source_replaces_the_budget_and_the_preset(tmp_path):
    path = write(tmp_path, dump(load(overrides=["train.tokens=1e9"])))
    config = load(path, overrides=["train.steps=7", "model.preset=130m"])
    assert (config.train.steps, config.model.hidden, config.model.ffn) == (7, 768, 2048)
    assert "contradict" in error_of(path=path, overrides=["batch.global_size=64"])
    assert "contradict" in error_of(path=write(tmp_path, "train:\n  steps: 5\n  tokens: 5"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  layres: 3\n", "run.yaml:2: unknown key 'model.layres'. Did you mean 'model.layers'?"),
        ("modle:\n  layers: 3\n", "run.yaml:2: unknown key 'modle.layers'. Did you mean 'model.layers'?"),
        ("\nlr: 3\n", "run.yaml:2: unknown key 'lr'. Did you mean 'optim.lr'?"),
        ("model: 3\n", "run.yaml:1: model: expected a group of keys, got 3"),
        ("model:\n  layers: '4'\n", "run.yaml:2: model.layers: expected an integer >= 1, or null; got '4'"),
        ("model:\n  layers: true\n", "run.yaml:2: model.layers: expected an integer >= 1, or null; got True"),
        ("model:\n  layers: 1.5\n", "run.yaml:2: model.layers: expected an integer >= 1, or null; got 1.5"),
        ("optim:\n\n  lr: -1\n", "run.yaml:3: optim.lr: expected a number > 0; got -1"),
        ("optim:\n  beta1: 1\n", "run.yaml:2: optim.beta1: expected a number >= 0, < 1; got 1"),
        ("parallel:\n  sequence: yes\n", "run.yaml:2: parallel.sequence: expected true or false; got 'yes'"),
        ("pause:\n  window: trimm\n", "expected one of exact, trim; got 'trimm'. Did you mean 'trim'?"),
        ("run:\n  dir:\n", "run.yaml:2: run.dir: expected text; got null"),
        ("data:\n  prefix: [[a]]\n", "run.yaml:2: expected a single value or a list of values, got a sequence"),
        ("run:\n  seed: 1\n  seed: 2\n", "run.yaml:3: run.seed is given twice; the first time at"),
        ("run: {}\nrun: {}\n", "run.yaml:2: run is given twice"),
        ("run: [\n", "run.yaml:2: not YAML"),
        ("- a\n", "run.yaml:1: expected groups of keys"),
        ("a: &a {b: *a}\n", "run.yaml:1: expected a single value or a list of values, got a mapping"),
        (
            "run:\n  dir: !!python/object/apply:os.system ['true']\n",
            "run.yaml:2: expected plain data, got the YAML tag",
        ),
    ],
)
def test_bad_files_are_refused_with_line_key_expected_and_got(tmp_path, text, message):
    assert message in error_of(path=write(tmp_path, text))


def test_several_wrong_values_are_reported_at_once(tmp_path):
    message = error_of(path=write(tmp_path, "optim:\n  lr: -1\nmodel:\n  layers: 0\n"))
    assert "run.yaml:2: optim.lr" in message and "run.yaml:4: model.layers" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "command line: expected key.path=value (for example optim.lr=3e-4), got 'optim.lr'"),
        ("=3", "command line: expected key.path=value"),
        ("optim.rl=3", "command line: unknown key 'optim.rl'. Did you mean 'optim.lr'?"),
        ("train.step=3", "command line: unknown key 'train.step'. Did you mean 'train.steps'?"),
        ("train.steps=many", "command line: train.steps: expected an integer >= 1, or null; got 'many'"),
        ("optim.lr=inf", "command line: optim.lr: expected a number > 0; got 'inf'"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    assert message in error_of(overrides=[override])


def test_files_that_cannot_be_read(tmp_path):
    assert "nowhere.yaml cannot be read: No such file" in error_of(path=tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}")
    assert "expected UTF-8 text, got byte 0xe9" in error_of(path=tmp_path / "latin.yaml")
    assert "Did you mean 'tiny-pause'?" in error_of(recipe="tiny-pauze")
    assert "expected a file or a recipe, got both" in error_of(path="a", recipe="tiny-pause")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("2e9", 2e9), (".5", 0.5), ("-1.5E+3", -1500.0), ("no", "no"), ("1:30", "1:30"), ("0123", "0123"),
     ("2026-11-23", "2026-11-23"), ("1_000", 1000), ("~", None), ("true", True), ("[a, 1]", ["a", 1]), ("=x", "=x")],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    assert read_override(f"a.b={text}").value == value
    (entry,) = read_entries(f"a:\n  b: {text}\n", "f")
    assert (entry.value, entry.path, entry.where) == (value, "a.b", "f:2")


def test_text_keys_take_what_was_written():
    config = load(overrides=["run.dir=2024", "data.tokenizer=1e5 #2", "data.cache='null'", "pause.placement=uniform"])
    assert (config.run.dir, config.data.tokenizer, config.data.cache) == ("2024", "1e5 #2", "null")


def test_prefixes_and_blends():
    for override in ("data.prefix=0.3 a 0.7 b", "data.prefix=[0.3, a, 0.7, b]"):
        assert load(overrides=[override]).data.prefix == ("0.3", "a", "0.7", "b")
    assert load(overrides=["data.prefix=data/c4"]).data.prefix == ("data/c4",)


def test_integers_may_be_written_as_powers_of_ten():
    assert load(overrides=["train.tokens=200e9"]).train.tokens == 200_000_000_000


def test_every_default_round_trips_and_every_key_is_described():
    assert {path for path, key in keys().items() if not key.description} == set()
    config = load()
    assert load(overrides=[]) == config and isinstance(config, RunConfig)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_round_trip(name, tmp_path):
    config = load(recipe=name)
    assert (config.train.steps or config.finetune.epochs) and config.run.dir == f"runs/{name}"
    assert load(write(tmp_path, dump(config))) == config


def test_recipes_that_are_compared_differ_in_pauses_only():
    for size in ("tiny", "c4-130m", "c4-1b", "c4-7b"):
        pause, standard = (load(recipe=f"{size}-{variant}").model_dump() for variant in ("pause", "std"))
        assert pause.pop("run")["seed"] == standard.pop("run")["seed"]
        assert (pause["pause"].pop("rate"), standard["pause"].pop("rate")) == (0.1, 0)
        assert pause == standard


METHODS = {  # method: the recipe that it is compared with, and the keys in which they differ
    "cyb": ("pause", {"pause.run", "objective.name", "objective.discount"}),
    "dit": ("pause", {"pause.placement", "data.side"}),
    "every-k": ("pause", {"pause.placement", "pause.positions"}),
    "looped": ("std", {"model.loops", "model.loop_layers"}),
}


@pytest.mark.parametrize("size", ["tiny", "c4-130m", "c4-1b"])
@pytest.mark.parametrize("method", METHODS)
def test_recipes_of_methods_differ_in_the_methods_keys_only(size, method):
    other, differing = METHODS[method]
    own, compared = load(recipe=f"{size}-{method}"), load(recipe=f"{size}-{other}")
    assert own.train == compared.train and own.batch == compared.batch
    found = {
        f"{section}.{name}"
        for section, values in compared
        for name, value in values
        if getattr(getattr(own, section), name) != value
    }
    assert found == {"run.dir", *differing}


@pytest.mark.parametrize("name", ["paper-130m", "paper-1b"])
def test_paper_recipes_hold_the_papers_numbers(name):
    config = load(recipe=name)
    assert (config.pause.rate, config.pause.window, config.data.sequence_length) == (0.1, "trim", 2048)
    assert config.train.tokens == 200_000_000_000


def test_configuration_imports_no_torch():
    heavy = "{'torch', 'numpy', 'deepspeed'}"
    code = f"import sys, pause_megatron.config as c; c.load(); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_regular_expression_is_no_list_on_a_command_line():
    config = load(overrides=["pause.placement=after", "pause.pattern=[.,;:]"])
    assert config.pause.pattern == "[.,;:]"
    assert load(overrides=["pause.placement=after", "pause.pattern='[0-9]'"]).pause.pattern == "[0-9]"
