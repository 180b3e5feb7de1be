"""Grids: errors that name the line, cells that are shared, fingerprints that depend only on content."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.small_grid import GRID, write_grid

from pause_megatron.config.identity import ADDED_KEYS
from pause_megatron.config.keys import keys
from pause_megatron.config.load import load
from pause_megatron.config.model_schema import ModelSection
from pause_megatron.config.presets import fill_sizes, flops_per_token
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.cell import INPUT, OUTPUT, SCORES
from pause_megatron.experiment.extra import spend as spend_extra
from pause_megatron.experiment.grid import CellGraph, expand
from pause_megatron.experiment.inputs import TaskRecords, assumed_inputs
from pause_megatron.experiment.load import dump_grid, load_grid, recipe_names
from pause_megatron.experiment.models import resolve_models
from pause_megatron.experiment.report.published import published
from pause_megatron.experiment.schema import Extra


@pytest.fixture
def small(tmp_path):
    return write_grid(tmp_path / "grid.yaml")


def plan_of(path, *overrides: str) -> CellGraph:
    grid = load_grid(path, overrides=overrides)
    return expand(grid, assumed_inputs(grid))


def by_name(plan: CellGraph) -> dict[str, str]:
    return {cell.name: cell.fingerprint for cell in plan.cells}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("limit: 8", "limt: 8", r":LINE: unknown key 'evaluate.limt'. Did you mean 'limit'\?"),
        ("pauses: [3]", "pausses: [3]", r":LINE: unknown key 'tasks.web_questions.pausses'. Did you mean 'pauses'\?"),
        ("pauses: [3]", "pauses: []", r":LINE: tasks.web_questions.pauses: expected a list with at least 1 item"),
        ("pauses: [3]", "pauses: [many]", r":LINE: tasks.web_questions.pauses.0: expected .*, got 'many'"),
        ("seeds: [1]", "seeds: 1", r":LINE: seeds: expected a list, got 1"),
        (
            "finetune: standard",
            "finetune: none",
            r":LINE: variants.StdPT_StdFT.finetune: expected 'standard' or 'pauses'",
        ),
        ("model: StdPT, finetune: pauses", "model: StdTP, finetune: pauses", r":LINE: .*Did you mean 'StdPT'\?"),
        ("variants: [StdPT_PauseFT]", "variants: [StdPT_PausFT]", r":LINE: .*Did you mean 'StdPT_PauseFT'\?"),
        ("recipe: tiny-std", "", r":LINE: models.StdPT: expected recipe or config, one of them"),
        ("recipe: tiny-std", "recipe: tiny-sdt", r"models.StdPT: --recipe: .*Did you mean 'tiny-std'\?"),
        ("model.layers: 2", "model.layer: 2", r"models.StdPT: .*unknown key 'model.layer'"),
        ("optim.lr: 1e-3", "optim.lr: fast", r"tasks.web_questions: .*optim.lr: expected a number"),
    ],
)
def test_a_wrong_grid_names_the_line_and_what_was_meant(tmp_path, old, new, message):
    assert old in GRID
    path = write_grid(tmp_path / "grid.yaml", GRID.replace(old, new, 1))
    line = GRID[: GRID.index(old)].count("\n") + 1 - (not new)  # a missing key is at the group that lacks it
    with pytest.raises(ConfigError, match=message.replace("LINE", str(line))):
        plan_of(path)


def test_null_leaves_a_row_out():
    whole = load_grid(recipe="methods-tiny")
    part = load_grid(recipe="methods-tiny", overrides=["variants.DIT=null", "variants.DIT_PT=null", "models.DIT=null"])
    assert part == whole.model_copy(
        update={
            "models": {name: row for name, row in whole.models.items() if name != "DIT"},
            "variants": {name: row for name, row in whole.variants.items() if name not in ("DIT", "DIT_PT")},
        }
    )
    with pytest.raises(ConfigError, match=r"variants.DIT_PT.model: expected .*, got 'DIT'"):
        load_grid(recipe="methods-tiny", overrides=["models.DIT=null"])
    with pytest.raises(ConfigError, match=r"methods-tiny.yaml: baseline: .*, got 'StdPT_StdFT', the default"):
        load_grid(recipe="methods-tiny", overrides=["variants.StdPT_StdFT=null"])


@pytest.fixture(scope="module")
def paper() -> CellGraph:
    """The cells of the paper's experiment: 1645 of them."""
    grid = load_grid(recipe="paper-1b")
    return expand(grid, assumed_inputs(grid))


