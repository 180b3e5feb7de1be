"""Lines of shards: the same for every compression, and damage is never mistaken for the end of the file."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prose import compress, documents, json_lines

from pause_megatron.data.text.shard_file import DamagedShard, ShardFile, check_start, compression_of
from pause_megatron.errors import DataError

SUFFIXES = [".jsonl", ".json.gz", ".jsonl.zst"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40)
@given(content=st.binary(max_size=300).map(lambda data: data.replace(b"a", b"\n")))
def test_lines_are_those_of_the_content(tmp_path_factory, suffix: str, content: bytes) -> None:
    path = tmp_path_factory.mktemp("lines") / f"x{suffix}"
    path.write_bytes(compress(content, suffix))
    shard = ShardFile(path)
    expected = content.split(b"\n")
    assert list(shard.lines()) == (expected if expected[-1] else expected[:-1])
    assert shard.text_bytes == len(content)
    assert shard.read_bytes == path.stat().st_size
    assert shard.digest == f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_joined_members_and_large_blocks(tmp_path: Path, suffix: str) -> None:
    content = json_lines(documents(400))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"".join(compress(line + b"\n", suffix) for line in content.splitlines()))
    assert b"\n".join(ShardFile(path).lines()) + b"\n" == content


def test_padding_after_a_gzip_member_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.json.gz"
    path.write_bytes(gzip.compress(b"one\n") + b"\0" * 512)
    assert list(ShardFile(path).lines()) == [b"one"]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_every_truncation_is_found_after_the_last_whole_line(tmp_path: Path, suffix: str) -> None:
    content = json_lines(documents(20))
    whole = compress(content, suffix)
    lines = content.splitlines()
    path = tmp_path / f"x{suffix}"
    for length in {1, 2, 5, *range(10, len(whole), 97), len(whole) - 9, len(whole) - 1}:
        path.write_bytes(whole[:length])
        shard, read = ShardFile(path), []
        with pytest.raises(DamagedShard, match=rf"x{suffix}: truncated: .*readable up to line [\d,]+ \("):
            for line in shard.lines():
                read.append(line)
        assert read == lines[: len(read)]
        assert shard.line == len(read)


def test_flipped_bits_of_a_gzip_are_found(tmp_path: Path) -> None:
    whole = compress(json_lines(documents(20)), ".gz")
    path = tmp_path / "x.json.gz"
    for place in range(12, len(whole) - 4, 211):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with pytest.raises(DamagedShard, match=r"damaged \.gz data|truncated"):
            list(ShardFile(path).lines())


def test_too_long_lines_are_none_and_the_next_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * 200_000 + b"\nshort\n" + b"b" * 101)
    assert list(ShardFile(path).lines(limit=100)) == [None, b"short", None]


@pytest.mark.parametrize("name", ["x.parquet", "x.gz", "x.txt", "x.json.bz2", "x"])
def test_unknown_kinds_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"expected a shard named \.json"):
        compression_of(Path(name))


@pytest.mark.parametrize(
    ("content", "message"), [(b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version"), (b"", "empty")]
)
@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_something_else_under_a_compressed_name(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        check_start(path)
