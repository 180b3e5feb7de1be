"""The model's fingerprint: content, not place; read once."""

from __future__ import annotations

import json

import pytest

from pause_megatron.errors import DataError
from pause_megatron.evaluate import model_fingerprint
from pause_megatron.files.digest import file_digest


def test_the_fingerprint_is_the_contents_not_the_place(tmp_path):
    def model(name: str, **files: str):
        folder = tmp_path / name
        folder.mkdir()
        content = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}", "README.md": name}
        for file, text in {**content, **files}.items():
            (folder / file).write_text(text)
        return folder

    reports = []
    one, known = model("one"), tmp_path / "known.json"
    fingerprint = model_fingerprint(one, known, lambda *report: reports.append(report))
    assert fingerprint == model_fingerprint(model("two")) and fingerprint.startswith("xxh3_128:")
    assert reports[-1] == ("fingerprint of the model", 11, 11)
    for name, text in (("config.json", "{ }"), ("model.safetensors", "Weights"), ("tokenizer.json", "[]")):
        assert model_fingerprint(model(f"changed-{name}.d", **{name: text})) != fingerprint
    before, reports[:] = file_digest(known), []
    assert model_fingerprint(one, known, lambda *report: reports.append(report)) == fingerprint
    assert reports == [] and file_digest(known) == before  # nothing was read again
    (one / "model.safetensors").write_text("changed")
    assert model_fingerprint(one, known) not in (fingerprint, None) and json.loads(known.read_text())["files"]
    known.write_text("[]")
    assert model_fingerprint(one, known) == model_fingerprint(one)
    with pytest.raises(DataError, match=r"expected a transformers folder with \*.safetensors"):
        model_fingerprint(tmp_path)
