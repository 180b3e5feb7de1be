"""Sources from --input: their order, and the errors where there is nothing to read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.prose import documents, json_lines, write_shards

from pause_megatron.data.text.documents import Malformed
from pause_megatron.data.text.hub import HubOptions
from pause_megatron.data.text.sources import ReadOptions, find_sources
from pause_megatron.errors import DataError


def _texts(sources) -> list[str]:
    return [text for source in sources for text in source.open(ReadOptions()).documents()]


def test_natural_order_and_overlapping_globs(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"shard-{number}.jsonl").write_bytes(json_lines([f"text {number}"]))
    sources = find_sources([str(tmp_path / "*.jsonl"), str(tmp_path / "shard-2.jsonl")])
    assert [Path(source.name).name for source in sources] == ["shard-1.jsonl", "shard-2.jsonl", "shard-10.jsonl"]
    assert _texts(sources) == ["text 1", "text 2", "text 10"]


def test_an_existing_path_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    path = tmp_path / "part[1].jsonl"
    path.write_bytes(json_lines(["x"]))
    assert _texts(find_sources([str(path)])) == ["x"]


def test_datasets_streams_the_same_documents(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, documents(30), 3)
    files = tuple(sorted(map(str, tmp_path.iterdir())))
    sources = find_sources(["hf:json"], HubOptions(data_files=files))
    assert len(sources) == 3
    assert _texts(sources) == _texts(find_sources([pattern])) == list(documents(30))


def test_null_text_in_a_dataset_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": " "}\n')
    found = _texts(find_sources(["hf:json"], HubOptions(data_files=(str(path),))))
    assert found[0] == "a"
    assert [item.kind for item in found[1:] if isinstance(item, Malformed)] == ["text-not-string", "empty"]


def test_dataset_errors_name_the_data_set(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(["a"]))
    with pytest.raises(DataError, match=r"hf:json: expected a text column among text, timestamp, url, got 'body'"):
        find_sources(["hf:json"], HubOptions(data_files=(str(path),)), text_key="body")
    with pytest.raises(DataError, match="hf:json: datasets cannot open it"):
        find_sources(["hf:json"], HubOptions(data_files=(str(tmp_path / "missing.jsonl"),)))
    with pytest.raises(DataError, match=r"either shards or one hf:NAME"):
        find_sources(["hf:json", str(path)])
    path.write_text('{"text": "a"}\n' * 3 + "not json\n")
    with pytest.raises(DataError, match=r"datasets (stopped after record|cannot open it)"):
        _texts(find_sources(["hf:json"], HubOptions(data_files=(str(path),))))


def test_missing_and_empty_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.json\.gz: expected a shard, got no such file$"):
        find_sources([str(tmp_path / "*.json.gz")])
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        find_sources([str(tmp_path / "nowhere" / "*.json.gz")])
    with pytest.raises(DataError, match=r"expected shards, got a folder: name its shards"):
        find_sources([str(tmp_path)])
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="--input: expected documents, got 1 file of 0 bytes"):
        find_sources([str(tmp_path / "a.jsonl")])
    (tmp_path / "b.jsonl").write_bytes(json_lines(["x"]))
    assert _texts(find_sources([str(tmp_path / "?.jsonl")])) == ["x"]


def test_truncated_shards_stop_or_are_kept_as_asked(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(40), 1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-2000])
    (source,) = find_sources([str(path)])
    with pytest.raises(DataError, match=r"truncated.*--damaged-shards keep"):
        list(source.open(ReadOptions()).documents())
    *texts, last = source.open(ReadOptions(damaged_shards="keep")).documents()
    assert 0 < len(texts) < 40
    assert tuple(texts) == documents(40)[: len(texts)]
    assert (last.kind, last.line) == ("damaged-shard", len(texts) + 1)
