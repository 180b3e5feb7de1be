"""Records that are not as declared: the error names file, line, field, the expected and the given value."""

from __future__ import annotations

import copy
import gzip
import json

import pytest

from pause_megatron.errors import DataError
from pause_megatron.tasks import load_task, read_examples

GOOD = {
    "gsm8k": {"question": "How many?", "answer": "1 + 1 = 2\n#### 2"},
    "squad": {"context": "Paris is old.", "question": "What is old?", "answers": {"text": ["Paris"]}},
    "coqa": {
        "story": "A cat sat.",
        "questions": ["Who?", "Sure?"],
        "answers": {"input_text": ["a cat", "yes"]},
        "additional_answers": [["cat"], ["Yes"]],
    },
    "commonsense_qa": {
        "question": "Where?",
        "choices": {"label": ["A", "B"], "text": ["here", "there"]},
        "answerKey": "B",
    },
    "piqa": {"goal": "Sit", "sol1": "on it", "sol2": "under it", "label": 0},
    "lambada": {"text": "one two three"},
    "hellaswag": {"activity_label": "X", "ctx_a": "One", "ctx_b": "two", "endings": ["a", "b"], "label": "1"},
    "web_questions": {"question": "who?", "answers": ["me", "I"]},
    "natural_questions": {"question": "who", "answer": ["me"]},
}
ABSENT = object()

# task, path of the field, what stands there instead, what the error says
BAD = [
    ("gsm8k", "answer", ABSENT, "expected the field 'answer', got the fields question"),
    ("gsm8k", "question", 3.5, "field 'question': expected a text, got 3.5"),
    ("gsm8k", "question", "\n ", "field 'question': expected a text that is not empty, got '\\n '"),
    ("gsm8k", "question", "x\ud800", "field 'question': expected characters (half of a UTF-16 pair at 1)"),
    ("squad", "answers", ["Paris"], "field 'answers': expected an object with the field 'text', got list ['Paris']"),
    ("squad", "answers.text", ABSENT, "expected the field 'answers.text', got the fields in 'answers' none"),
    ("squad", "answers.text", [], "field 'answers.text': expected a text or a list of texts, got list []"),
    ("squad", "answers.text", ["Paris", ""], "field 'answers.text[1]': expected a text that is not empty, got ''"),
    ("squad", "context", None, "field 'context': expected a text, got null"),
    ("coqa", "answers.input_text", ["a cat"], "field 'answers.input_text': expected 2 answers, one per question"),
    ("coqa", "questions", ABSENT, "expected the field 'questions', got the fields story, answers, additional_answers"),
    ("coqa", "additional_answers", [["cat"]], "field 'additional_answers': expected answers for 2 turns"),
    ("coqa", "additional_answers", [["cat"], []], "expected as many answers at every turn"),
    ("coqa", "additional_answers", [["cat"], [""]], "turn 2: field 'answers[0]': expected a text that is not empty"),
    (
        "coqa",
        "additional_answers",
        {"0": {"input_text": ["cat"]}},
        "expected 2 answers of each human, got '1 answers'",
    ),
    ("commonsense_qa", "answerKey", "", "field 'answerKey': expected one of the labels A, B, got ''"),
    ("commonsense_qa", "choices.label", ["A"], "field 'choices.label': expected 2 labels, one per text"),
    ("piqa", "label", -1, "field 'label': expected an index from 0 to 1, got -1"),
    ("piqa", "label", True, "field 'label': expected an index from 0 to 1, got True"),
    ("piqa", "sol2", ABSENT, "expected the field 'sol2', got the fields goal, sol1, label. Did you mean 'sol1'?"),
    ("lambada", "text", "word", "field 'text': expected at least two words, got 'word'"),
    ("hellaswag", "label", "2", "field 'label': expected an index from 0 to 1, got '2'"),
    ("hellaswag", "endings", ["a", "[title]"], "field 'endings[1]': expected a text that is not empty, got ''"),
    ("hellaswag", "ctx_b", None, "field 'ctx_b': expected a text, got null"),
    ("web_questions", "answers", 7, "field 'answers': expected a text or a list of texts, got 7"),
    ("natural_questions", "answer", [["me"]], "field 'answer[0]': expected a text, got list ['me']"),
]


def edited(task: str, path: str, value: object) -> dict:
    record = copy.deepcopy(GOOD[task])
    *parents, name = path.split(".")
    place = record
    for parent in parents:
        place = place[parent]
    place.pop(name)
    if value is not ABSENT:
        place[name] = value
    return record


def split_file(task: str) -> str:
    return f"{load_task(task).splits.eval}.jsonl"


@pytest.mark.parametrize("task", sorted(GOOD))
def test_the_good_records_are_good(tmp_path, task):
    (tmp_path / split_file(task)).write_text(json.dumps(GOOD[task]))
    assert read_examples(load_task(task), "eval", str(tmp_path))


@pytest.mark.parametrize(("task", "path", "value", "message"), BAD)
def test_a_bad_record_is_named(tmp_path, task, path, value, message):
    file = tmp_path / split_file(task)
    file.write_text("\n".join(json.dumps(record) for record in (GOOD[task], edited(task, path, value))))
    with pytest.raises(DataError) as caught:
        read_examples(load_task(task), "eval", str(tmp_path))
    assert str(caught.value).startswith(f"{file}:2") and message in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "expected a JSON object, got b'{' (Expecting property name"),
        (b'["a"]', "expected a JSON object, got b'[\"a\"]'"),
        (b'{"question": "\xff"}', "expected a JSON object, got b'{\"question\": \"\\xff\"}' ('utf-8' codec"),
        (b"[" * 100_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1", "expected a JSON object, got b'version https"),
    ],
)
def test_a_line_that_is_no_record(tmp_path, line, message):
    file = tmp_path / "test.jsonl"
    file.write_bytes(json.dumps(GOOD["gsm8k"]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_examples(load_task("gsm8k"), "eval", str(tmp_path))
    assert str(caught.value).startswith(f"{file}:3: ") and message in str(caught.value), caught.value


def test_a_limit_draws_from_all_records_so_that_a_bad_one_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(GOOD["gsm8k"]) + "\n{")
    with pytest.raises(DataError, match=r"test\.jsonl:2: expected a JSON object"):
        read_examples(load_task("gsm8k"), "eval", str(tmp_path), limit=1)


def test_damaged_and_empty_files(tmp_path):
    whole = gzip.compress((json.dumps(GOOD["gsm8k"]) + "\n").encode() * 1000)
    file = tmp_path / "test.jsonl.gz"
    for data, message in (
        (whole[:-20], "truncated"),
        (b"not gzip", "damaged"),
        (gzip.compress(b"\n\n"), "an empty file"),
    ):
        file.write_bytes(data)
        with pytest.raises(DataError, match=message) as caught:
            read_examples(load_task("gsm8k"), "eval", str(tmp_path))
        assert str(caught.value).startswith(f"{file}: ") and "--damaged-shards" not in str(caught.value)
