"""Import: real Hugging Face models of the family become checkpoints, and come back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.prose import documents, train_hugging_face, train_model
from support.ranks import run_on_ranks

from pause_megatron.checkpoint import CheckpointReader, Manifest
from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.cli import main
from pause_megatron.config.load import load
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.engine import Address
from pause_megatron.errors import CheckpointError, ConfigError, PauseMegatronError
from pause_megatron.hf.export import export
from pause_megatron.hf.importing import import_folder

FAMILIES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2"}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """Folders with the tokenizers of the families: SentencePiece, byte-level BPE, Qwen2's, each of 600 ids or so."""
    from transformers import Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sentencepiece").mkdir()
    train_model(folder / "sentencepiece" / "tokenizer.model")
    train_hugging_face(folder / "byte-level")
    # As the Hub has it: the class of a model, and a template that is a program.
    Qwen2Tokenizer().train_new_from_iterator(documents(300), 600).save_pretrained(str(folder / "qwen2"))
    return {path.name: path for path in folder.iterdir()}


def write_model(folder: Path, cls: str, tokenizer: Path, *, rows: int | None = None, dtype=torch.bfloat16, **changes):
    """A folder as the Hub has them: a real, randomly initialised model in bf16, and a tokenizer."""
    import transformers

    size = load_tokenizer(tokenizer).vocab_size
    config = getattr(transformers, f"{cls}Config")(vocab_size=rows or size, **{**SIZES, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{cls}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of 1 and biases of 0 would not notice being exchanged
                parameter.copy_(torch.rand_like(parameter) + ("norm" in name))
    model.to(dtype).save_pretrained(str(folder), max_shard_size="40KB")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(
    ("cls", "tokenizer", "tied", "tensor", "changes"),
    [
        ("Llama", "sentencepiece", False, 1, {}),
        ("Llama", "byte-level", True, 4, {"rope_theta": 500000.0}),
        ("Llama", "sentencepiece", True, 2, {"rms_norm_eps": 1e-3, "num_key_value_heads": 8}),
        ("Mistral", "sentencepiece", False, 2, {"sliding_window": None}),
        ("Mistral", "byte-level", True, 1, {"sliding_window": 4096, "num_key_value_heads": 1}),
        ("Qwen2", "qwen2", True, 1, {}),
        ("Qwen2", "qwen2", False, 4, {"rope_theta": 1e6}),
    ],
)
@pytest.mark.parametrize("extra_rows", [0, 5])
def test_import_then_export_gives_the_same_tensors(
    tokenizers, tmp_path, cls, tokenizer, tied, tensor, changes, extra_rows
):
    size = load_tokenizer(tokenizers[tokenizer]).vocab_size
    source = write_model(
        tmp_path / "hf", cls, tokenizers[tokenizer], rows=size + extra_rows, tie_word_embeddings=tied, **changes
    )
    done = import_folder(source, tmp_path / "native", tensor_parallel=tensor)
    pause = size + extra_rows - 1 if extra_rows else size
    assert done.pause_ids == (pause,) and done.how == ("free slot" if extra_rows else "grown vocabulary")
    assert done.largest_difference <= 1e-5 and done.family == FAMILIES[cls]
    assert Manifest.load(tmp_path / "native").tensor_parallel == tensor

    export(tmp_path / "native", tmp_path / "back", dtype="bf16")
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        new = after[name]
        assert new.dtype == value.dtype == torch.bfloat16
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert new.shape[0] == max(len(value), pause + 1)
            kept = torch.arange(len(value)) != pause
            assert torch.equal(new[: len(value)][kept], value[kept])
            check_pause_row(new[pause].float(), value[:size].float())
        else:
            assert torch.equal(new, value), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "intermediate_size", "rope_parameters"):
        assert config[key] == original[key], key
    assert config["model_type"] == original["model_type"]


def check_pause_row(row: torch.Tensor, text: torch.Tensor) -> None:
    """Drawn from the text rows' own distribution: within 5 standard deviations in each channel, and not their mean."""
    scores = (row - text.mean(dim=0)) / text.std(dim=0)
    assert float(scores.abs().max()) < 5 and 0.6 < float(scores.std()) < 1.5


def test_the_new_row_does_not_depend_on_how_the_checkpoint_is_cut(tokenizers, tmp_path):
    source = write_model(tmp_path / "hf", "Llama", tokenizers["sentencepiece"])
    rows = []
    for tensor in (1, 2):
        import_folder(source, tmp_path / f"tp{tensor}", tensor_parallel=tensor)
        export(tmp_path / f"tp{tensor}", tmp_path / f"back{tensor}")
        rows.append(
            [tensors(tmp_path / f"back{tensor}")[name][-1] for name in ("model.embed_tokens.weight", "lm_head.weight")]
        )
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert not torch.equal(*rows[0])  # a key of its own in the embedding and in the output layer


def test_an_export_is_imported_with_its_pause_rows(tokenizers, tmp_path):
    """Out, in and out again: the trained pause rows stay, K of them."""
    source = write_model(tmp_path / "hf", "Llama", tokenizers["sentencepiece"], tie_word_embeddings=True)
    import_folder(source, tmp_path / "native")
    export(tmp_path / "native", tmp_path / "out")
    done = import_folder(tmp_path / "out", tmp_path / "again", tensor_parallel=2)
    assert done.how == "kept"
    export(tmp_path / "again", tmp_path / "last")
    first, last = tensors(tmp_path / "out"), tensors(tmp_path / "last")
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    one, two = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("out", "last"))
    assert one == two


