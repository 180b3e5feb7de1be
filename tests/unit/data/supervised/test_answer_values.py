"""The file of `score --task`: found by ids, whole or refused, and what `scored` makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from pause_megatron.data.supervised.answer_values import AnswerValues, example_digest
from pause_megatron.data.supervised.answers import AnswerPauses
from pause_megatron.data.supervised.examples import Arrangement, EncodedExample
from pause_megatron.data.supervised.windows import SupervisedWindows
from pause_megatron.errors import DataError

SEEN: list[np.ndarray | None] = []


def examples(size: int = 12) -> list[EncodedExample]:
    """Examples of 0 to 19 prompt tokens and 2 to 29 target tokens, the last one EOD (0)."""
    rng = np.random.default_rng(5)
    return [
        EncodedExample(
            f"e {number}",
            rng.integers(1, 800, rng.integers(0, 20), dtype=np.int32),
            np.append(rng.integers(1, 800, rng.integers(1, 29), dtype=np.int32), np.int32(0)),
        )
        for number in range(size)
    ]


EXAMPLES = examples()
VALUES = [
    np.random.default_rng(number).random(example.target.size, dtype=np.float32)
    for number, example in enumerate(EXAMPLES)
]


class Sees:
    """A policy of a user's: it keeps the values that it is given."""

    def place(self, window, rng):
        SEEN.append(window.side)
        return np.zeros(0, dtype=np.int64)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.safetensors"
    AnswerValues.write(path, EXAMPLES, VALUES, {"task": "t", "model": "m", "kind": "loss"})
    return path


def arrays_of(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_each_example_has_its_values_in_any_order_and_part(file):
    read = AnswerValues.read(file)
    assert (read.metadata["task"], read.metadata["kind"], read.metadata["version"]) == ("t", "loss", "1")
    for order in (range(12), range(11, -1, -1), [3, 3, 7]):
        for number, found in zip(order, read.of([EXAMPLES[each] for each in order]), strict=True):
            assert found.id == EXAMPLES[number].id and not found.values.flags.writeable
            np.testing.assert_array_equal(found.values, VALUES[number][:-1])
    assert [path.name for path in file.parent.iterdir()] == ["t.safetensors"]


def test_the_digest_tells_prompt_from_target():
    one = EncodedExample("a", np.array([1, 2], np.int32), np.array([3, 0], np.int32))
    other = EncodedExample("b", np.array([1], np.int32), np.array([2, 3, 0], np.int32))
    assert example_digest(one) != example_digest(other)
    assert example_digest(one) == example_digest(one._replace(id="c", prompt=one.prompt.astype(np.int64)))


def test_a_missing_example_is_named(file):
    other = EXAMPLES[4]._replace(id="number 5", prompt=np.array([9], np.int32))
    with pytest.raises(DataError, match=re.escape("of example number 5, got none; 1 of 2 examples are missing")) as got:
        AnswerValues.read(file).of([EXAMPLES[0], other])
    assert "The records differ, or were fewer: run `pause-megatron score --task NAME --model DIR --output " in str(
        got.value
    )
    with pytest.raises(DataError, match="The tokenizer or the prompts differ: run"):
        AnswerValues.read(file).of([other])


def test_what_is_no_such_file_is_refused(file, tmp_path):
    arrays, metadata = arrays_of(file)

    def refused(expected: str, metadata: dict[str, str] = metadata, **changes: np.ndarray) -> None:
        save_file({**arrays, **changes}, tmp_path / "x", metadata=metadata)
        with pytest.raises(DataError, match=re.escape(expected)):
            AnswerValues.read(tmp_path / "x")

    refused("altered since it was written", values=arrays["values"] + 1)
    refused("with version 1 and the arrays digests, ends, values, got version 2", {**metadata, "version": "2"})
    refused("got version None", {})
    refused("and digests, ends, more, values", more=arrays["ends"])
    refused("ends: expected I64 of one dimension, got I32", ends=arrays["ends"].astype(np.int32))
    refused("values: expected F32 of one dimension, got F32 of shape [1, ", values=arrays["values"][None])
    refused("ends: expected an ascending end for each of 12 digests", ends=arrays["ends"][:-1])
    refused("ends: expected an ascending end for each of 12 digests", ends=arrays["ends"][::-1].copy())
    refused("ends: expected an ascending end for each of 12 digests", values=arrays["values"][1:])
    refused("digests: expected ascending ones, each once", digests=arrays["digests"][::-1].copy())
    values = arrays["values"].copy()
    values[3] = np.nan
    AnswerValues.write(tmp_path / "x", EXAMPLES, np.split(values, arrays["ends"][:-1]), {})
    with pytest.raises(DataError, match="values: expected finite ones"):
        AnswerValues.read(tmp_path / "x")
    torch.save(arrays, tmp_path / "pickle")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-9])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pickle", "cut", "empty"):
        with pytest.raises(DataError, match=rf"task\.scores: .*{name}: expected a file that .* cannot be read"):
            AnswerValues.read(tmp_path / name)
    with pytest.raises(DataError, match="got no such file"):
        AnswerValues.read(tmp_path / "none")
    with pytest.raises(DataError, match="got something else"):
        AnswerValues.read(tmp_path)


def test_pauses_stand_before_the_answers_highest_values_and_never_before_its_first_token(file):
    encoded = AnswerValues.read(file).of(EXAMPLES)
    for run in (1, 2):
        answers = AnswerPauses("scored", 0.3, run)
        layout = Arrangement(128, range(1, 3), range(900, 901), answers=answers)
        windows = SupervisedWindows(encoded, layout, seed=1, task="t")
        for epoch in range(2):  # no draw: the same in each epoch
            for example, gaps in zip(encoded, windows.epoch(epoch).answers, strict=True):
                size = example.target.size - 1
                places = round(0.3 * size / run)
                highest = np.argsort(-example.values[1:], kind="stable")[:places] + 1
                assert gaps.tolist() == sorted([*highest.tolist()] * run)
                tokens = layout.answer(example, gaps).tokens.tolist()
                after = [tokens[at + 1] for at in range(len(tokens) - 1) if tokens[at] == 900 != tokens[at + 1]]
                assert after == example.target[np.sort(highest)].tolist()
    first = encoded[0]._replace(values=np.full(EXAMPLES[0].target.size - 1, 0, np.float32))
    first.values[0] = 9
    gaps = AnswerPauses("scored", 0.3).gaps(first.target[:-1], 1, "t", 0, number=0, values=first.values)
    assert gaps.size and gaps[0] == 1  # before the second token, the first of equal values


def test_a_policy_of_the_users_sees_the_values(file):
    encoded = AnswerValues.read(file).of(EXAMPLES)
    layout = Arrangement(128, range(1, 3), range(900, 901), answers=AnswerPauses(f"{__name__}:Sees", 0.3))
    SEEN.clear()
    SupervisedWindows(encoded, layout, seed=1, task="t").epoch(0)
    assert all(np.array_equal(seen, example.values) for seen, example in zip(SEEN, encoded, strict=True))
    SEEN.clear()
    SupervisedWindows(EXAMPLES, replace(layout), seed=1, task="t").epoch(0)
    assert len(SEEN) == 12 and all(seen is None for seen in SEEN)
