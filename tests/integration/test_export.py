"""Export: transformers computes the native model's results from the folder, for every training topology."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cards import run_card
from support.ranks import run_on_ranks
from support.tiny_config import tiny_config

from pause_megatron.checkpoint import Manifest
from pause_megatron.cli import main
from pause_megatron.config import families
from pause_megatron.config.families import Family, Piece
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.errors import CheckpointError
from pause_megatron.hf import export as exporting
from pause_megatron.hf import weights
from pause_megatron.hf.export import export

STEPS, SAMPLES, TOLERANCE = 3, 6, 1e-5
# ranks, tensor, ZeRO stage, further keys. Heads are 8; key/value heads, tying, pauses and biases vary: each of their
# values, each stage and each tensor parallelism by default, more of their combinations with --full.
CASES = [
    (1, 1, 0, ["model.tied=true", "model.kv_heads=8", "pause.embeddings=3"]),
    (2, 1, 3, ["model.tied=false", "model.kv_heads=1", "model.qkv_bias=true", "model.rope_base=500.0"]),
    (
        *(2, 2, 2),
        [
            *("model.tied=true", "model.kv_heads=2", "pause.softmax=exclude", "model.norm_eps=1e-3"),
            *("model.loops=3", "model.loop_layers=1..1"),
        ],
    ),
    (
        *(4, 4, 1),
        [
            *("model.tied=false", "model.kv_heads=4", "parallel.sequence=true", "pause.embeddings=2"),
            *("pause.positions=shared", "pause.placement=with_replacement"),
        ],
    ),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (2, 1, 1, ["model.tied=false", "model.kv_heads=1", "pause.embeddings=3"]),
            (2, 1, 3, ["model.tied=true", "model.kv_heads=4", "model.qkv_bias=true"]),
            (2, 2, 0, ["model.tied=false", "model.kv_heads=8", "model.rope_base=500.0"]),
            (2, 2, 3, ["model.tied=false", "model.kv_heads=4", "model.qkv_bias=true", "pause.embeddings=2"]),
            (4, 4, 1, ["model.tied=true", "model.kv_heads=4", "parallel.sequence=true"]),
            (4, 4, 3, ["model.tied=false", "model.kv_heads=8", "pause.softmax=exclude", "pause.embeddings=2"]),
            (4, 2, 2, ["model.tied=false", "model.kv_heads=2"]),
        )
    ),
]


def run_config(corpus: str, folder: Path | str, tensor: int, zero: int, extra: list[str]) -> RunConfig:
    return tiny_config(
        *(f"data.prefix={corpus}", f"run.dir={folder}", f"engine.zero_stage={zero}", f"parallel.tensor={tensor}"),
        *("data.sequence_length=64", "data.split=90,10,0", "batch.global_size=4", "batch.micro_size=1"),
        *("engine.precision=fp32", "optim.lr=0.02", "optim.schedule=constant", f"train.steps={STEPS}"),
        *("pause.rate=0.2", "checkpoint.every=0", f"validation.every={STEPS}", f"validation.samples={SAMPLES}"),
        *("log.tensorboard=false", "model.init_std=0.1"),
        *extra,
        layers=2,
        hidden=64,
        heads=8,
        vocab_multiple=32,
    )


def train(corpus: str, folder: str, tensor: int, zero: int, extra: list[str]) -> list[torch.Tensor]:
    """Trains; then the logits of the first validation windows, by the native model at the topology that trained it."""
    from pause_megatron.checkpoint import CheckpointReader, restore_weights
    from pause_megatron.checkpoint.store import open_newest
    from pause_megatron.distributed import initialize
    from pause_megatron.train.pretrain import corpus_data, pretrain
    from pause_megatron.train.run import new_model

    config = run_config(corpus, folder, tensor, zero, extra)
    assert pretrain(config) == 0
    with initialize(config.parallel) as context:
        data = corpus_data(config, context.world_size)
        model = new_model(config, data)
        restore_weights(model, CheckpointReader(open_newest(folder).folder, context.tp_rank))
        windows = torch.stack([data.valid.windows[i]["tokens"] for i in range(SAMPLES)])
        positions = torch.stack([data.valid.windows[i]["position_ids"] for i in range(SAMPLES)])
        with torch.no_grad():
            return [windows, model.eval().logits(windows, positions).clone()]


def loss_by_transformers(model, config: RunConfig) -> float:
    """Mean loss over the validation windows; nothing of the native model takes part."""
    from pause_megatron.train.pretrain import corpus_data

    valid = corpus_data(config, config.parallel.tensor).valid.windows
    total, count = 0.0, 0
    for number in range(SAMPLES):
        sample = valid[number]
        tokens = sample["tokens"][None]
        with torch.no_grad():
            logits = model(tokens, **documented(model, tokens)).logits[0]
        if config.pause.softmax == "exclude":
            logits[:, model.config.pause["ids"]] = float("-inf")
        losses = F.cross_entropy(logits, sample["labels"], reduction="none")
        kept = sample["loss_mask"] > 0
        total, count = total + float(losses[kept].double().sum()), count + int(kept.sum())
    return total / count


def documented(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the card of the folder tells to give transformers beside the tokens: nothing, or positions and a mask."""
    if model.config.pause.get("positions") != "shared":
        return {}
    is_text = ~torch.isin(tokens, torch.tensor(model.config.pause["ids"]))
    return {"position_ids": (is_text.cumsum(1) - 1).clamp(min=0), "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize(("ranks", "tensor", "zero", "extra"), CASES)
def test_exported_logits_and_validation_loss_are_the_native_ones(corpus, tmp_path, ranks, tensor, zero, extra):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = tmp_path / "run", tmp_path / "out"
    windows, native = run_on_ranks(ranks, train, corpus, str(run), tensor, zero, extra)[0]
    done = export(run, out, max_shard_size=60_000)
    assert done.files > 1
    assert done.parity.largest_difference <= TOLERANCE and done.parity.source == "corpus"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False, dtype=torch.float32).eval()
    with torch.no_grad():
        exported = model(windows, **documented(model, windows)).logits
    assert exported.shape == native.shape
    assert float((exported - native).abs().max()) <= TOLERANCE
    assert bool((windows == model.config.pause["ids"][0]).any())

    config = run_config(corpus, run, tensor, zero, extra)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]["valid_loss"]
    assert abs(loss_by_transformers(model, config) - logged) <= TOLERANCE

    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert tokenizer("Fellow citizens" + "<pause>" * 3)["input_ids"][-3:] == [model.config.pause["ids"][0]] * 3
    assert model.generation_config.suppress_tokens == model.config.pause["ids"]
    assert model.config.num_hidden_layers == config.model.depth
    assert getattr(model.config, "loops", 1) == config.model.loops
    assert getattr(model.config, "loop_layers", None) == (None if config.model.loop_layers is None else [1, 1])
    assert model.config.vocab_size == model.config.pause["ids"][-1] + 1
    assert ("lm_head.weight" in names(out)) == (not config.model.tied)
    # transformers 5.0 reads the tokenizer of a Qwen2 folder as it is; with later ones the export becomes a Llama.
    families = ["LlamaForCausalLM", "Qwen2ForCausalLM"] if config.model.qkv_bias else ["LlamaForCausalLM"]
    assert type(model).__name__ in families
    if config.pause.positions == "shared":
        check_shared_positions(run, out, model, tokenizer, windows, exported)


