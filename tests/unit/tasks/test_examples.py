"""What tasks give: every record, the invariants that later stages rely on, and each transform."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import METRICS, answer_in, fingerprint, load_task, read_examples, sample, task_names

MADE = {
    "commonsense_qa": {"train": 60, "eval": 16},
    "coqa": {"train": 13, "eval": 33},
    "gsm8k": {"train": 40, "eval": 24},
    "hellaswag": {"train": 8, "eval": 16},
    "lambada": {"train": 12, "eval": 40},
    "natural_questions": {"train": 12, "eval": 24},
    "piqa": {"train": 12, "eval": 24},
    "squad": {"train": 18, "eval": 20},
    "web_questions": {"train": 12, "eval": 20},
}
REAL = {
    "commonsense_qa": {"train": 9741, "eval": 611},
    "coqa": {"eval": 4019},
    "gsm8k": {"train": 7473, "eval": 660},
    "hellaswag": {"eval": 5021},
    "lambada": {"eval": 2577},
    "natural_questions": {"train": 8755, "eval": 1805},
    "piqa": {"train": 16113, "eval": 919},
    "squad": {"train": 8088, "eval": 5285},
    "web_questions": {"train": 3778, "eval": 1016},
}


def write_records(folder: Path, name: str, records: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def test_the_nine_tasks_ship():
    assert task_names() == tuple(sorted(MADE)) == tuple(sorted(REAL))


@pytest.mark.parametrize("name", sorted(MADE))
def test_every_record_is_an_example(record_folder, task_records, name):
    """And each example's own target is a right answer by the task's primary metric, if that judges text; but for a few
    answers that hold the text which ends an answer (one of natural_questions has line ends)."""
    task = load_task(name)
    judge = METRICS[task.primary]
    unanswerable = 0
    for split, count in (MADE if record_folder == task_records else REAL)[name].items():
        examples = read_examples(task, split, str(record_folder / task.folder))
        assert len(examples) == count == len({example.id for example in examples})
        for example in examples:
            assert example.prompt == example.prompt.rstrip() != ""
            assert example.target[0] == " " and example.target[1:] == example.target.strip() != ""
            cut = any(mark in example.target for mark in task.decoding.stop)
            unanswerable += cut
            if judge.reads == "text" and name != "coqa" and not cut:
                answer = answer_in(example.target, task.decoding.stop)
                assert judge.per_record(answer, example.references) == 1.0, (answer, example.references)
            if example.choices:
                assert example.choices[example.gold] == example.target
                likeliest = [0.0 if index == example.gold else -1000.0 for index in range(len(example.choices))]
                assert METRICS["choice_accuracy"].per_record(likeliest, example.choices, example.gold) == 1.0
    assert unanswerable == (name == "natural_questions")


def test_reading_tasks_imports_no_torch_and_no_datasets(task_records):
    code = (
        "import sys; from pause_megatron.tasks import *\n"
        "read_examples(load_task('gsm8k'), 'eval', sys.argv[1], 3)\n"
        "print({'torch', 'datasets', 'numpy', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(task_records / "gsm8k")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_limit_is_a_sample_and_counts_examples(task_records):
    task = load_task("coqa")
    folder = str(task_records / "coqa")
    everything = read_examples(task, "eval", folder)
    for limit in (1, 12, 13, 100):
        assert read_examples(task, "eval", folder, limit) == sample(everything, limit)
        assert read_examples(task, "eval", folder, limit, from_start=True) == everything[:limit]
    with pytest.raises(ConfigError, match=r"task\.limit: expected at least 1, got 0"):
        read_examples(task, "eval", folder, 0)


def test_the_fingerprint_sees_every_field(task_records):
    examples = read_examples(load_task("piqa"), "eval", str(task_records / "piqa"), 5)
    known = {fingerprint(examples), fingerprint(examples[:4]), fingerprint(examples[::-1])}
    first = examples[0]
    for change in (
        {"id": "x"},
        {"prompt": "x"},
        {"target": " x"},
        {"references": ("x",)},
        {"choices": first.choices[::-1]},
        {"gold": 1 - first.gold},
    ):
        known.add(fingerprint([replace(first, **change), *examples[1:]]))
    assert len(known) == 9
    assert fingerprint(examples) == fingerprint(iter(examples)) and fingerprint(examples).startswith("xxh3_128:")


def test_plain_and_compressed_files_are_one(tmp_path):
    records = [{"question": f"{n}?", "answer": [f"ä {n}"]} for n in range(3)]
    plain = write_records(tmp_path / "plain", "validation.jsonl", records)
    packed = tmp_path / "packed"
    packed.mkdir()
    packed.joinpath("validation.jsonl.gz").write_bytes(gzip.compress(plain.joinpath("validation.jsonl").read_bytes()))
    marked = tmp_path / "marked"  # a byte order mark, a blank line, no last newline, Windows' line ends
    marked.mkdir()
    lines = "\r\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    marked.joinpath("validation.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    task = load_task("natural_questions")
    assert len({fingerprint(read_examples(task, "eval", str(folder))) for folder in (plain, packed, marked)}) == 1


STORY = {
    "story": "A cat sat. ",
    "questions": ["Who?", "What did it do?", "Sure?"],
    "answers": {"input_text": ["a cat", "sat", "yes"], "answer_start": [0, 0, 0], "answer_end": [1, 1, 1]},
}


@pytest.mark.parametrize(
    "record",
    [
        {**STORY, "additional_answers": [["cat", "A cat"], ["it sat", "sat down"], ["Yes", "yes"]]},
        {
            **STORY,
            "questions": {"input_text": STORY["questions"], "turn_id": [1, 2, 3]},
            "additional_answers": {
                "0": {"input_text": ["cat", "it sat", "Yes"]},
                "1": {"input_text": ["A cat", "sat down", "yes"]},
            },
        },
    ],
    ids=["per turn", "per human"],
)
def test_a_story_becomes_its_turns(tmp_path, record):
    folder = write_records(tmp_path, "validation.jsonl", [record])
    first, second, third = read_examples(load_task("coqa"), "eval", str(folder))
    assert (first.id, first.prompt, first.target) == ("1.1", "A cat sat.\n\nQ: Who?\nA:", " a cat")
    assert second.prompt == "A cat sat.\n\nQ: Who?\nA: a cat\nQ: What did it do?\nA:"
    assert third.prompt == f"{second.prompt} sat\nQ: Sure?\nA:"
    assert (third.id, third.references) == ("1.3", ("yes", "Yes", "yes"))  # humans who agree stay two


def test_a_story_with_one_human(tmp_path):
    folder = write_records(tmp_path, "train.jsonl", [STORY])
    assert [example.references for example in read_examples(load_task("coqa"), "train", str(folder))] == [
        ("a cat",),
        ("sat",),
        ("yes",),
    ]


def test_raw_hellaswag_records_lose_their_markers(tmp_path):
    record = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Heat the oven. [step] Wait.",
        "ctx_b": "then you",
        "endings": ["eat [title] Clean up.", " sing  loud.", "[substeps] stir.", "go."],
        "label": "2",
    }
    folder = write_records(tmp_path, "validation.jsonl", [record])
    (example,) = read_examples(load_task("hellaswag"), "eval", str(folder))
    assert example.prompt == "Baking: How to bake. Heat the oven. Wait. Then you"
    assert example.choices == (" eat. Clean up.", " sing loud.", " stir.", " go.")
    assert (example.gold, example.target, example.references) == (2, " stir.", ("stir.",))


def test_the_last_word_is_split_off_at_any_white_space(tmp_path):
    folder = write_records(tmp_path, "test.jsonl", [{"text": "All the power\n\nof “Power "}])
    (example,) = read_examples(load_task("lambada"), "eval", str(folder))
    assert (example.prompt, example.target, example.references) == ("All the power\n\nof", " “Power", ("“Power",))


def test_braces_in_a_record_stay_braces(tmp_path):
    folder = write_records(
        tmp_path, "test.jsonl", [{"question": "{answer} {0} {{x}} %s?", "answer": "{question} #### 1"}]
    )
    (example,) = read_examples(load_task("gsm8k"), "eval", str(folder))
    assert example.prompt == "Question: {answer} {0} {{x}} %s?\nAnswer:"
    assert example.target == " {question} #### 1"


def test_records_through_datasets(tmp_path):
    """`datasets` gives the examples that the file gives (it reads a folder as it reads the hub); and without network
    the error says what to do. In a process of its own: `datasets` reads its environment when it is imported."""
    records = [
        {"id": str(n), "context": "Paris is old.", "question": f"{n}?", "answers": {"text": ["Paris", "old"][: n + 1]}}
        for n in range(2)
    ]
    folder = write_records(tmp_path / "squad", "validation.jsonl", records)
    code = (
        "import sys; from pause_megatron.errors import DataError; from pause_megatron.tasks import *\n"
        "task = load_task('squad')\n"
        "there = task.model_copy(update={'dataset': task.dataset.model_copy(update={'path': sys.argv[1]})})\n"
        "print(fingerprint(read_examples(there, 'eval')))\n"
        "try: read_examples(task, 'eval')\n"
        "except DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, check=True
    )
    first, message = done.stdout.strip().split("\n")
    assert first == fingerprint(read_examples(load_task("squad"), "eval", str(folder)))
    assert message.startswith("the dataset rajpurkar/squad (split validation) cannot be read from the Hugging Face Hub")
    assert message.endswith("validation.jsonl.gz): task.path=DIR, or --task-path ROOT with ROOT/squad/")


def test_a_split_that_is_not_there(tmp_path):
    folder = write_records(tmp_path, "other.jsonl", [{"text": "a b"}])
    with pytest.raises(DataError, match=r"no eval split of lambada: expected test\.jsonl or .*, got other\.jsonl$"):
        read_examples(load_task("lambada"), "eval", str(folder))
    with pytest.raises(DataError, match="expected a folder with the records of lambada"):
        read_examples(load_task("lambada"), "eval", str(tmp_path / "nowhere"))


def test_train_records_may_be_called_train(tmp_path):
    """LAMBADA is finetuned on its development passages; a folder's train.jsonl serves too."""
    folder = write_records(tmp_path, "train.jsonl", [{"text": "one two"}])
    assert read_examples(load_task("lambada"), "train", str(folder))[0].target == " two"
    write_records(tmp_path, "validation.jsonl", [{"text": "one three"}])
    assert read_examples(load_task("lambada"), "train", str(folder))[0].target == " three"
