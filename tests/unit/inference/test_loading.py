"""Folders that are loaded, and folders that are refused without running what lies in them."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from support.tiny_llama import write_folder

from pause_megatron.cli import main
from pause_megatron.errors import DataError
from pause_megatron.inference import load, write_custom_generate


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "out", m_ft=3)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "out")


class Payload:
    """Creates a file if anything unpickles it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_is_all_that_is_needed(folder):
    generator = load(folder, dtype="bf16", attention="eager")
    assert generator.default_pauses == 3
    assert generator.model.dtype == torch.bfloat16
    assert generator.generate(["A", "My fellow citizens"], max_new_tokens=3).completions[0].pauses == 3


def test_pickles_are_never_opened(folder, tmp_path):
    mark = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(DataError, match=r"expected \*.safetensors, got none; pytorch_model.bin, .* refused"):
        load(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(DataError, match="the model cannot be loaded"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_folder_is_never_run(folder, tmp_path, file):
    mark = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil:\n    pass\n")
    names = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    change(folder / file, auto_map=names, model_type="evil", tokenizer_class="Evil")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(mark)!r}, 'w')\n")
    try:
        load(folder).generate(["A"], max_new_tokens=1)
    except DataError as error:
        assert "cannot be loaded" in str(error)
    assert not mark.exists()


def test_a_damaged_folder_is_named(folder, tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"config.json: expected a transformers folder"):
        load(tmp_path)
    with pytest.raises(DataError, match="no CUDA device"):
        if torch.cuda.is_available():
            pytest.skip("this machine has one")
        load(folder, device="cuda")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="the model cannot be loaded"):
        load(folder)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        load(folder)


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/latest", "begun"])
@pytest.mark.parametrize("verb", ["generate --prompt A", "evaluate --tasks piqa --output {0}/r --task-path {0}"])
def test_a_run_is_to_be_exported_first(tmp_path, place, verb, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "latest"
    for folder in (checkpoint, tmp_path / "begun", tmp_path / "piqa"):
        folder.mkdir(parents=True)
    for file in (checkpoint / "manifest.json", checkpoint / "config.yaml", tmp_path / "begun" / "config.yaml"):
        file.write_text("{}")  # names are all that is looked at
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n')
    model = tmp_path / place
    assert main([*verb.format(tmp_path).split(), "--model", str(model)]) == 2
    told = f"export it first: pause-megatron export-hf {model} OUT\n"
    assert capsys.readouterr().err.endswith(
        f"{model}: expected a folder that export-hf wrote, got a run or a checkpoint; {told}"
    )


def test_an_architecture_that_is_not_known_is_refused(folder):
    change(folder / "config.json", model_type="unheard-of", architectures=["UnheardOf"])
    with pytest.raises(DataError, match="the model cannot be loaded"):
        load(folder)


def test_generate_code_is_only_put_beside_a_model(tmp_path):
    with pytest.raises(DataError, match=r"config.json: expected a transformers folder"):
        write_custom_generate(tmp_path)
