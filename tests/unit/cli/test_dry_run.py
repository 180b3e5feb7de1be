"""`pretrain --dry-run`: the printed arithmetic, where the ranks and the vocabulary come from."""

from __future__ import annotations

import json

import pytest

from pause_megatron.cli import main
from pause_megatron.config.load import recipe_names


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def rows(capsys, *arguments: str) -> dict[str, str]:
    assert main(["pretrain", "--dry-run", *arguments]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    return {name.strip(): value.strip() for name, value in (line.split("  ", 1) for line in lines)}


def test_the_papers_run(capsys):
    table = rows(capsys, "--recipe", "paper-130m", "--world-size", "8")
    assert table["ranks"] == "8 = 8 data parallel x 1 tensor parallel"
    assert table["global batch"] == "512 windows = 16 micro x 4 accumulation x 8 data parallel"
    assert table["window"] == "2,048 tokens, 205 pauses inserted (rate 0.1, uniform, then cut)"
    assert table["pause fraction"] == "9.09% of the input tokens (expected)"
    assert table["raw tokens a step"] == "1,048,576"
    assert table["steps"] == "190,735 for a budget of 200,000,000,000 raw tokens"
    assert table["vocabulary"] == "32,001 = 32,000 text (assumed) + 1 pause"
    assert table["parameters"] == "134,107,392"
    assert table["engine"] == "ZeRO stage 1, bf16"


def test_a_side_array_that_is_not_there(capsys, tmp_path):
    (tmp_path / "c.manifest.json").write_text("{}")
    given = (f"data.prefix={tmp_path}/c", "data.side=score", "pause.placement=scored", "--vocab-size", "8000")
    assert rows(capsys, *given)["not there"] == f"{tmp_path}/c.score.npy (data.side)"
    (tmp_path / "c.score.npy").touch()
    assert "not there" not in rows(capsys, *given)


def test_the_keys_of_a_method_are_shown(capsys, tmp_path):
    (tmp_path / "c.manifest.json").write_text("{}")
    cyb = rows(capsys, "--recipe", "tiny-cyb", f"data.prefix={tmp_path}/c")
    assert cyb["objective"] == "name=cyb_anytime, discount=0.9" and "not there" not in cyb
    dit = rows(capsys, "--recipe", "tiny-dit", f"data.prefix={tmp_path}/c")
    assert dit["window"].endswith("(rate 0.1, scored with data.side=loss, no text lost)")
    assert dit["not there"] == f"{tmp_path}/c.loss.npy (data.side)" and "objective" not in dit
    assert rows(capsys, "--recipe", "tiny-every-k")["window"].endswith("(1 after every token, shared positions)")


def test_code_of_the_user_is_resolved_as_at_the_start(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_of_mine.py").write_text("x = 1\n1 / 0\n")
    rows(capsys, f"pause.placement={__name__}:rows", f"objective.token_weights={__name__}:rows")
    launch = ["launch", "--recipe", "tiny-std", "--gpus-per-node", "0", "--tasks-per-node", "1"]
    answers = ["finetune", "--dry-run", "--recipe", "finetune-gsm8k", "train.steps=1"]
    for words, message in (
        (["objective=json:Nope"], "objective.name: expected one of cross_entropy, anytime"),
        (["objective=json:Nope"], "json/__init__.py: expected 'Nope' in the module, got none"),
        (["objective=json:loads"], "objective.name=json:loads: expected a result, got TypeError"),
        (["pause.placement=no_such:f"], "pause.placement: expected one of uniform, isolated"),
        (["pause.placement=no_such:f"], "got 'no_such:f': expected the module no_such in this folder or on PYTHONPATH"),
        (["pause.placement=broken_of_mine:f"], "broken_of_mine.py:2: cannot be imported (ZeroDivisionError: division"),
        (["objective.token_weights=math:pi"], "objective.token_weights: expected a function, got a float in math:pi"),
    ):
        for start in (["pretrain", "--dry-run"], launch):
            assert main([*start, *words]) == 2
            assert message in capsys.readouterr().err, (start, words)
    assert main([*answers, "finetune.answer_placement=no_such:f"]) == 2
    assert "finetune.answer_placement: expected one of uniform" in capsys.readouterr().err
    grid = ["experiment", "run", "--recipe", "methods-tiny", "--dry-run"]
    assert main([*grid, "models.CYB.set.objective.name=no_such:f"]) == 2
    assert "cell pretrain-CYB: objective.name: expected one of cross_entropy" in capsys.readouterr().err
    assert main([*launch, "pause.placement=no_such:f", "--container", "pyxis:image"]) == 0
    assert "outside the container: pause.placement: expected" in capsys.readouterr().err


def test_options_of_a_model_have_a_row_where_it_has_some(capsys):
    table = rows(capsys, "model.preset=qwen3-0.6b", "model.sliding_window=512", "model.loops=2")
    sizes = "x 1024 hidden, 16 heads, 8 key/value heads, 3072 ffn, tied"
    assert table["model"] == f"28 layers run 2 times (depth 56) {sizes}"
    part = rows(capsys, "model.preset=qwen3-0.6b", "model.loop_layers=8..11", "model.loops=4")
    assert part["model"] == f"28 layers, 8..11 run 4 times (depth 40) {sizes}"
    assert table["model options"] == (
        "rope_base=1000000.0, norm_eps=1e-06, head_dim=128, qk_norm=head, sliding_window=512"
    )
    assert "model options" not in rows(capsys)
    given = ("model.preset=qwen3-0.6b", "train.only=pause_rows", "pause.embeddings=2")
    assert rows(capsys, *given)["trained"] == "2,048 (pause_rows); a new run needs model.from"


def test_the_arithmetic_of_an_extension_is_that_of_the_added_steps(capsys):
    longer = ("--recipe", "tiny-std", "train.extended_from=1000", "train.steps=1200")
    table = rows(capsys, *longer, "optim.warmup_steps=10")
    assert table["steps"] == "200 after the 1,000 of the finished run, to step 1,200"
    assert table["raw tokens in all"].startswith("819,200 ")
    assert "after 10 steps of warm-up" in table["learning rate"]
    assert rows(capsys, *longer, "optim.schedule=constant", "optim.lr=1e-3")["learning rate"] == "0.001, constant"


def test_text_tokens_of_a_standard_run_are_all_tokens(capsys):
    table = rows(capsys, "--recipe", "tiny-std")
    assert table["raw tokens a step"] == "4,096"
    assert table["text tokens a step"] == "4,096 (expected)"


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("finetune-")])
def test_every_pretraining_recipe_plans_on_four_ranks(name, capsys):
    ranks = rows(capsys, "--recipe", name, "--world-size", "4")["ranks"]
    assert ranks in ("4 = 4 data parallel x 1 tensor parallel", "4 = 2 data parallel x 2 tensor parallel")


