"""Pauses within answers: read and never predicted, drawn by address, counted where lengths are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pause_megatron.data.batches.batch import collate
from pause_megatron.data.supervised.answers import AnswerPauses
from pause_megatron.data.supervised.examples import Arrangement, EncodedExample
from pause_megatron.data.supervised.windows import SupervisedWindows, summarize
from pause_megatron.data.windows.token_texts import TokenTextTable
from pause_megatron.errors import ConfigError, DataError

PAUSES = range(900, 903)


def twice_after_odd(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Two pauses after each odd token, in no order."""
    return (np.flatnonzero(text % 2) + 1).repeat(2)[::-1]


def outside(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """A gap past the end."""
    return np.array([text.size + 1])


def floats(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """No gaps at all."""
    return np.array([1.5])


def many(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """More pauses than a window holds."""
    return np.ones(500, dtype=np.int64)


POLICIES = [
    AnswerPauses("uniform", 0.5),
    AnswerPauses("isolated", 0.4),
    AnswerPauses("with_replacement", 1.5, run=2),
    AnswerPauses("bernoulli", 0.3, run=2),
    AnswerPauses("interval", 0.2),
    AnswerPauses("every", 0.0, run=2),
    AnswerPauses("before", 0.3, pattern="^5", texts=TokenTextTable(800, lambda ids: "".join(map(str, ids)), [])),
    AnswerPauses(f"{__name__}:twice_after_odd", 0.0),
]


def made(size: int = 40) -> list[EncodedExample]:
    """Examples of 0 to 29 prompt tokens and 1 to 25 target tokens, the last one EOD (0)."""
    rng = np.random.default_rng(3)
    sizes = zip(rng.integers(0, 30, size).tolist(), rng.integers(0, 25, size).tolist(), strict=True)
    return [
        EncodedExample(
            f"e {number}",
            rng.integers(1, 800, prompt, dtype=np.int32),
            np.append(rng.integers(1, 800, answer, dtype=np.int32), np.int32(0)),
        )
        for number, (prompt, answer) in enumerate(sizes)
    ]


EXAMPLES = made()
PLAIN = Arrangement(128, range(1, 6), PAUSES)


def windows(answers: AnswerPauses | None, **changes: object) -> SupervisedWindows:
    return SupervisedWindows(EXAMPLES, replace(PLAIN, answers=answers, **changes), seed=5, task="t")


def parts(data: SupervisedWindows, epoch: int) -> dict[int, tuple[list[int], list[tuple[int, int]]]]:
    """Each example of an epoch: its input tokens, and (place, target) of its supervised positions."""
    start, found = data.windows_in_epochs(epoch) if epoch else 0, {}
    for number, items in enumerate(data.epoch(epoch).windows):
        sample = {name: values.numpy() for name, values in data[start + number].items()}
        for segment, item in enumerate(items):
            places = np.flatnonzero(sample["segments"] == segment)
            assert sample["position_ids"][places].tolist() == list(range(places.size))
            learned = [
                (place, int(label))
                for place, (label, mask) in enumerate(
                    zip(sample["labels"][places], sample["loss_mask"][places], strict=True)
                )
                if mask
            ]
            found[item] = (sample["tokens"][places].tolist(), learned)
        outside = sample["segments"] < 0
        assert not sample["loss_mask"][outside].any() and not sample["tokens"][outside].any()
    return found


@pytest.mark.parametrize("answers", POLICIES, ids=lambda each: each.placement.rpartition(":")[2])
@pytest.mark.parametrize("location", ["append", "prepend"])
def test_an_answer_without_its_pauses_is_the_answer_and_each_token_is_predicted_once(answers, location):
    data, total = windows(answers, location=location), 0
    for epoch in (0, 1):
        counts = data.epoch(epoch).counts
        for item, (tokens, learned) in parts(data, epoch).items():
            example, places = EXAMPLES[item], [place for place, _ in learned]
            prefix = example.prompt.size + int(counts[item])
            inputs = tokens[prefix:]
            assert [token for token in inputs if token not in PAUSES] == example.target[:-1].tolist()
            # Each target is predicted once, in order, by what stands directly before it; no target is a pause.
            assert [label for _, label in learned] == example.target.tolist()
            assert places[0] == prefix - 1 and places[-1] == len(tokens) - 1
            following = {place: tokens[place + 1] for place in range(prefix - 1, len(tokens) - 1)}
            assert all(following.get(place, 0) == label for place, label in learned)
            assert sorted(set(following) - set(places)) == [p for p, token in following.items() if token in PAUSES]
            runs = [0]
            for token in inputs:
                if token in PAUSES:
                    assert token == PAUSES[runs[-1] % len(PAUSES)]
                runs.append(runs[-1] + 1 if token in PAUSES else 0)
            total += sum(token in PAUSES for token in inputs)
    assert total > 50


@pytest.mark.parametrize("answers", POLICIES, ids=lambda each: each.placement.rpartition(":")[2])
def test_draws_are_by_address_and_lengths_count_them(answers):
    data, padded = windows(answers), windows(answers, batching="padded")
    packed, single = parts(data, 1), parts(padded, 1)
    assert packed == single
    few = SupervisedWindows(EXAMPLES[:7], data.arrangement, seed=5, task="t")
    assert {item: packed[item] for item in range(7)} == parts(few, 1)
    drawn = [data.epoch(epoch).answers for epoch in (0, 1)]
    same = all(np.array_equal(one, two) for one, two in zip(*drawn, strict=True))
    assert same == (answers.placement == "every" or ":" in answers.placement)  # another epoch draws other places
    for item, (tokens, _) in packed.items():
        assert len(tokens) == data.arrangement.length(EXAMPLES[item], *data.epoch(1).pauses(item))
    facts, first = summarize(data), parts(data, 0)
    assert facts.tokens == sum(len(tokens) for tokens, _ in first.values())
    assert facts.pauses == sum(token in PAUSES for tokens, _ in first.values() for token in tokens)
    assert facts.pauses_in_answers == facts.pauses - int(data.epoch(0).counts.sum())
    assert facts.targets == sum(example.target.size for example in EXAMPLES)


def test_counts_are_a_fraction_of_the_answer_in_whole_runs():
    for rate, run in ((0.5, 1), (0.25, 3), (2.0, 4)):
        answers = AnswerPauses("uniform", rate, run)
        for example in EXAMPLES:
            answer = example.target[:-1]
            gaps = answers.gaps(answer, 1, "t", 0, number=2)
            assert gaps.size == round(rate * answer.size / run) * run == answers.most(answer.size)
            assert all(count % run == 0 for count in np.unique(gaps, return_counts=True)[1])


def test_nothing_changes_without_a_placement_or_at_rate_0():
    for answers in (None, AnswerPauses("uniform", 0.0)):
        data, plain = windows(answers), SupervisedWindows(EXAMPLES, PLAIN, seed=5, task="t")
        assert data.epoch(2).windows == plain.epoch(2).windows
        for number in range(data.windows_in_epochs(1)):
            one, two = data[number], plain[number]
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert summarize(windows(None)).pauses_in_answers == 0


def test_the_prefix_and_its_hints_are_those_without_pauses_in_the_answer():
    hinted = [each._replace(hints=np.array([7, 8], dtype=np.int32)) for each in EXAMPLES]
    shape = replace(PLAIN, pauses=range(3, 4), hints="pauses", batching="padded", prefix_attention="bidirectional")
    one, two = (
        SupervisedWindows(hinted, replace(shape, answers=each), seed=5, task="t") for each in (None, POLICIES[0])
    )
    for number in range(len(hinted)):
        assert torch.equal(one[number]["hints"], two[number]["hints"])
        assert torch.equal(one[number]["prefix"], two[number]["prefix"])


def test_pauses_are_counted_in_a_micro_batch_and_targets_after_them_apart():
    data = windows(POLICIES[0], batching="padded")
    batch = collate([data[0], data[1]], sample_ids=range(2), pause_ids=PAUSES)
    assert batch.pause_tokens == sum(int((data[n]["tokens"] >= PAUSES.start).sum()) for n in (0, 1))
    assert batch.targets.max() < PAUSES.start
    items = [data.epoch(0).windows[n][0] for n in (0, 1)]
    runs = sum(len(np.unique(data.epoch(0).answers[item])) for item in items)
    assert int(batch.after_pause.sum()) == runs + 2  # and the first target, after the prompt's pauses


def test_fillers_take_the_place_of_pauses_in_answers_too():
    data = windows(POLICIES[0], pause_ids=range(17, 18), batching="padded")
    (item,) = data.epoch(0).windows[0]
    sample, example = data[0], EXAMPLES[item]
    gaps = data.epoch(0).answers[item]
    assert sample["labels"][sample["loss_mask"] > 0].tolist() == example.target.tolist()
    assert int((sample["tokens"] == 17).sum()) >= gaps.size + int(data.epoch(0).counts[item])


@pytest.mark.parametrize(("length", "fits"), [(29, True), (28, False)])
def test_an_example_must_fit_with_all_its_pauses(length, fits):
    example = EncodedExample("long", np.arange(9, dtype=np.int32), np.arange(1, 12, dtype=np.int32))
    # 1 token of the prompt, 5 pauses, 11 targets, 13 pauses in the answer of 10 tokens
    arrangement = replace(PLAIN, sequence_length=length, answers=AnswerPauses("uniform", 1.3))
    if fits:
        data = SupervisedWindows([example], arrangement, seed=0, task="t")
        assert all(data[number]["loss_mask"].sum() == 11 for number in range(9))
        return
    with pytest.raises(DataError) as caught:
        SupervisedWindows([example], arrangement, seed=0, task="t")
    assert "example long: expected at most 10 target tokens beside 18 pauses (13 in the answer)" in str(caught.value)
    assert "lower finetune.pauses or finetune.answer_rate" in str(caught.value)
    with pytest.raises(DataError, match=r"expected at most 0 target tokens .* lower finetune\.pauses or pause\.run$"):
        replace(arrangement, answers=AnswerPauses("every", 0.1, run=3)).check(example)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("outside", ConfigError, "expected gaps from 1 to"),
        ("floats", ConfigError, "expected an array of integers with one axis, got float64"),
        ("many", DataError, r"beside 50\d pauses \(500 in the answer\)"),
        ("missing", ConfigError, "expected one of uniform"),
    ],
)
def test_a_policy_of_the_users_is_checked_before_work_starts(policy, error, message):
    with pytest.raises(error, match=message):
        summarize(windows(AnswerPauses(f"{__name__}:{policy}", 0.1)))


def test_samples_are_shown_with_the_pauses_of_their_answers(tmp_path):
    from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
    from pause_megatron.tasks.synthetic.base import write_tokenizer
    from pause_megatron.train.finetune import show_window

    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = [np.array(tokenizer.encode(text), dtype=np.int32) for text in ("01", "101=")]
    example = EncodedExample("x", ids[0], np.append(ids[1], np.int32(tokenizer.eod)))
    pause_ids = range(tokenizer.pause_id, tokenizer.pause_id + 1)
    data = SupervisedWindows(
        [example], Arrangement(32, range(2, 3), pause_ids, answers=AnswerPauses("isolated", 1.0)), seed=0, task="t"
    )
    shown = show_window(collate([data[0]], sample_ids=[0], pause_ids=pause_ids), tokenizer)
    prefix, bracket, target = shown.partition("[[")
    assert bracket and prefix.count("<pause>") == 2 and target.count("<pause>") == ids[1].size
    assert target.replace("<pause>", "") == "101=]]"
