"""Hints as targets: which position predicts which hint, and what is refused before work starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pause_megatron.data.batches.batch import collate
from pause_megatron.data.supervised.examples import Arrangement, EncodedExample, encode_examples, with_hints
from pause_megatron.data.supervised.windows import SupervisedWindows, summarize
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.tasks import Example, fingerprint
from pause_megatron.tasks.synthetic.base import write_tokenizer

PAUSES = range(40, 43)
PLAIN = Arrangement(24, range(5, 6), PAUSES)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


FIRST = EncodedExample("first", ids(3, 4, 5), ids(7, 1), ids(11, 12))
SECOND = EncodedExample("second", ids(9), ids(8, 6, 1), ids(13, 14, 15, 16))


def windows(*examples: EncodedExample, **changes: object) -> SupervisedWindows:
    return SupervisedWindows(examples, replace(PLAIN, **changes), seed=1, task="t")


def window_of(example: EncodedExample, **changes: object) -> dict[str, torch.Tensor]:
    return windows(example, **changes)[0]


def test_pause_k_predicts_hint_k_and_the_last_one_the_answer():
    sample = window_of(FIRST, hints="pauses")
    # tokens: 3 of the prompt, 5 pauses at 3..7, then the answer
    assert sample["hints"].tolist() == [[3, -1, 11], [4, -1, 12]]
    assert sample["loss_mask"].nonzero().flatten().tolist() == [7, 8]


def test_a_head_each_predicts_at_the_position_of_the_answer():
    sample = window_of(FIRST, hints="heads", pauses=range(1))
    assert sample["hints"].tolist() == [[2, 0, 11], [2, 1, 12]]
    assert sample["loss_mask"].nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("changes", [{}, {"pauses": range(5, 9)}, {"prefix_attention": "bidirectional"}])
def test_inputs_and_answers_are_those_without_hints(changes):
    for place in ("pauses", "heads"):
        sample, plain = (window_of(SECOND, hints=hints, **changes) for hints in (place, None))
        assert "hints" not in plain and sample.pop("hints").shape == (4, 3)
        assert all(torch.equal(sample[name], plain[name]) for name in plain)


@pytest.mark.parametrize("place", ["pauses", "heads"])
def test_a_micro_batch_has_the_row_of_each_hint(place):
    data = windows(FIRST, SECOND, batching="padded", hints=place)
    batch = collate([data[0], data[1]], sample_ids=range(2), pause_ids=PAUSES)
    assert batch.hints_by_head == ((2, 2, 1, 1) if place == "heads" else ())
    assert (batch.hints_count, batch.targets_count, summarize(data).hints) == (6, 5, 6)
    rows, targets = batch.hint_rows.tolist(), batch.hint_targets.tolist()
    found = {(row % 2, row // 2, target) for row, target in zip(rows, targets, strict=True)}
    assert found == {(n, int(p), int(t)) for n in range(2) for p, _, t in data[n]["hints"]}
    is_pause = (batch.tokens >= PAUSES.start).t().flatten()[batch.hint_rows]
    assert is_pause.all()  # with heads, the last pause
    packed = batch.packed(pinned=False)
    assert torch.equal(packed.hint_rows, batch.hint_rows) and packed.hints_by_head == batch.hints_by_head


@pytest.mark.parametrize(
    ("example", "changes", "message"),
    [
        (SECOND, {"pauses": range(4, 9)}, "example second: expected at least 5 finetune.pauses for its 4 hints"),
        (FIRST._replace(hints=ids()), {}, "example first: expected hints of the task"),
    ],
)
def test_too_few_pauses_or_no_hints_are_refused(example, changes, message):
    with pytest.raises(DataError) as caught:
        windows(example, hints="pauses", **changes)
    assert message in str(caught.value)
    windows(example, **changes)  # hints without a loss ask for nothing


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def example_of(*hints: str) -> Example:
    return Example(id="17", prompt="01=", target="1", references=("1",), hints=hints)


def test_a_hint_is_the_id_of_its_one_token(tokenizer):
    examples = [example_of("1", "0", "="), example_of("1")]
    encoded = with_hints(encode_examples(examples, tokenizer), examples, tokenizer)
    one, zero, equals = (tokenizer.encode(text)[0] for text in "10=")
    assert [each.hints.tolist() for each in encoded] == [[one, zero, equals], [one]]


@pytest.mark.parametrize("hint", ["10", "", "<pause>"])
def test_a_hint_of_another_number_of_tokens_is_refused_by_name(tokenizer, hint):
    examples = [example_of("1", hint)]
    with pytest.raises(DataError) as caught:
        with_hints(encode_examples(examples, tokenizer), examples, tokenizer)
    assert str(caught.value).startswith("example 17: hint 2: expected the text of one token, got ")


def test_hints_belong_to_the_fingerprint():
    assert fingerprint([example_of()]) != fingerprint([example_of("1")]) != fingerprint([example_of("0")])
