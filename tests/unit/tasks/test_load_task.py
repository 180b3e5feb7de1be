"""Tasks by name, by file and by 'module:attribute'; and the errors of wrong declarations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml

from pause_megatron.config.text import write_yaml
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import (
    METRICS,
    DeclaredTask,
    Decoding,
    Example,
    FinetuneDefaults,
    Task,
    load_task,
    read_examples,
    register_metric,
    task_names,
)
from pause_megatron.tasks.load import FOLDER

DECLARATION = {
    "kind": "generate",
    "dataset": {"path": "me/mine"},
    "splits": {"eval": "test"},
    "prompt": "{question}",
    "references": "answer",
    "metrics": ["exact_match", "f1"],
    "primary": "f1",
    "decoding": {"max_new_tokens": 8, "stop": ["\n"]},
}


@dataclass(frozen=True)
class Sums:
    """A user's task whose examples are generated."""

    name: str = "sums"
    kind: str = "generate"
    folder: str = "sums"
    metrics: tuple[str, ...] = ("exact_match",)
    primary: str = "exact_match"
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=4))
    finetune: FinetuneDefaults = field(default_factory=FinetuneDefaults)
    prompt: str = "{} + {} ="

    def examples(self, split: str, path: str | None, limit: int | None) -> list[Example]:
        numbers = range(100 if split == "train" else 10)[:limit]
        return [
            Example(id=str(n), prompt=self.prompt.format(n, n), target=f" {2 * n}", references=(str(2 * n),))
            for n in numbers
        ]


SUMS = Sums()
TRAILING = Sums(prompt="{} + {} = ")
UNJUDGED = Sums(metrics=("exact_macht",))


@pytest.mark.parametrize("name", task_names())
def test_declarations_that_ship(name):
    task = load_task(name)
    assert isinstance(task, Task) and task.name == name
    assert task.finetune.pauses in (10, 50)  # what the paper tries
    assert set(task.metrics) <= set(METRICS)
    assert load_task(str(FOLDER / f"{name}.yaml")) == task
    plain = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert plain["kind"] == task.kind  # any YAML reader reads it
    with pytest.raises(Exception, match="frozen"):
        task.name = "x"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"expected one of commonsense_qa, .*, got 'gsm8'\. Did you mean 'gsm8k'\?"):
        load_task("gsm8")


@pytest.mark.parametrize("name", [__name__, "test_load_task"])
def test_an_object_plugs_in(name):
    task = load_task(f"{name}:SUMS")
    assert task.name == "sums"
    assert [example.target for example in read_examples(task, "eval", limit=3)] == [" 0", " 2", " 4"]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Sums", "is a class; name an instance"),
        ("DECLARATION", "lacks name, kind"),
        ("NOTHING", "cannot be imported"),
        ("UNJUDGED", "task .*: metrics: expected .*, got 'exact_macht'. Did you mean 'exact_match'"),
    ],
)
def test_an_object_that_is_no_task(attribute, message):
    with pytest.raises(ConfigError, match=message):
        load_task(f"{__name__}:{attribute}")


