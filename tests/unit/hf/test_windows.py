"""Windows for a transformers model against the loss of the windows that `pretrain` reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.prose import documents, small_tokenizer, write_shards
from support.tiny_llama import llama
from torch import Tensor
from torch.nn.functional import cross_entropy

from pause_megatron.data.corpus.side_writing import register_values
from pause_megatron.data.prepare.run import prepare
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.hf.windows import LabelledWindows, pause_windows

LENGTH = 64
PAUSES = range(600, 601)
KINDS = [
    {},
    {"window": "trim", "placement": "with_replacement", "rate": 0.5},
    {"rate": 0.0},
    {"intra_document_masking": True, "eod_mask_loss": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    for name, texts in (("a", documents(40)), ("b", documents(60)[40:])):
        prepare([write_shards(folder / f"s{name}", texts, 1)], small_tokenizer(folder), folder / name, workers=1)
    return folder


@pytest.fixture(scope="module")
def model():
    return llama(602, pauses=2)


def _definition(model, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum and count of a window of PauseGPTDataset: mask and labels, unshifted (Goyal et al., section 3.1)."""
    losses = cross_entropy(model(sample["tokens"][None]).logits[0], sample["labels"], reduction="none")
    return (losses * sample["loss_mask"]).sum(), sample["loss_mask"].sum()


@pytest.mark.parametrize("pause_ids", [PAUSES, range(600, 602)], ids=["one", "two in turn"])
@pytest.mark.parametrize("settings", KINDS, ids=["exact", "trim", "none", "apart"])
def test_the_models_own_loss_is_that_of_the_windows_mask(folder, model, settings, pause_ids):
    train = pause_windows(folder / "a", LENGTH, pause_ids=pause_ids, samples=20, **settings).train
    assert len(train) == 20 and len(list(train)) == 20
    for number in range(20):
        made, native = train[number], train.windows[number]
        ids, labels = made["input_ids"], made["labels"]
        assert ids.shape == labels.shape == (LENGTH,)
        assert torch.equal(ids[:-1], native["tokens"]) and labels[0] == -100
        assert torch.equal(labels[1:] != -100, native["loss_mask"] == 1)
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        text = ids[(ids < 600)].tolist()
        dataset = train.windows
        assert text == dataset.window_text(number)[: len(text)].tolist()
        if not settings.get("intra_document_masking"):
            total, count = _definition(model, native)
            torch.testing.assert_close(model(input_ids=ids[None], labels=labels[None]).loss, total / count)
            assert count == (len(text) - 1 if ids[-1] < 600 or settings else count)
            assert set(made) == {"input_ids", "labels"}


def test_the_last_pause_has_the_next_id_in_turn(folder):
    """It has no label; the window itself is checked."""
    train = pause_windows(folder / "a", LENGTH, pause_ids=range(600, 602), rate=0.6, samples=60).train
    ends = []
    for number in range(60):
        window = train.windows.injector(train.windows.window_text(number), number)
        assert train[number]["input_ids"].tolist() == window.tokens.tolist()
        ends.append(int(window.tokens[-1]))
    assert {600, 601} <= set(ends)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_intra_document_masking_holds_in_transformers(folder, attention):
    model = llama(601, attn_implementation=attention)
    train = pause_windows(folder / "a", 512, pause_ids=PAUSES, samples=12, intra_document_masking=True).train
    several = 0
    for number in range(12):
        sample = train[number]
        begins = (sample["position_ids"] == 0).nonzero().flatten().tolist()
        several += len(begins) > 1
        total = torch.zeros(())
        for begin, end in zip(begins, [*begins[1:], 512], strict=True):
            # The document, with the first token of the next: that is its last target.
            logits = model(sample["input_ids"][None, begin:end]).logits[0]
            labels = torch.cat([sample["labels"][begin + 1 : end + 1], torch.full((max(end - 511, 0),), -100)])
            total = total + cross_entropy(logits, labels, reduction="sum")
        loss = model(**{name: values[None] for name, values in sample.items()}, use_cache=False).loss
        torch.testing.assert_close(loss, total / (sample["labels"] != -100).sum())
    assert several > 3


