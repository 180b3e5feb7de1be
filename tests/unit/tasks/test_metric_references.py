"""The metrics agree with others' implementations of them, on answers and on adversarial edits of these.

lm-eval's own functions where it has the task; SQuAD's and CoQA's published rules, written down once more, otherwise.
"""

from __future__ import annotations

import ast
import json
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
from datasets import Dataset
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.filters.extraction import RegexFilter
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.hellaswag.utils import preprocess

from pause_megatron.data.text.shard_file import ShardFile
from pause_megatron.tasks import METRICS, load_task, read_examples
from pause_megatron.tasks.transforms import without_markers

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
RECORDS = 250

EDITS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: "",
    lambda text: " \t",
    str.upper,
    str.title,
    lambda text: f"the {text}",
    lambda text: f"An {text}, a",
    lambda text: f'"{text}".',
    lambda text: f"“{text}”",
    lambda text: f"  {text}\u00a0\u2009 ",
    lambda text: text.replace(" ", "  \n "),
    lambda text: text.replace(" ", "-"),
    lambda text: text.replace(" ", ""),
    lambda text: " ".join(text.split()[::-1]),
    lambda text: " ".join(text.split()[:-1]),
    lambda text: f"{text} {text}",
    lambda text: text.replace("e", "é").replace("I", "İ").replace("ss", "ß"),
    lambda text: re.sub(r"\d", lambda found: chr(0x0660 + int(found.group())), text),
    lambda text: re.sub(r"(\d)(\d{3})\b", r"\1,\2", text),
    lambda text: f"a.the,an {text} thea",
    lambda text: "the",
    lambda text: f"{text}s",
)


def predictions(answers: list[str], seed: int) -> Iterator[tuple[int, str]]:
    """Every edit of every answer, and another record's answer, with the number of the record."""
    others = random.Random(seed).sample(answers, len(answers))
    for number, (answer, other) in enumerate(zip(answers, others, strict=True)):
        yield number, other
        yield from ((number, edit(answer)) for edit in EDITS)


# SQuAD v1.1's evaluation script and CoQA's, as their rules were published.


def squad_normal_form(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.UNICODE)
    return " ".join(text.split())


def squad_exact(prediction: str, references: list[str]) -> float:
    return max(float(squad_normal_form(prediction) == squad_normal_form(reference)) for reference in references)


def squad_f1(prediction: str, references: list[str]) -> float:
    scores = []
    for reference in references:
        left, right = squad_normal_form(prediction).split(), squad_normal_form(reference).split()
        same = sum(min(left.count(word), right.count(word)) for word in set(left))
        if same == 0:
            scores.append(0.0)
            continue
        precision, recall = same / len(left), same / len(right)
        scores.append((2 * precision * recall) / (precision + recall))
    return max(scores)


