"""The loader gives what direct reads give, in order, and ends cleanly."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch
from support.corpora import ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus

from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.data.batches.loader import StepLoader
from pause_megatron.data.batches.sampler import StepSampler
from pause_megatron.data.windows.dataset import PauseGPTDataset
from pause_megatron.errors import ConfigError

PAUSE_IDS = range(ByteTokenizer.pause_id, ByteTokenizer.pause_id + 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PauseGPTDataset:
    prefix = write_corpus(tmp_path_factory.mktemp("corpus") / "speeches", paragraphs(30))
    return make_dataset(prefix, make_config(prefix, 32, pause_rate=0.2, pause_window="trim"), 96)


class Recorder:
    """A dataset that records which samples are read, and fails at one."""

    def __init__(self, dataset: PauseGPTDataset, bad: int | None = None) -> None:
        self.dataset, self.bad, self.read = dataset, bad, []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        if idx == self.bad:
            raise OSError("the disk went away")
        self.read.append(idx)
        return self.dataset[idx]


def assert_equal(left: MicroBatch, right: MicroBatch) -> None:
    for field in dataclasses.fields(MicroBatch):
        mine, theirs = getattr(left, field.name), getattr(right, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "step-loader"]


@pytest.mark.parametrize("prefetch", [0, 1, 3, 50])
@pytest.mark.parametrize("ranks", [1, 2])
def test_loader_is_direct_reads(dataset: PauseGPTDataset, prefetch: int, ranks: int) -> None:
    for rank in range(ranks):
        sampler = StepSampler(8, 2, rank, ranks)
        with StepLoader(dataset, sampler, 3, 12, prefetch, pause_ids=PAUSE_IDS) as loader:
            steps = list(loader)
        assert [step for step, _ in steps] == list(range(3, 12))
        for step, batches in steps:
            expected = [
                collate([dataset[number] for number in numbers], sample_ids=numbers, pause_ids=PAUSE_IDS)
                for numbers in sampler.indices(step)
            ]
            assert len(batches) == len(expected)
            for left, right in zip(batches, expected, strict=True):
                assert_equal(left, right)
    assert not threads()


def test_for_a_gpu_each_micro_batch_is_one_pinned_buffer(dataset, monkeypatch) -> None:
    """Page-locked memory needs a GPU: here ordinary memory stands in for it."""
    pinned, places, empty = [], [], torch.empty

    def pinning(*size, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", pinning)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: places.append((device, threading.current_thread())))
    gpu, sampler = torch.device("cuda", 3), StepSampler(8, 4)
    with StepLoader(dataset, sampler, 0, 3, pause_ids=PAUSE_IDS, device=gpu) as loader:
        steps = list(loader)
    assert pinned == [True] * 6
    assert [(device, thread.name) for device, thread in places] == [(gpu, "step-loader")]
    with StepLoader(dataset, sampler, 0, 3, pause_ids=PAUSE_IDS, device=torch.device("cpu")) as loader:
        for (_, left), (_, right) in zip(steps, loader, strict=True):
            for packed, plain in zip(left, right, strict=True):
                assert_equal(packed, plain)
                assert len({t.untyped_storage().data_ptr() for t in packed.device_tensors().values()}) == 1
    assert len(pinned) == 6


def test_topologies_read_the_same_samples(dataset: PauseGPTDataset) -> None:
    """One rank or four, one window at a time or four: the same windows, with the same pauses, in each step."""

    def windows(micro: int, ranks: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for rank in range(ranks):
            with StepLoader(dataset, StepSampler(16, micro, rank, ranks), 1, 4, pause_ids=PAUSE_IDS) as loader:
                for _, batches in loader:
                    for batch in batches:
                        found.update(zip(batch.sample_ids.tolist(), batch.tokens.tolist(), strict=True))
        return found

    whole = windows(16, 1)
    assert sorted(whole) == list(range(16, 64))
    assert all(windows(micro, ranks) == whole for micro, ranks in [(1, 1), (4, 1), (1, 4), (4, 4), (2, 2)])


def test_a_resumed_loader_gives_the_steps_of_an_uninterrupted_one(dataset: PauseGPTDataset) -> None:
    sampler = StepSampler(8, 4)
    with StepLoader(dataset, sampler, 0, 10, pause_ids=PAUSE_IDS) as loader:
        uninterrupted = list(loader)[6:]
    with StepLoader(dataset, sampler, 6, 10, pause_ids=PAUSE_IDS) as loader:
        resumed = list(loader)
    for (step, left), (other_step, right) in zip(resumed, uninterrupted, strict=True):
        assert step == other_step
        for mine, theirs in zip(left, right, strict=True):
            assert_equal(mine, theirs)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_thread_are_raised_by_next(dataset: PauseGPTDataset, prefetch: int) -> None:
    with StepLoader(Recorder(dataset, bad=17), StepSampler(4, 2), 0, 10, prefetch, pause_ids=PAUSE_IDS) as loader:
        assert [next(loader)[0] for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(OSError, match="the disk went away"):
            next(loader)
    assert not threads()
    assert list(loader) == []


def test_closing_early_stops_the_thread(dataset: PauseGPTDataset) -> None:
    recorder = Recorder(dataset)
    loader = StepLoader(recorder, StepSampler(4, 2), 0, 20, 2, pause_ids=PAUSE_IDS)
    next(loader)
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 5
    assert not threads()
    assert len(recorder.read) <= 4 * 5  # one taken, two waiting, one in the thread's hand, one being read
    assert list(loader) == []


def test_the_loader_prefetches_no_more_steps_than_given(dataset: PauseGPTDataset) -> None:
    recorder = Recorder(dataset)
    with StepLoader(recorder, StepSampler(4, 4), 0, 20, 2, pause_ids=PAUSE_IDS):
        deadline = time.monotonic() + 5
        while len(recorder.read) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert recorder.read == list(range(12))  # two wait in the queue, a third in the thread's hand


@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_steps(dataset: PauseGPTDataset, prefetch: int) -> None:
    with StepLoader(dataset, StepSampler(4, 4), 5, 5, prefetch, pause_ids=PAUSE_IDS) as loader:
        assert list(loader) == []


def test_a_dataset_that_is_too_short(dataset: PauseGPTDataset) -> None:
    message = rf"dataset of 400 samples or more for 100 steps of .*size=4, got one of {len(dataset)}"
    with pytest.raises(ConfigError, match=message):
        StepLoader(dataset, StepSampler(4, 4), 0, 100, pause_ids=PAUSE_IDS)