@pytest.mark.parametrize("recipe", recipe_names())
def test_shipped_experiments_load_and_dump_loads_back(recipe, tmp_path):
    grid = load_grid(recipe=recipe)
    assert load_grid(write_grid(tmp_path / "again.yaml", dump_grid(grid))) == grid


def test_the_large_experiments_differ_only_in_size():
    large, small = (load_grid(recipe=f"paper-{size}").model_dump_json() for size in ("1b", "130m"))
    for old, new in (("paper-1b", "paper-130m"), ("paper_1b", "paper_130m"), ("1B", "130M")):
        large = large.replace(old, new)
    assert large == small


@pytest.mark.parametrize("recipe", ["tiny", "paper-1b"])
def test_inputs_come_first_and_no_folder_is_used_twice(recipe, paper):
    grid = load_grid(recipe=recipe)
    plan = paper if recipe == "paper-1b" else expand(grid, assumed_inputs(grid))
    seen: set[str] = set()
    for cell in plan.cells:
        assert cell.input is None or cell.input.fingerprint in seen
        seen.add(cell.fingerprint)
    assert len({cell.folder_name for cell in plan.cells}) == len(plan.cells)
    four = {"StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT"}
    assert four < set(grid.variants) and len({(p.variant, p.task) for p in plan.points}) >= 4 * len(grid.tasks)


def test_the_grids_of_methods_share_the_baselines_cells_and_name_what_was_published():
    tiny, methods = (load_grid(recipe=name) for name in ("tiny", "methods-tiny"))
    known, cells = by_name(expand(tiny, assumed_inputs(tiny))), by_name(expand(methods, assumed_inputs(methods)))
    shared = set(known) & set(cells)
    assert {"pretrain-StdPT", "pretrain-PausePT", "evaluate-StdPT-squad-m0-s1-at0"} < shared
    assert all(known[name] == cells[name] for name in shared)
    assert set(published().methods) == {"CYB", "DIT", "EveryK", "Looped"} < set(methods.variants)
    for name in ("methods-130m", "methods-1b"):
        grid = load_grid(recipe=name)
        everywhere = {row: variant.model_copy(update={"tasks": None}) for row, variant in grid.variants.items()}
        assert everywhere == {row: each.model_copy(update={"tasks": None}) for row, each in methods.variants.items()}
        assert grid.models.keys() == methods.models.keys()
        tokens = {run.config.train.tokens for run in resolve_models(grid, 32_000).values()}
        assert len(tokens) == 1  # equal raw tokens


