"""Task examples in windows: ids, pauses, targets, truncation, drawing, packing."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.prose import train_hugging_face, train_model

from pause_megatron.data.batches.batch import collate
from pause_megatron.data.supervised.examples import (
    Arrangement,
    EncodedExample,
    Prompting,
    continuations,
    encode_examples,
)
from pause_megatron.data.supervised.packing import pack
from pause_megatron.data.supervised.windows import SupervisedWindows, summarize
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import Example, load_task, read_examples

PAUSES = range(600, 602)  # K = 2


def with_bos(folder: Path) -> Path:
    """A byte-level tokenizer that puts a BOS before texts, as Llama 3's does."""
    train_hugging_face(folder, special=("</s>", "<s>"))
    document = json.loads((folder / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [_id_of(document, "<s>")], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def _id_of(document: dict, name: str) -> int:
    return next(token["id"] for token in document["added_tokens"] if token["content"] == name)


@pytest.fixture(scope="module", params=["sentencepiece", "bos"])
def tokenizer_path(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    return str(train_model(folder / "t.model") if request.param == "sentencepiece" else with_bos(folder / "bos"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(train_model(tmp_path_factory.mktemp("tokenizer") / "t.model"))


@pytest.fixture(scope="module")
def examples(task_records, sentencepiece) -> list[EncodedExample]:
    """200 examples of several tasks, of 20 to 700 tokens, those of one task far from each other."""
    kinds = itertools.product(("gsm8k", "commonsense_qa", "squad", "coqa", "natural_questions"), ("train", "eval"))
    tasks = ((load_task(name), split) for name, split in kinds)
    found = [each for task, split in tasks for each in read_examples(task, split, str(task_records / task.folder))]
    return encode_examples(random.Random(5).sample(found, 200), sentencepiece)


def arranged(**changes: object) -> Arrangement:
    return replace(Arrangement(1024, range(10, 11), PAUSES), **changes)


def windows(examples: list[EncodedExample], **changes: object) -> SupervisedWindows:
    return SupervisedWindows(examples, arranged(**changes), seed=7, task="several")


@pytest.mark.parametrize("task", ["gsm8k", "squad", "hellaswag"])
def test_ids_are_those_of_inference_with_the_exported_tokenizer(task_records, tmp_path, tokenizer_path, task):
    from transformers import AutoTokenizer

    from pause_megatron.hf.tokenizer import convert_tokenizer
    from pause_megatron.hf.tokenizer_files import write_tokenizer
    from pause_megatron.inference import PauseInfo
    from pause_megatron.inference.prompts import PromptEncoder

    native = load_tokenizer(tokenizer_path)
    native.save(tmp_path / "native")
    pause_ids = range(native.pause_id, native.pause_id + 2)
    (tmp_path / "hf").mkdir()
    made = convert_tokenizer(tmp_path / "native", native, pause_ids)
    write_tokenizer(tmp_path / "hf", made, {}, sequence_length=1024, plain=True)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(tmp_path / "hf"), PauseInfo(pause_ids))
    assert encoder.leading == native.leading and bool(native.leading) == tokenizer_path.endswith("bos")

    split = "eval" if task == "hellaswag" else "train"
    examples = read_examples(load_task(task), split, str(task_records / task), 150)
    encoded = encode_examples(examples, native)
    for example, (name, prompt, target, *_) in zip(examples, encoded, strict=True):
        assert name == example.id
        assert prompt.tolist() == encoder.encode(example.prompt)
        assert target.tolist() == [*encoder.encode_continuation(example.target), native.eod]
    for location in ("append", "prepend"):
        arrangement = Arrangement(2048, range(3, 4), pause_ids, location=location, leading=len(native.leading))
        whole, marked = arrangement.arrange(encoded[0], 3)
        assert whole[:marked].tolist() == encoder.with_pauses(encoder.encode(examples[0].prompt), 3, location)
    assert continuations(native).filler_id(".") == encoder.filler_id(".")


@pytest.mark.parametrize("location", ["append", "prepend"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_loss_is_on_the_target_only_from_the_last_prefix_token_on(examples, location, count):
    dataset = windows(examples[:5], pauses=range(count, count + 1), location=location, batching="padded")
    seen = set()
    for number in range(5):
        (item,) = dataset.epoch(0).windows[number]
        _, prompt, target, *_ = examples[item]
        sample = {name: value.numpy() for name, value in dataset[number].items()}
        length, first = prompt.size + count + target.size - 1, prompt.size + count - 1
        assert np.flatnonzero(sample["loss_mask"]).tolist() == list(range(first, length))
        assert sample["labels"][first:length].tolist() == target.tolist()
        inputs = sample["tokens"][:length]
        run = [PAUSES[i % 2] for i in range(count)]
        prefix = [*prompt, *run] if location == "append" else [*run, *prompt]
        assert inputs.tolist() == [*prefix, *target[:-1]]
        if count and location == "append":
            assert inputs[first] in PAUSES  # the first target is read from the last pause
        assert not np.isin(sample["labels"], PAUSES).any()
        assert sample["position_ids"][:length].tolist() == list(range(length))
        assert (sample["segments"] == 0).sum() == length and (sample["segments"][length:] == -1).all()
        seen.add(item)
    assert seen == set(range(5))


def test_labels_of_the_prefix_are_ignored(examples):
    sample = windows(examples)[0]
    other = dict(sample)
    other["labels"] = torch.where(sample["loss_mask"] > 0, sample["labels"], 17)
    one, two = (collate([s], sample_ids=[0], pause_ids=PAUSES) for s in (sample, other))
    assert torch.equal(one.targets, two.targets) and torch.equal(one.target_rows, two.target_rows)
    assert one.targets_count == int(sample["loss_mask"].sum())
    assert one.pause_tokens == int((sample["tokens"] >= 600).sum()) == 10 * int(sample["segments"].max() + 1)


def test_a_bidirectional_prefix_is_prompt_and_pauses(examples):
    sample = windows(examples, prefix_attention="bidirectional")[0]
    for segment in range(int(sample["segments"].max()) + 1):
        places = (sample["segments"] == segment).nonzero().squeeze(1)
        inside, learned = sample["prefix"][places], sample["loss_mask"][places] > 0
        assert int(inside.sum() + learned.sum()) == len(places) + 1  # they share the prefix's last token
        assert not inside[int(inside.sum()) :].any() and inside[0]
    assert not sample["prefix"][sample["segments"] < 0].any()
    assert "prefix" not in windows(examples)[0]


def test_a_long_prompt_is_cut_on_the_left_and_nothing_else_is():
    example = EncodedExample("x", np.arange(1, 31, dtype=np.int32), np.array([50, 51, 52], dtype=np.int32))
    for location in ("append", "prepend"):
        arrangement = arranged(sequence_length=16, pauses=range(4, 5), location=location, leading=1)
        whole, marked = arrangement.arrange(example, 4)
        assert arrangement.length(example, 4) == 16 == whole.size - 1
        text = [token for token in whole[:marked].tolist() if token not in PAUSES]
        assert text == [1, *range(22, 31)]  # the BOS stays
        assert whole[marked:].tolist() == [50, 51, 52] and marked == 4 + len(text)


@pytest.mark.parametrize(("size", "pauses", "fits"), [(16, 13, True), (16, 14, False), (15, 13, False)])
def test_pauses_and_target_are_never_cut(size, pauses, fits):
    example = EncodedExample("train 4", np.arange(9, dtype=np.int32), np.arange(3, dtype=np.int32))
    arrangement = arranged(sequence_length=size, pauses=range(pauses + 1))
    if fits:
        SupervisedWindows([example], arrangement, seed=0, task="t")
        return
    with pytest.raises(
        DataError, match=rf"example train 4: expected at most \d target tokens beside {pauses} pauses .* got 3\."
    ):
        SupervisedWindows([example], arrangement, seed=0, task="t")


def test_bad_examples_are_named(sentencepiece):
    empty = EncodedExample("e 1", np.zeros(0, dtype=np.int32), np.arange(3, dtype=np.int32))
    arranged(pauses=range(1, 2)).check(empty)
    with pytest.raises(DataError, match=r"example e 1: expected a prompt, or pauses .*, got an empty prompt without"):
        arranged(pauses=range(2)).check(empty)
    with pytest.raises(DataError, match="examples: expected at least one, got none"):
        encode_examples([], sentencepiece)
    bad = Example(id="7", prompt="a", target=" b\ud800", references=("b",))
    with pytest.raises(DataError, match="example 7: target: "):
        encode_examples([bad], sentencepiece)
    with pytest.raises(ConfigError, match="expected the text of one token"):
        continuations(sentencepiece).filler_id("two words")


@pytest.mark.parametrize(("name", "value"), [("location", "behind"), ("prefix_attention", "both")])
def test_prompting_names_what_does_not_exist(name, value):
    assert replace(Prompting(), location="prepend", filler=".").prefix_attention == "causal"
    with pytest.raises(ConfigError, match=rf"{name}: expected one of (append|causal), .*, got '{value}'"):
        Prompting(**{name: value})


def test_pauses_are_drawn_by_address(examples):
    drawn = windows(examples, pauses=range(51))
    first = drawn.epoch(0).counts
    assert (first.min(), first.max()) == (0, 50) and abs(first.mean() - 25) < 4
    assert (first[:20] == windows(examples[:20], pauses=range(51)).epoch(0).counts).all()
    others = (drawn.epoch(1).counts, SupervisedWindows(examples, arranged(pauses=range(51)), seed=7, task="t").epoch(0))
    assert (others[0] != first).any() and (others[1].counts != first).any()
    assert (windows(examples, pauses=range(51), batching="padded").epoch(0).counts == first).all()


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_every_epoch_has_every_example_once_and_windows_have_an_address(examples, batching):
    dataset = windows(examples, pauses=range(51), batching=batching)
    ends = [dataset.windows_in_epochs(epochs) for epochs in (1, 2, 3)]
    for epoch in range(3):
        made, counts, _ = dataset.epoch(epoch)
        assert sorted(item for items in made for item in items) == list(range(200))
        for items in made:
            assert sum(dataset.arrangement.length(examples[item], int(counts[item])) for item in items) <= 1024
    assert dataset.epoch(0).windows != dataset.epoch(1).windows
    wanted = [0, ends[0] - 1, ends[0], ends[1] + 3, ends[2] - 1]
    before = {number: dataset[number]["tokens"] for number in wanted}
    fresh = windows(examples, pauses=range(51), batching=batching)
    for number in reversed(wanted):  # windows can be read in any order
        assert torch.equal(fresh[number]["tokens"], before[number])
    assert dataset.locate(ends[0]) == (1, 0)
    assert dataset.windows_in_epochs(1.5) == ends[0] + -(-(ends[1] - ends[0]) // 2)


def test_packing_fills_windows(examples):
    facts = summarize(windows(examples))
    assert facts.padding < 0.1 and facts.windows < 100 and facts.pauses == 2000 and facts.truncated == 0
    assert facts.targets == sum(example.target.size for example in examples)
    generator = np.random.default_rng(0)
    for room in (10, 64):
        lengths = generator.integers(1, room + 1, 300).tolist()
        made = pack(lengths, room)
        assert sorted(item for items in made for item in items) == list(range(300))
        assert all(sum(lengths[item] for item in items) <= room for items in made)
    assert pack([5, 5, 4, 6], 10) == [[0, 1], [2, 3]] and pack([], 10) == []
