"""collate against its definition."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from support.corpora import ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus
from torch.utils._python_dispatch import TorchDispatchMode

from pause_megatron.data.batches.batch import collate
from pause_megatron.data.windows.dataset import PauseGPTDataset

PAUSE = ByteTokenizer.pause_id


@pytest.fixture(scope="module", params=[0.0, 0.1, 0.4])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PauseGPTDataset:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "speeches", paragraphs(30))
    config = make_config(prefix, 48, embeddings=2, pause_rate=request.param, pause_window="trim")
    return make_dataset(prefix, config, 12)


@pytest.mark.parametrize("size", [1, 3])
def test_rows_are_those_of_the_sequence_first_flattening(dataset: PauseGPTDataset, size: int) -> None:
    samples = [dataset[number] for number in range(size)]
    batch = collate(samples, sample_ids=range(100, 100 + size), pause_ids=range(PAUSE, PAUSE + 2))
    rows, targets, after_pause, pauses = [], [], [], 0
    for position in range(48):
        for number, sample in enumerate(samples):
            pauses += sample["tokens"][position] >= PAUSE
            if sample["loss_mask"][position]:
                rows.append(position * size + number)
                targets.append(int(sample["labels"][position]))
                after_pause.append(bool(sample["tokens"][position] >= PAUSE))
    assert batch.target_rows.tolist() == rows == sorted(rows)
    assert batch.targets.tolist() == targets
    assert batch.after_pause.tolist() == after_pause
    assert batch.pause_tokens == pauses
    assert batch.sample_ids.tolist() == list(range(100, 100 + size))
    assert torch.equal(batch.tokens, torch.stack([sample["tokens"] for sample in samples]))
    assert torch.equal(batch.position_ids, torch.arange(48).expand(size, 48))
    assert {value.dtype for value in (batch.tokens, batch.position_ids, batch.target_rows, batch.targets)} == {
        torch.int64
    }
    assert batch.targets_count == len(targets)
    assert batch.raw_tokens == 48 * size
    assert batch.text_tokens == 48 * size - pauses


def test_rows_pick_the_supervised_hidden_states(dataset: PauseGPTDataset) -> None:
    """hidden[seq, batch, width].flatten(0, 1)[target_rows] are the states at the positions that carry loss."""
    samples = [dataset[number] for number in range(4)]
    batch = collate(samples, sample_ids=range(4), pause_ids=range(PAUSE, PAUSE + 2))
    hidden = batch.tokens.t().unsqueeze(2) * 1000 + batch.position_ids.t().unsqueeze(2)
    picked = hidden.flatten(0, 1)[batch.target_rows].squeeze(1)
    mask = torch.stack([sample["loss_mask"] for sample in samples]).bool()
    assert sorted(picked.tolist()) == sorted((batch.tokens * 1000 + batch.position_ids)[mask].tolist())


def test_a_micro_batch_without_targets(dataset: PauseGPTDataset) -> None:
    batch = collate([dataset[None], dataset[None]], sample_ids=[0, 0], pause_ids=range(PAUSE, PAUSE + 2))
    assert batch.targets_count == 0
    assert batch.target_rows.shape == batch.targets.shape == batch.after_pause.shape == (0,)


def test_to_keeps_everything(dataset: PauseGPTDataset) -> None:
    batch = collate([dataset[0]], sample_ids=[0], pause_ids=range(PAUSE, PAUSE + 2))
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.after_pause.device.type == "meta"
    assert moved.pause_tokens == batch.pause_tokens
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.pause_tokens = 3


@pytest.mark.parametrize("size", [1, 3])
def test_a_packed_micro_batch_is_one_buffer_and_moves_by_one_copy(dataset, size: int) -> None:
    samples = [{"dataset_id": np.int16(number), **dataset[number]} for number in range(size)]
    batch = collate(samples, sample_ids=range(size), pause_ids=range(PAUSE, PAUSE + 2))
    segments = torch.zeros(size, 48, dtype=torch.int32)
    packed = dataclasses.replace(batch, segments=segments).packed(pinned=False)
    assert packed.segments is segments
    moved = packed.to("meta")
    tensors = [field.name for field in dataclasses.fields(batch) if torch.is_tensor(getattr(batch, field.name))]
    assert len(tensors) == 7
    for name in tensors:
        before, inside, there = (getattr(each, name) for each in (batch, packed, moved))
        assert torch.equal(before, inside) and inside.dtype == before.dtype and inside.is_contiguous(), name
        assert inside.data_ptr() % 64 == 0, name
        assert inside.untyped_storage().data_ptr() == packed.tokens.untyped_storage().data_ptr(), name
        assert (there.shape, there.dtype, there.device.type) == (before.shape, before.dtype, "meta"), name
    assert len(copies(lambda: packed.to("meta"))) == 1
    assert len(copies(lambda: batch.to("meta"))) == 7
    assert packed.to("cpu") is packed


def test_views_of_a_moved_buffer_show_its_values(dataset) -> None:
    """Between two dtypes of one host the copy is made, which the same device would save."""
    batch = collate([dataset[0]], sample_ids=[5], pause_ids=range(PAUSE, PAUSE + 2)).packed(pinned=False)
    with mock.patch.object(torch, "device", lambda *_: None):
        moved = batch.to("cpu")
    assert moved is not batch
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(before, after) if torch.is_tensor(before) else before == after


def copies(function) -> list[str]:
    seen: list[str] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.overloadpacket.__name__ == "_to_copy":
                seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    with Copies():
        function()
    return seen


def test_batches_of_gpt_dataset_need_no_pauses(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "speeches", paragraphs(3))
    dataset = make_dataset(prefix, make_config(prefix, 16, pause_rate=0.0), 2)
    batch = collate([dataset[0], dataset[1]], sample_ids=[0, 1], pause_ids=range(PAUSE, PAUSE + 1))
    assert batch.target_rows.tolist() == list(range(32))
    assert batch.pause_tokens == 0


def test_each_target_of_a_blend_has_its_corpus(dataset: PauseGPTDataset) -> None:
    samples = [{"dataset_id": np.int16(7 - number), **dataset[number]} for number in range(3)]
    batch = collate(samples, sample_ids=range(3), pause_ids=range(PAUSE, PAUSE + 2))
    assert batch.dataset_ids.tolist() == [7, 6, 5]
    assert batch.target_datasets.tolist() == [7 - row % 3 for row in batch.target_rows.tolist()]
    assert collate([dataset[0]], sample_ids=[0], pause_ids=range(PAUSE, PAUSE + 2)).target_datasets is None