def test_a_single_process_in_a_job_counts_one_rank(capsys, monkeypatch):
    """A shell of salloc or a batch script has SLURM's variables; only the tasks of srun are ranks."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert rows(capsys, "batch.global_size=4", "batch.micro_size=4")["ranks"].startswith("1 = ")


def test_a_place_that_is_no_number_is_refused(capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert main(["pretrain", "--dry-run"]) == 2
    assert "environment variable WORLD_SIZE: expected a whole number, got 'four'" in capsys.readouterr().err


def test_vocabulary_comes_from_the_manifest_or_the_option(tmp_path, capsys):
    (tmp_path / "c.manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": 8192}}))
    prefix = f"data.prefix=0.5 {tmp_path}/none 0.5 {tmp_path}/c"
    assert rows(capsys, prefix)["vocabulary"].startswith("8,193 = 8,192 text (")
    assert rows(capsys, prefix, "--vocab-size", "100", "pause.embeddings=4")["vocabulary"].startswith("104 = 100 text")
    (tmp_path / "c.manifest.json").write_text("{}")
    assert rows(capsys, prefix)["vocabulary"].startswith("32,001 = 32,000 text (assumed)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "3", "parallel.tensor=2"], "parallel.tensor: expected a divisor of the number of ranks (3)"),
        (["--world-size", "3"], "batch.global_size: expected a multiple of batch.micro_size (4)"),
        (["--world-size", "0"], "expected an integer >= 1, got '0'"),
        (["engine.ds_config=zero7"], "engine.ds_config: expected a DeepSpeed JSON file or one of"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(arguments, message, capsys):
    assert main(["pretrain", "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_vocabulary_is_the_corpus_the_presets_or_assumed(tmp_path):
    """An imported tokenizer has its pauses among its ids: they are not counted twice."""
    import json

    from pause_megatron.cli.support.dry_run import text_vocabulary
    from pause_megatron.config.load import load
    from pause_megatron.config.presets import PRESETS, VOCABULARIES

    def found(*overrides: str) -> tuple[int, str]:
        return text_vocabulary(load(overrides=overrides), None)

    manifest = tmp_path / "c.manifest.json"
    for pause, pauses, text in ((1501, 1, 1501), (1500, 1, 1500), (1499, 2, 1499)):
        manifest.write_text(json.dumps({"tokenizer": {"vocab_size": 1501, "pause_id": pause}}))
        assert found(f"data.prefix={tmp_path / 'c'}", f"pause.embeddings={pauses}") == (text, str(manifest))
    assert VOCABULARIES.keys() < PRESETS.keys()
    assert found("model.preset=qwen3-0.6b") == (151_936, "qwen3-0.6b's")
    assert found() == (32_000, "assumed")