def test_the_native_tokenizer_reserves_exactly_that_id(tokenizers, tmp_path):
    for name in ("sentencepiece", "byte-level"):
        source = write_model(tmp_path / f"{name}-hf", "Llama", tokenizers[name], rows=700)
        done = import_folder(source, tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name / "tokenizer")
        assert tokenizer.pause_id == done.pause_ids[0] == 699
        text = "My fellow citizens, <pause> is only text here."
        assert tokenizer.encode(text) == load_tokenizer(tokenizers[name]).encode(text)


def begin(corpus: str, checkpoint: str, folder: str, tensor: int, zero: int) -> dict[str, torch.Tensor]:
    """Starts a run from a checkpoint at another topology; the weights before its first step, as this rank has them."""
    from pause_megatron.distributed import initialize
    from pause_megatron.train.pretrain import corpus_data, pretrain
    from pause_megatron.train.run import new_model
    from pause_megatron.train.start.initial_weights import find_initial_weights
    from pause_megatron.train.start.start import Start

    config = load(
        overrides=[
            *(f"data.prefix={corpus}", f"run.dir={folder}", f"model.from={checkpoint}", f"parallel.tensor={tensor}"),
            *("data.sequence_length=64", "data.split=90,10,0", "batch.global_size=4", "batch.micro_size=1"),
            *("train.steps=2", f"engine.zero_stage={zero}", "engine.precision=fp32", "optim.schedule=constant"),
            *("optim.warmup_steps=0", "validation.every=0", "log.tensorboard=false", "model.vocab_multiple=8"),
        ]
    )
    with initialize(config.parallel) as context:
        data = corpus_data(config, context.world_size)
        model = new_model(config, data)
        Start(find_initial_weights(checkpoint, config, data.tokenizer, context)).load_weights(model, context)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert pretrain(config) == 0
    return weights


def test_a_run_begins_with_imported_weights_at_any_topology(tokenizers, shards, tmp_path):
    source = write_model(tmp_path / "hf", "Qwen2", tokenizers["qwen2"], dtype=torch.float32)
    import_folder(source, tmp_path / "tp1", tensor_parallel=1)
    import_folder(source, tmp_path / "tp4", tensor_parallel=4)
    one = str(next(iter(sorted(shards.glob("c4-train.*")))))
    prefix, tokenizer = str(tmp_path / "corpus"), str(tmp_path / "tp1" / "tokenizer")
    assert main(["prepare", "--input", one, "--tokenizer", tokenizer, "--output", prefix]) == 0
    # TP 4 -> TP 2: as when TP 2 had been written.
    import_folder(source, tmp_path / "tp2", tensor_parallel=2)
    loaded = run_on_ranks(2, begin, prefix, str(tmp_path / "tp4"), str(tmp_path / "run"), 2, 2)
    for rank, weights in enumerate(loaded):
        reader = CheckpointReader(tmp_path / "tp2", rank)
        for name, value in weights.items():
            if name not in VOCABULARY:  # padded to another multiple here: compared through the export below
                assert torch.equal(value.flatten(), reader.read(Address(name, 0, value.numel()), "param")), name
    assert (tmp_path / "run" / "config.yaml").read_text().count(f"from: {tmp_path / 'tp4'}") == 1
    # It went on from there, with steps of its own, and is a run like any other: it exports.
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.parity.source == "corpus"
    before, after = tensors(source), tensors(tmp_path / "out")
    moved = max(float((after[name][: len(value)] - value).abs().max()) for name, value in before.items())
    assert 0 < moved < 5e-3  # two steps of AdamW at 3e-4 each