def test_values_of_answers_are_computed_between_pretraining_and_finetuning(tmp_path):
    grid = load_grid(recipe="methods-tiny", overrides=["evaluate.device=cpu", "data.tasks=R"])
    inputs = dataclasses.replace(assumed_inputs(grid), tasks={n: TaskRecords("R", n) for n in grid.tasks})
    cells = {cell.name: cell for cell in expand(grid, inputs).cells}
    (scored,) = (cell for cell in cells.values() if cell.verb == "score")  # one, for three seeds
    tuned = [cell for cell in cells.values() if cell.scores]
    assert [cell.name for cell in tuned] == [f"finetune-StdPT-squad-m0-scored-0_2-loss-s{seed}" for seed in (1, 2, 3)]
    for cell in tuned:
        assert cell.inputs == (cells["pretrain-StdPT"], scored) and f"task.scores={SCORES}" in cell.arguments
    assert scored.name == "score-StdPT-squad-loss" and scored.inputs == (cells["export-StdPT"],)
    assert cells["export-StdPT"].inputs == (cells["pretrain-StdPT"],)
    options = ("--task", "squad", "--kind", "loss", "--task-limit", "2000", "--held-out", "0.05")
    machine = ("--task-path", "R", "--device", "cpu", "--output", OUTPUT, "--overwrite")
    assert scored.arguments == ("--model", INPUT, *options, *machine)
    deciding = dict(zip(options[::2], ["squad", "loss", 2000, 0.05], strict=True))
    assert scored.identity == {"options": deciding, "records": "squad"}
    evaluated = next(cell for cell in cells.values() if cell.verb == "evaluate" and cell.input.input in tuned)
    assert evaluated.arguments[evaluated.arguments.index("--pause-entropy") + 1] == "2.0"
    # What the scoring depends on reaches the finetuning and its evaluation, and no other row.
    for override in ("variants.DIT.scores=entropy", "models.StdPT.set.train.steps=401"):
        other = load_grid(recipe="methods-tiny", overrides=["evaluate.device=cpu", "data.tasks=R", override])
        changed = set(by_name(expand(other, inputs)).values()) - {cell.fingerprint for cell in cells.values()}
        assert not changed & {cell.fingerprint for cell in (*tuned, evaluated, scored)}
        assert len(changed) == (1 + 3 * 3 if "entropy" in override else 1 + 1 + 1 + 9 + 6 * 3)
    wrong = ["variants.DIT.set.finetune.answer_placement=uniform", "variants.DIT.set.task.scores=mine.safetensors"]
    for override, message in zip(
        wrong, ("variants.DIT: tasks.squad: ", r"variants.DIT: .*task.scores in set"), strict=True
    ):
        with pytest.raises(ConfigError, match=message):
            expand(load_grid(recipe="methods-tiny", overrides=[override]), inputs)


def test_a_side_array_is_part_of_a_cell_and_of_no_other(small, tmp_path):
    path = write_grid(tmp_path / "sides.yaml", dump_grid(load_grid(small)))
    plain = by_name(plan_of(path))
    grid = load_grid(
        path, overrides=["models.DIT.recipe=tiny-dit", "variants.DIT.model=DIT", "variants.DIT.finetune=pauses"]
    )
    one, two = (
        by_name(expand(grid, dataclasses.replace(assumed_inputs(grid), sides={"loss": digest}))) for digest in "ab"
    )
    assert one["pretrain-DIT"] != two["pretrain-DIT"]
    assert all(plain[name] == one[name] == two[name] for name in plain)


def test_the_papers_grid_is_the_papers(paper):
    grid = load_grid(recipe="paper-1b")
    assert len(grid.tasks) == 9 and len(grid.seeds) == 5
    assert grid.tasks["gsm8k"].pauses == (2, 10, 25, 50)
    assert all(task.pauses == (10, 50) for name, task in grid.tasks.items() if name != "gsm8k")
    # Each model is pretrained once, for all of its variants.
    assert sorted(cell.name for cell in paper.cells if cell.verb == "pretrain") == sorted(
        f"pretrain-{name}" for name in grid.models
    )
    options = {cell.name: cell.arguments for cell in paper.cells if cell.verb == "evaluate"}
    curve = options["evaluate-PausePT-gsm8k-m10-s1-curve0to50"]
    assert curve[curve.index("--pauses") + 1] == "0,2,5,10,25,50"
    filler = options["evaluate-StdPT-gsm8k-m0-s1-filler-curve10to50"]
    assert filler[filler.index("--filler") + 1] == "."


def test_a_variant_decodes_with_pauses_of_its_own(small):
    plain = {cell.name: cell for cell in plan_of(small).cells}
    settings = ["every=4", "after='-$'", "entropy=2", "requests=false", "in_prompt=true", "limit=3"]
    decoded = ["variants.D.model=StdPT", "variants.D.finetune=pauses"]
    plan = plan_of(small, *decoded, *(f"variants.D.inference.decoding.{each}" for each in settings))
    found = {cell.name: cell for cell in plan.cells}
    assert all(found[name].fingerprint == cell.fingerprint for name, cell in plain.items())
    added = [cell for name, cell in found.items() if name not in plain]
    assert added and all(cell.verb == "evaluate" for cell in added)
    given = ("--pause-every", "4", "--pause-after=-$", "--pause-entropy", "2.0")
    given += ("--no-pause-requests", "--pause-limit", "3", "--pause-in-prompt")
    for cell in added:
        start = cell.arguments.index("--pause-every")
        assert cell.arguments[start : start + len(given)] == given
        assert cell.identity["options"]["--pause-requests"] is False
    without = [f"variants.D.inference.decoding.{each}" for each in settings if not each.startswith("entropy")]
    with pytest.raises(ConfigError, match="expected entropy or requests with limit"):
        plan_of(small, *decoded, *without)


