"""Modules at their earlier names."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pause_megatron
from pause_megatron.moved import MOVED

PACKAGE = Path(pause_megatron.__file__).parent


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_the_table_names_modules_that_are_there(old, new):
    assert PACKAGE.joinpath(*new.split(".")).with_suffix(".py").is_file()
    assert not PACKAGE.joinpath(*old.split(".")).with_suffix(".py").exists()


@pytest.mark.parametrize("old", ["data.pause", "durable", "tasks.counting", "config.plan"])
def test_an_old_module_is_the_new_one_and_a_warning_names_it(old):
    name, new = f"pause_megatron.{old}", f"pause_megatron.{MOVED[old]}"
    sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match=f"{name} is now {new}"):
        module = importlib.import_module(name)
    assert module is importlib.import_module(new) and module.__name__ == module.__spec__.name == new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module(name)  # once imported it is like any other


def test_names_of_a_module_that_became_a_package():
    package = importlib.import_module("pause_megatron.data.tokenizer")
    with pytest.warns(FutureWarning, match=r"is now pause_megatron\.data\.tokenizer\.tokenizer\.Tokenizer"):
        old = package.Tokenizer
    assert old is importlib.import_module("pause_megatron.data.tokenizer.tokenizer").Tokenizer
    with pytest.raises(AttributeError, match="'NoSuchName'"):
        _ = package.NoSuchName
    with pytest.raises(ImportError):
        importlib.import_module("pause_megatron.data.no_such_module")
    for name in ("prepare", "adopt"):
        with pytest.warns(FutureWarning, match=rf"is now pause_megatron\.data\.{name}\.run\.{name}"):
            function = getattr(importlib.import_module(f"pause_megatron.data.{name}"), name)
        assert function.__module__ == f"pause_megatron.data.{name}.run"
    from pause_megatron.data.adopt import scan  # a module of the package, not the function of the old one

    assert scan.__name__ == "pause_megatron.data.adopt.scan"


def test_the_warning_names_the_line_that_imports(tmp_path):
    script = tmp_path / "user.py"
    script.write_text("from pause_megatron.data.pause import inject\nprint(inject.__module__)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60)
    assert done.stdout == "pause_megatron.data.windows.pause\n", done.stderr
    assert "user.py:1: FutureWarning: pause_megatron.data.pause is now" in done.stderr
