"""Megatron-LM's checkpoints in and out: megatron-core itself writes them, and loads what is exported."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.megatron_checkpoints import (
    LENGTH,
    code,
    index_with_code,
    load_as_megatron_lm,
    load_dist,
    load_legacy,
    load_optimizer,
    save_both,
    save_stages,
)
from support.prose import train_model
from support.ranks import run_on_ranks
from support.tiny_llama import write_folder
from torch.distributed.checkpoint.metadata import TensorProperties

from pause_megatron.checkpoint import Manifest
from pause_megatron.checkpoint.layout import partition_dim, row_spans
from pause_megatron.checkpoint.manifest import FileEntry
from pause_megatron.cli import main
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.checkpoint import open_checkpoint
from pause_megatron.hf.importing import import_folder
from pause_megatron.hf.parity import native_logits
from pause_megatron.hf.weights import native_shapes
from pause_megatron.megatron_lm import export as exporting
from pause_megatron.megatron_lm.arguments import write_arguments
from pause_megatron.megatron_lm.export import ExportedMegatron, export_megatron
from pause_megatron.megatron_lm.flags import ignored_arguments
from pause_megatron.megatron_lm.importing import import_megatron
from pause_megatron.megatron_lm.names import place_of
from pause_megatron.megatron_lm.safe import read_index
from pause_megatron.megatron_lm.torch_dist import read_common

PIECES = 600
PAUSE = 600
CASES = {
    "untied": {},
    "tied, biased": {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True, "rotary_base": 500000},
    "biased everywhere, wide heads": {"add_bias_linear": True, "kv_channels": 16},
    "norms of heads, windows above a layer": {
        "qk_layernorm": True,
        "kv_channels": 16,
        "window_size": (5, 0),
        "window_attn_skip_freq": [0, 1, 1],
        "norm_epsilon": 0.01,
    },
    "Llama 3's RoPE, a tensor per layer and half of the gate": {
        "use_rope_scaling": True,
        "rope_scaling_factor": 8.0,
        "rotary_base": 500000,
        "kv_channels": 32,
        "singleton": True,
    },
    "linear RoPE, all heads with keys, bf16": {
        "rotary_seq_len_interpolation_factor": 4,
        "num_query_groups": 4,
        "group_query_attention": False,
        "bf16": True,
    },
}


def windows() -> torch.Tensor:
    """Two windows of text ids, the second with pauses."""
    tokens = torch.randint(0, PIECES, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    tokens[1, 3::5] = PAUSE
    return tokens


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a native checkpoint."""
    found, _ = native_logits(open_checkpoint(folder, lambda *_: None), tokens, torch.float32)
    return torch.cat([one.reshape(-1, *one.shape[-2:]) for one in found])


