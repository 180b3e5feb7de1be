"""Keys under the earlier names: accepted with a warning, and the same run as under their present names."""

from __future__ import annotations

from pathlib import Path

import pytest

from pause_megatron.config.keys import keys
from pause_megatron.config.load import dump, load, load_saved
from pause_megatron.config.renamed import BY_OLD_NAME, stored_value, with_old_names
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError
from pause_megatron.train.start.extension import config_differences

NEW = "data.intra_document_masking"


def as_written_by_0_1(config: ResolvedConfig, path: Path) -> Path:
    """`config.yaml` of a run, under the old name."""
    value = "apart" if config.data.intra_document_masking else "joined"
    text = dump(config)
    line = f"  intra_document_masking: {str(config.data.intra_document_masking).lower()}\n"
    assert line in text
    path.write_text(text.replace(line, f"  documents: {value}\n"))
    return path


@pytest.mark.parametrize(("value", "masking"), [("joined", False), ("apart", True)])
def test_an_old_key_warns_once_with_its_place_and_new_spelling(tmp_path, caplog, value, masking):
    path = tmp_path / "run.yaml"
    path.write_text(f"data:\n  split: 98,2,0\n  documents: {value}\n")
    assert load(path).data.intra_document_masking is masking
    [line] = caplog.messages
    assert line.startswith(f"{path}:3: data.documents={value} is deprecated")
    assert line.endswith(f"write {NEW}={str(masking).lower()}")
    caplog.clear()
    assert load(overrides=[f"data.documents={value}"]).data.intra_document_masking is masking
    [line] = caplog.messages
    assert line.startswith("command line: data.documents=") and caplog.records[0].levelname == "WARNING"
    caplog.clear()
    assert load_saved(path).data.intra_document_masking is masking and caplog.messages == []


def test_present_keys_do_not_warn(caplog):
    load(recipe="tiny-pause", overrides=[f"{NEW}=true"])
    assert caplog.messages == []


def test_both_names_in_one_source_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  intra_document_masking: true\n  documents: apart\n")
    expected = rf"{path}:3: expected {NEW} or its old name data\.documents, got both \({NEW} at {path}:2\)"
    with pytest.raises(ConfigError, match=expected):
        load(path)
    with pytest.raises(ConfigError, match=r"command line: .* got both"):
        load(overrides=["data.documents=apart", f"{NEW}=true"])


def test_the_command_line_replaces_a_file_under_either_name(tmp_path):
    path = as_written_by_0_1(load(overrides=[f"{NEW}=true"]), tmp_path / "config.yaml")
    assert load(path, overrides=[f"{NEW}=false"]).data.intra_document_masking is False
    assert load(path, overrides=["data.documents=joined"]).data.intra_document_masking is False


@pytest.mark.parametrize("value", ["alone", "true", "null", "[apart]"])
def test_a_value_that_the_old_key_never_had_is_refused(value):
    expected = (
        rf"command line: data\.documents is now {NEW}: expected {NEW}=false \(was joined\), .*; got data\.documents="
    )
    with pytest.raises(ConfigError, match=expected):
        load(overrides=[f"data.documents={value}"])


@pytest.mark.parametrize("masking", ["false", "true"])
def test_a_config_of_0_1_resumes_as_the_same_run(tmp_path, masking):
    now = load(recipe="tiny-pause", overrides=[f"{NEW}={masking}"])
    before = load(as_written_by_0_1(now, tmp_path / "config.yaml"))
    assert before == now and dump(before) == dump(now)
    assert config_differences(before, now, 50) == []
    other = load(recipe="tiny-pause", overrides=[f"{NEW}={'true' if masking == 'false' else 'false'}"])
    [difference] = config_differences(before, other, 50)
    assert difference.startswith(f"{NEW}: ")


def test_stored_names_and_values_are_those_of_0_1():
    assert with_old_names({NEW: True, "run.seed": 1}) == {"data.documents": "apart", "run.seed": 1}
    assert stored_value({"data": {"documents": "apart"}}, NEW) is True
    assert stored_value({"data": {"intra_document_masking": False}}, NEW) is False
    assert stored_value({"data": {"documents": 3}}, NEW) == 3  # of a file that was never written
    assert stored_value({"run": {"seed": 1}}, "run.seed") == 1 and stored_value({}, NEW) is None


def test_every_old_name_leads_to_a_key_and_is_none():
    assert {renamed.new for renamed in BY_OLD_NAME.values()} <= set(keys())
    assert not set(BY_OLD_NAME) & set(keys())
