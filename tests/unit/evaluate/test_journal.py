"""Samples on disk: a prefix of the order, whole batches, of one identity."""

from __future__ import annotations

import pytest

from pause_megatron.errors import DataError
from pause_megatron.evaluate import Sample, read_samples
from pause_megatron.evaluate.journal import Journal
from pause_megatron.evaluate.stored import BatchCost

IDENTITY = {"task": "t", "model": "m", "settings": {"pauses": 2}}
ORDER = [str(number) for number in range(6)]
COST = {"forward_passes": 1, "positions": 9, "seconds": 0.5}


def record(name: str) -> Sample:
    fields = {
        "id": name,
        "prediction": f"ä{name}",
        "scores": {"exact_match": 1.0},
        "tokens": {"prompt": 3, "pauses": 2, "new": 1},
        "cut": 0,
    }
    return Sample.model_validate(fields)


def fill(path, batches) -> None:
    with Journal(path, IDENTITY, ORDER) as journal:
        for batch in batches:
            journal.append([record(name) for name in batch], BatchCost(records=len(batch), **COST))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples" / "t.jsonl"


def test_a_file_cut_anywhere_resumes_to_the_same_bytes(path):
    """Cut anywhere: what is kept are whole batches, and the finished file is the uninterrupted one."""
    fill(path, [ORDER[:2], ORDER[2:4], ORDER[4:]])
    whole = path.read_bytes()
    ends = [0, *(at + 1 for at in range(len(whole)) if whole[at : at + 1] == b"\n")]
    for length in sorted({*range(0, len(whole), 11), *ends, *(end - 1 for end in ends[1:])}):
        path.write_bytes(whole[:length])
        with Journal(path, IDENTITY, ORDER) as journal:
            done = len(journal.samples)
            assert done == 2 * sum(ends[2 * batch] <= length for batch in (1, 2, 3))
            for start in range(done, 6, 2):
                journal.append([record(name) for name in ORDER[start : start + 2]], BatchCost(records=2, **COST))
        assert path.read_bytes() == whole


def test_records_read_back_are_those_written(path):
    fill(path, [ORDER[:4], ORDER[4:]])
    assert list(read_samples(path)) == ORDER
    assert read_samples(path)["3"].batch == BatchCost(records=4, **COST)
    assert read_samples(path)["0"].prediction == "ä0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0], lines[1][:-9], *lines[2:]], r"t.jsonl: line 2: damaged: expected a JSON object"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], r"t.jsonl: line 1: id: expected '0', got '1'"),
        (lambda lines: [*lines, lines[0]], r"t.jsonl: line 7: id: expected 'no further record', got '0'"),
        (lambda lines: ["[1]", *lines], r"t.jsonl: line 1: damaged: expected a JSON object"),
        (lambda lines: [lines[0].replace('"of": "', '"of": "f'), *lines[1:]], r"line 1: of: expected .* got 'f"),
        (
            lambda lines: [lines[0].replace("scores", "score"), *lines[1:]],
            r"line 1: scores: expected a value, got none",
        ),
    ],
)
def test_damage_is_named_and_refused(path, change, message):
    fill(path, [ORDER])
    damaged = "\n".join(change(path.read_text().splitlines())) + "\n"
    path.write_text(damaged)
    with pytest.raises(DataError, match=message):
        Journal(path, IDENTITY, ORDER)
    assert path.read_text() == damaged


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**IDENTITY, "model": "x"}, r"t.json: model: expected 'x' \(this run\), got 'm'"),
        ({**IDENTITY, "settings": {"pauses": 3}}, r"t.json: settings.pauses: expected 3 \(this run\), got 2"),
        ({**IDENTITY, "more": 1}, r"t.json: more: expected 1 \(this run\), got None"),
        ({"task": "t", "model": "m"}, r"t.json: settings: expected None \(this run\), got"),
    ],
)
def test_outcomes_of_something_else_are_never_mixed(path, other, message):
    fill(path, [ORDER[:2]])
    before = path.read_bytes()
    with pytest.raises(DataError, match=message):
        Journal(path, other, ORDER)
    assert path.read_bytes() == before


def test_samples_without_what_they_are_of_are_refused(path):
    fill(path, [ORDER[:2]])
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"t.jsonl: expected t.json beside it"):
        Journal(path, IDENTITY, ORDER)