def states(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a native checkpoint, by file and name."""
    return {
        f"{path.name} {name}": value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()
    }


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint at TP 2 with a trained pause row."""
    folder = tmp_path_factory.mktemp("native")
    write_folder(folder / "hf", num_hidden_layers=3)
    import_folder(folder / "hf", folder / "ckpt", tensor_parallel=2)
    return folder / "ckpt"


@pytest.fixture(scope="module")
def exported(native: Path) -> Path:
    """Its export."""
    out = native.parent / "megatron"
    assert main(["export-megatron", str(native), str(out), "--tensor-parallel", "2"]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_model(tmp_path_factory.mktemp("tokenizer") / "speech.model")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Checkpoints that megatron-core wrote at TP 2, and the logits of the models."""
    found = {}
    for name, changes in CASES.items():
        root = tmp_path_factory.mktemp("written")
        found[name] = root, run_on_ranks(2, save_both, str(root), 2, windows().tolist(), PIECES + 1, changes)[0]
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_core_loads_an_export_and_computes_the_same(native: Path, exported: Path, tensor: int) -> None:
    expected = logits_of(native, windows())
    rows = None if tensor == 2 else 640  # another padding than the one that is stored
    for got in run_on_ranks(tensor, load_dist, str(exported / "release"), tensor, windows().tolist(), PIECES + 1, rows):
        assert float((got - expected).abs().max()) <= 1e-5


def test_an_export_comes_back_bit_for_bit(native: Path, exported: Path, tmp_path: Path) -> None:
    command = ["import-megatron", str(exported), str(tmp_path / "back"), "--tensor-parallel", "2"]
    assert main([*command, "--tokenizer", str(exported / "tokenizer")]) == 0
    before, after = states(native), states(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    one, two = (open_checkpoint(folder, lambda *_: None) for folder in (native, tmp_path / "back"))
    assert one.pause_ids == two.pause_ids == range(PAUSE, PAUSE + 1)
    assert one.config.model.model_dump(exclude={"family"}) == two.config.model.model_dump(exclude={"family"})


OPTIONS = {
    "head_dim": 16,
    "qk_norm": "head",
    "sliding_window": 6,
    "sliding_from": 1,
    "norm_eps": 0.01,
    "rope_base": 500000.0,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_length": 8192,
}
FLAGS = "--norm-epsilon 0.01 --qk-layernorm --use-rope-scaling --rope-scaling-factor 8.0 --window-size 5,0 "
FLAGS += "--window-attn-skip-freq [0,1,1] --finetune"


@pytest.fixture(scope="module")
def with_options(native: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportedMegatron]:
    """A native checkpoint with options that Megatron-LM does not take from a checkpoint, and its export."""
    folder = tmp_path_factory.mktemp("options")
    write_random(folder / "ckpt", native, OPTIONS)
    return folder / "ckpt", export_megatron(folder / "ckpt", folder / "out")


def write_random(folder: Path, like: Path, options: dict[str, Any]) -> None:
    """Write a checkpoint with other options, random weights and the tokenizer of another one."""
    config = open_checkpoint(like, lambda *_: None).config
    config = config.model_copy(update={"model": config.model.model_copy(update={"family": None, **options})})
    other = folder.parent / "written"
    export_megatron(like, other)
    args = write_arguments(config, live_rows=PAUSE + 1, padded_rows=640, tensor_parallel=1, iteration=0)
    shapes = native_shapes(config.model, 640)
    generator = torch.Generator().manual_seed(5)
    state = {place_of(name).apart: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    state = {name: value + ("norm" in name) for name, value in state.items()}
    args.pause_ids = [PAUSE]
    (other / "old" / "mp_rank_00").mkdir(parents=True)
    torch.save({"args": args, "checkpoint_version": 3.0, "model": state}, other / "old/mp_rank_00/model_optim_rng.pt")
    import_megatron(other / "old", folder, tokenizer=other / "tokenizer")


def test_an_export_says_which_options_megatron_lm_needs(with_options) -> None:
    _, done = with_options
    assert " ".join(done.flags) == FLAGS and done.notes == ()
    told = ignored_arguments(argparse.Namespace(use_rope_scaling=True, rope_scaling_factor=32.0))
    assert len(told) == 1 and "args.rope_scaling_factor is 32, but Megatron-LM's own model provider drops it" in told[0]


@pytest.mark.skipif(find_spec("megatron.training") is None, reason="megatron-core before 0.19 is without Megatron-LM")
def test_megatron_lm_itself_loads_an_export_with_those_options(with_options) -> None:
    native, done = with_options
    expected = logits_of(native, windows())
    options = list(done.flags), windows().tolist(), PIECES + 1
    assert float((run_on_ranks(1, load_as_megatron_lm, str(done.folder), *options)[0] - expected).abs().max()) <= 2e-5


def test_an_index_is_read_by_every_release_of_torch(exported: Path, tmp_path: Path, monkeypatch) -> None:
    index = exported / "release" / ".metadata"
    monkeypatch.setattr(TensorProperties, "__setstate__", lambda self, state: self.states.append(state), raising=True)
    monkeypatch.setattr(TensorProperties, "states", [], raising=False)
    with index.open("rb") as file:
        pickle.load(file)
    assert {len(state) for state in TensorProperties.states} == {5}  # torch 2.15 writes and reads a sixth, strides
    monkeypatch.undo()
    with index.open("rb") as file:
        metadata = pickle.load(file)
    whole = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*whole(self)[:5], None))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    entries = read_index(tmp_path / ".metadata").state_dict_metadata.values()
    assert {entry.properties.dtype for entry in entries if hasattr(entry, "properties")} == {torch.float32}


def test_mp_rank_folders_come_back_and_megatron_core_loads_them(native: Path, tmp_path: Path) -> None:
    export_megatron(native, tmp_path / "out", tensor_parallel=2, format="torch")
    import_megatron(tmp_path / "out", tmp_path / "back", tokenizer=tmp_path / "out" / "tokenizer", tensor_parallel=2)
    before, after = states(native), states(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    expected = logits_of(native, windows())
    for got in run_on_ranks(2, load_legacy, str(tmp_path / "out" / "release"), 2, windows().tolist(), PIECES + 1):
        assert float((got - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("format", ["torch_dist", "torch"])
def test_looped_layers_become_layers_of_their_own(native: Path, tmp_path: Path, monkeypatch, format) -> None:
    """A range of layers that repeats comes back as a plain model with the same logits."""
    plain = open_checkpoint(native, lambda *_: None)
    loops = {"loops": 3, "loop_layers": "1..1"}
    config = plain.config.model_copy(update={"model": plain.config.model.model_copy(update=loops)})
    looped = replace(plain, config=config)
    monkeypatch.setattr(exporting, "open_checkpoint", lambda *_: looped)
    export_megatron(native, tmp_path / "out", format=format)
    import_megatron(tmp_path / "out", tmp_path / "back", tokenizer=tmp_path / "out" / "tokenizer")
    assert open_checkpoint(tmp_path / "back", lambda *_: None).config.model.layers == looped.config.model.depth == 5
    expected = torch.stack(native_logits(looped, windows(), torch.float32)[0])
    assert torch.equal(torch.stack([*logits_of(tmp_path / "back", windows())]), expected)
    assert not torch.equal(logits_of(native, windows()), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["dist", "legacy"])
def test_a_checkpoint_of_megatron_core_computes_the_same(written, tokenizer, tmp_path, case, format) -> None:
    root, expected = written[case]
    source = root / "dist" if format == "dist" else root / "legacy" / "iter_0000100"
    done = import_megatron(source, tmp_path / "kept", tokenizer=tokenizer, keep_pause_row=True)
    assert done.how == "kept" and done.pause_ids == (PAUSE,) and done.rows == 608
    got = logits_of(tmp_path / "kept", windows())
    assert float((got - expected).abs().max()) <= 1e-5
    # Without the flag the row after the tokenizer's ids is padding: a new row is drawn, and text stays as it is.
    done = import_megatron(source, tmp_path / "new", tokenizer=tokenizer, tensor_parallel=2)
    assert done.how == "new"
    got = logits_of(tmp_path / "new", windows()[:1])
    assert float((got[..., :PIECES] - expected[:1, :, :PIECES]).abs().max()) <= 1e-5
    assert not torch.equal(got[..., PIECES], expected[:1, :, PIECES])


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_become_one_model(tokenizer, tmp_path, tied) -> None:
    changes = {"untie_embeddings_and_output_weights": not tied}
    _, expected = run_on_ranks(2, save_stages, str(tmp_path), windows().tolist(), PIECES + 1, changes)
    for format in ("dist", "legacy"):
        source = tmp_path / format / "iter_0000100"
        import_megatron(source, tmp_path / f"{format}-kept", tokenizer=tokenizer, keep_pause_row=True)
        assert float((logits_of(tmp_path / f"{format}-kept", windows()) - expected).abs().max()) <= 1e-5


def with_moments(native: Path, folder: Path) -> Path:
    """A copy of a checkpoint with random moments, as after training."""
    shutil.copytree(native, folder)
    manifest = Manifest.load(folder)
    for number, name in enumerate(manifest.state_files()):
        tensors = load_file(folder / name)
        generator = torch.Generator().manual_seed(number)
        for key, value in tensors.items():
            if not key.startswith("param|"):
                tensors[key] = torch.rand(value.shape, generator=generator)
        save_file(tensors, str(folder / name))
        manifest.files[name] = FileEntry.of(folder / name)
    (folder / "manifest.json").write_text(replace(manifest, step=7, optimizer_step=7, progress={"step": 7}).dumps())
    return folder


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_distributed_optimizer_loads_masters_and_moments(native: Path, tmp_path: Path, tensor: int) -> None:
    source = with_moments(native, tmp_path / "trained")
    export_megatron(source, tmp_path / "out", tensor_parallel=tensor, optimizer=True)
    reader = open_checkpoint(source, lambda *_: None).reader
    for rank, found in enumerate(run_on_ranks(tensor, load_optimizer, str(tmp_path / "out" / "iter_0000007"), tensor)):
        assert len(found) == len(reader.manifest.parameters)
        for name, values in found.items():
            assert torch.equal(values["param"], values["weight"]), name
            for key in ("param", "exp_avg", "exp_avg_sq"):
                merged = reader.rows(name, 0, reader.shape(name)[0], key)
                expected = shard(name, merged, rank, tensor)
                live = (
                    len(expected) if "embed" not in name and "output" not in name else PAUSE + 1 - rank * len(expected)
                )
                assert torch.equal(values[key][:live], expected[:live]), (name, key)


def shard(name: str, merged: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    if partition_dim(name) == 1:
        return merged.chunk(ranks, dim=1)[rank]
    spans = row_spans(name, len(merged), ranks)
    return torch.cat(
        [merged[s.start : s.start + s.count] for s in spans if partition_dim(name) is None or s.rank == rank]
    )


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a torch_dist checkpoint with other arguments."""
    shutil.copytree(source, folder)
    common = read_common(folder)
    vars(common["args"]).update(changes)
    del common["args"].exit_signal  # an inert record cannot be written again
    torch.save(common, folder / "common.pt")
    return folder


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_experts", 8),
        ("mtp_num_layers", 1),
        ("multi_latent_attention", True),
        ("normalization", "LayerNorm"),
        ("position_embedding_type", "learned_absolute"),
        ("position_embedding_type", "yarn"),
        ("swiglu", False),
        ("rotary_interleaved", True),
        ("rotary_percent", 0.5),
        ("softmax_type", "learnable"),
        ("layernorm_zero_centered_gamma", True),
        ("window_attn_skip_freq", 2),
        ("attention_output_gate", True),
        ("spec", ["my_module", "my_layers"]),
        ("num_query_groups", 3),
        ("hidden_size", "32"),
        ("num_layers", None),
    ],
)
def test_another_architecture_is_refused_by_argument_and_value(written, tokenizer, tmp_path, argument, value) -> None:
    changes = {argument: value} | ({"window_size": (4, 0)} if argument.startswith("window") else {})
    source = edited(written["untied"][0] / "dist" / "iter_0000100", tmp_path / "source", **changes)
    with pytest.raises(CheckpointError) as error:
        import_megatron(source, tmp_path / "out", tokenizer=tokenizer)
    told = str(error.value)
    assert f"{source}: args.{argument}: expected " in told and f"got {str(value)!r}" in told
    assert "\n" not in told and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ffn_hidden_size": 64},
            r"linear_fc1.weight: expected shape \(3, 128, 32\) by its arguments, got \(3, 96, 32\)",
        ),
        ({"num_layers": 2}, r"expected shape \(2, 32\) by its arguments, got \(3, 32\)"),
        ({"num_layers": 4}, r"expected shape \(4, 32\) by its arguments, got \(3, 32\)"),
        ({"qk_layernorm": True}, "expected a tensor decoder.layers.0.self_attention.q_layernorm.weight"),
        ({"untie_embeddings_and_output_weights": False}, "got a tensor 'output_layer.weight'"),
        ({"padded_vocab_size": 640}, r"expected 640 rows \(args.padded_vocab_size\), got 608"),
        ({"pause_ids": [590]}, r"expected pauses at the ids \[590\] \(args.pause_ids\), got \[600\]"),
    ],
)
def test_tensors_that_contradict_the_arguments_are_refused(written, tokenizer, tmp_path, changes, message) -> None:
    source = edited(written["untied"][0] / "dist" / "iter_0000100", tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message):
        import_megatron(source, tmp_path / "out", tokenizer=tokenizer)


