"""The report of a real, finished experiment (tests/assets/finished): its files, pages, and `experiment diff`."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
import tarfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from pause_megatron.cli import main
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.experiment.declared import Declaration, DeclaredRun, declare, read_declaration
from pause_megatron.experiment.grid import expand
from pause_megatron.experiment.inputs import assumed_inputs
from pause_megatron.experiment.load import load_grid
from pause_megatron.experiment.provenance import StartsFile, keep_declaration, record_start
from pause_megatron.experiment.report import tables
from pause_megatron.experiment.report.choice import EVALUATION, HELD_OUT, choose
from pause_megatron.experiment.report.collect import collect
from pause_megatron.experiment.report.compare import summarise
from pause_megatron.experiment.report.data_files import COLUMNS
from pause_megatron.experiment.report.findings import findings_of
from pause_megatron.experiment.report.flips import find_outcomes, flips, mcnemar, read_records
from pause_megatron.experiment.report.head import settings_table
from pause_megatron.experiment.report.methods import methods_table
from pause_megatron.experiment.report.published import published
from pause_megatron.experiment.stored import PlanFile

ASSET = Path(__file__).resolve().parents[2] / "assets" / "finished" / "opposites.tar.gz"


def unpack(folder: Path) -> Path:
    with tarfile.open(ASSET) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def report(root) -> Path:
    words = ["experiment", "report", str(root / "exp"), "--output", str(root / "out")]
    assert main([*words, "--task-path", str(root / "records")]) == 0
    return root / "out"


def rows(report: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((report / name).read_text().splitlines()))


def answers(root: Path, label: str) -> dict[str, float]:
    cell, _, pauses = label.partition("@")
    (path,) = (root / "exp" / "cells").glob(f"{cell}/results/samples/*-m{pauses}-*.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return {line["id"]: line["scores"]["exact_match"] for line in lines}


def test_every_number_is_in_csv_and_json_with_documented_columns(root, report):
    summary = json.loads((report / "summary.json").read_text())
    assert summary["columns"] == COLUMNS
    for name, columns in COLUMNS.items():
        assert list(rows(report, name)[0]) == list(columns)
    seeds = rows(report, "seeds.csv")
    assert len(seeds) == len(summary["seeds"]) == 15  # 4 own numbers of pauses and one of a curve, 3 seeds each
    for row in seeds:
        folder = root / "exp" / "cells" / row["cell"] / "results"
        lines = [json.loads(line) for line in (folder / "samples" / row["samples"]).read_text().splitlines()]
        value = 100 * sum(line["scores"]["exact_match"] for line in lines) / len(lines)
        assert float(row["value"]) == pytest.approx(value)
        assert 0 <= float(row["low"]) <= value <= float(row["high"]) <= 100 and float(row["high"]) > float(row["low"])
    for row in rows(report, "scores.csv"):
        of_seeds = [float(s["value"]) for s in seeds if all(s[k] == row[k] for k in ("variant", "m_ft", "m_inf"))]
        assert float(row["value"]) == pytest.approx(sum(of_seeds) / 3)
    chosen = [row for row in rows(report, "scores.csv") if row["chosen_from"] == "2"]
    assert {row["m_ft"] for row in chosen} == {"3", "6"} and {row["chosen_on"] for row in chosen} == {
        "evaluation records"
    }
    best = max(chosen, key=lambda row: float(row["value"]))
    assert [row["main"] for row in chosen if row is not best] == ["False"] and best["main"] == "True"


def test_comparisons_are_corrected_for_their_number(report):
    filler, pauses = sorted(rows(report, "comparisons.csv"), key=lambda row: row["variant"])
    assert (filler["variant"], pauses["variant"]) == ("Filler", "StdPT_PauseFT")
    smaller, larger = sorted((filler, pauses), key=lambda row: float(row["p"]))
    assert float(smaller["p_holm"]) == pytest.approx(min(1.0, 2 * float(smaller["p"])))
    for row in (filler, pauses):
        assert float(row["p"]) == max(float(row["p_records"]), float(row["p_seeds"]))
        assert row["supported"] == str(float(row["p_holm"]) < 0.05)
    assert float(larger["p_holm"]) >= float(smaller["p_holm"])


def test_flips_are_those_of_the_answers_on_disk(root, report):
    assert len(rows(report, "flips.csv")) == 6
    for row in rows(report, "flips.csv"):
        before, after = answers(root, row["baseline_cell"]), answers(root, row["variant_cell"])
        gained = sum(after[name] > before[name] for name in before)
        lost = sum(after[name] < before[name] for name in before)
        assert (int(row["gained"]), int(row["lost"])) == (gained, lost)
        assert float(row["p_mcnemar"]) == pytest.approx(mcnemar(gained, lost))
        assert int(row["gained"]) + int(row["lost"]) + int(row["same_right"]) + int(row["same_wrong"]) == 48


def test_the_head_names_program_machine_files_and_settings(root, report):
    page = (report / "index.html").read_text()
    summary = json.loads((report / "summary.json").read_text())["provenance"]
    digest = hashlib.sha256((root / "exp" / "grid.yaml").read_bytes()).hexdigest()
    assert summary["grid_sha256"] == digest and digest in page
    assert "pause-megatron experiment run --config grid.yaml" in page and "AMD EPYC" in page
    assert "torch 2.13.0" in page and "deepspeed 0.19.8" in page and "megatron-core 0.16.1" in page
    assert "nothing: the runs were chosen freely" in page and "optim.lr" in page
    for fingerprint in (*summary["records"].values(), *summary["corpora"].values()):
        assert fingerprint.startswith("xxh3_128:") and fingerprint in page


def test_rows_of_other_methods_stand_beside_what_their_papers_report(root, report, tmp_path):
    assert "it reports" not in (report / "index.html").read_text()
    assert json.loads((report / "summary.json").read_text())["methods"] == {}
    for name in ("grid.yaml", "plan.json"):  # the same cells, of a row that is named as a method
        (tmp_path / name).write_text((root / "exp" / name).read_text().replace("Filler", "DIT"))
    (tmp_path / "cells").symlink_to(root / "exp" / "cells")
    assert main(["experiment", "report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    (row,) = re.findall(r"<tr><th scope=row>DIT</th><td>DIT, arXiv:2506.03616</td>.*?</tr>", page)
    (found,) = (each for each in rows(report, "comparisons.csv") if each["variant"] == "Filler")
    assert "+4.7 points on GSM8K" in row and f"WebQuestions {float(found['difference']):+.1f} (" in row
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["methods"].keys() == {"DIT"}
    every = methods_table(["CYB", "Other", "EveryK"], {}, "StdPT_StdFT", published())
    assert "no figure known here" in every and "3 times the data" in every and "Other" not in every


def test_settings_tell_methods_apart():
    keys = [{"pause.placement": "uniform"}, {"objective.name": "anytime", "pause.run": 2, "pause.placement": "every"}]
    cells = {
        name: SimpleNamespace(name=f"pretrain-{name}", verb="pretrain", identity={"config": config})
        for name, config in zip("ab", keys, strict=True)
    }
    points = [SimpleNamespace(variant=f"Row{name}", cell=name) for name in "aba"]
    experiment = SimpleNamespace(cells=cells, points=points, lineage=lambda name: name)
    both = settings_table(experiment)
    assert "<th scope=row>pretrain-<wbr>a</th><td>Rowa</td><td>1</td>" in both and "<td>Rowb</td>" in both
    assert all(text in both for text in ("objective.name", "anytime", "pause.run", "pause.placement", "every"))
    cells.pop("b")
    assert "pause.placement" not in settings_table(experiment)


def test_the_page_is_self_contained_accessible_and_links_to_cells(root, report):
    page = (report / "index.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script src" not in page
    assert page.count("<img ") == page.count("<figcaption>") == len(re.findall(r'<img alt="[^"]{40,}"', page)) >= 4
    assert page.count("<table") == page.count("<div class=scroll role=region aria-label=Table tabindex=0><table")
    assert "biased upwards" in page and "± " not in page and "2 comparisons" in page
    links = {target for target in re.findall(r'href="([^"#]+)"', page)}
    assert len([target for target in links if "/cells/" in target]) == 31 and "pairs/Filler-web_questions.html" in links
    assert all((report / target).exists() for target in links)


def test_a_page_shows_flipped_answers_with_prompts_and_references(report):
    page = (report / "pairs" / "Filler-web_questions.html").read_text()
    assert "what is the opposite of" in page and "Right → wrong" in page and "McNemar" in page
    assert "not shown" not in page and (report / "pairs" / "../index.html").exists()


def test_diff_compares_any_two_evaluations(root, capsys):
    experiment = str(root / "exp")
    cells = ["evaluate-StdPT-web_questions-m6-s1@0", "evaluate-StdPT-web_questions-m6-s1@6"]
    assert (
        main(["experiment", "diff", experiment, *cells, "--examples", "1", "--task-path", str(root / "records")]) == 0
    )
    text = capsys.readouterr().out
    assert "exact_match: 48 records" in text and "McNemar's exact p" in text and text.count("record ") <= 2
    assert "Question: " in text and "references: " in text
    with pytest.raises(DataError, match=r"expected a number of pauses at inference, one of @0, @6, got none"):
        find_outcomes(root / "exp", "evaluate-StdPT-web_questions-m6-s1-curve")
    with pytest.raises(DataError, match=r"expected one folder that begins with 'evaluate', got .*, .*, "):
        find_outcomes(root / "exp", "evaluate")
    with pytest.raises(DataError, match=r"expected a cell of evaluate, got one of export-hf"):
        find_outcomes(root / "exp", "export-StdPT-web_questions-m6-s1")


def test_prompts_of_other_records_are_not_shown(root, tmp_path):
    outcomes = find_outcomes(root / "exp", "evaluate-StdPT-web_questions-m0-s1-at0")
    assert len(read_records(outcomes, str(root / "records")).examples) == 48
    other = tmp_path / "webquestions"
    other.mkdir()
    text = (root / "records" / "webquestions" / "test.jsonl").read_text()
    (other / "test.jsonl").write_text(text.replace("opposite", "contrary"))
    assert "are others than were evaluated" in read_records(outcomes, str(tmp_path)).missing
    assert "DataError" in read_records(outcomes, str(tmp_path / "nowhere")).missing
    assert flips(outcomes, outcomes).p_value == 1.0


def test_the_choice_is_made_on_held_out_records_where_all_candidates_have_them(root, tmp_path):
    collected = collect(root / "exp")
    summaries = summarise(collected.scores)
    key = ("StdPT_PauseFT", "web_questions")
    free = choose(collected, summaries)[key]
    assert free.biased and free.records == EVALUATION and free.chosen.value == max(free.values)
    # On held-out records the other one is better.
    own = [score for score in collected.scores if score.variant == key[0] and score.own]
    held = tuple(dataclasses.replace(score, value=0.5 + 0.1 * (score.m_ft != free.chosen.m_ft)) for score in own)
    choice = choose(dataclasses.replace(collected, held_out=held), summaries)[key]
    assert choice.records == HELD_OUT and not choice.biased and choice.chosen.m_ft != free.chosen.m_ft
    html = tables.choice_table({key: choice}, published())
    assert "held-out part of train" in html and "60.0" in html and "biased" not in html
    # With a seed missing, nothing is chosen there.
    fewer = choose(dataclasses.replace(collected, held_out=held[1:]), summaries)[key]
    assert fewer.records == EVALUATION and fewer.chosen == free.chosen


def test_an_experiment_of_an_earlier_version_has_a_report(tmp_path):
    """Without origin.json and starts.json, and with samples gone: what is known is shown."""
    root = unpack(tmp_path)
    for path in (*root.rglob("origin.json"), *root.rglob("starts.json"), *root.glob("exp/cells/*/results/samples/*l")):
        path.unlink()
    words = ["experiment", "report", str(root / "exp"), "--output", str(root / "out")]
    assert main(words) == 0
    page = (root / "out" / "index.html").read_text()
    assert "command not recorded" in page and "machine" in page
    assert findings_of(root / "exp").comparisons == {} and not list(root.glob("out/pairs/*"))


def declared(root: Path) -> Declaration:
    plan = PlanFile.read(root / "exp")
    cell = {
        point.cell: json.loads((root / "exp" / "cells" / point.cell / "cell.json").read_text()) for point in plan.points
    }
    return Declaration(
        runs=tuple(
            DeclaredRun(variant=p.variant, task=p.task, m_ft=p.m_ft, seed=p.seed, cell=cell[p.cell]["fingerprint"])
            for p in plan.points
        )
    )


def test_a_report_says_whether_the_runs_are_those_declared(tmp_path):
    root = unpack(tmp_path)
    declaration = declared(root)
    path = root / "mine.yaml"
    path.write_text(json.dumps(declaration.model_dump()))  # JSON is YAML
    keep_declaration(root / "exp", path)
    facts = findings_of(root / "exp").provenance["declared"]
    assert facts["differences"] == [] and facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["at_first_start"] is False  # the asset's start had none
    # A changed declaration is another experiment, and so is none.
    path.write_text(json.dumps(declaration.model_dump() | {"question": "another?"}))
    with pytest.raises(ConfigError, match="expected the file of the earlier start"):
        keep_declaration(root / "exp", path)
    with pytest.raises(ConfigError, match=r"expected the pre-declaration of the earlier start .*, got none"):
        keep_declaration(root / "exp", None)


def test_every_start_of_an_experiment_is_recorded(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("name: a\n")
    for word in ("seeds=[1]", "seeds=[2]"):
        record_start(tmp_path, ["experiment", "run", word], grid)
    first, second = StartsFile.read(tmp_path).starts
    assert (first.command[-1], second.command[-1]) == ("seeds=[1]", "seeds=[2]") and first.begun <= second.begun
    assert first.grid_sha256 == hashlib.sha256(b"name: a\n").hexdigest() and first.declared_sha256 is None
    assert first.origin.packages["torch"] == version("torch") and "cores" in first.origin.machine


def test_runs_beyond_the_declaration_are_named(root):
    declaration = declared(root)
    points = [
        (point, run.cell) for point, run in zip(PlanFile.read(root / "exp").points, declaration.runs, strict=True)
    ]
    fewer = Declaration(runs=declaration.runs[1:])
    assert fewer.differences(points) == ["in the grid, not declared: StdPT_StdFT on web_questions, M_ft=0, seed 1"]
    (missing,) = declaration.differences(points[1:])
    assert missing.startswith("declared, not in the grid: StdPT_StdFT")
    (changed,) = declaration.differences([(points[0][0], "0" * 32), *points[1:]])
    assert changed.startswith("other settings, data or version than declared: StdPT_StdFT")
    names_only = Declaration(runs=tuple(run.model_copy(update={"cell": None}) for run in declaration.runs))
    assert names_only.differences(points) == []


def test_the_declaration_of_a_grid_is_read_back(tmp_path):
    grid = load_grid(recipe="tiny")
    graph = expand(grid, assumed_inputs(grid))
    (tmp_path / "declared.yaml").write_text(declare(graph, "Do pauses: help?"))
    found = read_declaration(tmp_path / "declared.yaml")
    assert found.question == "Do pauses: help?" and len(found.runs) == len(graph.points)
    assert {(run.variant, str(run.m_ft), run.cell) for run in found.runs} == {
        (point.variant, point.m_ft, point.cell.fingerprint) for point in graph.points
    }


def test_a_wrong_declaration_names_file_line_and_field(tmp_path):
    path = tmp_path / "declared.yaml"
    path.write_text("question: q\nruns:\n  - {variant: A, task: t, m_ft: 1, sede: 3}\n")
    with pytest.raises(ConfigError, match=r"declared\.yaml:3: runs\.0\.(seed|sede): expected"):
        read_declaration(path)
