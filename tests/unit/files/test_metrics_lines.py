"""metrics.jsonl with anything in it: good lines are read and kept byte for byte, and nothing ends in a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_megatron.cli import main
from pause_megatron.errors import DataError
from pause_megatron.experiment.ledger import ledger_of
from pause_megatron.experiment.report.costs import newest_metrics
from pause_megatron.files import metrics_lines
from pause_megatron.files.metrics_lines import DAMAGED, keep_steps, last_step, read_metrics


def line(step: int) -> bytes:
    numbers = {"loss": 2.0 / step, "tokens": 100 * step, "text_tokens": 90 * step, "seconds": 0.5, "valid_loss": None}
    return json.dumps({"step": step, **numbers}).encode() + b"\n"


BAD = {
    "not UTF-8": b'{"step": 1, "loss": "\xff\xfe"}',
    "brackets": b"[" * 200_000,
    "objects in objects": b'{"step":' * 100_000,
    "a number": b"17",
    "a list": b"[1, 2]",
    "null": b"null",
    "text": b'"step"',
    "no step": b'{"loss": 1.0}',
    "step 0": b'{"step": 0}',
    "a step that is a text": b'{"step": "3"}',
    "a step that is true": b'{"step": true}',
    "a step with a fraction": b'{"step": 3.0}',
    "a step of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "nothing": b"",
    "zeros": b"\0" * 4096,
    "two lines in one": b'{"step": 1}{"step": 2}',
    "longer than any line": b'{"step": 1, "x": "' + b"y" * (2 * metrics_lines.LONGEST_LINE) + b'"}',
    "carriage returns": b'{"step": 1\r\r',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_bad_lines_are_kept_aside_and_good_ones_byte_for_byte(tmp_path, bad, place):
    path, good = tmp_path / "metrics.jsonl", [line(step) for step in range(1, 5)]
    path.write_bytes(b"".join([*good[:place], bad + b"\n", *good[place:]]))
    metrics = read_metrics(path)
    assert [record["step"] for record in metrics.records] == [1, 2, 3, 4] and metrics.damaged == 1
    assert last_step(path) == 4
    said = keep_steps(path, 3)
    assert path.read_bytes() == b"".join(good[:3])
    assert said == f"{path}: damaged lines taken out and kept in {DAMAGED}: 1"
    aside = (tmp_path / DAMAGED).read_bytes()
    assert aside == bad + b"\n" or (len(bad) > metrics_lines.LONGEST_LINE and bad.endswith(aside[-100:-1]))
    assert keep_steps(path, 3) is None and sorted(os.listdir(tmp_path)) == [DAMAGED, path.name]


@given(st.lists(st.one_of(st.integers(1, 9).map(line), st.binary(max_size=60).map(lambda some: some + b"\n"))))
def test_valid_lines_stay_with_any_content_between_them(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"".join(lines))
    wanted = [each for each in path.read_bytes().splitlines(keepends=True) if each in {line(n) for n in range(1, 6)}]
    keep_steps(path, 5)
    assert path.read_bytes() == b"".join(wanted)
    assert len(read_metrics(path).records) == len(wanted)


def test_an_incomplete_last_line_is_dropped_and_a_valid_file_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2)[:-1])
    assert keep_steps(path, 9) is None and path.read_bytes() == line(1)
    before = path.stat()
    assert keep_steps(path, 1) is None and path.stat().st_ino == before.st_ino
    assert keep_steps(tmp_path / "none.jsonl", 1) is None and os.listdir(tmp_path) == [path.name]


def test_a_folder_or_a_pipe_in_its_place_does_not_block(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match="expected the metrics of a run: Is a directory"):
        read_metrics(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for name in ("metrics.jsonl", "pipe"):
        assert last_step(tmp_path / name) is None and keep_steps(tmp_path / name, 1) is None
    assert len(os.listdir(tmp_path)) == 2


def test_a_file_that_cannot_be_replaced_keeps_every_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        keep_steps(path, 1)
    assert path.read_bytes() == line(1) + line(2) and os.listdir(tmp_path) == [path.name]


def test_every_reader_takes_the_good_lines(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    more = [b'{"step": 3, "loss": "much", "tokens": null}\n', b'{"step": 4, "loss": null}\n']
    path.write_bytes(line(1) + b"\xff\n" + line(2) + b"".join(more) + b"[" * 100_000 + b"\n" + line(3)[:20])
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "loss.png")]) == 0
    assert "damaged lines left out: 2" in capsys.readouterr().err and (tmp_path / "loss.png").stat().st_size > 1000
    ledger = ledger_of("pretrain", tmp_path, 10.0, 7.0, 1)
    assert (ledger.raw_tokens, ledger.text_tokens, ledger.seconds, ledger.flops) == (200, 180, 1.0, 2000.0)
    assert newest_metrics(path) == {"step": 2, "loss": 1.0, "tokens": 200, "text_tokens": 180, "seconds": 0.5}


@pytest.mark.parametrize("content", [b"", b"\xff\n", b'{"step": 1}\n', None])
def test_every_reader_reports_unusable_metrics_in_one_line(tmp_path: Path, capsys, content):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "loss.png")]) == 2
    assert f"{path}: expected the metrics of a run" in capsys.readouterr().err
    for read in (lambda: ledger_of("finetune", tmp_path, 10.0, 7.0, 1), lambda: newest_metrics(path)):
        with pytest.raises(DataError, match="expected the metrics of a run"):
            read()