def damage(source: Path, how: str) -> None:
    largest = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size, default=None)
    if how == "missing shard":
        largest.unlink()
    elif how == "short shard":
        largest.write_bytes(largest.read_bytes()[:-4000])
    elif how == "no index":
        (source / ".metadata").unlink()
    elif how in ("offset", "shape", "twice"):
        index = pickle.loads((source / ".metadata").read_bytes())
        entry = index.state_dict_metadata["embedding.word_embeddings.weight"]
        place = next(info for key, info in index.storage_data.items() if key.fqn == "embedding.word_embeddings.weight")
        if how == "offset":
            place.offset = "1"
        elif how == "shape":
            entry.size = torch.Size([300, 32])
        else:
            entry.chunks[1] = entry.chunks[0]
        (source / ".metadata").write_bytes(pickle.dumps(index))
    elif how == "index with code":
        index_with_code(source / ".metadata")
    elif how == "code":
        code(source / "common.pt")
    elif how == "backend":
        (source / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    elif how == "missing rank":
        shutil.rmtree(source / "mp_rank_00")
    elif how == "code in a rank":
        code(source / "mp_rank_01" / "model_optim_rng.pt")
    elif how == "no file":
        (source / "mp_rank_01" / "model_optim_rng.pt").unlink()


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("dist", "missing shard", r"expected a file '__\d_\d.distcp', got none"),
        ("dist", "short shard", r"__\d_\d.distcp: tensor .*: expected [\d,]+ bytes or more, got"),
        ("dist", "no index", ".metadata: expected the index of a torch_dist checkpoint, got none"),
        ("dist", "index with code", "posix.system, which can run code; not opened"),
        ("dist", "offset", ".metadata: .*expected a place in a file, got another value"),
        ("dist", "shape", ".metadata: embedding.word_embeddings.weight: expected parts within its shape, got others"),
        ("dist", "twice", "embedding.word_embeddings.weight: expected parts that are apart, two overlap"),
        ("dist", "code", "common.pt: expected values that Megatron-LM saves, got posix.system, which can run code"),
        ("dist", "backend", "metadata.json: sharded_backend: expected 'torch_dist', got 'zarr'"),
        ("legacy", "missing rank", r"of 2 tensor-parallel x 1 pipeline ranks, got none of rank \(0, 0\)"),
        ("legacy", "no file", r"of 2 tensor-parallel x 1 pipeline ranks, got none of rank \(1, 0\)"),
        ("legacy", "code in a rank", "model_optim_rng.pt: expected values that Megatron-LM saves, got posix.system"),
    ],
)
def test_missing_files_and_code_are_refused(written, tokenizer, tmp_path, capfd, kind, how, message) -> None:
    source = tmp_path / "source"
    shutil.copytree(written["untied"][0] / kind / "iter_0000100", source)
    damage(source, how)
    with pytest.raises(CheckpointError, match=message):
        import_megatron(source, tmp_path / "out", tokenizer=tokenizer)
    assert "ran" not in capfd.readouterr().out and not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_size_is_refused(written, exported, tmp_path, capsys) -> None:
    source = written["untied"][0] / "dist"
    for size in (500, 700):
        other = train_model(tmp_path / f"{size}.model", vocab_size=size)
        command = ["import-megatron", str(source), str(tmp_path / "out"), "--tokenizer", str(other)]
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "to 608 ids, for the embedding has 608 rows with padding, got " + str(size) in told
    assert main(["import-megatron", str(tmp_path / "nothing"), str(tmp_path / "out"), "--tokenizer", str(other)]) == 2
    assert "expected a folder iter_XXXXXXX or one with latest_checkpointed_iteration.txt" in capsys.readouterr().err


def test_an_export_without_a_counterpart_is_refused(native, tmp_path) -> None:
    for options, message in (
        ({"tensor_parallel": 3}, "--tensor-parallel: expected a divisor of model.heads = 4, got 3"),
        ({"optimizer": True, "format": "torch"}, "--optimizer: expected --format torch_dist with it, got torch"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_megatron(native, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