def test_another_model_or_vocabulary_is_refused(tokenizers, corpus, tmp_path):
    source = write_model(tmp_path / "hf", "Llama", tokenizers["sentencepiece"])
    import_folder(source, tmp_path / "native")
    common = ["pretrain", f"data.prefix={corpus}", f"run.dir={tmp_path / 'run'}", f"model.from={tmp_path / 'native'}"]
    common += ["train.steps=2", "data.sequence_length=64", "optim.warmup_steps=0", "engine.precision=fp32"]
    for key, expected in (
        ("model.heads=4", "model.heads: 8 in the checkpoint, 4 in this run"),
        ("", "tokenizer fingerprint"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            _pretrain([*common[1:], *([key] if key else [])])
    with pytest.raises(ConfigError, match=r"model\.from: expected a checkpoint"):
        load(overrides=[f"model.from={tmp_path / 'nothing'}"])


def _pretrain(overrides: list[str]) -> None:
    from pause_megatron.train.pretrain import pretrain

    pretrain(load(overrides=overrides))


def test_the_command(tokenizers, tmp_path, capsys):
    source = write_model(tmp_path / "hf", "Llama", tokenizers["byte-level"])
    assert main(["import-hf", str(source), str(tmp_path / "native"), "--tensor-parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert "grown vocabulary" in said and "tensor parallel 2" in said and "pretrain model.from=" in said
    assert main(["import-hf", str(source), str(tmp_path / "native")]) == 2
    assert "holds files" in capsys.readouterr().err
    assert main(["import-hf", str(source), str(tmp_path / "x"), "--pause-token", "<think>"]) == 2
    assert "has no such token" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_without_a_comparison_no_whole_model_is_loaded(tokenizers, tmp_path, monkeypatch, capsys):
    """And the same files are written."""
    source = write_model(tmp_path / "hf", "Llama", tokenizers["byte-level"])
    import_folder(source, tmp_path / "native")
    export(tmp_path / "native", tmp_path / "out")
    monkeypatch.setattr("pause_megatron.hf.parity.native_logits", None)
    monkeypatch.setattr("pause_megatron.hf.parity.load_with_transformers", None)
    assert main(["import-hf", str(source), str(tmp_path / "native2"), "--no-comparison"]) == 0
    assert "\nlogits: not compared\n" in capsys.readouterr().out
    assert main(["export-hf", str(tmp_path / "native2"), str(tmp_path / "out2"), "--no-comparison"]) == 0
    assert "\nlogits and tokenizer: not compared\n" in capsys.readouterr().out
    for one, two in (("native", "native2"), ("out", "out2")):
        names = [path.name for path in sorted((tmp_path / one).rglob("*")) if path.is_file()]
        assert names == [path.name for path in sorted((tmp_path / two).rglob("*")) if path.is_file()]
        for path in (tmp_path / one).glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / two / path.name).read_bytes()
    with pytest.raises(TypeError):
        import_folder(source, tmp_path / "native3")
    assert main(["export-hf", str(tmp_path / "native"), str(tmp_path / "a"), "--adapter", "b", "--no-comparison"]) == 2


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, qwen2, mistral, qwen3, olmo2"),
        ({"model_type": "mixtral"}, "model_type: expected one of .* got 'mixtral'"),
        ({"model_type": "qwen3_moe"}, "model_type: expected one of .* got 'qwen3_moe'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: expected"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "low_freq_factor: .* got no such key"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "type: expected default, linear, llama3, yarn"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
        ({"mlp_bias": True}, r"expected a tensor model\.layers\.0\.mlp\..*bias .*mlp_bias"),
        ({"head_dim": 16}, r"k_proj.weight: expected shape \(64, 64\) by config.json .*head_dim.*got \(32, 64\)"),
        ({"num_key_value_heads": 2}, r"k_proj.weight: expected shape \(16, 64\) .*num_key_value_heads"),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
            r"expected a tensor .*k_norm.* \(.*model_type",
        ),
        ({"logit_scale": 0.5}, "logit_scale: expected no such key .*LlamaForCausalLM"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 3}, r"expected a tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"config\.json's model only .*num_hidden_layers.* got a tensor 'model\.layers\.1"),
        ({"intermediate_size": 100}, r"expected shape \(64, 100\)"),
        ({"vocab_size": 590}, r"expected shape \(590, 64\)"),
        ({"attention_bias": True}, r"expected a tensor .*bias"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"hidden_size": 2**31}, "hidden_size"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number above 0"),
        ({"tie_word_embeddings": True}, "lm_head.weight: expected the embedding"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map requires code"),
    ],
)
def test_what_the_native_model_cannot_do_is_refused(tokenizers, tmp_path, changes, expected):
    source = write_model(tmp_path / "hf", "Llama", tokenizers["sentencepiece"])
    edit(source, **changes)
    with pytest.raises(PauseMegatronError, match=expected):
        import_folder(source, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("cls", "tokenizer"), [("Llama", "byte-level"), ("Mistral", "byte-level"), ("Qwen2", "qwen2")])
def test_a_missing_key_has_the_default_of_transformers_or_is_refused(tokenizers, tmp_path, full, cls, tokenizer):
    """An import compares its logits with those that transformers computes from the same folder, 1e-5 in fp32."""
    changes = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
    source = write_model(tmp_path / "hf", cls, tokenizers[tokenizer], **changes)
    whole = json.loads((source / "config.json").read_text())
    needed = {"model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
    needed |= {"num_hidden_layers", "vocab_size"}
    chosen = (
        whole if full else {"Llama": ["rope_parameters"], "Mistral": ["rms_norm_eps"], "Qwen2": ["layer_types"]}[cls]
    )
    for key in chosen:
        (source / "config.json").write_text(json.dumps({name: whole[name] for name in whole if name != key}))
        try:
            done = import_folder(source, tmp_path / f"without {key}", sequence_length=64)
        except CheckpointError:
            assert key in needed, key
            continue
        assert done.largest_difference <= 1e-5, key


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tokenizers, tmp_path):
    source = write_model(tmp_path / "hf", "Llama", tokenizers["sentencepiece"], rows=590)
    with pytest.raises(CheckpointError, match=r"expected ids below vocab_size=590 in the tokenizer, got up to 599"):
        import_folder(source, tmp_path / "native")


def test_an_output_bias_goes_in_and_out(tokenizers, tmp_path):
    for name, scale in (("some", 1), ("zero", 0)):
        source = write_model(tmp_path / f"{name}-hf", "Llama", tokenizers["sentencepiece"], attention_bias=True)
        for path in source.glob("*.safetensors"):
            content = {k: v * scale if k.endswith("o_proj.bias") else v for k, v in load_file(path).items()}
            save_file(content, path)
        import_folder(source, tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}-out", dtype="bf16")
        before, after = tensors(source), tensors(tmp_path / f"{name}-out")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key][: len(value)], value) for key, value in before.items())