def test_the_address_of_0_1_still_loads_with_a_warning():
    """In a process of its own: a module that is imported already warns no more."""
    code = (
        "from pause_megatron.tasks import load_task; old = load_task('pause_megatron.tasks.codewords:CODE_OF_16');"
        "print(old is load_task('pause_megatron.tasks.synthetic.codewords:CODE_OF_16'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True\n"
    assert (
        "FutureWarning: pause_megatron.tasks.codewords is now pause_megatron.tasks.synthetic.codewords" in done.stderr
    )


def test_a_metric_name_belongs_to_one_module():
    def exact_match(prediction: str, references: list[str]) -> float:
        return 0.0

    with pytest.raises(ConfigError, match=r"metric exact_match: expected a new name, got that of pause_megatron\."):
        register_metric()(exact_match)
    assert METRICS["exact_match"].per_record is not exact_match


def test_what_an_object_gives_is_checked():
    with pytest.raises(DataError, match=r"task sums, example 0: expected a prompt that .* does not end in white space"):
        read_examples(TRAILING, "eval")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "quiz.yaml"
    path.write_text(write_yaml(DECLARATION))
    (tmp_path / "test.jsonl").write_text('{"question": "Who?", "answer": "me"}')
    task = load_task(str(path))
    assert (task.name, task.folder, task.target) == ("quiz", "quiz", " {answer}")
    (example,) = read_examples(task, "eval", str(tmp_path))
    assert example == Example(id="1", prompt="Who?", target=" me", references=("me",))
    with pytest.raises(ConfigError, match="task quiz: its dataset me/mine has no split for finetuning"):
        read_examples(task, "train", str(tmp_path))


def test_choices_with_further_accepted_answers(tmp_path):
    """Finetuning learns the right choice, as it will be scored; decoded answers may be any of the references."""
    path = tmp_path / "quiz.yaml"
    choices = {"choices": ["first", "second"], "gold": "label", "metrics": ["exact_match", "choice_accuracy"]}
    path.write_text(write_yaml({**DECLARATION, **choices, "primary": "exact_match"}))
    record = '{"question": "Who?", "first": "you", "second": "me", "label": 1, "answer": ["I", "me"]}'
    (tmp_path / "test.jsonl").write_text(record)
    (example,) = read_examples(load_task(str(path)), "eval", str(tmp_path))
    assert (example.target, example.references) == (" me", ("I", "me"))
    assert (example.choices, example.gold) == ((" you", " me"), 1)


# what is changed, the key whose line is named (None: the file alone), what the error says
WRONG = [
    ({"promt": "x"}, "promt", "unknown key 'promt'. Did you mean 'prompt'?"),
    (
        {"decoding": {"max_new_token": 3}},
        "max_new_token",
        "unknown key 'decoding.max_new_token'. Did you mean 'max_new_tokens'?",
    ),
    (
        {"decoding": {"max_new_tokens": "8"}},
        "max_new_tokens",
        "decoding.max_new_tokens: input should be a valid integer, got '8'",
    ),
    ({"decoding": {"max_new_tokens": 0}}, "max_new_tokens", "input should be greater than or equal to 1, got 0"),
    ({"kind": "guess"}, "kind", "kind: input should be 'generate' or 'choice', got 'guess'"),
    ({"metrics": ["f2"]}, "- f2", "metrics: expected names of exact_match, f1, "),
    ({"transform": "coqua"}, "transform", "got 'coqua'. Did you mean 'coqa'?"),
    ({"prompt": "{question.__class__}"}, "prompt", "prompt: expected the name of a field in braces"),
    ({"prompt": "{question!r}"}, "prompt", "got 'question!r'"),
    ({"prompt": "{question"}, "prompt", "prompt: expected '}' before end of string"),
    ({"prompt": "{answer}"}, "prompt", "it would give the answer away"),
    ({"target": "answer"}, "target", "target: expected {answer} in the target, got 'answer'"),
    ({"name": "x"}, "name", "expected no key 'name', which the file's name gives (quiz)"),
    ({"primary": "coqa_f1"}, None, "primary: expected one of metrics (exact_match, f1), got 'coqa_f1'"),
    ({"kind": "choice"}, None, "kind choice: expected choices and gold"),
    ({"gold": "label"}, None, "choices and gold: expected both or neither"),
    ({"references": None}, None, "references: expected the path of the accepted answers, or choices and gold"),
    ({"metrics": ["f1", "choice_accuracy"]}, None, "choice_accuracy compares choices; expected choices and gold"),
    (
        {"metrics": "choice_accuracy", "primary": "choice_accuracy", "choices": "options", "gold": "label"},
        None,
        "primary: choice_accuracy does not score kind generate",
    ),
]


@pytest.mark.parametrize(("changes", "key", "message"), WRONG)
def test_a_wrong_declaration_is_named(tmp_path, changes, key, message):
    path = tmp_path / "quiz.yaml"
    path.write_text(write_yaml({**DECLARATION, **changes}))
    lines = [line.strip().partition(":")[0] for line in path.read_text().splitlines()]
    with pytest.raises(ConfigError) as caught:
        load_task(str(path))
    where = f"{path}: " if key is None else f"{path}:{lines.index(key) + 1}: "
    assert any(line.startswith(where) and message in line for line in str(caught.value).splitlines()), caught.value


def test_a_key_that_is_not_there(tmp_path):
    path = tmp_path / "quiz.yaml"
    path.write_text(write_yaml({key: value for key, value in DECLARATION.items() if key != "prompt"}))
    with pytest.raises(ConfigError, match=r"quiz\.yaml: expected the key 'prompt', got none"):
        load_task(str(path))
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        load_task("nowhere.yaml")
    assert DeclaredTask.model_fields.keys() >= DECLARATION.keys()