def test_one_pass_reads_each_corpus_once_and_more_draw_other_pauses(folder):
    one = pause_windows(folder / "a", LENGTH, pause_ids=PAUSES, split="1,0,0").train
    tokens = sum(len(document) + 1 for document in small_tokenizer(folder).encode_batch(list(documents(40))))
    text = LENGTH - round(0.1 * (LENGTH - 1))
    assert len(one) == (tokens - 1) // (text - 1)
    both = pause_windows([folder / "a", folder / "b"], LENGTH, pause_ids=PAUSES, split="1,0,0").train
    assert len(both) > len(one) and both[0]["input_ids"].shape == (LENGTH,)
    more = pause_windows(folder / "a", LENGTH, pause_ids=PAUSES, split="1,0,0", samples=3 * len(one)).train
    assert len(more) == 3 * len(one)
    with pytest.raises(ConfigError, match="expected a number of samples with a blend's weights"):
        pause_windows(["1", folder / "a", "2", folder / "b"], LENGTH, pause_ids=PAUSES)


def test_held_out_windows_with_and_without_pauses(folder):
    windows = pause_windows(
        str(folder / "a"), LENGTH, pause_ids=PAUSES, samples=8, valid_prefix=folder / "b", valid_samples=5
    )
    assert windows.rows == 601 and windows.pause_ids == PAUSES
    assert isinstance(windows.valid, LabelledWindows) and len(windows.valid) == 5
    assert (windows.valid[0]["input_ids"] == 600).sum() == round(0.1 * (LENGTH - 1))
    assert (windows.valid_without_pauses[0]["input_ids"] != 600).all()
    assert pause_windows(folder / "a", LENGTH, pause_ids=PAUSES, samples=8).valid is None


def test_pauses_stand_before_the_tokens_of_highest_value(folder, tmp_path):
    for path in folder.glob("a.*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    tokens = np.fromfile(tmp_path / "a.bin", dtype=np.uint16)
    np.save(tmp_path / "v.npy", tokens)  # so that a token's value is its id
    register_values(tmp_path / "a", "score", tmp_path / "v.npy")
    options = {"placement": "scored", "side": "score", "run": 2, "rate": 0.16, "samples": 6}
    for sample in pause_windows(tmp_path / "a", LENGTH, pause_ids=PAUSES, **options).train:
        ids = sample["input_ids"].numpy()
        before = (ids == 600).nonzero()[0][1::2] + 1  # behind the second pause of a run
        text = ids[ids != 600]
        assert sorted(ids[before]) == sorted(text[1:])[-len(before) :] and len(before) == 5


def test_invalid_arguments_are_refused_before_anything_is_built(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"pause_ids: expected ids from 600 on, .* got range\(601, 602\)"):
        pause_windows(folder / "a", LENGTH, pause_ids=range(601, 602))
    for settings, message in (
        ({"documents": "alone"}, "documents: expected 'joined' or 'apart', got 'alone'"),
        ({"rate": 1.5}, r"pause\.rate: expected a fraction"),
        ({"placement": "unifrom"}, r"pause\.placement"),
        ({"split": "a"}, r"data\.split"),
        ({"side": "score"}, "side: expected placement='scored' or a policy of yours with it, got 'uniform'"),
        ({"placement": "scored"}, "expected the name of a side array with pause_placement=scored"),
        ({"placement": "scored", "side": "score"}, "expected a side array of its manifest"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            pause_windows(folder / "a", LENGTH, pause_ids=PAUSES, **settings)
    with pytest.raises(DataError, match="nothing-here"):
        pause_windows(folder / "nothing-here", LENGTH, pause_ids=PAUSES)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, .* got none: make the TrainingArguments"):
        pause_windows(folder / "a", LENGTH, pause_ids=PAUSES)
