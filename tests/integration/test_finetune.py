"""Finetuning as a user does it: one loss list at every topology, bit-exact resume, and an export that agrees."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.forked_ranks import TIMING
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.checkpoint import MergedReader, Store
from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.cli import main
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.hf.export import export
from pause_megatron.tasks import load_task, read_examples

PAUSES, LIMIT = "0..6", 57  # of 60 records; 3 are held out
_NO_ANSWERS = ["finetune.answer_placement=null", "finetune.answer_rate=0.1"]
# ranks, tensor, sequence parallel, ZeRO stage, micro-batch, further keys; every stage, and each kind of ranks
TOPOLOGIES = [
    (2, 1, False, 3, 1, []),
    (2, 2, True, 2, 4, []),
    (4, 2, True, 1, 2, ["parallel.recompute=full"]),
]
MORE_TOPOLOGIES = [
    (1, 1, False, 3, 4, ["parallel.recompute=full"]),
    (2, 1, False, 0, 2, []),
    (2, 1, False, 1, 4, []),
    (2, 2, False, 3, 2, ["parallel.recompute=full"]),
]


def settings_of(base: str, data: str, folder: str) -> list[str]:
    return [
        *(f"model.from={base}", f"task.path={data}", f"task.limit={LIMIT}", f"run.dir={folder}"),
        *(f"finetune.pauses={PAUSES}", "finetune.prefix_attention=bidirectional", "finetune.epochs=3"),
        *("batch.global_size=8", "optim.lr=3e-3", "optim.warmup_steps=2", "engine.precision=fp32"),
        *("checkpoint.every=4", "checkpoint.keep=9", "validation.every=6", "validation.samples=10"),
        *("log.samples_every=5", "finetune.answer_placement=uniform", "finetune.answer_rate=0.4"),
    ]


def run_config(base: str, data: str, folder: str, extra: list[str]) -> RunConfig:
    return load(recipe="finetune-commonsense_qa", overrides=[*settings_of(base, data, folder), *extra])


def tune(
    base: str, data: str, folder: str, zero: int, micro: int, tensor: int, sequence: bool, extra: list[str]
) -> int:
    from pause_megatron.train.finetune import finetune

    topology = [f"parallel.tensor={tensor}", f"parallel.sequence={str(sequence).lower()}"]
    settings = [f"engine.zero_stage={zero}", f"batch.micro_size={micro}", *topology, *extra]
    return finetune(run_config(base, data, folder, settings))


def pretrain_base(corpus: str, folder: str) -> int:
    from pause_megatron.train.pretrain import pretrain

    return pretrain(
        load(
            recipe="tiny-pause",
            overrides=[
                *(f"data.prefix={corpus}", f"run.dir={folder}", "train.steps=2", "optim.warmup_steps=1"),
                *tiny_model(layers=2, hidden=64, heads=4, tied=False),
                *("pause.embeddings=2", "pause.softmax=exclude", "checkpoint.every=0", "validation.every=0"),
                *("pause.positions=shared", "model.loops=2", "model.loop_layers=1..1"),
                # Weights this large make attention sharp enough that a bidirectional prefix shows in the logits.
                *("model.init_std=0.1", "log.tensorboard=false"),
            ],
        )
    )


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> str:
    """A run with two pause vectors that share positions, a layer that runs twice, and windows of 256."""
    folder = str(tmp_path_factory.mktemp("base") / "run")
    assert run_on_ranks(1, pretrain_base, corpus, folder) == [0]
    return folder


@pytest.fixture(scope="module")
def data(task_records) -> str:
    return str(task_records / "commonsense_qa")


@pytest.fixture(scope="module")
def reference(base, data, tmp_path_factory) -> Path:
    """One rank, one micro-batch a step, no ZeRO."""
    folder = tmp_path_factory.mktemp("reference")
    assert run_on_ranks(1, tune, base, data, str(folder), 0, 8, 1, False, []) == [0]
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMING} for line in metrics(folder)]


def test_the_reference_learns_after_pauses(reference):
    lines = metrics(reference)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert len({line["targets"] for line in lines}) > 5
    assert all(0 < line["pause_fraction"] < 0.2 and line["loss_after_pause"] for line in lines)
    assert lines[-1]["valid_loss"] != lines[-1]["valid_loss_without_pauses"]
    config = load(reference / "config.yaml")
    assert (config.pause.embeddings, config.pause.softmax, config.data.sequence_length) == (2, "exclude", 256)
    assert (config.pause.positions, config.model.loops, config.model.loop_layers) == ("shared", 2, "1..1")
    assert (
        config.train.steps == len(lines) == load(Store(reference / "checkpoints").path(4) / "config.yaml").train.steps
    )


@pytest.mark.parametrize(
    "topology",
    [*TOPOLOGIES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_TOPOLOGIES)],
    ids=lambda t: "-".join(map(str, t[:5])),
)
def test_one_loss_list(base, data, tmp_path, reference, topology):
    ranks, tensor, sequence, zero, micro, extra = topology
    settings = ["log.tensorboard=false", "checkpoint.every=0", *extra]
    assert run_on_ranks(ranks, tune, base, data, str(tmp_path), zero, micro, tensor, sequence, settings) == [0] * ranks
    lines, expected = metrics(tmp_path), metrics(reference)
    for key in ("step", "lr", "tokens", "text_tokens", "targets", "pause_fraction", "applied"):
        assert [line[key] for line in lines] == [line[key] for line in expected], key
    for key in ("loss", "loss_after_pause", "grad_norm", "valid_loss", "valid_loss_without_pauses"):
        got = [line[key] for line in lines if key in line]
        assert got == pytest.approx([line[key] for line in expected if key in line], rel=1e-5), key


def test_a_resumed_run_is_the_uninterrupted_one(base, data, tmp_path, reference):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder, symlinks=True)
    store = Store(folder / "checkpoints")
    last = store.steps()[-1]
    for step in store.steps():
        if step > 4:
            shutil.rmtree(store.path(step))
    moved = tmp_path / "records"  # the records' place does not matter, their content does
    shutil.copytree(data, moved)
    assert run_on_ranks(1, tune, base, str(moved), str(folder), 0, 8, 1, False, []) == [0]
    timeless = [
        [{k: v for k, v in line.items() if k not in TIMING} for line in metrics(f)] for f in (folder, reference)
    ]
    assert timeless[0] == timeless[1]
    for path in Store(reference / "checkpoints").path(last).glob("state-*"):
        assert (store.path(last) / path.name).read_bytes() == path.read_bytes()


def test_adapters_are_finetuned(base, data, tmp_path):
    """They and the pause embeddings learn the task; other weights, and excluded pause logits, are the base's."""
    extra = ["train.only=lora", "lora.rank=8", "optim.lr=1e-2", "checkpoint.every=0", "log.tensorboard=false"]
    assert run_on_ranks(2, tune, base, data, str(tmp_path / "run"), 1, 4, 2, True, extra) == [0, 0]
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    before, after = (MergedReader(open_newest(folder).folder) for folder in (base, tmp_path / "run"))
    for name in before.manifest.parameters:
        rows = before.shape(name)[0]
        changed = (before.rows(name, 0, rows) != after.rows(name, 0, rows)).view(rows, -1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == ([1000, 1001] if name == VOCABULARY[0] else []), name
    done = export(tmp_path / "run", tmp_path / "out", dtype="bf16")
    assert done.parity.largest_difference <= done.parity.tolerance
    assert "`lora` only" in (done.folder / "README.md").read_text()


def native_scores(folder: str, base: str, data: str, counts: tuple[int, ...]) -> list[list[float]]:
    """Log-likelihood of each example's target behind M pauses, by the native model; pauses out of the softmax."""
    from pause_megatron.checkpoint import CheckpointReader, restore_weights
    from pause_megatron.distributed import initialize
    from pause_megatron.model.attention import segment_mask
    from pause_megatron.train.finetune import training_data
    from pause_megatron.train.inputs.task_data import open_task
    from pause_megatron.train.run import new_model

    task = open_task(run_config(base, data, folder, ["validation.every=0", "batch.micro_size=1"]))
    found = []
    with initialize(task.config.parallel) as context, torch.no_grad():
        model = new_model(task.config, training_data(task)).eval()
        restore_weights(model, CheckpointReader(open_newest(folder).folder, context.tp_rank))
        for count in counts:
            of_count = []
            for example in task.windows.examples[:4]:
                whole, marked = task.windows.arrangement.arrange(example, count)
                tokens = torch.from_numpy(whole)[None]
                where = torch.arange(tokens.shape[1] - 1)[None]
                mask = segment_mask(torch.zeros_like(where), where < marked)
                positions = (tokens < task.pause_ids[0]).cumsum(1)[:, :-1] - 1  # pauses use up none
                logits = model.logits(tokens[:, :-1], positions, mask)[0, marked - 1 :]
                logits[:, list(task.pause_ids)] = float("-inf")
                targets = tokens[0, marked:, None]
                of_count.append(float(logits.log_softmax(-1).gather(1, targets).double().sum()))
            found.append(of_count)
    return found


def test_an_export_prompts_as_it_was_finetuned(base, data, reference, tmp_path):
    """The bidirectional prefix, the pauses and the ids of training are those of generation through transformers."""
    from pause_megatron.inference import Prompting
    from pause_megatron.inference import load as load_exported

    counts = (0, 1, 10)
    export(reference, tmp_path / "hf")
    entry = json.loads((tmp_path / "hf" / "config.json").read_text())["pause"]
    assert (entry["m_ft"], entry["location"], entry["filler"]) == (6, "append", None)
    assert (entry["prefix_attention"], entry["rate"], entry["realised_rate"]) == ("bidirectional", 0.1, None)
    assert "finetuned with pauses on commonsense_qa" in (tmp_path / "hf" / "README.md").read_text()
    generator = load_exported(tmp_path / "hf")
    assert generator.default_pauses == 6
    examples = read_examples(load_task("commonsense_qa"), "train", data, LIMIT, 0.05)[:4]
    prompts = [example.prompt for example in examples]
    eod = generator.eos[0]
    targets = [[*generator.encoder.encode_continuation(example.target), eod] for example in examples]
    (native,) = run_on_ranks(1, native_scores, str(reference), base, data, counts)
    for count, expected in zip(counts, native, strict=True):
        scores, _ = generator.score(prompts, targets, pauses=count)
        assert [score.log_likelihood for score in scores] == pytest.approx(expected, rel=1e-5)
        causal, _ = generator.score(prompts, targets, pauses=count, prompting=Prompting())
        apart = [abs(score.log_likelihood / value - 1) for score, value in zip(causal, expected, strict=True)]
        assert min(apart) > 1e-4 and max(apart) > 1e-3, apart


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.name=gsm9k"], "'gsm8k'"),
        (["train.steps=3"], "expected only one of finetune.epochs and train.steps"),
        (["finetune.location=prepend"], "finetune.location: 'append' in the checkpoint, 'prepend' in this run"),
        (["task.limit=50"], "corpus: xxh3_128:"),
        (["finetune.filler=two words"], "filler: expected the text of one token"),
        (
            ["finetune.filler=.", "objective=pause_megatron.objective.shipped:Anytime"],
            "expected finetune.filler=null with",
        ),
        (["finetune.pauses=400"], "of the prompt in a window of data.sequence_length=256"),
        (["finetune.answer_placement=no.such:policy"], "finetune.answer_placement: expected one of"),
        (["finetune.pauses=ten"], "a whole number of pauses, or a range LOW..HIGH"),
        (["finetune.epochs=null"], "finetune.epochs, train.steps or train.tokens: expected one of them"),
        (["task.path=/nonexistent"], "/nonexistent"),
        (["task.name=null", "finetune.epochs=null", *_NO_ANSWERS], "task.name: expected a task to finetune on"),
    ],
)
def test_bad_input_is_named(base, data, reference, overrides, message):
    settings = [*settings_of(base, data, str(reference)), "batch.micro_size=8", *overrides]
    code, said = run_on_ranks(1, verb, ["finetune", "--recipe", "finetune-commonsense_qa", *settings])[0]
    assert code == 2 and message in said and "Traceback" not in said


def verb(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return main(arguments), said.getvalue()


def test_dry_run_counts_and_trains_nothing(base, data, tmp_path, capsys):
    settings = [f"model.from={base}", f"task.path={data}", f"task.limit={LIMIT}", f"run.dir={tmp_path / 'run'}"]
    settings += ["finetune.answer_placement=uniform", "finetune.answer_rate=2"]
    assert main(["finetune", "--recipe", "finetune-commonsense_qa", "--dry-run", *settings]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["task"].strip().startswith(f"commonsense_qa: {LIMIT} examples, 0 prompts cut")
    within, _, _, share, _, _, placement = rows["in the answers"].split()
    within = within.replace(",", "")
    assert f"{10 * LIMIT + int(within):,} an epoch" in rows["pauses"] and placement == "(uniform)"
    assert 1 < float(share) < 2  # two a token of an answer, whose EOD is a target too
    assert "% padding" in rows["windows an epoch"]
    assert not (tmp_path / "run").exists()
