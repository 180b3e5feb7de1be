"""Files of version 0.1 (tests/assets/experiment) read as typed records and written again: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_megatron.errors import DataError
from pause_megatron.experiment.stored import (
    AttemptsFile,
    CellFile,
    DoneFile,
    FailedFile,
    JobFile,
    PlanFile,
    StoredFile,
    is_done,
)

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "experiment"
KINDS = {kind.NAME: kind for kind in (AttemptsFile, CellFile, DoneFile, FailedFile, JobFile, PlanFile)}
FILES = sorted(ASSETS.rglob("*.json"))


def test_every_kind_of_file_has_an_example():
    assert {path.name for path in FILES} == set(KINDS) and len(FILES) == 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ASSETS)))
def test_a_file_of_0_1_is_written_back_byte_for_byte(path, tmp_path):
    KINDS[path.name].read(path.parent).write(tmp_path)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_numbers_keep_their_type():
    """Model FLOPs are integers where they are counted so, and an integer is written without a fraction."""
    trained, scored = (DoneFile.read(ASSETS / name).ledger for name in ("pretrain", "evaluate"))
    assert type(trained.flops) is int and type(scored.flops) is float
    assert trained.raw_tokens == trained.text_tokens + trained.pauses


def test_a_cell_is_done_by_its_fingerprint():
    fingerprint = CellFile.read(ASSETS / "pretrain").fingerprint
    assert is_done(ASSETS / "pretrain", fingerprint)
    assert not is_done(ASSETS / "pretrain", "other") and not is_done(ASSETS, fingerprint)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (JobFile, None, r"job\.json: expected a file that `pause-megatron experiment run` wrote, got none"),
        (
            JobFile,
            "{",
            r"job\.json: damaged: expected a JSON object, got .*; remove it, and the cell is computed again",
        ),
        (JobFile, "[]", r"job\.json: damaged: expected a JSON object, got b'\[\]'"),
        (JobFile, '{"version": 2, "job": "1"}', r"job\.json: version: expected 1, got 2"),
        (FailedFile, '{"version": 1, "code": "x", "fingerprint": ""}', r"failed\.json: code: expected .*, got 'x'"),
        (PlanFile, '{"version": 1, "cells": ["a"]}', r"plan\.json: points: expected a value, got none"),
        (PlanFile, '{"version": 1, "cells": [7], "points": []}', r"plan\.json: cells\[0\]: expected a text, got 7"),
    ],
)
def test_a_file_that_cannot_be_used_names_its_field(tmp_path, kind: type[StoredFile], content, message):
    if content is not None:
        (tmp_path / kind.NAME).write_text(content)
    with pytest.raises(DataError, match=message):
        kind.read(tmp_path)