def test_equal_cells_are_one(small):
    plan = plan_of(small)
    assert len(plan.cells) == 7  # 1 pretraining; 2 x (finetune, export, evaluate)
    same = plan_of(
        small, "variants.Again.model=StdPT", "variants.Again.finetune=pauses", "variants.Again.about=the same"
    )
    again = [point for point in same.points if point.variant == "Again"]
    # It belongs to no curve, so only its evaluation differs.
    assert len(same.cells) == 8 and len(again) == 1 and again[0].cell.input.fingerprint in by_name(plan).values()


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.batch_size=3",
        "evaluate.device=cuda",
        "finetune.set.batch.micro_size=2",
        "finetune.set.checkpoint.every=7",
        "models.StdPT.set.log.every=5",
        "models.StdPT.set.engine.zero_stage=2",
        "variants.StdPT_StdFT.about=words",
        "name=other",
    ],
)
def test_a_fingerprint_does_not_depend_on_hardware_speed_or_words(small, override):
    assert by_name(plan_of(small, override)) == by_name(plan_of(small))


def test_an_identity_spells_renamed_keys_as_0_1_did(small):
    """A cell that 0.1 computed has the same fingerprint now."""
    cells = plan_of(small, "models.StdPT.set.data.intra_document_masking=true").cells
    configs = [cell.identity["config"] for cell in cells if "config" in cell.identity]
    assert {config["data.documents"] for config in configs} == {"joined", "apart"}
    assert not any("data.intra_document_masking" in config for config in configs)
    assert by_name(plan_of(small, "models.StdPT.set.data.documents=joined")) == by_name(plan_of(small))


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("models.StdPT.set.train.steps=3", {"pretrain", "finetune", "export", "evaluate"}),
        ("finetune.set.optim.lr=2e-3", {"finetune", "export", "evaluate"}),
        ("evaluate.limit=7", {"evaluate"}),
        ("curves=[]", {"evaluate"}),
    ],
)
def test_a_change_reaches_what_depends_on_it_and_nothing_else(small, override, changed):
    before, after = set(by_name(plan_of(small)).values()), by_name(plan_of(small, override))
    assert {name.split("-")[0] for name, fingerprint in after.items() if fingerprint not in before} == changed


def test_a_fingerprint_depends_on_the_data_and_not_on_where_it_lies(small):
    grid = load_grid(small, overrides=["data.prefix=/here/english", "data.tasks=/here"])
    moved = load_grid(small, overrides=["data.prefix=/there/english", "data.tasks=/there"])
    inputs = assumed_inputs(grid)
    there = {name: dataclasses.replace(records, folder="/there") for name, records in inputs.tasks.items()}
    before = by_name(expand(grid, inputs))
    assert by_name(expand(moved, dataclasses.replace(inputs, tasks=there))) == before
    other = expand(grid, dataclasses.replace(inputs, corpus="another text"))
    assert not set(by_name(other).values()) & set(before.values())
    scored = {name: dataclasses.replace(records, evaluation="other") for name, records in inputs.tasks.items()}
    changed = set(by_name(expand(grid, dataclasses.replace(inputs, tasks=scored))).items()) - set(before.items())
    assert {name.split("-")[0] for name, _ in changed} == {"evaluate"}


def test_a_blank_in_the_path_of_the_corpus(small):
    """A list, as in a run's own configuration; the grid is written and read again, and every cell gets it whole."""
    for given in (["my data/en"], [3, "my data/en", 0.5, "b"]):
        grid = load_grid(small, overrides=[f"data.prefix={json.dumps(given)}", "data.tasks=/here"])
        small.with_name("again.yaml").write_text(dump_grid(grid))
        assert load_grid(small.with_name("again.yaml")) == grid
        pretraining = [cell for cell in expand(grid, assumed_inputs(grid)).cells if cell.verb == "pretrain"]
        for cell in pretraining:
            word = next(word for word in cell.arguments if word.startswith("data.prefix="))
            assert load(overrides=[word]).data.prefix == tuple(map(str, given))
        assert pretraining


