"""Files in tests/assets/results, of earlier code, read as typed records and written again: the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pause_megatron.errors import DataError
from pause_megatron.evaluate import HarnessDecoding, Identity, OwnDecoding, Settings, read_results, read_samples
from pause_megatron.evaluate.fingerprint import ModelDigests
from pause_megatron.evaluate.identity import digest
from pause_megatron.evaluate.journal import dump_identity, dump_samples
from pause_megatron.evaluate.results import ResultsFolder, dump_results
from pause_megatron.evaluate.stored import ResultEntry, Sample
from pause_megatron.files.typed_json import read_object

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "results"
SAMPLES = sorted((ASSETS / "samples").glob("*.jsonl"))


def test_results_of_0_1_are_written_back_byte_for_byte(tmp_path):
    content = (ASSETS / "results.json").read_bytes()
    entries = read_results(ASSETS)
    assert dump_results(entries) == content
    assert {entry.asked for entry in entries} == {None, "lm_eval/reading_choice", "lm_eval/reading_decode"}
    (tmp_path / "results.json").write_bytes(content)
    folder = ResultsFolder(tmp_path, entries[0].model, "out")
    folder.add(entries[1:3])  # replaces, and sorts all
    assert (tmp_path / "results.json").read_bytes() == content


def test_keys_of_other_versions_are_kept():
    line = {"task": "t", "metric": "m", "value": 1, "n": 2, "pauses": 0, "location": "append", "filler": None}
    line |= {"prefix_attention": "causal", "seed": 0, "dtype": "fp32", "model": "m", "data": "d", "further": [1.5]}
    entry = ResultEntry.parse(line, "here")
    assert entry.primary and entry.tokens is None
    assert json.dumps(entry.as_json()) == json.dumps(line)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_of_0_1_are_written_back_byte_for_byte(path):
    samples = list(read_samples(path).values())
    assert dump_samples(samples) == path.read_bytes() and len(samples) == 6
    document = read_object(path.with_suffix(".json"))
    assert dump_identity(document) == path.with_suffix(".json").read_bytes()
    assert {sample.of for sample in samples} == {digest(document)}
    decoding = (HarnessDecoding if document["task"].startswith("lm_eval/") else OwnDecoding)(**document["decoding"])
    fields = {name: document[name] for name in ("task", "model", "data", "harness")}
    identity = Identity(**fields, settings=Settings(**document["settings"]), decoding=decoding)
    assert dump_identity(identity.document()) == path.with_suffix(".json").read_bytes()


def test_model_digests_of_0_1_are_written_back_byte_for_byte():
    cache = ModelDigests.parse(read_object(ASSETS / "model.json"), "model.json")
    content = json.dumps(cache.model_dump(mode="json"), indent=2).encode() + b"\n"
    assert content == (ASSETS / "model.json").read_bytes()


def test_infinite_log_likelihoods_survive():
    """lm-eval writes -Infinity for a continuation that spells a token of probability 0."""
    line = '{"id": "t/0", "prediction": [[-Infinity, false], [-2.5, true]], "scores": {"acc": 1.0}, "of": "x"}\n'
    assert dump_samples([Sample.parse(json.loads(line), "here")]).decode() == line


def test_a_field_is_still_found_by_its_key_with_a_warning():
    sample = Sample(id="1", scores={"f1": 0.5})
    with pytest.warns(FutureWarning, match=r'record\["scores"\] is now record\.scores; .* until 0\.2'):
        assert sample["scores"]["f1"] == 0.5
    with pytest.warns(FutureWarning), pytest.raises(KeyError):
        _ = sample["prediction"]


def test_a_field_of_another_type_is_named():
    with pytest.raises(DataError, match=r"here: tokens\.new: expected an integer, got None"):
        Sample.parse({"id": "1", "scores": {}, "tokens": {"prompt": 1, "pauses": 2, "new": None}}, "here")
    with pytest.raises(DataError, match=r"here: id: expected a text, got 7"):
        Sample.parse({"id": 7, "scores": {}}, "here")
