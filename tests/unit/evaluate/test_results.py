"""results.json: every task, metric and setting once, of one model, from one writer."""

from __future__ import annotations

import pytest

from pause_megatron.errors import DataError
from pause_megatron.evaluate import (
    Identity,
    OwnDecoding,
    ResultEntry,
    ResultsFolder,
    Sample,
    Settings,
    opened,
    read_results,
)
from pause_megatron.evaluate.stored import BatchCost

ORDER = [str(number) for number in range(6)]
COST = BatchCost(records=6, forward_passes=1, positions=9, seconds=0.5)
DECODING = OwnDecoding(max_new_tokens=4, stop=(), metrics=("exact_match", "f1"))


def identity(**changes) -> Identity:
    values = {"task": "t", "model": "m", "data": "d", "settings": Settings(pauses=2), "decoding": DECODING}
    return Identity(**{**values, **changes})


def record(name: str) -> Sample:
    scores, tokens = {"exact_match": 1.0, "f1": 0.5}, {"prompt": 3, "pauses": 2, "new": 1}
    return Sample.model_validate({"id": name, "scores": scores, "tokens": tokens, "cut": 0})


def finish(folder: ResultsFolder, of: Identity) -> list[ResultEntry]:
    with folder.journal(of, ORDER) as journal:
        if len(journal.samples) < len(ORDER):
            journal.append([record(name) for name in ORDER], COST)
        entries = folder.summarise(of, journal.samples, "f1")
    folder.add(entries)
    return entries


def test_results_hold_every_task_metric_and_setting_once(tmp_path):
    folder = ResultsFolder(tmp_path, "m", "out")
    finish(folder, identity())
    finish(folder, identity(settings=Settings(pauses=5, filler="/.")))
    again = ResultsFolder(tmp_path, "m", "out")
    finish(again, identity())
    entries = read_results(tmp_path)
    assert [(entry.metric, entry.pauses) for entry in entries] == [
        ("exact_match", 2),
        ("exact_match", 5),
        ("f1", 2),
        ("f1", 5),
    ]
    assert entries[2].as_json() == {
        **{"task": "t", "metric": "f1", "primary": True, "value": 0.5, "standard_error": 0.0, "n": 6},
        **{"low": pytest.approx(0.1380, abs=1e-4), "high": pytest.approx(0.8620, abs=1e-4), "groups": 6},
        **{"pauses": 2, "location": "append", "filler": None, "prefix_attention": "causal", "seed": 0, "dtype": "fp32"},
        **{"model": "m", "model_path": "out", "data": "d", "harness": "pause-megatron", "cut": 0, "seconds": 0.5},
        **{"tokens": {"prompt": 18, "pauses": 12, "new": 6}, "positions": 9, "forward_passes": 1},
    }
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names[2:] == ["t-m5-append-filler-%2F.-seed0.json", "t-m5-append-filler-%2F.-seed0.jsonl"]


def test_errors_count_the_groups_of_the_samples_or_of_the_examples(tmp_path):
    folder, of = ResultsFolder(tmp_path, "m", "out"), identity()
    samples = [
        record(name).model_copy(update={"scores": {"exact_match": float(name in "012")}, "group": "ab"[int(name) // 3]})
        for name in ORDER
    ]
    [entry] = folder.summarise(of, samples, "exact_match")
    assert (entry.value, entry.standard_error, entry.n, entry.groups) == (0.5, pytest.approx(0.5), 6, 2)
    assert 0 <= entry.low < 0.05 and 0.95 < entry.high <= 1
    earlier = [sample.model_copy(update={"group": ""}) for sample in samples]
    [again] = folder.summarise(of, earlier, "exact_match", {sample.id: sample.group for sample in samples})
    assert again == entry


def test_the_held_out_part_has_results_of_its_own(tmp_path):
    folder = ResultsFolder(tmp_path, "m", "out")
    finish(folder, identity())
    finish(folder, identity(data="other records", settings=Settings(pauses=2, split="held-out")))
    entries = read_results(tmp_path)
    assert [entry.split for entry in entries] == ["eval", "held-out"] * 2
    assert ["split" in entry.as_json() for entry in entries] == [False, True] * 2
    assert (tmp_path / "samples" / "t-m2-append-held-out-seed0.jsonl").is_file()


def test_another_model_or_data_is_refused_even_without_samples(tmp_path):
    folder = ResultsFolder(tmp_path, "m", "out")
    finish(folder, identity())
    with pytest.raises(DataError, match=r"results.json: model: expected n \(other\), got m \(out\)"):
        ResultsFolder(tmp_path, "n", "other")
    for path in (tmp_path / "samples").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"results.json: data: expected 'e' \(this run\), got 'd'"):
        folder.check(identity(data="e"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ('{"version": 2, "results": []}', "version: expected 1, got 2"),
        ('{"version": 1}', r"results: expected a list, got None"),
        ('{"version": 1, "results": [1]}', r"results\[0\]: expected"),
        ('{"version": 1, "results": [{"task": 1}]}', r"results\[0\]: task: expected a text, got 1"),
        ('{"version": 1, "results": [{"task": "t"}]}', r"results\[0\]: metric: expected a value, got none"),
    ],
)
def test_damaged_results_are_named(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=rf"results.json.*{message}"):
        ResultsFolder(tmp_path, "m", "out")


def test_one_writer_at_a_time(tmp_path):
    busy = pytest.raises(DataError, match="another process is working on the results in")
    with opened(tmp_path / "a" / "results") as path, busy, opened(path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"), opened(tmp_path / "file" / "results"):
        pass
