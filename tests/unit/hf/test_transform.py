"""Blocks with pauses: unchanged text, longer rows, and positions that depend only on the row number."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from support.corpora import paragraphs
from support.tiny_llama import llama

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.hf.transform import PauseTransform, pad_batch

PAUSES = range(257, 258)


def _blocks(length: int, count: int = 12) -> list[dict[str, list[int]]]:
    text = np.concatenate(paragraphs(40))[: length * count]
    return [{"input_ids": block.tolist()} for block in text.reshape(count, length)]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("window", ["exact", "trim"])
def test_text_stays_in_order_and_is_predicted_once(rate, window):
    transform = PauseTransform(PAUSES, rate=rate, window=window)
    for length in (2, 3, 17, 64, 100):
        for number, block in enumerate(_blocks(length, 3)):
            made = {name: np.array(values) for name, values in transform(block, number).items()}
            ids, labels, is_text = made["input_ids"], made["labels"], made["input_ids"] != PAUSES.start
            kept = ids[is_text]
            assert kept.tolist() == block["input_ids"][: kept.size]
            assert is_text[0] and (labels[~is_text] == -100).all() and labels[0] == -100
            assert labels[1:][is_text[1:]].tolist() == kept[1:].tolist()
            assert made["attention_mask"].tolist() == [1] * ids.size
            if window == "exact":
                assert kept.size == length == transform.text_length(ids.size)
                assert (~is_text).sum() == round(rate * (ids.size - 1))
            else:
                assert ids.size == length == transform.text_length(length)


@pytest.mark.parametrize("run", [1, 3])
def test_runs_patterns_and_every(run):
    tokenizer = Bytes()
    blocks = _blocks(40, 3)
    commas = PauseTransform(PAUSES, rate=0.2, placement="after", run=run, pattern="[ae]", tokenizer=tokenizer)
    every = PauseTransform(PAUSES, placement="every", run=run)
    assert Hasher.hash(commas) == Hasher.hash(commas)
    for number, block in enumerate(blocks):
        ids = np.array(commas(block, number)["input_ids"])
        before = ids[:-1][(ids[1:] == PAUSES.start) & (ids[:-1] != PAUSES.start)]
        assert before.size and set(before) <= {ord("a"), ord("e")}
        ids = np.array(every(block, number)["input_ids"])
        assert ids[:: run + 1].tolist() == block["input_ids"] and ids.size == 39 * (run + 1) + 1
    for placement, message in (("scored", "no side array"), ("before", "a tokenizer")):
        with pytest.raises(ConfigError, match=f"PauseTransform: expected .*{message}.*got placement='{placement}'"):
            PauseTransform(PAUSES, placement=placement)


class Bytes:
    vocab_size = 256

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_positions_depend_only_on_seed_names_and_number():
    block = _blocks(64)[0]
    made = [
        PauseTransform(PAUSES, **settings)(block, number)["input_ids"]
        for settings in ({}, {"seed": 5}, {"dataset": "b"}, {"split": "valid"})
        for number in (0, 1)
    ]
    assert len(set(map(tuple, made))) == 8
    assert PauseTransform(PAUSES)(block, 1)["input_ids"] == made[1]


def test_datasets_gives_each_row_its_number_in_memory_and_streamed():
    blocks = _blocks(32)
    transform = PauseTransform(PAUSES, rate=0.2)
    expected = [transform(block, number) for number, block in enumerate(blocks)]
    before = Hasher.hash(transform)  # the key of what `map` keeps on disk
    rows = datasets.Dataset.from_list(blocks)
    assert rows.map(transform, with_indices=True).to_list() == expected
    assert list(rows.to_iterable_dataset(num_shards=3).map(transform, with_indices=True)) == expected
    assert Hasher.hash(transform) == before == Hasher.hash(PauseTransform(PAUSES, rate=0.2))
    assert Hasher.hash(PauseTransform(PAUSES, rate=0.2, seed=1)) != before


def test_labels_of_ones_own_go_with_their_tokens_and_padding_goes():
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    labels = [-100, -100, -100, 8, 9, 10, 11, 12]
    block = {"input_ids": [0, 0, *ids, 0], "labels": [3, -100, *labels, -100], "attention_mask": [0, 0, *[1] * 8, 0]}
    made = PauseTransform(PAUSES, rate=0.5)(block, 0)
    pairs = [pair for pair in zip(made["input_ids"], made["labels"], strict=True) if pair[0] not in PAUSES]
    assert pairs == list(zip(ids, labels, strict=True)) and len(made["input_ids"]) == 14


def test_a_padded_batch_has_the_losses_of_its_samples():
    model, transform = llama(258), PauseTransform(PAUSES, rate=0.3)
    samples = [transform(_blocks(length)[number], number) for number, length in enumerate((7, 30, 12))]
    batch = pad_batch(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, 42)
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    count = torch.tensor([(torch.tensor(sample["labels"]) != -100).sum() for sample in samples])
    alone = [
        model(**{name: torch.tensor([sample[name]]) for name in ("input_ids", "labels")}).loss for sample in samples
    ]
    torch.testing.assert_close(model(**batch).loss, (torch.stack(alone) * count).sum() / count.sum())


def test_what_cannot_get_pauses_is_named():
    transform = PauseTransform(PAUSES)
    with pytest.raises(DataError, match=r"block 3: expected text only, got the pause id 257.*split_special_tokens"):
        transform({"input_ids": [1, 257, 2]}, 3)
    with pytest.raises(DataError, match=r"block 4: expected 2 tokens or more.*got 1"):
        transform({"input_ids": [1, 0], "attention_mask": [1, 0]}, 4)
    with pytest.raises(DataError, match=r"block 5: column 'token_type_ids': .*remove_columns"):
        transform({"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 0]}, 5)
    assert transform({"input_ids": [1, 2, 3], "text": "abc"}, 5)["input_ids"]
    for settings, message in (
        ({"rate": 1.0}, r"pause\.rate"),
        ({"window": "cut"}, r"pause\.window"),
        ({"placement": "unifrom"}, r"pause\.placement"),
        ({"placement": "bernoulli"}, "bernoulli"),
    ):
        with pytest.raises(ConfigError, match=message):
            PauseTransform(PAUSES, **settings)


def test_workers_that_share_a_stream_are_refused(tmp_path):
    """Each would count its part from 0; one worker counts as none does."""
    for shard in range(2):
        datasets.Dataset.from_list(_blocks(32, 4)).to_json(tmp_path / f"{shard}.jsonl")
    stream = datasets.load_dataset("json", data_files=str(tmp_path / "*.jsonl"), split="train", streaming=True)
    mapped = stream.map(PauseTransform(PAUSES, rate=0.2), with_indices=True).with_format("torch")

    def read(workers: int) -> list[list[int]]:
        loader = torch.utils.data.DataLoader(mapped, batch_size=None, num_workers=workers)
        return [block["input_ids"].tolist() for block in loader]

    assert read(1) == read(0) and len(read(0)) == 8
    with pytest.raises(ConfigError, match="one worker to read a stream, got num_workers=2"):
        read(2)


def test_a_batch_and_columns_of_other_lengths_are_named():
    rows = datasets.Dataset.from_list(_blocks(32))
    with pytest.raises(ConfigError, match="expected one block and its number, got a list of numbers"):
        rows.map(PauseTransform(PAUSES), with_indices=True, batched=True)
    block = {"input_ids": [1, 2, 3], "labels": [1, 2]}
    with pytest.raises(DataError, match=r"block 7: column 'labels': expected 3 values, as input_ids has, got \(2,\)"):
        PauseTransform(PAUSES)(block, 7)
    with pytest.raises(DataError, match="block 7: expected text only, got the pause id 257"):
        PauseTransform(PAUSES)({"input_ids": [1, 2, 3], "labels": [1, 257, 3]}, 7)
