"""The parity of uniform bits: answers, hints, the two splits, and names of any size."""

from __future__ import annotations

from itertools import islice

import pytest

from pause_megatron.errors import ConfigError
from pause_megatron.tasks import load_task, read_examples

MODULE = "pause_megatron.tasks.synthetic.parity"


def bits_of(name: str, split: str, limit: int | None = None) -> list[str]:
    examples = load_task(f"{MODULE}:{name}").examples(split, None, limit)
    return [example.prompt.removesuffix("=") for example in examples]


@pytest.mark.parametrize("name", ["PARITY_OF_7", "PARITY_OF_7_EQUALITY"])
def test_answers_and_hints_are_those_of_the_number_of_ones(name):
    for example in read_examples(load_task(f"{MODULE}:{name}"), "train"):
        ones = example.prompt.count("1")
        assert example.target == str(ones % 2) == example.references[0]
        compare = ones.__eq__ if name.endswith("EQUALITY") else ones.__ge__
        assert example.hints == tuple("1" if compare(i) else "0" for i in range(1, 8))


@pytest.mark.parametrize("bits", [4, 10, 20, 64])
def test_no_prompt_is_in_both_splits_or_twice(bits):
    train, evaluation = (bits_of(f"PARITY_OF_{bits}_TRAIN_4000", split) for split in ("train", "eval"))
    assert all(len(prompt) == bits for prompt in train + evaluation)
    assert len({*train, *evaluation}) == len(train) + len(evaluation) == min(2**bits, 4000 + 2048)


def test_prompts_are_uniform_and_the_split_tells_nothing_about_the_parity():
    for split in ("train", "eval"):
        prompts = bits_of("PARITY_OF_20", split, 2000)
        shares = [sum(prompt[i] == "1" for prompt in prompts) / 2000 for i in range(20)]
        odd = sum(prompt.count("1") % 2 for prompt in prompts) / 2000
        assert all(abs(share - 0.5) < 0.05 for share in (*shares, odd))  # 4.5 standard deviations
        variance = sum((prompt.count("1") - 10) ** 2 for prompt in prompts) / 2000
        assert abs(variance - 5) < 0.8  # that of a binomial distribution


def test_examples_depend_neither_on_their_number_nor_on_the_hints():
    names = ("PARITY_OF_24", "PARITY_OF_24_EQUALITY", "PARITY_OF_24_TRAIN_100000")
    for split in ("train", "eval"):
        first, *others = (bits_of(name, split, 50) for name in names)
        assert all(other == first for other in others)
    big = load_task(f"{MODULE}:PARITY_OF_24_TRAIN_100000")
    assert sum(1 for _ in islice(big.pairs("train"), 40_000)) == 40_000


def test_defaults_fit_the_hints_and_unknown_names_are_refused():
    assert load_task(f"{MODULE}:PARITY_OF_40").finetune.pauses == 41
    with pytest.raises(ConfigError, match="PARITY_OF_N has N bits"):
        load_task(f"{MODULE}:PARITY_OF_NONE")