def check_shared_positions(run: Path, out: Path, model, tokenizer, windows: torch.Tensor, logits: torch.Tensor) -> None:
    """Positions matter; generation has them; they survive an import; Megatron-LM's rotary embedding has none."""
    from pause_megatron.hf.importing import import_folder
    from pause_megatron.inference import PauseGenerator
    from pause_megatron.megatron_lm.export import export_megatron

    with torch.no_grad():
        assert float((model(windows).logits - logits).abs().max()) > 100 * TOLERANCE
        prompt = [int(token) for token in windows[0, :9]]
        prompt = [token for token in prompt if token not in model.config.pause["ids"]]
        generated = PauseGenerator(model, tokenizer).generate([prompt], pauses=3, max_new_tokens=4, keep_logits=True)
        (first,) = generated.completions
        run_of_pauses = [model.config.pause["ids"][index] for index in (0, 1, 0)]
        whole = torch.tensor([[*prompt, *run_of_pauses, *first.ids]])
        expected = model(whole, **documented(model, whole)).logits[0, len(prompt) + 2 : -1]
    assert float((first.logits[: len(expected)] - expected).abs().max()) <= TOLERANCE
    assert "**Pauses use up no positions**" in (out / "README.md").read_text()
    again = out.with_name("again")
    import_folder(out, again)
    assert load(str(again / "config.yaml")).pause.positions == "shared"
    with pytest.raises(CheckpointError, match=r"expected pause\.positions=own, got shared"):
        export_megatron(run, out.with_name("megatron"))


