"""Samples of examples by group, and the held-out part of a train split."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import Decoding, Example, FinetuneDefaults, fingerprint, load_task, read_examples
from pause_megatron.tasks.sampling import divide, sample


def examples(sizes: dict[str, int]) -> list[Example]:
    """Return examples ordered by group, as datasets are."""
    names = [group for group, size in sizes.items() for _ in range(size)]
    return [
        Example(id=str(number), prompt=f"p{number}", target=" t", references=("t",), group=group)
        for number, group in enumerate(names)
    ]


def test_a_sample_has_every_groups_share_in_the_datasets_order():
    whole = examples({"a": 500, "b": 300, "c": 150, "d": 50})
    taken = sample(whole, 100)
    counts = Counter(example.group for example in taken)
    assert sum(counts.values()) == 100
    for group, share in {"a": 50, "b": 30, "c": 15, "d": 5}.items():
        assert abs(counts[group] - share) <= 1
    assert taken == sorted(taken, key=lambda example: int(example.id))
    assert taken == sample(whole, 100)


def test_more_groups_than_the_limit_give_one_record_each_at_most():
    taken = sample(examples({f"story {index}": 15 for index in range(500)}), 200)
    assert max(Counter(example.group for example in taken).values()) == 1


def test_a_larger_limit_contains_a_smaller_one():
    whole = examples({"a": 70, "": 40, "b": 7, "c": 13})
    ids = [{example.id for example in sample(whole, limit)} for limit in range(1, 131)]
    assert all(small < large for small, large in itertools.pairwise(ids))
    assert sample(whole, None) == sample(whole, 1000) == whole


def test_every_example_is_drawn_equally_often():
    """Over 1,000 name spaces: expected 1/5 each, standard error 0.013."""
    drawn = np.zeros(60)
    base = examples({"a": 31, "b": 17, "c": 12})
    for space in range(1000):
        named = [replace(example, id=f"{space}-{example.id}", group=f"{space} {example.group}") for example in base]
        for example in sample(named, 12):
            drawn[int(example.id.partition("-")[2])] += 1
    assert np.abs(drawn / 1000 - 0.2).max() < 4 * 0.0127


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.99])
def test_a_held_out_part_shares_no_group_with_training(fraction):
    whole = examples({"": 30, **{f"g{index}": 5 + index for index in range(10)}})
    kept, held = divide(whole, fraction)
    assert {example.group for example in kept} & {example.group for example in held} <= {""}
    assert len(kept) + len(held) == len(whole)
    assert {example.id for example in kept}.isdisjoint(example.id for example in held)
    assert kept
    assert fraction * len(whole) <= len(held) <= 2 * max(fraction * len(whole), 1) or len(kept) <= 14
    assert divide(whole, fraction) == (kept, held)


def test_a_large_group_is_not_held_out(caplog):
    for large in range(20):  # whichever is drawn first
        kept, held = divide(examples({f"large {large}": 990, "small": 10}), 0.05)
        assert (len(kept), len(held)) == (990, 10)
    assert not caplog.records
    kept, held = divide(examples({"a": 60, "b": 40}), 0.05)
    assert (len(kept), len(held)) == (60, 40) and "task.held_out=0.05" in caplog.text


def test_one_group_cannot_be_divided():
    with pytest.raises(ConfigError, match=r"task\.held_out=0\.05: expected training examples of 2 groups"):
        divide(examples({"a": 9}), 0.05)


def test_the_groups_of_the_tasks_that_ship(task_records):
    folders = {"squad": "squad", "coqa": "coqa", "hellaswag": "hellaswag", "piqa": "piqa"}
    groups = {
        name: [example.group for example in read_examples(load_task(name), "train", str(task_records / folder))]
        for name, folder in folders.items()
    }
    assert groups["squad"][0] == "Kestrel_Line"
    assert groups["squad"][1].startswith(("xxh3_128:", "Doctor Imre Vasko"))  # it has no title
    assert groups["coqa"][0] == groups["coqa"][1] != groups["coqa"][-1]
    assert all(groups["hellaswag"])
    assert all(groups["piqa"])
    gsm8k = read_examples(load_task("gsm8k"), "train", str(task_records / "gsm8k"))
    assert not any(example.group for example in gsm8k)


def test_training_and_held_out_part_are_the_train_split(task_records):
    task, path = load_task("squad"), str(task_records / "squad")
    kept, held = (read_examples(task, part, path, held_out=0.2) for part in ("train", "held-out"))
    assert sorted(int(e.id) for e in (*kept, *held)) == [int(e.id) for e in read_examples(task, "train", path)]
    few = read_examples(task, "train", path, 5, held_out=0.2)
    assert {example.id for example in few} < {example.id for example in kept}
    with pytest.raises(ConfigError, match=r"task\.held_out: expected a fraction above 0, got 0"):
        read_examples(task, "held-out", path, held_out=0)


def test_group_and_empty_hints_do_not_change_a_fingerprint():
    [plain] = examples({"": 1})
    assert fingerprint([plain]) == fingerprint([replace(plain, group="story")])
    assert fingerprint([plain]) != fingerprint([replace(plain, hints=("a",))])
    assert fingerprint([plain]) == "xxh3_128:a24f969b4ba0e350cfc151d5cd0f3c77"  # as before the fields existed


class Generated:
    """A plug-in whose examples have no end; `examples` without a limit gives a thousand."""

    name = folder = "generated"
    kind = "generate"
    metrics = ("exact_match",)
    primary = "exact_match"
    decoding = Decoding(max_new_tokens=2)
    finetune = FinetuneDefaults()

    def __init__(self) -> None:
        self.made: list[int] = []

    def examples(self, split, path, limit):
        self.made.append(limit or 1000)
        return examples({"": self.made[-1]})


def test_a_task_that_generates_examples_makes_no_more_than_are_asked_for():
    task = Generated()
    assert [example.id for example in read_examples(task, "eval", limit=7)] == [str(index) for index in range(7)]
    assert task.made == [7]
    kept = read_examples(task, "train", limit=3000, held_out=0.05)
    assert task.made == [7, 1000, 3000]
    held = read_examples(task, "held-out", held_out=0.05)
    assert (len(kept), len(held)) == (2950, 50)
    assert {example.id for example in kept}.isdisjoint(example.id for example in held)


def test_a_plug_in_with_ordered_records_draws_a_sample():
    task = Generated()
    task.ordered = True
    taken = read_examples(task, "eval", limit=10)
    assert task.made == [1000]
    assert [example.id for example in taken] != [str(index) for index in range(10)]
    assert len(read_examples(task, "eval", limit=10, from_start=True)) == 10


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("titel", r"expected the field 'titel', got the fields title, context.*Did you mean 'title'"),
        ("[a, b]", r"expected the field 'b', got the fields"),
        ("questions", r"field 'questions': expected a text, got list"),
    ],
)
def test_a_group_that_names_no_field_is_refused(tmp_path, group, message):
    (tmp_path / "quiz.yaml").write_text(
        f"kind: generate\ndataset: {{path: me/quiz}}\nsplits: {{eval: test}}\nprompt: '{{context}}'\n"
        f"references: context\ngroup: {group}\nmetrics: f1\nprimary: f1\ndecoding: {{max_new_tokens: 1}}\n"
    )
    record = {"title": "t", "context": "c", "questions": []}
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message):
        read_examples(load_task(str(tmp_path / "quiz.yaml")), "eval", str(tmp_path))