def test_missing_shards_and_tensors_are_named_and_nothing_is_written(tokenizers, tmp_path):
    """The index names a file that is not there, or a tensor that its file lacks; and tensors beside the index."""
    whole = write_model(tmp_path / "hf", "Qwen3", tokenizers["qwen2"], head_dim=16)
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    victim = sorted(index["weight_map"])[3]
    shard = index["weight_map"][victim]

    def without_the_file(folder: Path) -> None:
        (folder / shard).unlink()

    def without_the_tensor(folder: Path) -> None:
        kept = {name: value for name, value in load_file(folder / shard).items() if name != victim}
        save_file(kept, folder / shard)

    def without_norms(folder: Path) -> None:
        del index["weight_map"]["model.layers.1.self_attn.q_norm.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for path in folder.glob("*.safetensors"):
            kept = {k: v for k, v in load_file(path).items() if k != "model.layers.1.self_attn.q_norm.weight"}
            save_file(kept, path)

    def with_a_norm_of_another(folder: Path) -> None:
        extra = {"model.layers.0.pre_feedforward_layernorm.weight": torch.ones(64)}
        save_file({**load_file(folder / shard), **extra}, folder / shard)

    for spoil, expected in (
        (without_the_file, rf"{shard}: expected the file that .*index\.json names for \d+ tensors, got none"),
        (without_the_tensor, rf"{shard}: expected a tensor {victim}, which .*index\.json places there, got none"),
        (without_norms, r"expected a tensor model\.layers\.1\.self_attn\.q_norm\.weight .*model_type.*got none"),
        (with_a_norm_of_another, rf"{shard}: expected tensors .*model_type, hidden_size\), got a tensor .*pre_feedfor"),
    ):
        shutil.copytree(whole, tmp_path / "spoilt")
        spoil(tmp_path / "spoilt")
        with pytest.raises(CheckpointError, match=expected) as caught:
            import_folder(tmp_path / "spoilt", tmp_path / "native")
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "spoilt")
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