def names(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found += file.keys()
    return found


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run at tensor parallel 2, ZeRO 2, with grouped queries and two pauses, which stand after words on e."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    keys = ["model.tied=false", "model.kv_heads=4", "pause.embeddings=2", "pause.placement=after", "pause.pattern=e$"]
    run_on_ranks(2, train, corpus, str(folder), 2, 2, keys)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_the_rounding_of_the_weights_and_nothing_else(run, tmp_path, dtype):
    whole = export(run, tmp_path / "fp32")
    half = export(run, tmp_path / dtype, dtype=dtype)
    assert half.bytes < 0.51 * whole.bytes
    assert half.parity.rounding > 1e-4 > half.parity.largest_difference
    high, low = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", dtype))
    assert all(torch.equal(high[name].to(rounded.dtype), rounded) for name, rounded in low.items())


def test_the_command_prints_its_checks_and_writes_a_card(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export-hf", str(run / "checkpoints" / "latest"), str(out), "--finetuned-pauses", "7"]) == 0
    said = capsys.readouterr().out
    assert "largest difference from the native model" in said and "identical ids on" in said
    card = (out / "README.md").read_text()
    progress = Manifest.load(run / "checkpoints" / "latest").progress
    rate = 1 - progress["text_tokens"] / progress["tokens"]
    assert f"realised pause rate | {rate:.4%}" in card and "| M_ft | 7 |" in card and "pauses=7, " in card
    config = json.loads((out / "config.json").read_text())
    assert config["pause"]["m_ft"] == 7 and config["pause"]["realised_rate"] == pytest.approx(rate)
    assert config["pause"]["tokens"] == ["<pause>", "<pause_1>"] and config["pause"]["rate"] == 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    check_places_of_decoding(run, out, config["pause"]["decoding"])


def check_places_of_decoding(run: Path, out: Path, document: dict) -> None:
    """Generation has pauses after the tokens that training knew; the card's code, with transformers, has the same."""
    from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
    from pause_megatron.data.windows.token_texts import token_texts
    from pause_megatron.inference import load
    from pause_megatron.inference.places import Places

    assert document == {"after": "e$", "count": 1, "in_prompt": True}
    generator, prompt = load(out), "We are the people, and these are true, more or less"
    [completion] = generator.generate([prompt], max_new_tokens=8).completions
    assert completion.prompt_pauses >= 3 and completion.pauses == 7
    assert run_card(out, prompt) == prompt + completion.text
    places = Places(generator.encoder, generator.pause.decoding, generator.pause.ids)
    trained = token_texts(load_tokenizer(run / "checkpoints" / "latest" / "tokenizer")).matches("e$")[:-1]
    assert trained.sum() > 10 and trained.tolist() == [places.after(token, 1) > 0 for token in range(trained.size)]


def gate_and_up_exchanged(model, rows: int, family: Family) -> list:
    tensors = {tensor.name: tensor for tensor in weights.hf_tensors(model, rows, family)}
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    wrong = []
    for tensor in tensors.values():
        part = next((part for part in other if part in tensor.name), None)
        rows_of = tensors[tensor.name.replace(part, other[part])] if part else tensor
        wrong.append(replace(tensor, rows=rows_of.rows))
    return wrong


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (families, "_qkv_pieces", lambda model, kind: _ungrouped(model, kind)),
        (exporting, "hf_tensors", gate_and_up_exchanged),
    ],
    ids=["queries, keys and values not grouped", "gate and up exchanged"],
)
def test_a_wrong_conversion_is_found_and_leaves_nothing(run, tmp_path, monkeypatch, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(
        CheckpointError,
        match=r"logits differ: expected a difference of at most .*, got .* in window \d at position",
    ):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _ungrouped(model, kind: str) -> tuple[Piece, ...]:
    """The layout that people expect: all queries, all keys, all values."""
    pieces, start = [], 0
    for part, width in (("q", model.query_width), ("k", model.kv_width), ("v", model.kv_width)):
        pieces.append(Piece(f"self_attn.{part}_proj.{kind}", start, width))
        start += width
    return tuple(pieces)


def test_a_tokenizer_that_differs_is_found(run, tmp_path, monkeypatch):
    from pause_megatron.hf import sentencepiece_model

    right = sentencepiece_model.merges
    monkeypatch.setattr(sentencepiece_model, "merges", lambda pieces: right(pieces)[::-1])
    with pytest.raises(CheckpointError, match=r"produces different ids for \d+ of \d+ lines, for example"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty_is_refused_before_any_work(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    reports = []
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="expected a new or an empty folder"):
            export(run, tmp_path / name, report=lambda *report: reports.append(report))
    assert not reports
    (tmp_path / "empty").mkdir()
    assert export(run, tmp_path / "empty").folder == tmp_path / "empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_damage_is_found_and_named(run, tmp_path):
    source = (run / "checkpoints" / "latest").resolve()
    for name in sorted(Manifest.load(source).files):
        for kind in ("flip", "delete"):
            copy = tmp_path / "copy"
            shutil.copytree(source, copy)
            content = bytearray((copy / name).read_bytes())
            content[len(content) // 2] ^= 1
            (copy / name).unlink()
            if kind == "flip":
                (copy / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=f"(?s)damaged.*{name}"):
                export(copy, tmp_path / "out")
            shutil.rmtree(copy)
    assert list(tmp_path.iterdir()) == []


def test_norms_that_transformer_engine_keeps_in_linear_layers_are_found(run, tmp_path):
    """`model.attention=te` names a norm's weight after the layer that follows it; all else is the same."""
    source = tmp_path / "checkpoint"
    shutil.copytree((run / "checkpoints" / "latest").resolve(), source)

    def fused(name: str) -> str:
        name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
        return name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")

    for path in source.glob("state-*"):
        save_file({fused(label): value for label, value in load_file(path).items()}, path)
    manifest = Manifest.load(source)
    parameters = {fused(name): entry for name, entry in manifest.parameters.items()}
    assert parameters.keys() != manifest.parameters.keys()
    rewrite_manifest(source, replace(manifest, parameters=parameters))
    export(source, tmp_path / "fused")
    export(run, tmp_path / "plain")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "plain"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_without_its_corpus_a_checkpoint_is_compared_on_other_text(run, tmp_path, monkeypatch):
    source = tmp_path / "checkpoint"
    shutil.copytree((run / "checkpoints" / "latest").resolve(), source)
    config = (source / "config.yaml").read_text()
    manifest = Manifest.load(source)
    prefix = load(source / "config.yaml").data.prefix[0]
    (source / "config.yaml").write_text(config.replace(prefix, "gone"))
    rewrite_manifest(source, manifest)
    done = export(source, tmp_path / "out")
    assert done.parity.source == "built-in sentences" and done.parity.lines >= 20


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    """Sizes and digests of the files as they are now, as in a forged checkpoint."""
    from pause_megatron.checkpoint.manifest import FileEntry
    from pause_megatron.files.digest import file_digest

    files = {name: FileEntry((folder / name).stat().st_size, file_digest(folder / name)) for name in manifest.files}
    (folder / "manifest.json").write_text(replace(manifest, files=files).dumps())
