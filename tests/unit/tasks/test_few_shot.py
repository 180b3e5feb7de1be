"""Few-shot prompts: drawn by seed and record, never the record itself, never from the split of evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from unit.tasks.test_load_task import DECLARATION

from pause_megatron.config.text import write_yaml
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import Example, load_task, read_examples, with_shots


def example(number: int, prompt: str | None = None) -> Example:
    return Example(id=str(number), prompt=prompt or f"Q{number}:", target=f" {number}", references=(str(number),))


POOL = [example(number) for number in range(40)]


def test_a_prompt_holds_the_solved_examples_and_then_itself():
    [found] = with_shots([example(100)], POOL, count=3, separator="\n\n")
    *shots, own = found.prompt.split("\n\n")
    solved = {each.prompt + each.target for each in POOL}
    assert own == "Q100:" and len({*shots}) == 3 and {*shots} <= solved
    assert (found.id, found.target, found.references) == ("100", " 100", ("100",))


def test_the_draw_depends_on_seed_and_record_only():
    queries = [example(number) for number in range(100, 130)]
    found = with_shots(queries, POOL, count=4)
    assert found[7:9] == with_shots(queries[7:9], POOL, count=4)
    assert found != with_shots(queries, POOL, count=4, seed=1)
    assert len({each.prompt for each in found}) == 30


def test_no_record_draws_itself():
    """With all others drawn, a record that drew itself would show its answer."""
    for found in with_shots(POOL, POOL, count=39):
        assert len(found.prompt.split("\n\n")) == 40 and found.prompt.count(f"Q{found.id}:") == 1
    with pytest.raises(DataError, match=r"few_shot: expected 40 examples besides '0' to draw from, got 39"):
        with_shots(POOL, POOL, count=40)
    same = [example(number, "Q5:") for number in range(3)]
    with pytest.raises(DataError, match="got 0"):
        with_shots(same, same, count=1)


def test_examples_about_the_same_text_are_not_drawn():
    pool = [replace(each, group=f"page {int(each.id) % 2}") for each in POOL]
    for found in with_shots(pool[:6], pool, count=20):
        assert {int(shot.split()[-1]) % 2 for shot in found.prompt.split("\n\n")[:-1]} == {1 - int(found.id) % 2}
    with pytest.raises(DataError, match="got 20"):
        with_shots(pool, pool, count=21)


def test_every_example_is_drawn_as_often():
    counts = dict.fromkeys((each.prompt for each in POOL), 0)
    for found in with_shots([example(number) for number in range(1000, 2000)], POOL, count=4):
        for shot in found.prompt.split("\n\n")[:-1]:
            counts[shot.split()[0]] += 1
    assert sum(counts.values()) == 4000 and min(counts.values()) > 60 and max(counts.values()) < 145


@pytest.fixture
def declare(tmp_path):
    for split, numbers in {"train": range(8), "spare": range(8, 16), "test": range(16, 20)}.items():
        records = [{"question": f"Q{number}:", "answer": f"A{number}"} for number in numbers]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))

    def load(few_shot: object, splits: dict[str, str]):
        path = tmp_path / "quiz.yaml"
        path.write_text(write_yaml({**DECLARATION, "splits": splits, "few_shot": few_shot}))
        return load_task(str(path))

    return load


@pytest.mark.parametrize(
    ("few_shot", "splits", "source"),
    [
        ({"count": 3}, {"train": "train", "eval": "test"}, range(8)),
        ({"count": 3, "from": "spare", "seed": 2}, {"train": "train", "eval": "test"}, range(8, 16)),
        ({"count": 3, "from": "spare"}, {"eval": "test"}, range(8, 16)),
    ],
)
def test_a_declared_task_draws_from_its_split(declare, tmp_path, few_shot, splits, source):
    task = declare(few_shot, splits)
    for split in ("train", "eval") if "train" in splits else ("eval",):
        for found in read_examples(task, split, str(tmp_path)):
            *shots, _ = found.prompt.split("\n\n")
            assert {*shots} < {f"Q{number}: A{number}" for number in source} and len({*shots}) == 3


@pytest.mark.parametrize(
    ("few_shot", "splits", "message"),
    [
        ({"count": 3, "from": "test"}, {"train": "train", "eval": "test"}, r"few_shot\.from: expected a split besides"),
        ({"count": 3}, {"eval": "test"}, r"few_shot\.from: expected a split besides that of evaluation \(test\)"),
        ({"count": 0}, {"train": "train", "eval": "test"}, r"yaml:\d+: few_shot\.count: input should be greater"),
        ({"cuont": 1}, {"train": "train", "eval": "test"}, r"unknown key 'few_shot\.cuont'\. Did you mean 'count'"),
        ({"count": 1, "from": "spar"}, {"train": "train", "eval": "test"}, r"spar\.jsonl"),
    ],
)
def test_wrong_few_shot_keys_are_named(declare, tmp_path, few_shot, splits, message):
    with pytest.raises((ConfigError, DataError), match=message):
        read_examples(declare(few_shot, splits), "eval", str(tmp_path))