def test_budgets_make_models_equally_long(tmp_path):
    pause = "  PausePT: {recipe: tiny-pause, set: {train.steps: 90}, budget: {like: StdPT, equal: EQUAL}}\nfinetune:"
    for equal in ("total_tokens", "text_tokens", "flops"):
        text = GRID.replace("finetune:\n", pause.replace("EQUAL", equal) + "\n", 1)
        text = text.replace("train.steps: 2\n", "train.steps: 20000\n")
        models = resolve_models(load_grid(write_grid(tmp_path / "g.yaml", text)), 1000)
        std, pauses = models["StdPT"], models["PausePT"]
        measure = {
            "total_tokens": lambda run: run.config.train.tokens,
            "text_tokens": lambda run: run.config.train.tokens * run.text_share,
            "flops": lambda run: run.config.train.tokens * run.flops_per_token,
        }[equal]
        assert measure(pauses) == pytest.approx(measure(std), rel=1e-5)
        assert std.text_share == 1 and pauses.text_share == pytest.approx(0.9, abs=0.01)
    circle = text.replace("recipe: tiny-std", "recipe: tiny-std\n    budget: {like: PausePT, equal: flops}", 1)
    with pytest.raises(ConfigError, match="StdPT -> PausePT -> StdPT"):
        resolve_models(load_grid(write_grid(tmp_path / "g.yaml", circle)), 1000)


def extra(model, spend: str, pauses: int = 10, vocabulary: int = 0) -> tuple[int | None, float, str]:
    """The chosen size, the factor of training, and the text of an extra after 100 tokens."""
    found = spend_extra(model, Extra(spend=spend, pauses=pauses, prefix_tokens=100), vocabulary)
    return found.keys.get(f"model.{spend}"), found.longer, found.about


def test_ten_pauses_after_100_tokens_cost_about_two_layers_of_24():
    model = fill_sizes(ModelSection(preset="1b", layers=24))
    assert extra(model, "layers")[0] == 26
    assert extra(model, "layers", vocabulary=32_000)[0] in (26, 27)
    assert extra(model, "layers", pauses=50)[0] == pytest.approx(36, abs=1)


def test_every_way_to_spend_pauses_has_the_nearest_flops():
    model = fill_sizes(ModelSection(preset="1b", layers=24))

    def cost(tokens: int, **changes: int) -> int:
        changed = model.model_copy(update=changes)
        return flops_per_token(changed, 32_001, tokens) * tokens

    for spend, step in (("layers", 1), ("ffn", 64), ("loops", 1)):
        for pauses in (10, 50, 200, 20_000):  # the last ones cost attention most of all
            size, longer, about = extra(model, spend, pauses, 32_001)
            wanted = cost(100 + pauses)
            gaps = [abs(cost(100, **{spend: near}) - wanted) for near in (size - step, size, size + step)]
            smallest = getattr(model, spend) + step
            assert longer == 1 and gaps[1] <= gaps[2] and (size == smallest or gaps[1] <= gaps[0])
            assert f"{cost(100, **{spend: size}) / wanted:.3f} of the FLOPs of {pauses} pauses" in about
    ranged = Extra(spend="loops", pauses=50, prefix_tokens=100, loop_layers="8..15")
    found = spend_extra(model, ranged, 32_001)
    assert found.keys == {"model.loops": 3, "model.loop_layers": "8..15"}  # 24 + 2 x 8 layers; 36 are 1.5 times 24
    assert "loops 1 -> 3 of layers 8..15, " in found.about
    gaps = [abs(cost(100, loops=near, loop_layers="8..15") - cost(150)) for near in (2, 3, 4)]
    assert gaps[1] < min(gaps[0], gaps[2])
    with pytest.raises(ConfigError, match=r"model.loop_layers: expected a range .* within 0\.\.23, got '8..24'"):
        spend_extra(model, ranged.model_copy(update={"loop_layers": "8..24"}), 32_001)
    size, longer, _ = extra(model, "training", 10, 32_001)
    assert size is None and longer == pytest.approx(cost(110) / cost(100))


