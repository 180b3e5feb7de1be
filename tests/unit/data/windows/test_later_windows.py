"""The windows of an extension: the unread rest of the corpus, else the corpus again in another order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support.corpora import ByteTokenizer, paragraphs, write_corpus

from pause_megatron.config.schema import PauseSection
from pause_megatron.data.batches.loader import Samples
from pause_megatron.data.windows.build import DatasetOptions, build_datasets
from pause_megatron.data.windows.extension import LaterWindows

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("later")
    documents = paragraphs(60)
    write_corpus(folder / "one", documents[:40])
    write_corpus(folder / "two", documents[40:])
    return folder


def build(folder: Path, words: str, samples: int | None, before: int = 0, rate: float = 0.2):
    return build_datasets(
        DatasetOptions(
            [str(folder / word) if word.isalpha() else word for word in words.split()],
            split="9,1,0",
            sequence_length=LENGTH,
            tokenizer=ByteTokenizer(),
            pause=PauseSection(rate=rate),
            seed=5,
            train_samples=samples,
            valid_samples=6,
            cache=str(folder / "cache"),
            samples_before=before,
        )
    )


def same(one: Samples, other: Samples, numbers: range) -> bool:
    return all(np.array_equal(one[number][key], other[number][key]) for number in numbers for key in one[number])


@pytest.mark.parametrize("words", ["one", "0.7 one 0.3 two", "one two"])
def test_within_the_first_epoch_the_unread_windows_follow(folder, words):
    """No window is read twice, and no window of the finished run moves."""
    finished = build(folder, words, 40)
    extended = build(folder, words, 60, before=40)
    assert same(finished.train, extended.train, range(40))
    again = build(folder, words, 80, before=60)  # an extension of the extension
    assert same(extended.train, again.train, range(60))
    texts = Counter(bytes(again.train[number]["tokens"].numpy()) for number in range(80))
    assert max(texts.values()) == 1
    assert same(finished.valid, again.valid, range(6))
    assert same(finished.valid_without_pauses, again.valid_without_pauses, range(6))


@pytest.mark.parametrize("words", ["one", "0.7 one 0.3 two", "one two"])
def test_otherwise_another_epoch_follows_with_its_own_order_and_pauses(folder, words):
    one_reading = 40 if "0.7" in words else len(build(folder, words, None).train)
    finished = build(folder, words, one_reading)
    end = one_reading + (400 if "0.7" in words else 100)
    extended = build(folder, words, end, before=one_reading)
    assert isinstance(extended.train, LaterWindows) and len(extended.train) >= end
    with pytest.raises(IndexError, match=rf"window {one_reading - 1}: expected {one_reading} or more"):
        extended.train[one_reading - 1]
    added = [extended.train[number] for number in range(one_reading, end)]
    moved = sum(
        not torch.equal(sample["tokens"], finished.train[number]["tokens"])
        for number, sample in enumerate(added[:one_reading])
    )
    assert moved >= min(len(added), one_reading) - 2  # another order
    pauses = [frozenset(np.flatnonzero(each["tokens"].numpy() == ByteTokenizer.pause_id)) for each in added]
    before = {
        frozenset(np.flatnonzero(finished.train[number]["tokens"].numpy() == ByteTokenizer.pause_id))
        for number in range(one_reading)
    }
    assert len(before & set(pauses)) <= 1  # 12 places of 63: none comes twice by chance
    # As a resume inside the extension builds it; an extension of it has an order of its own again.
    assert same(extended.train, build(folder, words, end, before=one_reading).train, range(one_reading, end))
    later = build(folder, words, end + 60, before=end).train
    assert not same(later, LaterWindows(build(folder, words, 60).train, end), range(end, end + 60))
    assert same(finished.valid, extended.valid, range(6))


def test_another_epoch_reads_every_document_of_the_corpus(folder):
    whole = build(folder, "one", None, rate=0.0).train
    size = len(whole)
    anew = build(folder, "one", 2 * size, before=size, rate=0.0).train
    counts = [
        np.bincount(np.concatenate([windows[number]["tokens"].numpy() for number in numbers]), minlength=257)
        for windows, numbers in ((whole, range(size)), (anew, range(size, 2 * size)))
    ]
    # The last piece of a reading that fills no window differs.
    assert np.abs(counts[0] - counts[1]).sum() <= 2 * LENGTH
