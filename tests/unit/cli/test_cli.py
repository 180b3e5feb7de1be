"""The program's front: verbs, exit codes, messages, launcher options, and how fast --help is."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pause_megatron import __version__, cli
from pause_megatron.cli import main
from pause_megatron.config.keys import keys
from pause_megatron.config.load import load, recipe_names
from pause_megatron.errors import ConfigError, DataError, SharedError
from pause_megatron.tasks import load_task, task_names

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["doctor", "--help"], ["--version"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments, record_property):
    code = (
        "import sys; from pause_megatron.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'numpy', 'deepspeed', 'megatron'} & set(sys.modules); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    record_property("seconds", time.perf_counter() - start)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


def test_overview_names_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, text in cli.VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(text)}$", out, re.MULTILINE)
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_a_module_of_that_name(verb):
    module = importlib.import_module(f"pause_megatron.cli.{verb.replace('-', '_')}")
    assert cli.VERBS[verb] == module.HELP
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pause-megatron {__version__}\n"
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()  # setup.py: see test_versions
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_pretrain_help_lists_every_key(capsys):
    assert main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for key in keys().values():
        local = "; local" if key.local else ""
        assert f"    {key.path:26} {key.expected.split()[0]}" in out
        assert f" {key.path} {key.expected}; default {key.default_text}{local} {key.description.split()[0]}" in words
    assert all(name in out for name in recipe_names() if not name.startswith("finetune-"))
    assert max(map(len, out.splitlines())) <= 120


def test_finetune_has_a_recipe_for_every_task(capsys):
    assert {f"finetune-{name}" for name in task_names()} == {n for n in recipe_names() if n.startswith("finetune-")}
    for name in task_names():
        config = load(recipe=f"finetune-{name}")
        assert config.task.name == name and config.finetune.pauses == str(load_task(name).finetune.pauses)
    assert main(["finetune", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in task_names()) and "    finetune.pauses " in out


def test_python_dash_m_runs_the_program():
    done = subprocess.run([sys.executable, "-m", "pause_megatron", "pretrian"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "Did you mean 'pretrain'?" in done.stderr


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        (["pretrain"], True),
        (["--local_rank=0", "finetune", "--recipe", "r"], True),
        (["experiment", "run"], True),
        (["pretrain", "--help"], False),
        *((words, False) for words in ([], ["--help"], ["--version"], ["plan"], ["prepare"], ["doctor"], ["none"])),
    ],
)
def test_long_verbs_end_with_their_launcher_even_before_imports(words, ends, monkeypatch):
    called = []
    monkeypatch.setattr(sys, "argv", ["pause-megatron", *words])
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(cli.launcher, "end_with_launcher", lambda: called.append("watch"))
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: called.append(arguments) or 0)
    assert main() == 0
    assert called[:-1] == ["watch"] * ends and [*called[-1]] == [word for word in words if "local_rank" not in word]


@pytest.mark.parametrize(
    "option", [["--local_rank=3"], ["--local-rank", "3"], ["--local-rank=3"], ["--local_rank", "3"]]
)
@pytest.mark.parametrize("before", [True, False])
def test_launchers_may_add_the_local_rank(option, before, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    verb = ["pretrain", "--print-config"]
    assert main(option + verb if before else verb + option) == 0
    assert "sequence_length" in capsys.readouterr().out
    assert os.environ["LOCAL_RANK"] == "5"  # a launcher's own word stands
    monkeypatch.delenv("LOCAL_RANK")
    main(option + verb)
    assert os.environ["LOCAL_RANK"] == "3"
    assert main(["--local_rank=x", *verb]) == 2


def test_errors_are_one_message_on_stderr(capsys):
    assert main(["pretrain", "--dry-run", "optim.rl=3"]) == 2
    out, err = capsys.readouterr()
    expected = "pause-megatron: error: command line: unknown key 'optim.rl'. Did you mean 'optim.lr'?\n"
    assert (out, err) == ("", expected)
    assert main(["pretrain", "--no-such-option"]) == 2
    assert "write configuration keys" not in capsys.readouterr().err
    assert main(["pretrain", "--optim.lr", "3e-4"]) == 2
    assert "unrecognized arguments: --optim.lr; write configuration keys as optim.lr=VALUE" in capsys.readouterr().err
    assert main(["pretrain", "--recipe", "tiny-pause", "--config", "x.yaml"]) == 2


def test_a_run_needs_data_and_a_length(capsys):
    assert main(["pretrain", "train.steps=1"]) == 2
    assert "data.prefix: expected the prefix of a prepared corpus" in capsys.readouterr().err
    assert main(["pretrain", "data.prefix=x"]) == 2
    assert "train.steps or train.tokens: expected one of them" in capsys.readouterr().err
    assert main(["pretrain", "data.prefix=x", "train.steps=1", "--world-size", "2"]) == 2
    assert "--world-size belongs to --dry-run" in capsys.readouterr().err


STARTED = {"WORLD_SIZE": "16", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]"}


def raising(error: BaseException):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "environment", "code", "message"),
    [
        (ConfigError("no"), {}, 2, "pause-megatron: error: no\n"),
        (ConfigError("no"), {**STARTED, "RANK": "8", "LOCAL_RANK": "0"}, 2, "pause-megatron: [rank 8] error: no\n"),
        (ConfigError("no"), {**STARTED, "RANK": "1", "LOCAL_RANK": "1"}, 2, ""),
        (SharedError("no"), {**STARTED, "RANK": "8", "LOCAL_RANK": "0"}, 2, ""),
        (SharedError("no"), {**STARTED, "RANK": "0", "LOCAL_RANK": "0"}, 2, "pause-megatron: error: no\n"),
        (DataError("bad"), {**STARTED, "RANK": "1", "LOCAL_RANK": "1"}, 2, "pause-megatron: [rank 1] error: bad\n"),
        (DataError("bad"), {**STEP, "SLURM_PROCID": "4"}, 2, "pause-megatron: [rank 4] error: bad\n"),
        (
            ConfigError("no"),
            {"RANK": "1", "WORLD_SIZE": "2"},
            2,
            "pause-megatron: error: no\n",
        ),  # nobody knows where
        (KeyboardInterrupt(), {}, 130, "pause-megatron: interrupted\n"),
    ],
)
def test_exit_codes_and_who_speaks(error, environment, code, message, monkeypatch, capsys):
    module = importlib.import_module("pause_megatron.cli.doctor")
    monkeypatch.setattr(module, "run", raising(error))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(importlib.import_module("pause_megatron.cli.doctor"), "run", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_print_config_loads_back(tmp_path, capsys):
    arguments = ["--recipe", "tiny-pause", "run.dir=a", "log.every=3"]
    assert main(["pretrain", *arguments[:3], "--print-config", *arguments[3:]]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert load(path) == load(recipe="tiny-pause", overrides=arguments[2:])
