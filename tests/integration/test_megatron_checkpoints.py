"""Megatron-LM's checkpoints in and out: megatron-core itself writes them, and loads what is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.megatron_checkpoints import LENGTH, load_dist, load_legacy, save_both
from support.prose import train_model
from support.ranks import run_on_ranks
from support.tiny_llama import write_folder

from pause_megatron.cli import main
from pause_megatron.hf.checkpoint import open_checkpoint
from pause_megatron.hf.importing import import_folder
from pause_megatron.hf.parity import native_logits
from pause_megatron.megatron_lm.export import export_megatron
from pause_megatron.megatron_lm.importing import import_megatron

PIECES = 600
PAUSE = 600
CASES = {
    "untied": {},
    "tied, biased": {"untie_embeddings_and_output_weights": False, "add_qkv_bias": True, "rotary_base": 500000},
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
    for got in run_on_ranks(
        tensor, load_dist, str(exported / "iter_0000000"), tensor, windows().tolist(), PIECES + 1, rows
    ):
        assert float((got - expected).abs().max()) <= 1e-5


def test_an_export_comes_back_bit_for_bit(native: Path, exported: Path, tmp_path: Path) -> None:
    command = ["import-megatron", str(exported), str(tmp_path / "back"), "--tensor-parallel", "2"]
    assert main([*command, "--tokenizer", str(exported / "tokenizer")]) == 0
    before, after = states(native), states(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    one, two = (open_checkpoint(folder, lambda *_: None) for folder in (native, tmp_path / "back"))
    assert one.pause_ids == two.pause_ids == range(PAUSE, PAUSE + 1)
    assert one.config.model.model_dump(exclude={"family"}) == two.config.model.model_dump(exclude={"family"})


def test_mp_rank_folders_come_back_and_megatron_core_loads_them(native: Path, tmp_path: Path) -> None:
    export_megatron(native, tmp_path / "out", tensor_parallel=2, format="torch")
    import_megatron(tmp_path / "out", tmp_path / "back", tokenizer=tmp_path / "out" / "tokenizer", tensor_parallel=2)
    before, after = states(native), states(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    expected = logits_of(native, windows())
    for got in run_on_ranks(2, load_legacy, str(tmp_path / "out" / "iter_0000000"), 2, windows().tolist(), PIECES + 1):
        assert float((got - expected).abs().max()) <= 1e-5


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
