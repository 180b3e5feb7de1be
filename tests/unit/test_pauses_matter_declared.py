"""The derivations of the declared experiment: sizes, steps, digests, the rule of the tuning, the verdict."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from benchmarks.pauses_matter import declaration as declarations
from benchmarks.pauses_matter import results
from benchmarks.pauses_matter.comparison import compare, measured, verdict
from benchmarks.pauses_matter.declaration import SIZES, Declaration, committed, read
from benchmarks.pauses_matter.report import comparison_table, settings_table, tuning_table, write_report
from benchmarks.pauses_matter.runs import asked, run_config
from benchmarks.pauses_matter.settings import Plan, overrides, plans, texts

from pause_megatron.config import load
from pause_megatron.config.presets import flops_per_token, parameters
from pause_megatron.errors import ConfigError, DataError

FOLDER = Path(declarations.__file__).parent
STORED = FOLDER.parent / "results" / "pauses-matter"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture(scope="module", params=SHIPPED)
def declared(request):
    return read(request.param)


@pytest.fixture(scope="module")
def codewords() -> Declaration:
    return read("codewords").content


def changed(tmp_path, **values):
    content = yaml.safe_load((FOLDER / "codewords.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "declared.yaml"
    file.write_text(yaml.safe_dump({**content, **values}), encoding="utf-8")
    return file


def lines_of(declaration, digest="d", final=lambda name, seed: 0.5, tuning=lambda name, rate: 0.5):
    common = {"digest": digest, "started": "2026-01-01T00:00:00+00:00", "cpu": 1.0, "seconds": 2.0}
    trained = [name for name, setting in declaration.settings.items() if setting.trained is None]

    def rate_of(name):
        of = declaration.settings[name].trained or name
        return results.best_rate({rate: tuning(of, rate) for rate in declaration.tuning.learning_rates})

    return [
        {
            "phase": "tuning",
            "setting": name,
            "seed": seed,
            "learning_rate": rate,
            "accuracy": tuning(name, rate),
            **common,
        }
        for name in trained
        for seed in declaration.tuning.seeds
        for rate in declaration.tuning.learning_rates
    ] + [
        {
            "phase": "final",
            "setting": name,
            "seed": seed,
            "learning_rate": rate_of(name),
            "accuracy": final(name, seed),
            **common,
        }
        for name in declaration.settings
        for seed in declaration.seeds
    ]


def test_every_control_has_the_subject_s_training_flops(declared):
    content = declared.content
    found = plans(content)
    subject = found[content.subject]
    for name, plan in found.items():
        if content.settings[name].steps == "equal FLOPs":
            batch = load(None, overrides=overrides({**plan.config, "train.steps": 1})).batch.global_size
            assert abs(plan.flops - subject.flops) <= plan.example_flops * batch / 2 + 1, name
        elif name != content.subject:
            assert plan.steps == subject.steps


def test_a_plan_s_numbers_are_those_of_its_configuration(declared, tmp_path):
    content = declared.content
    for plan in plans(content).values():
        config = run_config(content, plan, 1, 0.01, tmp_path)
        vocabulary = texts(content.task, content.tokenizer).vocabulary + config.pause.embeddings
        assert plan.parameters == parameters(config.model, vocabulary)
        assert plan.flops == plan.steps * config.batch.global_size * plan.window * flops_per_token(
            config.model, vocabulary, plan.window
        )
        assert (config.train.steps, config.data.sequence_length) == (plan.steps, plan.window)


def test_equal_sizes_are_the_nearest_that_there_are(declared):
    content = declared.content
    found = plans(content)
    subject = found[content.subject]
    for name, setting in content.settings.items():
        for key, word in setting.config.items():
            if key not in SIZES or word not in ("equal FLOPs", "equal parameters"):
                continue
            value = found[name].config[key]
            config = {**setting.config, key: value - (2 if key == "model.hidden" else 1)}
            if config[key] < 1:
                continue
            smaller = content.model_copy(
                update={"settings": {**content.settings, name: setting.model_copy(update={"config": config})}}
            )
            below = plans(smaller)[name]
            if word == "equal FLOPs":
                distance = abs(found[name].example_flops - subject.example_flops)
                assert distance < abs(below.example_flops - subject.example_flops)
            else:
                assert below.parameters < subject.parameters <= found[name].parameters


def test_tuning_and_final_prompts_are_apart(declared):
    content = declared.content
    tuning, final = ({example.prompt for example in asked(content, phase)} for phase in ("tuning", "final"))
    assert len(final) and len(tuning) and not tuning & final


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": [1, 2, 3, 4]}, "seeds"),
        ({"seeds": [10, 11, 12, 13, 200]}, "none of tuning.seeds, got [200]"),
        ({"left_out": {}}, "expected auxiliary-heads too, or a reason under left_out"),
        ({"subject": "pauses"}, "got 'pauses'"),
        ({"config": {"train.steps": 3}}, "expected no train.steps, the run fills it in, got 3"),
        ({"config": {"model.heads": "equal FLOPs"}}, "model.heads: expected a value"),
        ({"other": 1}, "other"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(values, message, tmp_path):
    file = changed(tmp_path, **values)
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(file) in str(caught.value) and message in str(caught.value)


def test_results_of_another_declaration_are_refused(tmp_path, codewords):
    one, other = read("codewords").digest, read(changed(tmp_path, chance=0.2)).digest
    file = tmp_path / "results.jsonl"
    results.append(file, lines_of(codewords, digest=one)[:2])
    assert len(results.read_results(file, one)) == 2
    with pytest.raises(ConfigError, match=r"results.jsonl:1: expected runs of the declaration with sha256"):
        results.read_results(file, other)


def test_a_declaration_must_be_committed_before_its_final_runs(tmp_path):
    file = tmp_path / "declared.yaml"
    file.write_text("a: 1\n", encoding="utf-8")
    assert committed(file) is None

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    with pytest.raises(ConfigError, match="expected a file that is committed before its final runs"):
        committed(file)
    git("add", ".")
    git("commit", "-m", "declared", "--date", "2026-01-02T03:04:05+00:00")
    assert committed(file) == "2026-01-02T03:04:05+00:00"
    file.write_text("a: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"declared\.yaml: expected a file that is committed"):
        committed(file)


def test_the_tuning_takes_the_best_mean_and_of_ties_the_smaller_rate(codewords):
    assert results.best_rate({0.003: 0.7, 0.01: 0.9, 0.03: 0.9}) == 0.01
    lines = lines_of(codewords, tuning=lambda name, rate: rate if name == "longer" else 0.5)
    rates = results.chosen(codewords, lines)
    assert rates["longer"] == rates["filler-at-inference"] == 0.03
    assert {
        rate for name, rate in rates.items() if codewords.settings[name].trained != "longer" and name != "longer"
    } == {0.003}
    with pytest.raises(
        DataError, match=r"expected a tuning run of \(setting, rate, seed\) \('distinct-vectors', 0.003, 200\)"
    ):
        results.chosen(codewords, lines[1:])


def test_only_missing_runs_are_made(codewords):
    declared = read("codewords")
    lines = lines_of(codewords, tuning=lambda name, rate: rate == 0.01)
    assert not results.tuning_jobs(declared, lines) and not results.final_jobs(declared, lines)
    kept = [line for line in lines if (line["phase"], line["setting"], line["seed"]) != ("final", "wider", 12)]
    (job,) = results.final_jobs(declared, kept)
    assert (job.phase, job.setting, job.seed, job.learning_rate) == ("final", "wider", 12, 0.01)


def plan_of_size(size):
    return Plan({}, 1, size, 1, 1, 1)


def test_the_verdict_names_every_control_that_is_not_passed():
    values = {
        "subject": [0.95, 0.96, 0.94, 0.95, 0.96],
        "low": [0.5, 0.52, 0.49, 0.51, 0.5],
        "equal": [0.95, 0.95, 0.95, 0.96, 0.94],
        "large": [0.99, 0.98, 0.99, 0.99, 0.98],
        "same": [0.95, 0.96, 0.94, 0.95, 0.96],
    }
    found = {name: measured(of, 1000) for name, of in values.items()}
    sizes = {"subject": 100, "low": 100, "equal": 105, "large": 106, "same": 100}
    comparisons = compare("subject", found, {name: plan_of_size(size) for name, size in sizes.items()})
    low, equal, large, same = comparisons
    assert low.passed and low.p_value < 0.001 and low.difference == pytest.approx(0.448)
    assert not (equal.passed or large.passed or same.passed)
    assert (equal.same_size, large.same_size) == (True, False) and same.p_value == 1
    assert "every control: no; not against equal, large, same." in verdict(comparisons, 5, 5)
    assert "same size: no; not against equal, same." in verdict(comparisons, 5, 5)
    assert "every control: yes" in verdict([low], 5, 5)
    assert verdict([low], 4, 5) == "**Undecided: 4 of 5 declared seeds.**"
    assert all(0 < one.low < one.high < 1 for one in found.values())
    with pytest.raises(DataError, match="two seeds or more, got 1"):
        measured([0.5], 1000)


def test_the_report_shows_digest_times_and_every_setting(tmp_path, codewords):
    declared = read("codewords")
    sizes = {name: plan_of_size(100) for name in codewords.settings}
    for name, setting in codewords.settings.items():
        sizes[name].config.update({key: value if key not in SIZES else 9 for key, value in setting.config.items()})

    def accuracy(name, seed):
        return 0.9 + seed / 1000 if name == codewords.subject else 0.4 + (seed % 3) / 100

    lines = lines_of(codewords, digest=declared.digest, final=accuracy)
    write_report(
        declared, sizes, lines, tmp_path, committed="2025-12-31T00:00:00+00:00", command="python x", machine="a machine"
    )
    text = (tmp_path / "codewords.md").read_text(encoding="utf-8")
    assert "**Survives every control: yes.**" in text and declared.digest in text
    assert "committed 2025-12-31T00:00:00+00:00, first final run 2026-01-01T00:00:00+00:00" in text
    assert all(f"| {name} |" in text for name in codewords.settings)
    assert "Left out: auxiliary-heads" in text and "(ffn 9)" in text
    assert (tmp_path / "codewords.png").stat().st_size > 10_000
    assert "Not shown to be declared before" not in text
    write_report(
        declared, sizes, lines, tmp_path, committed="2026-01-02T00:00:00+00:00", command="python x", machine="a machine"
    )
    assert "Not shown to be declared before" in (tmp_path / "codewords.md").read_text(encoding="utf-8")


def test_lines_are_read_once_each_and_a_cut_one_is_run_again(tmp_path, codewords):
    file, lines = tmp_path / "codewords.jsonl", lines_of(codewords)
    results.append(file, lines)
    with file.open("a") as stream:
        stream.write('{"phase": "fin')
    assert results.read_results(file, "d") == lines == results.read_results(file, "d")
    results.append(file, lines[-1:])
    with pytest.raises(DataError, match=rf"codewords.jsonl:{len(lines) + 1}: expected one line of each run"):
        results.read_results(file, "d")


def test_a_run_of_another_learning_rate_does_not_count(codewords):
    lines = lines_of(codewords)
    other = {**lines[-1], "learning_rate": 0.03, "accuracy": 1.0}
    assert results.final_values(codewords, [*lines, other]) == results.final_values(codewords, lines)


@pytest.mark.parametrize("name", [path.stem for path in sorted(STORED.glob("*.jsonl"))])
def test_the_page_shows_what_the_stored_runs_of_a_declaration_give(name):
    declared = read(name)
    content, page = declared.content, (STORED / f"{name}.md").read_text(encoding="utf-8")
    lines = results.read_results(STORED / f"{name}.jsonl", declared.digest)
    found, numbers = results.found(content, lines), plans(content)
    comparisons = compare(content.subject, found, numbers)
    tables = (
        verdict(comparisons, len(content.seeds), len(content.seeds)),
        settings_table(declared, numbers, found, results.chosen(content, lines)),
        comparison_table(comparisons, content.subject),
        tuning_table(declared, lines),
    )
    assert all(line in page for table in tables for line in table.splitlines())
    assert declared.digest in page and len(found[content.subject].values) == len(content.seeds)