def coqa_pair_f1(reference: str, prediction: str) -> float:
    left, right = squad_normal_form(reference).split(), squad_normal_form(prediction).split()
    if not left or not right:
        return float(left == right)
    same = sum((Counter(left) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(right), same / len(left)
    return (2 * precision * recall) / (precision + recall)


def test_squad_metrics_follow_the_published_rules(record_folder):
    examples = read_examples(load_task("squad"), "eval", str(record_folder / "squad"), RECORDS)
    count = 0
    for number, prediction in predictions([example.references[0] for example in examples], seed=1):
        references = examples[number].references
        assert METRICS["exact_match"].per_record(prediction, references) == squad_exact(prediction, references)
        assert METRICS["f1"].per_record(prediction, references) == pytest.approx(
            squad_f1(prediction, references), abs=1e-12
        )
        count += 1
    assert count >= 20 * len(examples) > 0


@pytest.fixture(scope="module")
def coqa_scores() -> Callable[[list[str], str], dict[str, float]]:
    """lm-eval's leave-one-out for CoQA.

    Its module imports a part of transformers that version 5 no longer has (two functions, of SQuAD's rules), so its
    functions are read from its file and get these rules as they stand above.
    """
    source = (LM_EVAL_TASKS / "coqa" / "utils.py").read_text(encoding="utf-8")
    functions = ast.Module([node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)], [])
    rules = SimpleNamespace(
        compute_exact=lambda reference, prediction: int(squad_exact(prediction, [reference])), compute_f1=coqa_pair_f1
    )
    names: dict = {"squad_metrics": rules}
    exec(compile(functions, "coqa", "exec"), names)
    return names["compute_scores"]


def test_coqas_f1_and_exact_match_are_lm_evals(record_folder, coqa_scores):
    examples = read_examples(load_task("coqa"), "eval", str(record_folder / "coqa"))
    examples = examples[:: max(1, len(examples) // RECORDS)]
    assert len(examples) >= 25 and all(len(example.references) >= 4 for example in examples)
    for number, prediction in predictions([example.references[0] for example in examples], seed=2):
        everyone = examples[number].references
        for references in (everyone, everyone[:1], everyone[:2]):
            theirs = coqa_scores(list(references), prediction)
            for name, metric in (("f1", "coqa_f1"), ("em", "coqa_exact_match")):
                ours = METRICS[metric].per_record(prediction, references)
                assert ours == pytest.approx(theirs[name], abs=1e-12)


def nq_normal_form(text: str) -> str:
    """The open Natural Questions' published rules: NFD, then as SQuAD."""
    return squad_normal_form(unicodedata.normalize("NFD", text))


def test_natural_questions_exact_match_follows_its_own_rules(record_folder):
    examples = read_examples(load_task("natural_questions"), "eval", str(record_folder / "nq_open"), RECORDS)
    answers = [example.references[0].replace("e", "é").replace("o", "o\u0308") for example in examples]
    for number, prediction in predictions(answers, seed=4):
        references = (answers[number], *examples[number].references)
        for form in ("NFC", "NFD", "NFKC"):
            said = unicodedata.normalize(form, prediction)
            expected = any(nq_normal_form(said) == nq_normal_form(reference) for reference in references)
            assert METRICS["nq_exact_match"].per_record(said, references) == expected


# GSM8K: lm-eval's filters and exact match, with the settings of its own file.

NUMBER_EDITS: tuple[Callable[[str], str], ...] = (
    lambda number: f"#### {number}",
    lambda number: f"So it is {number}.\n#### {number}.",
    lambda number: f"#### {int(number.replace(',', '')):,}",
    lambda number: f"#### -{number}",
    lambda number: f"#### {number}.00",
    lambda number: f"#### 0{number}",
    lambda number: f"#### {number}0",
    lambda number: f"####{number}",
    lambda number: f"### {number}",
    lambda number: f"#### ${number}",
    lambda number: f"The answer is ${number}.",
    lambda number: f"The answer is {number} dollars, and not 17",
    lambda number: f"It is {number} ...",
    lambda number: f"#### {number}\n\nQ: next\n#### 3",
    lambda number: f"#### 3\n#### {number}",
    lambda number: f"{number}",
    lambda number: f"-${number}",
    lambda number: f"1.2.{number}",
    lambda number: f"{number}%",
    lambda number: f"#### {number} apples",
    lambda number: "#### ",
    lambda number: "#### .",
    lambda number: "none",
    lambda number: "",
    lambda number: "#### ١٢",
)


@pytest.mark.parametrize(
    ("metric", "filter_name"), [("final_number", "strict-match"), ("final_number_flexible", "flexible-extract")]
)
def test_final_numbers_are_lm_evals_up_to_spelling(record_folder, metric, filter_name):
    """Where lm-eval says right, so do we. Where only we do, the number is the same but written another way: lm-eval
    compares characters ("18.00" is not "18")."""
    config = load_yaml(LM_EVAL_TASKS / "gsm8k" / "gsm8k.yaml")
    steps = next(entry["filter"] for entry in config["filter_list"] if entry["name"] == filter_name)
    pick = RegexFilter(**{key: value for key, value in steps[0].items() if key != "function"})
    settings = {
        key: config["metric_list"][0][key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")
    }
    examples = read_examples(load_task("gsm8k"), "eval", str(record_folder / "gsm8k"), RECORDS)
    agreements = 0
    for example in examples:
        number = example.references[0].split("#### ")[1]
        for prediction in (*(edit(number) for edit in NUMBER_EDITS), example.target, example.target[:-1]):
            found = pick.apply([[prediction]], [{}])[0][0]
            theirs = exact_match_hf_evaluate([found], [example.references[0]], **settings)["exact_match"]
            ours = METRICS[metric].per_record(prediction, example.references)
            if ours != theirs:
                assert ours == 1.0, (prediction, found)
                assert _value(found) == _value(number), (prediction, found)
            else:
                agreements += 1
    assert agreements > 0.8 * len(examples) * len(NUMBER_EDITS)


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[$,]", "", text).rstrip("."))
    except InvalidOperation:
        return None


# Option scoring: lm-eval's task objects themselves, on the same records.


def lm_eval_task(name: str, records: list[dict], metrics: list[str]) -> ConfigurableTask:
    """lm-eval's task as its file declares it, with these records in place of the hub's."""
    config = dict(load_yaml(LM_EVAL_TASKS / name / f"{name}.yaml"))
    config.pop("dataset_path")
    config |= {"training_split": None, "metric_list": [{"metric": metric} for metric in metrics]}
    config["custom_dataset"] = lambda **_: {"validation": Dataset.from_list(records)}
    return ConfigurableTask(config=config)


@pytest.mark.parametrize("name", ["piqa", "hellaswag"])
def test_choices_and_their_accuracy_are_lm_evals(record_folder, name):
    [file] = (record_folder / name).glob("validation.jsonl*")
    records = [json.loads(line) for _, line in zip(range(RECORDS), ShardFile(file).lines(), strict=False)]
    examples = read_examples(load_task(name), "eval", str(record_folder / name), RECORDS, from_start=True)
    judge = lm_eval_task(name, records, ["acc", "acc_norm", "acc_bytes"])
    rng = random.Random(3)
    for example, document in zip(examples, judge.validation_docs(), strict=True):
        theirs = judge.doc_to_choice(document)
        assert example.prompt == judge.doc_to_text(document).rstrip()
        assert example.choices == tuple(f" {choice.strip()}" for choice in theirs)
        if any(choice != choice.strip() for choice in theirs):
            continue  # we do not count white space around a choice, lm-eval does
        for _ in range(4):
            # About -1 nat a character, so that the three ways of comparing differ; sometimes an exact tie.
            values = [-len(choice) * rng.uniform(0.9, 1.1) for choice in theirs]
            values = values if rng.random() < 0.8 else [values[0]] * len(values)
            scores = judge.process_results(document, [(value, False) for value in values])
            for ours, their in (("", "acc"), ("_norm", "acc_norm"), ("_bytes", "acc_bytes")):
                metric = METRICS[f"choice_accuracy{ours}"].per_record
                assert metric(values, example.choices, example.gold) == scores[their]


def test_hellaswag_markers_go_as_in_lm_eval(record_folder):
    texts = [
        example.prompt
        for example in read_examples(load_task("hellaswag"), "eval", str(record_folder / "hellaswag"), 300)
    ]
    marked = [
        edit(text)
        for text in texts
        for edit in (
            lambda text: text.replace(". ", " [title] ", 1),
            lambda text: text.replace(". ", ". [step] ", 1),
            lambda text: f"[header] {text} [title] then [substeps]",
            lambda text: f"{text}  [a [b] c]   [",
            lambda text: f"\n{text}\n[\n] ",
        )
    ]
    assert [without_markers(text) for text in marked] == [preprocess(text).strip() for text in marked]


def test_exact_match_on_nq_is_lm_evals_for_plain_edits(record_folder):
    """lm-eval takes articles away only as it lists them and before punctuation, and keeps white space as it is; on
    edits that do not touch these, both agree."""
    settings = load_yaml(LM_EVAL_TASKS / "nq_open" / "nq_open.yaml")["metric_list"][0]
    settings = {key: settings[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    examples = read_examples(load_task("natural_questions"), "eval", str(record_folder / "nq_open"), 400)
    edits = (
        lambda text: text,
        lambda text: f"the {text}",
        lambda text: f"{text}.",
        lambda text: f"{text} x",
        str.swapcase,
    )
    others = random.Random(4).sample(examples, len(examples))
    compared = 0
    for example, other in zip(examples, others, strict=True):
        for prediction in (*(edit(example.references[0]) for edit in edits), other.references[0]):
            if re.search(r"\b(THE|AN|A|tHE|aN)\b", prediction):
                continue
            theirs = max(
                exact_match_hf_evaluate([prediction], [reference], **settings)["exact_match"]
                for reference in example.references
            )
            assert METRICS["exact_match"].per_record(prediction, example.references) == theirs, prediction
            compared += 1
    assert compared >= 5 * len(examples)


def test_last_word_on_passages(record_folder):
    """The rule once more: the first word written, less what is no letter or digit at its ends, is the last word."""

    def bare(word: str) -> str:
        while word and not word[0].isalnum():
            word = word[1:]
        while word and not word[-1].isalnum():
            word = word[:-1]
        return word

    examples = read_examples(load_task("lambada"), "eval", str(record_folder / "lambada"))
    for example in examples:
        word = example.references[0]
        for prediction in (
            word,
            f" {word}, he said",
            f"“{word}”",
            f"{word}\n\nx",
            word.upper(),
            f"{word}s",
            "",
            "...",
            f"x {word}",
        ):
            expected = bool(prediction.split()) and bare(prediction.split()[0]) == bare(word) != ""
            assert METRICS["last_word"].per_record(prediction, example.references) == float(expected)
