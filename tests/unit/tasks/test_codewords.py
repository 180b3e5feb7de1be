"""The examples of `tasks.synthetic.codewords`: answers by brute force, splits, tokens."""

from __future__ import annotations

from math import comb

import pytest

from pause_megatron.data.supervised.examples import encode_examples
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import ConfigError
from pause_megatron.tasks import fingerprint, load_task, read_examples
from pause_megatron.tasks.synthetic.base import write_tokenizer
from pause_megatron.tasks.synthetic.codewords import Decode

NAME = "pause_megatron.tasks.synthetic.codewords:CODE_OF_16"


@pytest.mark.parametrize(("bits", "words", "flips"), [(16, 8, 3), (10, 4, 1), (24, 10, 2)])
def test_the_answer_is_the_one_nearest_codeword(bits, words, flips):
    task = Decode(bits=bits, words=words, flips=flips)
    code = task.code()
    assert len(set(code)) == words and all(word.count("1") == bits // 2 for word in code)
    for example in task.examples("train", None, 300):
        prompt = example.prompt.removesuffix("=")
        distances = [sum(a != b for a, b in zip(prompt, word, strict=True)) for word in code]
        assert min(distances) == flips and distances.count(flips) == 1
        assert (example.target, example.references) == (str(distances.index(flips)), (example.target,))


def test_splits_are_disjoint_together_whole_and_the_same_in_every_run():
    task = load_task(NAME)
    train, held_out = (read_examples(task, split) for split in ("train", "eval"))
    prompts = {example.prompt for example in train + held_out}
    assert len(prompts) == len(train) + len(held_out) == 8 * comb(16, 3)
    assert read_examples(task, "eval", limit=10) == held_out[:10]
    assert fingerprint(held_out) == fingerprint(load_task(NAME).examples("eval", None, None))


def test_a_symbol_is_a_token_and_the_answer_too(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for encoded in encode_examples(load_task(NAME).examples("eval", None, 50), tokenizer):
        assert encoded.prompt.size == 17 and encoded.target.size == 2
        assert encoded.target[1] == tokenizer.eod


def test_bad_input():
    with pytest.raises(ConfigError, match=r"task\.path: expected none"):
        load_task(NAME).examples("train", "records")
    with pytest.raises(ConfigError, match=r"expected 8 words 9 apart"):
        Decode(bits=10, words=8, flips=4).code()
