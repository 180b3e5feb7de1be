"""The benchmark at C4's size, at a small one: its files are a corpus, and what it measures is what a run does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks import c4_scale
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

DOCUMENTS = 10_000


def _caches(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").iterdir() if path.suffix != ".json"}


def test_ten_thousand_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c4_scale.write(tmp_path, DOCUMENTS)
    lengths = np.concatenate(list(c4_scale.generated_lengths(DOCUMENTS)))
    index = IndexedDataset(str(tmp_path / "c4"))
    assert np.array_equal(index.sequence_lengths, lengths) and 470 < lengths.mean() < 520 and lengths.min() >= 1
    bin_file = (tmp_path / "c4.bin").stat()
    assert bin_file.st_size == 2 * lengths.sum(dtype=np.int64) and bin_file.st_blocks == 0

    samples = c4_scale.samples_of(tmp_path, "pass")
    measured = c4_scale.measured(lambda: c4_scale.start(tmp_path, samples))
    assert measured["seconds"] > 0 and measured["peak"] > 0
    stock = _caches(tmp_path)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    # What --lean replaces, it replaces with the same bytes.
    monkeypatch.setattr(gpt_dataset, "_build_document_index", gpt_dataset._build_document_index)
    c4_scale.number_documents_leanly()
    c4_scale.start(tmp_path, samples)
    assert _caches(tmp_path) == stock

    held = sum(path.stat().st_size for path in [tmp_path / "c4.idx", *(tmp_path / "cache").glob("*.npy")])
    assert 0 < c4_scale.resident_bytes(tmp_path) <= held + 20 * 4096
