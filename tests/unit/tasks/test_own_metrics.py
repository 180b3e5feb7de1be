"""Metrics of one's own: where they are found, what they read, their scores, and the digest of their code."""

from __future__ import annotations

import functools

import pytest
from unit.tasks.test_load_task import DECLARATION

from pause_megatron.config.text import write_yaml
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.tasks import METRICS, load_task, metrics_of, register_metric
from pause_megatron.tasks.metrics.own import _DIGESTS, checked, code_digest, reads_of

MODULE = "def right(prediction, references):\n    return prediction in references\n"
CHOICES = {"kind": "choice", "choices": ["a", "b"], "gold": "label", "references": None, "decoding": None}


@pytest.fixture
def declare(tmp_path):
    """Writes a task file with a metric, and its module; returns the file."""

    def write(metric: str = "mine:right", module: str = MODULE, folder: str = "task", **changes: object):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "mine.py").write_text(module)
        keys = {**DECLARATION, "metrics": [metric], "primary": metric, **changes}
        (place / "quiz.yaml").write_text(write_yaml({key: value for key, value in keys.items() if value is not None}))
        return str(place / "quiz.yaml")

    return write


def test_a_metric_beside_the_file_needs_no_working_folder(declare):
    task = load_task(declare())
    metric = METRICS["mine:right"]
    assert task.primary == "mine:right" and metric.reads == "text"
    assert [metric.per_record(text, ["yes"]) for text in ("yes", "no")] == [1.0, 0.0]


def test_a_metric_in_the_working_folder(declare, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    load_task(declare("theirs:right"))
    assert METRICS["theirs:right"].per_record("yes", ["yes"]) == 1.0


def test_two_folders_may_have_modules_of_one_name(declare):
    tasks = load_task(declare()), load_task(declare(module=MODULE.replace("in", "not in"), folder="other"))
    one, other = (metrics_of(task)["mine:right"] for task in tasks)  # both files are loaded before one is scored
    assert (one.per_record("yes", ["yes"]), other.per_record("yes", ["yes"])) == (1.0, 0.0)
    assert one.code != other.code


def test_a_module_named_like_a_library_hides_nothing(declare, tmp_path):
    import statistics

    path = declare("statistics:right")
    (tmp_path / "task" / "statistics.py").write_text(MODULE)
    load_task(path)
    import statistics as again

    assert again is statistics and METRICS["statistics:right"].per_record("yes", ["yes"]) == 1.0


def test_a_choice_metric_and_a_choice_task_without_decoding(declare):
    module = "def margin(log_likelihoods, choices, gold, least=0.5):\n    return log_likelihoods[gold] > -least\n"
    task = load_task(declare("mine:margin", module, **CHOICES))
    assert METRICS["mine:margin"].reads == "choices" and METRICS["mine:margin"].per_record([-0.1], ["x"], 0) == 1.0
    assert task.decoding.max_new_tokens == 1


@pytest.mark.parametrize(
    ("metric", "module", "message"),
    [
        ("absent:right", MODULE, r"expected the module absent in .*task or .* or on PYTHONPATH, got none"),
        ("mine:rihgt", MODULE, r"mine\.py: expected 'rihgt' in the module, got none\. Did you mean 'right'\?"),
        ("mine:right", "right = 3", r"mine:right: expected a function, got 3"),
        ("mine:right", "class right:\n    pass", r"expected a function, got the class right"),
        (
            "mine:right",
            "\ndef right(a, b): ...",
            r"mine\.py:2: expected the parameters \(prediction, references\) or .*",
        ),
        ("mine:right", "def right(prediction, references, k): ...", r"mine\.py:1: .*got \(prediction, references, k\)"),
        ("mine:right", "def right(:", r"mine\.py:1: cannot be imported \(SyntaxError"),
        ("mine:right", "\nimport nowhere_at_all", r"mine\.py: cannot be imported \(No module named 'nowhere_at_all'\)"),
        ("mine:right", "\n1 / 0", r"mine\.py:2: cannot be imported \(ZeroDivisionError"),
        ("mine:right", "import sys\nsys.exit(3)", r"mine\.py:2: cannot be imported \(SystemExit: 3\)"),
        ("mine:", MODULE, r"expected 'module:attribute', got 'mine:'"),
        ("os:system", MODULE, r"expected the parameters"),
    ],
)
def test_a_metric_that_cannot_be_used_names_its_place(declare, metric, module, message):
    path = declare(metric, module)
    with pytest.raises(ConfigError, match=rf"quiz\.yaml:\d+: metrics: .*{message}"):
        load_task(path)


def test_a_text_metric_without_decoding_and_a_metric_of_the_other_kind(declare):
    with pytest.raises(
        ConfigError, match=r"expected the key 'decoding', got none \(mine:right reads a decoded answer\)"
    ):
        load_task(declare(decoding=None))
    with pytest.raises(ConfigError, match="primary: mine:right does not score kind choice"):
        load_task(declare(kind="choice", choices=["a", "b"], gold="label"))


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "0.5", None, [1.0]])
def test_a_score_outside_its_range_names_function_and_arguments(value):
    def mine(prediction, references):
        return value

    line = mine.__code__.co_firstlineno
    with pytest.raises(DataError, match=rf"test_own_metrics\.py:{line}: metric mine: expected a number in \[0, 1\]"):
        checked(mine, "mine")("yes", ["no"])


def test_an_error_inside_a_metric_names_its_line():
    def mine(prediction, references):
        return references[7]

    line = mine.__code__.co_firstlineno + 1
    with pytest.raises(DataError, match=rf"py:{line}: metric mine: expected a score, got IndexError: .* for \('yes', "):
        checked(mine, "mine")("yes", ["no"])


def test_the_digest_follows_the_code_and_what_it_imports(declare, tmp_path):
    load_task(declare())
    first = METRICS["mine:right"].code
    load_task(declare())
    assert METRICS["mine:right"].code == first
    load_task(declare(module=MODULE + "# changed\n"))
    assert METRICS["mine:right"].code not in ("", first)
    digests = set()
    for number in range(2):
        folder = tmp_path / f"with_helper{number}"
        folder.mkdir()
        (folder / f"helper{number}.py").write_text(f"LEAST = {number}\n")
        module = f"import helper{number}\n{MODULE}"
        load_task(declare(module=module, folder=folder.name))
        digests.add(METRICS["mine:right"].code)
        (folder / f"helper{number}.py").write_text("LEAST = 3\n")
        _DIGESTS.clear()
        digests.add(METRICS["mine:right"].code)
    assert len(digests) == 4
    assert all(METRICS[name].code == "" for name in ("exact_match", "choice_accuracy"))


def test_functions_without_a_file_have_a_digest():
    found = {}
    for body in ("1.0", "0.0"):
        exec(f"def mine(prediction, references): return {body}", space := {})
        found[body] = code_digest(space["mine"])
    assert len(set(found.values())) == 2
    partial = functools.partial(checked, name="x")
    assert code_digest(partial) == code_digest(functools.partial(checked, name="x"))
    assert reads_of(functools.partial(lambda prediction, references, k: k, k=1), "p") == "text"


def test_what_a_registered_metric_reads_is_checked():
    with pytest.raises(ConfigError, match="register_metric: reads: expected 'text' or 'choices', got 'txt'"):
        register_metric(reads="txt")
