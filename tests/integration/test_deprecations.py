"""What asks an exported model uses nothing that the installed transformers, torch or lm-eval announce the end of."""

from __future__ import annotations

import json
import logging
import re
import warnings

import pytest
from support.tiny_llama import write_folder

from pause_megatron.cli import main
from pause_megatron.inference import load
from pause_megatron.inference.custom_generate import pause_generate

ANNOUNCED = re.compile(r"deprecat|will be removed|no longer supported|in a future (release|version)", re.IGNORECASE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "out", m_ft=3)


@pytest.fixture
def announced(monkeypatch):
    """Everything that is said of an end: as a warning, or through a logger, where transformers says most of it."""
    from transformers.utils import logging as of_transformers

    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if ANNOUNCED.search(record.getMessage()):
                found.append(record.getMessage())

    kept = Kept()
    library = logging.getLogger("transformers")
    monkeypatch.setattr(of_transformers, "set_verbosity_error", lambda: None)  # the verbs are quiet about all of it
    of_transformers._get_library_root_logger().setLevel(logging.INFO)
    logging.Logger.warning_once.cache_clear()  # what an earlier test has been told counts as well
    library.addHandler(kept)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield lambda: [
            *found,
            *(f"{w.category.__name__} {w.filename}:{w.lineno}: {w.message}" for w in shown if _of_an_end(w.category)),
        ]
    library.removeHandler(kept)


def _of_an_end(category: type[Warning]) -> bool:
    return issubclass(category, (FutureWarning, DeprecationWarning, PendingDeprecationWarning))


def test_the_fixture_captures_the_warnings_of_transformers(announced):
    from transformers.utils import logging as of_transformers

    of_transformers.get_logger("transformers.modeling").warning_once("`a` is deprecated, use `b`")
    warnings.warn("gone soon", FutureWarning, stacklevel=1)
    assert [text.partition(" /")[0] for text in announced()] == ["`a` is deprecated, use `b`", "FutureWarning"]


@pytest.mark.parametrize("options", [["--pauses", "2"], ["--pauses", "auto"], ["--prefix-attention", "bidirectional"]])
def test_generate(folder, announced, capsys, options):
    prompts = ["--prompt", "My fellow citizens,", "--prompt", "A"]
    assert main(["generate", "--model", str(folder), *prompts, "--max-new-tokens", "3", *options]) == 0
    assert announced() == []


def test_generate_of_transformers_with_our_decoding(folder, announced):
    model = load(folder).model
    given = {"custom_generate": pause_generate, "pauses": 2, "max_new_tokens": 2, "return_dict_in_generate": True}
    output = model.generate(model.dummy_inputs["input_ids"][:, :3], **given)
    assert len(output.sequences[0]) == 5 and announced() == []


@pytest.mark.parametrize("task", ["piqa", "lambada"])
def test_evaluate(folder, announced, tmp_path, task):
    """Options that are scored, and answers that are decoded."""
    records = {
        "piqa": {"goal": "To boil water,", "sol1": "heat it.", "sol2": "cool it.", "label": 0},
        "lambada": {"text": "The river was cold and he swam across the river"},
    }
    (tmp_path / task).mkdir()
    for split in ("test", "validation"):
        (tmp_path / task / f"{split}.jsonl").write_text(json.dumps(records[task]) + "\n")
    arguments = ["--tasks", task, "--task-path", str(tmp_path), "--pauses", "0,2", "--output", str(tmp_path / "r")]
    assert main(["evaluate", "--model", str(folder), *arguments]) == 0
    assert announced() == []