def test_longer_training_multiplies_pretraining_and_finetuning(small):
    spent = [
        "models.StdPT.extra.spend=training",
        "models.StdPT.extra.pauses=50",
        "models.StdPT.extra.prefix_tokens=100",
    ]
    before, after = (
        {cell.verb: cell.estimate for cell in plan_of(small, "models.StdPT.set.train.steps=2000", *more).cells}
        for more in ([], spent)
    )
    ratio = float(after["pretrain"].about.split()[1])
    assert 1.5 < ratio < 1.6
    assert after["pretrain"].flops / before["pretrain"].flops == pytest.approx(ratio, rel=1e-3)
    assert after["finetune"].steps == round(before["finetune"].steps * ratio)


def test_the_old_name_of_extra_layers_is_read_with_a_warning(tmp_path):
    """The same cells, and one way only."""
    spelled = {
        "new": "extra: {spend: layers, pauses: 50, prefix_tokens: 100}",
        "old": "extra_layers: {pauses: 50, prefix_tokens: 100}",
    }
    grids = {key: GRID.replace("recipe: tiny-std", f"recipe: tiny-std\n    {text}", 1) for key, text in spelled.items()}
    new = by_name(plan_of(write_grid(tmp_path / "new.yaml", grids["new"])))
    old = write_grid(tmp_path / "old.yaml", grids["old"])
    with pytest.warns(FutureWarning, match=r"old\.yaml:\d+: models.StdPT: extra_layers is now extra: {spend: layers"):
        assert by_name(plan_of(old)) == new
    both = grids["old"].replace("extra_layers", f"{spelled['new']}\n    extra_layers")
    with pytest.raises(ConfigError, match="got both"):
        plan_of(write_grid(tmp_path / "both.yaml", both))


def test_a_key_at_its_default_leaves_the_identity_as_it_was(small):
    """`ADDED_KEYS` are defaults of the schema; a looped model is another cell."""
    configs = [cell.identity["config"] for cell in plan_of(small).cells if "config" in cell.identity]
    assert configs and not any(set(ADDED_KEYS) & set(config) for config in configs)
    assert {key: keys()[key].default for key in ADDED_KEYS} == ADDED_KEYS
    looped = plan_of(small, "models.StdPT.set.model.loops=3").cells
    assert {cell.identity["config"]["model.loops"] for cell in looped if "config" in cell.identity} == {3}


