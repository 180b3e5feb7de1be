"""Lines of a user's text end only at newlines; text that is not UTF-8 is an error with its line."""

from __future__ import annotations

import ast
import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_megatron.errors import DataError
from pause_megatron.files.lines import lines_of

PACKAGE = Path(__file__).resolve().parents[3] / "pause_megatron"
# Text of the program's own making, or shown on a terminal, where every kind of line may end.
SHOWN = {
    *(
        "cli/support/inspect_report.py",
        "cli/pretrain.py",
        "cli/launch.py",
        "cli/support/probes.py",
        "cli/support/installed.py",
    ),
    *("config/deepspeed.py", "distributed/store.py", "data/text/hub.py", "data/tokenizer/train.py"),
    *("evaluate/lm_eval_tasks.py", "tasks/record_files.py", "inference/loading.py", "train/logs/tensorboard.py"),
    "score/unit_scorer.py",  # an error of a process
    "hf/architecture.py",  # an error of transformers
    *("experiment/execute.py", "slurm/site.py", "slurm/commands.py"),  # what sinfo and squeue print
}

LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), max_size=8)


@given(st.lists(LETTERS, max_size=6), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_lines_come_back(lines, mark, ended, end):
    if lines and lines[0].startswith("\ufeff"):
        return
    text = end.join(lines) + (end if ended and lines else "")
    content = (codecs.BOM_UTF8 if mark else b"") + text.encode()
    while lines and not lines[-1] and not ended:  # what ends with a newline has no further line behind it
        lines = lines[:-1]
        ended = True
    assert lines_of(content, "x") == lines


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x0b", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\r"])
def test_nothing_else_ends_a_line(letter):
    assert lines_of(f"a{letter}b\nc".encode(), "x") == [f"a{letter}b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb".encode("utf-16"), "x: expected UTF-8, got UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        (codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), "got UTF-16"),
        ("a".encode("utf-32"), "got UTF-32"),
        ("a\n\nb".encode("utf-16-le"), "x:1: expected text, got a NUL byte at 1"),
        (b"a\n\nb\0", "x:3: expected text, got a NUL byte at 1"),
        (b"a\n\n\ncaf\xe9\n", "x:4: expected UTF-8, got the byte 0xe9 at 3 of the line"),
    ],
)
def test_what_is_no_text_is_refused(content, message):
    with pytest.raises(DataError) as caught:
        lines_of(content, "x")
    assert message in str(caught.value)


def test_no_other_reader_of_lines():
    """`str.splitlines` is for texts of the program's own: a file that a user gives goes through `lines_of`."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "splitlines"
    }
    assert found - SHOWN == set()


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_prompts_are_lines_and_nothing_else(tmp_path, monkeypatch, source):
    import argparse
    import io
    import types

    from pause_megatron.cli.generate import _prompts

    content = codecs.BOM_UTF8 + "first\u2028still first\r\n\n\fsecond \x1c\nlast".encode()
    (tmp_path / "prompts.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    name = str(tmp_path / "prompts.txt") if source == "file" else "-"
    args = argparse.Namespace(prompt=["given"], prompts_file=name)
    assert _prompts(args) == ["given", "first\u2028still first", "\fsecond \x1c", "last"]
