"""Properties of the metrics themselves, and what counts as the answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pause_megatron.tasks import METRICS, answer_in

WORDS = st.lists(st.sampled_from(["a", "The", "cat", "Cat!", "sat", "mat.", "on", "7,5", "é"]), max_size=6).map(
    " ".join
)
TEXT_METRICS = [name for name, metric in METRICS.items() if metric.reads == "text"]


@settings(max_examples=100)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_scores_lie_in_the_unit_interval_and_ignore_the_order_of_references(prediction, references, rng):
    shuffled = rng.sample(references, len(references))
    for name in TEXT_METRICS:
        score = METRICS[name].per_record(prediction, references)
        assert isinstance(score, float) and 0 <= score <= 1
        assert METRICS[name].per_record(prediction, shuffled) == pytest.approx(score, abs=1e-12)


@settings(max_examples=100)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_another_reference_never_hurts_a_best_of(prediction, references):
    for name in ("exact_match", "f1", "last_word"):
        more = METRICS[name].per_record(prediction, references)
        assert more >= METRICS[name].per_record(prediction, references[:1])
        assert more == max(METRICS[name].per_record(prediction, [reference]) for reference in references)


@settings(max_examples=200)
@given(st.text("aQ: \n#", max_size=30), st.lists(st.sampled_from(["\n", "Q:", "##", "a"]), max_size=3))
def test_it_does_not_matter_where_generation_stopped(text, stop):
    """Whether it ended with the first stop text, before it, or went on."""
    ends = [(text.find(mark), len(mark)) for mark in stop if mark in text]
    whole = answer_in(text, stop)
    if ends:
        place, length = min(ends)
        assert answer_in(text[:place], stop) == answer_in(text[: place + length], stop) == whole
    assert whole == whole.strip() and not any(mark in whole for mark in stop)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "score"),
    [
        ("exact_match", "The  Beatles!", ["beatles"], 1.0),
        ("exact_match", "", ["the"], 1.0),  # both are empty in normal form, which is SQuAD's rule
        ("f1", "", ["the"], 0.0),  # and so is this
        ("f1", "the black cat", ["a cat", "dog"], 2 / 3),
        ("coqa_f1", "", ["the"], 1.0),
        ("coqa_f1", "black cat", ["cat"], 2 / 3),
        ("coqa_f1", "yes", ["yes", "no", "no", "no"], 0.75),  # right only where "yes" is not left out
        ("coqa_exact_match", "Yes.", ["yes", "no", "no", "no"], 0.75),
        ("coqa_exact_match", "the yes", ["yes"], 1.0),
        ("nq_exact_match", "Beyonce\u0301", ["beyonc\u00e9"], 1.0),
        ("exact_match", "Beyonce\u0301", ["beyonc\u00e9"], 0.0),
        ("final_number", "9 + 9 = 18\n#### 18", ["...\n#### 18"], 1.0),
        ("final_number", "It is 18", ["...\n#### 18"], 0.0),
        ("final_number_flexible", "It is $18.00.", ["...\n#### 18"], 1.0),
        ("final_number", "#### 1,000", ["#### 1000"], 1.0),
        ("final_number", "#### -3", ["#### 3"], 0.0),
        ("final_number", "#### 0.50", ["0.5"], 1.0),
        ("final_number", "#### 5", ["no number"], 0.0),
        ("final_number", "#### 1.2.3", ["#### 1.2.3"], 0.0),
        ("last_word", " signs, he said", ["signs"], 1.0),
        ("last_word", "Signs", ["signs"], 0.0),
        ("last_word", "=signs$”", ["signs"], 1.0),
        ("last_word", "don’t", ["don’t"], 1.0),
        ("last_word", "...", ["..."], 0.0),
    ],
)
def test_scores_by_hand(metric, prediction, references, score):
    assert METRICS[metric].per_record(prediction, references) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "gold"), [("choice_accuracy", 0), ("choice_accuracy_norm", 1), ("choice_accuracy_bytes", 2)]
)
def test_three_ways_of_comparing_choices(metric, gold):
    choices = [" é", " éab", " éééé"]  # 1, 3, 4 characters; 2, 4, 8 bytes
    values = [-1.1, -1.8, -2.41]
    scores = [METRICS[metric].per_record(values, choices, right) for right in range(3)]
    assert [METRICS["choice_accuracy"].per_record(values, choices, right) for right in range(3)] == [1.0, 0.0, 0.0]
    assert sum(scores) == 1.0
    assert scores[gold] == 1.0


@pytest.mark.parametrize("metric", ["choice_accuracy_norm", "choice_accuracy_bytes"])
def test_a_blank_choice_has_no_length_to_divide_by(metric):
    with pytest.raises(ValueError, match="expected choices that are not blank, got choice 1 without a character"):
        METRICS[metric].per_record([-1.0, -2.0], [" yes", "  "], 0)


def test_choices_need_a_log_likelihood_each():
    for values in ([-1.0], [float("nan"), -1.0]):
        with pytest.raises(ValueError, match="expected"):
            METRICS["choice_accuracy"].per_record(values, [" a", " b"], 0)
    assert METRICS["choice_accuracy_norm"].per_record([-2.0, -2.0], [" a", " b"], 0) == 1.0  # the first of equals
