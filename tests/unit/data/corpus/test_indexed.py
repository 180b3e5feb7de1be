"""The `.idx` is, byte for byte, what megatron-core's own builder writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pause_megatron.data.corpus.index_file import check_entries, read_header, read_lengths, token_dtype, write_index
from pause_megatron.errors import DataError
from pause_megatron.files.digest import file_digest
from pause_megatron.files.durable import DigestFile


def _write(path: Path, dtype: str, lengths: list[int], cuts: list[int]) -> None:
    file = DigestFile(path)
    chunks = np.split(np.array(lengths, dtype=np.int32), sorted(min(cut, len(lengths)) for cut in cuts))
    write_index(file, dtype, len(lengths), lambda: chunks)
    file.publish()
    assert file.digest == file_digest(path)
    assert file.bytes == path.stat().st_size


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(["uint16", "int32"]),
    lengths=st.lists(st.integers(1, 50), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
)
def test_bytes_are_those_of_the_stock_builder(
    tmp_path_factory, dtype: str, lengths: list[int], cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("index")
    builder = IndexedDatasetBuilder(str(folder / "stock.bin"), dtype=getattr(np, dtype))
    for length in lengths:
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(folder / "stock.idx"))
    _write(folder / "ours.idx", dtype, lengths, cuts)
    assert (folder / "ours.idx").read_bytes() == (folder / "stock.idx").read_bytes()
    header = read_header(folder / "ours.idx")
    assert (header.dtype, header.documents) == (dtype, len(lengths))
    assert header.bin_bytes == (folder / "stock.bin").stat().st_size
    assert np.concatenate([*read_lengths(folder / "ours.idx", len(lengths)), []]).tolist() == lengths
    read: list[int] = []
    check_entries(folder / "ours.idx", header, read.append)
    assert sum(read) == (folder / "ours.idx").stat().st_size - 34


def test_offsets_past_four_gigabytes(tmp_path: Path) -> None:
    _write(tmp_path / "x.idx", "int32", [2**30, 2**30, 3], [1])
    (tmp_path / "x.bin").touch()
    with open(tmp_path / "x.bin", "r+b") as file:
        file.truncate(2**33 + 12)  # sparse
    corpus = IndexedDataset(str(tmp_path / "x"))
    assert corpus.index.sequence_pointers.tolist() == [0, 2**32, 2**33]
    assert len(corpus[2]) == 3
    assert read_header(tmp_path / "x.idx").bin_bytes == 2**33 + 12


def test_dtype_boundary() -> None:
    assert (token_dtype(65535), token_dtype(65536)) == ("uint16", "int32")


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    _write(path, "uint16", [3, 4, 5], [])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.idx: (expected a Megatron index|.*the file was truncated)"):
            read_header(path)
    for content, message in [
        (whole + b"\0", "the file was truncated or overwritten"),
        (b"XX" + whole[2:], "magic bytes"),
        (whole[:9] + b"\x02" + whole[10:], "got version 2 with"),
        (whole[:17] + b"\x07" + whole[18:], "got version 1 with 7"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_header(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_header(tmp_path / "missing.idx")
