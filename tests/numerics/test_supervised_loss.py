"""Packed = padded = one at a time, in loss and gradients, for examples with pauses; M = 0 is ordinary training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.prose import train_model
from support.ranks import run_on_ranks
from support.tiny_model import distance, section, take_gradients

from pause_megatron.config.schema import ParallelSection
from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.data.supervised.examples import Arrangement, encode_examples
from pause_megatron.data.supervised.windows import SupervisedWindows
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.tasks import load_task, read_examples

LENGTH = 320
PAUSES = range(600, 602)
# What is asked of finetuning: pauses, location, prefix attention.
KINDS = [
    (range(1), "append", "causal"),
    (range(10, 11), "append", "causal"),
    (range(10, 11), "append", "bidirectional"),
    (range(8), "prepend", "bidirectional"),
    (range(8), "prepend", "causal"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(train_model(tmp_path_factory.mktemp("tokenizer") / "t.model"))


def task_windows(tokenizer: str, data: str, kind: tuple) -> SupervisedWindows:
    """Short answers to questions, some of them with their prompts cut."""
    examples = read_examples(load_task("commonsense_qa"), "train", f"{data}/commonsense_qa", 6)
    pauses, location, attention = kind
    arrangement = Arrangement(LENGTH, pauses, PAUSES, location=location, prefix_attention=attention)
    return SupervisedWindows(encode_examples(examples, load_tokenizer(tokenizer)), arrangement, seed=3, task="csqa")


def model_of_600():
    from pause_megatron.model import Vocabulary, build_model

    vocabulary = Vocabulary(600, tuple(PAUSES))
    return build_model(section(), vocabulary=vocabulary, sequence_length=LENGTH, parallel=ParallelSection(), seed=5)


def batch_of(data: SupervisedWindows, numbers: list[int]) -> MicroBatch:
    return collate([data[number] for number in numbers], sample_ids=numbers, pause_ids=PAUSES)


def total(model, batches: list[MicroBatch]) -> tuple[list[float], dict, int]:
    """Token losses in ascending order, gradients of their sum, and how many windows were masked."""
    from pause_megatron.train.losses import lm_loss

    losses: list[float] = []
    for batch in batches:
        output = lm_loss(model, batch, 1.0)
        output.loss.backward()
        losses += output.token_losses.tolist()
    return sorted(losses), take_gradients(model), sum(batch.segments is not None for batch in batches)


def ways_apart(tokenizer: str, data: str, kind: tuple) -> list[tuple[float, float, int]]:
    """Packed and padded against one at a time: losses and gradients (relative), masked micro-batches."""
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection(), device="cpu"):
        model = model_of_600()
        packed = task_windows(tokenizer, data, kind)
        padded = SupervisedWindows(packed.examples, replace(packed.arrangement, batching="padded"), seed=3, task="csqa")
        assert max(map(len, packed.epoch(0).windows)) > 1
        expected, gradients, _ = total(model, [batch_of(padded, [n]) for n in range(6)])
        found = []
        for of_way, count in ((packed, packed.windows_in_epochs(1)), (padded, 6)):
            losses, theirs, masked = total(model, [batch_of(of_way, list(range(count)))])
            assert len(losses) == len(expected)
            apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
            found.append((apart, distance(theirs, gradients), masked))
        return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].start}-{kind[0].stop - 1}-{kind[1]}-{kind[2]}")
def test_packed_is_padded_is_one_at_a_time(tokenizer, task_records, kind):
    packed, padded = run_on_ranks(1, ways_apart, tokenizer, str(task_records), kind)[0]
    for apart, moved, _ in (packed, padded):
        assert apart < 1e-6 and moved < 1e-6
    assert packed[2] == 1 and padded[2] == (kind[2] == "bidirectional")


def against_plain_torch(tokenizer: str, data: str) -> tuple[float, float]:
    """M = 0, causal: the loss, and its gradient with respect to all weights, against cross-entropy on plain text."""
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection(), device="cpu"):
        model = model_of_600()
        windows = task_windows(tokenizer, data, (range(1), "append", "causal"))
        found, gradients, _ = total(model, [batch_of(windows, list(range(windows.windows_in_epochs(1))))])
        expected = []
        for _, prompt, target, *_ in windows.examples:
            text = torch.tensor([*prompt, *target], dtype=torch.int64)
            logits = model.logits(text[None, :-1], torch.arange(len(text) - 1)[None])[0]
            losses = F.cross_entropy(logits[prompt.size - 1 :], text[prompt.size :], reduction="none")
            losses.sum().backward()
            expected += losses.tolist()
        apart = max(abs(a / b - 1) for a, b in zip(found, sorted(expected), strict=True))
        return apart, distance(take_gradients(model), gradients)


def test_without_pauses_it_is_ordinary_supervised_training(tokenizer, task_records):
    apart, moved = run_on_ranks(1, against_plain_torch, tokenizer, str(task_records))[0]
    assert apart < 1e-6 and moved < 1e-6


def leaks(tokenizer: str, data: str, kind: tuple) -> tuple[int, int]:
    """One packed example gets other tokens: how many of its neighbours' losses, and of its own, keep every bit."""
    from pause_megatron.distributed import initialize
    from pause_megatron.train.losses import lm_loss

    with initialize(ParallelSection(), device="cpu"), torch.no_grad():
        model = model_of_600()
        batch = batch_of(task_windows(tokenizer, data, kind), [0])
        where = batch.segments[0]
        mine = (where == 0) & (batch.tokens[0] < 600)
        other = batch.tokens.clone()
        other[0, mine] = (other[0, mine] + 1) % 600
        before, after = (lm_loss(model, each, 1.0).token_losses for each in (batch, replace(batch, tokens=other)))
        own = where[batch.target_rows] == 0
        assert own.any() and not own.all()
        same = before == after
        return int((~same & ~own).sum()), int((same & own).sum())


@pytest.mark.parametrize("kind", KINDS[1:4], ids=lambda kind: f"{kind[1]}-{kind[2]}")
def test_an_example_does_not_reach_its_neighbours(tokenizer, task_records, kind):
    assert run_on_ranks(1, leaks, tokenizer, str(task_records), kind)[0] == (0, 0)
