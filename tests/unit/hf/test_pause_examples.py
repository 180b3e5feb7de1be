"""Examples for a transformers model: those of `finetune`, in its order, and their loss."""

from __future__ import annotations

import pickle

import pytest
import torch
from support.tiny_llama import llama, sentencepiece_tokenizer
from transformers import ByT5Tokenizer

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.hf.examples import PauseExamples
from pause_megatron.hf.transform import pad_batch

PAIRS = [
    ("Question: who was the first president of the United States? Answer:", " George Washington"),
    ("Question: in which year did the war end? Answer:", " 1865"),
    ("Spell <pause>:", " <pause>"),
]
PAUSE = 600


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("examples"), bos=True)


def _examples(tokenizer, length: int = 96, **settings) -> PauseExamples:
    return PauseExamples(PAIRS, tokenizer, length, pause_ids=range(PAUSE, PAUSE + 1), **settings)


def test_pauses_stand_between_prompt_and_target_which_is_learned(tokenizer):
    examples = _examples(tokenizer, pauses=4)
    assert len(examples) == 3
    seen = set()
    for sample in examples:
        ids, labels = sample["input_ids"], sample["labels"]
        places = (ids == PAUSE).nonzero().flatten().tolist()
        assert len(places) == 4 == places[-1] - places[0] + 1
        first = places[-1] + 1
        assert (labels[:first] == -100).all() and torch.equal(labels[first:], ids[first:])
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        prompt = tokenizer.decode(ids[1 : places[0]], skip_special_tokens=False)
        target = tokenizer.decode(ids[: places[0]].tolist() + ids[first:-1].tolist(), skip_special_tokens=True)
        seen.add((prompt, target[len(prompt) :]))
    assert seen == set(PAIRS)


def test_it_is_what_finetune_trains_on(tokenizer):
    """Shifted by the model, the labels are the targets of SupervisedWindows."""
    examples = _examples(tokenizer, pauses="0..6", epochs=2)
    windows = examples.windows
    for number in range(len(examples)):
        sample, native = examples[number], windows[number]
        size = sample["input_ids"].numel() - 1
        assert torch.equal(sample["input_ids"][:-1], native["tokens"][:size])
        supervised = native["loss_mask"][:size] == 1
        assert torch.equal(sample["labels"][1:] != -100, supervised) and not native["loss_mask"][size:].any()
        assert torch.equal(sample["labels"][1:][supervised], native["labels"][:size][supervised])


def test_the_loss_is_that_of_each_target_after_its_prefix(tokenizer):
    examples, model = _examples(tokenizer, pauses=3), llama(601)
    terms = []
    for sample in examples:
        log_softmax = model(sample["input_ids"][None]).logits[0].log_softmax(-1)
        first = int((sample["input_ids"] == PAUSE).nonzero()[-1]) + 1  # read from the last pause
        terms += [-log_softmax[k - 1, sample["input_ids"][k]] for k in range(first, sample["input_ids"].numel())]
    torch.testing.assert_close(model(**pad_batch(list(examples))).loss, torch.stack(terms).mean())


def test_every_epoch_has_each_example_once_with_pauses_of_its_own(tokenizer):
    examples = _examples(tokenizer, pauses="0..30", epochs=4)
    assert len(examples) == 12
    texts = [tuple(sample["input_ids"][sample["input_ids"] != PAUSE].tolist()) for sample in examples]
    for epoch in range(4):
        assert len(set(texts[3 * epoch : 3 * epoch + 3])) == 3
    counts = [int((sample["input_ids"] == PAUSE).sum()) for sample in examples]
    assert len(set(counts)) > 4 and max(counts) <= 30
    again = _examples(tokenizer, pauses="0..30", epochs=4)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(examples, again, strict=True))


def test_prompts_are_cut_on_the_left_and_targets_never(tokenizer):
    whole, cut = list(_examples(tokenizer, pauses=4)), list(_examples(tokenizer, 32, pauses=4))
    assert max(sample["input_ids"].numel() for sample in cut) == 32
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one["labels"][-10:], other["labels"][-10:]) and one["input_ids"][0] == other["input_ids"][0]


def test_prepended_pauses_and_fillers(tokenizer):
    assert all(
        (sample["input_ids"][1:5] == PAUSE).all() for sample in _examples(tokenizer, pauses=4, location="prepend")
    )
    dot = tokenizer.encode("a.", add_special_tokens=False)[-1]
    for sample in _examples(tokenizer, pauses=4, filler="."):
        first = int((sample["labels"] != -100).nonzero()[0])
        assert (sample["input_ids"][first - 4 : first] == dot).all() and (sample["input_ids"] != PAUSE).all()


def test_what_cannot_be_trained_on_is_named(tokenizer):
    with pytest.raises(DataError, match=r"example 0: expected at most .* target tokens beside 60 pauses"):
        _examples(tokenizer, 64, pauses=60)
    with pytest.raises(DataError, match="examples: expected at least one, got none"):
        PauseExamples([], tokenizer, 64, pause_ids=range(PAUSE, PAUSE + 1))
    with pytest.raises(ConfigError, match="location: expected one of append, prepend, got 'before'"):
        _examples(tokenizer, location="before")
    with pytest.raises(DataError, match=r"pause id: .* got 5, an ordinary piece"):
        PauseExamples(PAIRS, tokenizer, 64, pause_ids=range(5, 6))
    with pytest.raises(DataError, match="expected a fast tokenizer of transformers, got a ByT5Tokenizer"):
        PauseExamples(PAIRS, ByT5Tokenizer(), 64, pause_ids=range(PAUSE, PAUSE + 1))
    with pytest.raises(IndexError):
        _examples(tokenizer)[3]


def test_they_can_be_sent_to_a_worker(tokenizer):
    examples = _examples(tokenizer, pauses="0..6", epochs=3)
    sent = pickle.loads(pickle.dumps(examples))
    for number in range(len(examples)):
        assert torch.equal(sent[number]["input_ids"], examples[number]["input_ids"])