def test_the_dry_run_lists_cells_steps_flops_and_order(small, capsys):
    from pause_megatron.cli import main

    assert main(["experiment", "run", "--config", str(small), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 7 + 3
    assert out[2].split()[:4] == ["2", "finetune-StdPT-web_questions-m0-s1", "1", "40"]
    assert out[-2] == "7 cells: 1 pretrain, 2 finetune, 2 export-hf, 2 evaluate; 0 done"
    assert main(["experiment", "run", "--config", str(small)]) == 2
    assert "data.prefix: expected the prefix of a prepared corpus" in capsys.readouterr().err


def test_task_files_stand_in_a_grid_by_themselves(tmp_path):
    """The short forms give the cells of the long one; files are relative to the grid, wherever the command runs."""
    (tmp_path / "my-quiz.yaml").write_text("")
    long = GRID.replace("web_questions:", f"my_quiz: {{task: {tmp_path}/my-quiz.yaml, pauses: [3]}}\n  gsm8k:", 1)
    forms = {
        "group": GRID.replace("web_questions:", "my-quiz.yaml: {pauses: [3]}\n  gsm8k:", 1),
        "list": GRID.replace("  web_questions: {pauses: [3]}", "  - my-quiz.yaml\n  - gsm8k", 1),
    }
    expected = load_grid(write_grid(tmp_path / "long.yaml", long))
    for name, text in forms.items():
        path = write_grid(tmp_path / f"{name}.yaml", text)
        given = ["tasks.my_quiz.pauses=[3]", "tasks.gsm8k.pauses=[3]"] if name == "list" else []
        grid = load_grid(path, overrides=given)
        assert grid == expected
        assert load_grid(write_grid(tmp_path / "again.yaml", dump_grid(grid))) == grid
        assert by_name(plan_of(path, *given)) == by_name(plan_of(tmp_path / "long.yaml"))
    grid = load_grid(tmp_path / "list.yaml", overrides=["tasks=[my_tasks:PARITY, gsm8k]"])
    assert {name: task.task for name, task in grid.tasks.items()} == {"PARITY": "my_tasks:PARITY", "gsm8k": None}
    alone = GRID.replace("tasks:\n  web_questions: {pauses: [3]}", "tasks: my-quiz.yaml", 1)
    assert list(load_grid(write_grid(tmp_path / "one.yaml", alone)).tasks) == ["my_quiz"]


@pytest.mark.parametrize(
    ("tasks", "line", "message"),
    [
        ("  - gsm8k\n  - quizz.yaml", 2, r"expected the task file quizz\.yaml in the grid's folder .*, got none"),
        ("  quizz.yaml: {pauses: [3]}", 1, r"or NAME: \{task: PATH\}"),
        ("  - quiz.yaml: {pauses: [3]}", 1, r"write a group instead of the list: tasks: \{gsm8k: \{\}, quiz\.yaml"),
        ("  - 3", 1, r"expected the name or file of a task in the list, got 3"),
        ("  - quiz.yaml\n  - quiz.yml", 2, r"one task named quiz, got two; write OTHER_NAME: \{task: quiz\.yml\}"),
        ("  my-quiz: {pauses: [3]}", 1, r"got 'my-quiz'; to name a task yourself write NAME: \{task: FILE\.yaml\}"),
        ("  quiz.yaml: {pausses: [3]}", 1, r"unknown key 'tasks\.quiz\.pausses'\. Did you mean 'pauses'"),
    ],
)
def test_a_task_file_that_cannot_be_used_says_what_to_write(tmp_path, tasks, line, message):
    for name in ("quiz.yaml", "quiz.yml"):
        (tmp_path / name).write_text("")
    path = write_grid(tmp_path / "grid.yaml", GRID.replace("  web_questions: {pauses: [3]}", tasks, 1))
    start = GRID[: GRID.index("  web_questions")].count("\n")
    with pytest.raises(ConfigError, match=rf"grid\.yaml:{start + line}: .*{message}"):
        load_grid(path)


def test_a_task_file_in_a_variant_is_refused_with_its_name(tmp_path):
    text = GRID.replace("finetune: standard", "finetune: standard, tasks: [web-questions.yaml]", 1)
    with pytest.raises(ConfigError, match=r"expected the task's name in this grid \(web_questions\), got 'web-q"):
        load_grid(write_grid(tmp_path / "grid.yaml", text))


def test_the_number_of_pauses_is_chosen_on_the_held_out_part_of_train(small):
    """A variant with one M_ft and one M_inf has nothing to choose; its cells stay as they were."""
    alone, several = plan_of(small), plan_of(small, "tasks.web_questions.pauses=[3,5]")
    assert not any(point.held_out for point in alone.points)
    chosen = {point.m_ft: point.held_out for point in several.points if point.variant == "StdPT_PauseFT"}
    assert {"3", "5"} == chosen.keys() and all(chosen.values())
    [point] = [each for each in several.points if each.variant == "StdPT_PauseFT" and each.m_ft == "5"]
    held = point.held_out
    assert held.input is point.cell.input and held.name.endswith("-held-out") and held in several.cells
    given = dict(zip(held.arguments[::2], held.arguments[1::2], strict=True))
    assert (given["--split"], given["--held-out"], given["--pauses"]) == ("held-out", "0.05", "5")
    assert not any(each.held_out for each in several.points if each.variant == "StdPT_StdFT")
    names = by_name(several)
    for other in ("evaluate.select=eval", "finetune.set.task.held_out=0.0"):
        changed = plan_of(small, "tasks.web_questions.pauses=[3,5]", other)
        assert not any(each.held_out for each in changed.points)
        same = {name for name, mark in by_name(changed).items() if names[name] == mark}
        assert ("select" not in other) == any(name.startswith("finetune") and name not in same for name in names)
