"""Folders whose pauses share positions: what cannot keep them is refused, and what a file says is checked."""

from __future__ import annotations

import json

import pytest
from support.tiny_llama import write_folder

from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.hf.importing import import_folder
from pause_megatron.hf.pause_token import add_pause_token


def test_training_with_transformers_and_unknown_schemes_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_folder(tmp_path / "hf", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.pause["positions"] = "shared"
    with pytest.raises(ConfigError, match=r"expected pauses with positions of their own, got pause\.positions=shared"):
        add_pause_token(AutoTokenizer.from_pretrained(folder), model)
    config = json.loads((folder / "config.json").read_text())
    config["pause"]["positions"] = "half"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: pause\.positions: expected own or shared, got 'half'"):
        import_folder(folder, tmp_path / "checkpoint")
