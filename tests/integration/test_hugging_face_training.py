"""The README's code for transformers users, executed verbatim, and Trainer's loss on our samples."""

from __future__ import annotations

import ast
import copy
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.prose import documents, write_shards
from support.ranks import run_on_ranks
from support.tiny_llama import llama, sentencepiece_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from pause_megatron import PauseExamples, PauseLoss, PauseTransform, add_pause_token, pad_batch, pause_windows
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = [
    (ROOT / "README.md", "## In your own script\n"),
    (ROOT / "pause_megatron" / "hf" / "README.md", "## Training a transformers model\n"),
]
PAUSE = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder as the README assumes: llama/, shards/, and data/llama prepared with the model's tokenizer."""
    folder = tmp_path_factory.mktemp("library")
    tokenizer = sentencepiece_tokenizer(folder / "llama", pause=False)
    for part in (tokenizer, llama(len(tokenizer), pauses=0)):
        part.save_pretrained(str(folder / "llama"))
    pattern = write_shards(folder / "shards", [text[:400] for text in documents(150)], 1)
    prepare([pattern], load_tokenizer(folder / "llama"), folder / "data" / "llama", workers=1)
    return folder


def _definition(model, ids: Tensor) -> float:
    """Mean loss of a batch [batch, seq] over text targets, each predicted from the token before it."""
    with torch.no_grad():
        losses = cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[ids[:, 1:] != PAUSE].mean().item()


def _losses(trainer: Trainer) -> list[float]:
    """Losses of the steps, as Trainer accumulated them."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_readmes_lines_train_a_model_with_pauses(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    text = "\n".join(
        path.read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0] for path, heading in SECTIONS
    )
    first, further, loop = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    *before, train = ast.parse(first).body
    assert ast.unparse(train) == "trainer.train()"
    _run(before, names)
    model, trainer = names["model"], names["trainer"]
    initial, seen = copy.deepcopy(model), []
    hook = model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"]), with_kwargs=True)
    _run([train], names)
    hook.remove()
    losses = _losses(trainer)
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert seen[0].shape == (8, 128) and (seen[0] == PAUSE).sum() == 8 * 13
    assert losses[0] == pytest.approx(_definition(initial, seen[0]), rel=1e-5)
    moved = (model.get_input_embeddings().weight - initial.get_input_embeddings().weight).abs().amax(1)
    assert moved[PAUSE] > 1e-3

    _run(ast.parse(further).body, names)
    assert _on_examples(model, names["examples"]) < _on_examples(initial, names["examples"]) - 2
    assert model.config.pause["m_ft"] == 10

    windows = names["windows"].train
    ids = torch.stack([windows[number]["input_ids"] for number in range(8)])
    before_loop = _definition(model, ids)
    _run(ast.parse(loop).body, names)
    assert _definition(model, ids) < before_loop - 0.1


def test_the_first_python_block_of_the_readme_makes_a_dataset(folder, monkeypatch):
    monkeypatch.chdir(folder)
    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    assert len([line for line in block.splitlines() if line]) == 3
    loaders = {"tokenizer": AutoTokenizer, "model": AutoModelForCausalLM}
    names: dict[str, object] = {name: loader.from_pretrained("llama/") for name, loader in loaders.items()}
    _run(ast.parse(block).body, names)
    sample = names["train"][9_999]
    pauses = sample["input_ids"] == PAUSE
    assert len(names["train"]) == 10_000 and sample["input_ids"].shape == (2048,)
    assert pauses.sum() == round(0.1 * 2047) and (sample["labels"][pauses] == -100).all()
    assert list(names["pause_ids"]) == [PAUSE] and names["model"].get_input_embeddings().num_embeddings > PAUSE


def _run(body: list[ast.stmt], names: dict[str, object]) -> None:
    exec(compile(ast.Module(body, []), "README.md", "exec"), names)


def _on_examples(model, examples: PauseExamples) -> float:
    with torch.no_grad():
        return model(**pad_batch([examples[number] for number in range(8)])).loss.item()


def _train(make_data, folder: Path, micro: int = 8, accumulation: int = 1, **options):
    """Trains a small model for 5 steps; returns the losses of the steps and the trainer."""
    folder.mkdir(exist_ok=True)
    tokenizer = sentencepiece_tokenizer(Path(tempfile.mkdtemp(dir=folder)), pause=False)
    model = llama(len(tokenizer), pauses=0)
    pause_ids = add_pause_token(tokenizer, model)
    arguments = TrainingArguments(
        str(folder / "runs"),
        max_steps=5,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=make_data(folder, tokenizer, pause_ids), **options)
    trainer.train()
    return _losses(trainer), trainer


def _windows(folder, tokenizer, pause_ids):
    settings = {"rate": 0.3, "window": "trim", "placement": "bernoulli"}
    return pause_windows(folder / "data" / "llama", 64, pause_ids=pause_ids, samples=40, **settings).train


def _pairs(folder, tokenizer, pause_ids):
    pairs = [(text[:40], text[40 : 50 + 7 * number]) for number, text in enumerate(documents(20))]
    return PauseExamples(pairs, tokenizer, 200, pause_ids=pause_ids, pauses="0..9", epochs=2)


def _on_a_rank(folder: Path) -> list[float]:
    from accelerate.state import AcceleratorState

    try:
        return _train(_windows, folder, 2, 2)[0]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # the process lives on, for other tests


@pytest.mark.parametrize("make", [_windows, _pairs], ids=["windows", "examples"])
def test_accumulation_changes_nothing(folder, make):
    """Micro-batches differ in their number of targets: a mean of means would show."""
    options = {"data_collator": pad_batch} if make is _pairs else {}
    whole, trainer = _train(make, folder, 8, **options)
    for micro in (4, 2):
        losses, other = _train(make, folder, micro, 8 // micro, **options)
        assert losses == pytest.approx(whole, rel=1e-5)
        for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)  # of steps of 1e-2, by Adam
    options["compute_loss_func"] = PauseLoss(range(PAUSE, PAUSE + 1))
    assert _train(make, folder, 2, 4, **options)[0] == pytest.approx(whole, rel=1e-5)


def test_two_ranks_are_one(folder):
    whole, _ = _train(_windows, folder, 8)
    for losses in run_on_ranks(2, _on_a_rank, folder):
        assert losses == pytest.approx(whole, rel=1e-5)


def test_a_collator_that_writes_labels_trains_on_pauses(folder):
    """The default collator must stay: this one trains on pauses."""
    tokenizer = sentencepiece_tokenizer(folder / "collator", pause=False)
    tokenizer.pad_token = tokenizer.eos_token
    sample = _windows(folder, tokenizer, range(PAUSE, PAUSE + 1))[0]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([dict(sample)])
    assert (batch["labels"] == PAUSE).any() and not (sample["labels"] == PAUSE).any()


def test_blocks_of_ones_own_train_too(folder):
    def make(folder, tokenizer, pause_ids):
        import datasets

        text = tokenizer("\n".join(documents(40)))["input_ids"]
        blocks = [{"input_ids": text[start : start + 60]} for start in range(0, 60 * 40, 60)]
        return datasets.Dataset.from_list(blocks).map(PauseTransform(pause_ids, rate=0.1), with_indices=True)

    losses, _ = _train(make, folder)
    assert losses[-1] < losses[0] - 0.3
