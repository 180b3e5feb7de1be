"""build_datasets: blends and splits of megatron-core's builder, with and without pauses, and its errors."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from support.corpora import ByteTokenizer, paragraphs, write_corpus

from pause_megatron.config.blend import parse_blend
from pause_megatron.config.schema import PauseSection
from pause_megatron.data.windows.build import DatasetOptions, Datasets, build_datasets, names_of
from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseTokenizer
from pause_megatron.errors import ConfigError, DataError

PAUSE = ByteTokenizer.pause_id


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    documents = paragraphs(60)
    return [write_corpus(folder / "one", documents[:40]), write_corpus(folder / "two", documents[40:])]


@pytest.fixture
def build(corpora: list[str], tmp_path: Path) -> Callable[..., Datasets]:
    def call(prefix: list[str] | None = None, *, pause: PauseSection | None = None, **changes: object) -> Datasets:
        arguments = {
            "split": "9,1,0",
            "sequence_length": 64,
            "tokenizer": ByteTokenizer(),
            "seed": 5,
            "train_samples": 40,
            "valid_samples": 6,
            "cache": str(tmp_path / "cache"),
        }
        return build_datasets(
            DatasetOptions(prefix or corpora[:1], pause=pause or PauseSection(rate=0.2), **{**arguments, **changes})
        )

    return call


def has_pauses(dataset: PauseGPTDataset | BlendedDataset) -> bool:
    return any((dataset[number]["tokens"] >= PAUSE).any() for number in range(5))


def test_one_corpus(build: Callable[..., Datasets], corpora: list[str]) -> None:
    datasets = build()
    assert len(datasets.train) >= 40
    assert len(datasets.valid) >= 6 and len(datasets.valid_without_pauses) >= 6
    assert has_pauses(datasets.train) and has_pauses(datasets.valid)
    assert not has_pauses(datasets.valid_without_pauses)
    assert datasets.tokenizer.pause_ids == range(PAUSE, PAUSE + 1)
    assert datasets.train[0]["tokens"].shape == datasets.valid_without_pauses[0]["tokens"].shape == (64,)
    held_out = set(datasets.valid.document_index.tolist())
    assert held_out == set(range(36, 40)) == set(datasets.valid_without_pauses.document_index.tolist())
    assert not held_out & set(datasets.train.document_index.tolist())


def test_rate_zero_is_the_stock_builders_dataset(build: Callable[..., Datasets]) -> None:
    datasets = build(pause=PauseSection(rate=0))
    config = dataclasses.replace(datasets.train.config)
    stock, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, [40, 6, 0], lambda: True, config).build()
    assert test is None
    for ours, theirs in ((datasets.train, stock), (datasets.valid, valid)):
        for number in range(len(theirs)):
            assert all(torch.equal(ours[number][name], value) for name, value in theirs[number].items())
    assert datasets.valid_without_pauses is datasets.valid


def test_a_weighted_blend_repeats_its_corpora(build: Callable[..., Datasets], corpora: list[str]) -> None:
    datasets = build(["0.75", corpora[0], "0.25", corpora[1]], train_samples=400)
    assert len(datasets.train) >= 400
    shares = np.bincount([int(datasets.train[number]["dataset_id"]) for number in range(400)]) / 400
    assert shares == pytest.approx([0.75, 0.25], abs=0.01)
    assert has_pauses(datasets.valid) and not has_pauses(datasets.valid_without_pauses)
    again = build(["0.75", corpora[0], "0.25", corpora[1]], train_samples=400)
    assert all(torch.equal(datasets.train[number]["tokens"], again.train[number]["tokens"]) for number in range(400))


def test_corpora_without_weights_are_read_once(build: Callable[..., Datasets], corpora: list[str]) -> None:
    datasets = build(corpora)
    assert {int(datasets.train[number]["dataset_id"]) for number in range(40)} == {0, 1}
    with pytest.raises(ConfigError, match=r"expected 100000 train samples or more .*, got \d+\. .*WEIGHT PREFIX"):
        build(corpora, train_samples=100_000)


def test_samples_of_a_blend_are_those_of_its_corpora(build: Callable[..., Datasets], corpora: list[str]) -> None:
    """Pauses depend on the corpus and the sample number in it, not on the blend around it."""
    blend = build(["1", corpora[0], "1", corpora[1]]).train
    number = next(number for number in range(40) if blend[number]["dataset_id"] == 1)
    inner = blend.datasets[1][int(blend.dataset_sample_index[number])]
    assert torch.equal(blend[number]["tokens"], inner["tokens"])


def test_the_number_of_samples_decides_the_order(build: Callable[..., Datasets]) -> None:
    """Why build_datasets wants the number for the whole run: another one is another order."""
    few, many = build(train_samples=40).train, build(train_samples=4000).train
    assert not all(torch.equal(few[number]["tokens"], many[number]["tokens"]) for number in range(40))
    again = build(train_samples=40).train
    assert all(torch.equal(few[number]["tokens"], again[number]["tokens"]) for number in range(40))


def test_pauses_do_not_change_with_the_sample_order(build: Callable[..., Datasets]) -> None:
    first, second = build(seed=1).train, build(seed=2).train
    assert not torch.equal(first[0]["tokens"], second[0]["tokens"])
    assert torch.equal(first[0]["tokens"] >= PAUSE, second[0]["tokens"] >= PAUSE)


@pytest.mark.parametrize("split", ["1,0,0", "9999,1,0", "1", "9,1,0"])
def test_no_validation(build: Callable[..., Datasets], split: str, tmp_path: Path) -> None:
    """None without validation; an error before anything is built, where validation is on and the split has no text."""
    datasets = build(split=split, valid_samples=0)
    assert datasets.valid is None and datasets.valid_without_pauses is None
    if split != "9,1,0":
        with pytest.raises(
            DataError, match=rf"one: expected at least 65 tokens .* valid split, got 0 .* of 40, .*{split}"
        ):
            build(split=split, valid_samples=6, cache=str(tmp_path / "none"))
        assert not (tmp_path / "none").exists()


def test_the_index_cache_is_in_the_folder_that_is_given(build: Callable[..., Datasets], corpora: list[str]) -> None:
    before = sorted(os.listdir(Path(corpora[0]).parent))
    datasets = build(["1", corpora[0], "1", corpora[1]])
    assert sorted(os.listdir(Path(corpora[0]).parent)) == before
    cache = Path(datasets.train.datasets[0].config.path_to_cache)
    assert any("PauseGPTDataset-train-shuffle_index" in name for name in os.listdir(cache))
    assert threading.active_count() < 10


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_intra_document_masking_in_every_dataset_of_a_run(
    build: Callable[..., Datasets], corpora: list[str], tmp_path: Path, rate: float
) -> None:
    """The same windows and caches as without: only positions and segments differ."""
    blend, pause = ["3", corpora[0], "1", corpora[1]], PauseSection(rate=rate)
    unmasked = build(blend, pause=pause)
    cached = sorted(os.listdir(tmp_path / "cache"))
    masked = build(blend, pause=pause, intra_document_masking=True)
    assert sorted(os.listdir(tmp_path / "cache")) == cached
    for name in ("train", "valid", "valid_without_pauses"):
        for number in range(5):
            plain, sample = getattr(unmasked, name)[number], getattr(masked, name)[number]
            assert sample.keys() - plain.keys() == {"segments"}
            for key in plain.keys() - {"position_ids", "dataset_id"}:
                assert torch.equal(sample[key], plain[key]), key
            begins = [int(place) for place in (sample["position_ids"] == 0).nonzero()]
            assert sample["segments"][begins].tolist() == list(range(len(begins)))


def test_default_cache_is_beside_the_first_corpus(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "data" / "corpus", paragraphs(20))
    arguments = {"split": "1", "sequence_length": 32, "tokenizer": ByteTokenizer(), "seed": 1}
    build_datasets(DatasetOptions([prefix], pause=PauseSection(), train_samples=4, valid_samples=0, **arguments))
    assert sorted(os.listdir(tmp_path / "data")) == ["cache", "corpus.bin", "corpus.idx"]


def test_parse_blend() -> None:
    assert parse_blend(["a"]) == (["a"], None)
    assert parse_blend(["a", "b"]) == (["a", "b"], None)
    assert parse_blend(["a", "b", "c"]) == (["a", "b", "c"], None)
    assert parse_blend(["0.3", "a", "0.7", "b"]) == (["a", "b"], [0.3, 0.7])
    assert parse_blend(["1", "a"]) == (["a"], None)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([], "data.prefix: expected the prefix of a prepared corpus, got nothing"),
        (["0.3", "a", "b", "c"], "data.prefix: expected WEIGHT PREFIX WEIGHT PREFIX .*'0.3 a b c'"),
        (["-1", "a", "1", "b"], "weights above 0, got '-1 a 1 b'"),
        (["nan", "a", "1", "b"], "weights above 0"),
    ],
)
def test_blends_that_cannot_be_read(prefix: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_blend(prefix)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,1,0", "0,1,0", "nan,1"])
def test_splits_that_cannot_be_read(build: Callable[..., Datasets], split: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.split: expected"):
        build(split=split)


def test_a_corpus_that_is_missing(build: Callable[..., Datasets], corpora: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.prefix: expected the files .*no\.bin and .*no\.idx"):
        build([str(tmp_path / "no")])
    with pytest.raises(DataError, match=r"no\.bin"):
        build(["1", corpora[0], "1", str(tmp_path / "no")])


@pytest.mark.parametrize("pause", [PauseSection(rate=0.2), PauseSection(rate=0.2, window="trim"), PauseSection(rate=0)])
def test_a_corpus_with_less_text_than_a_window(
    build: Callable[..., Datasets], corpora: list[str], tmp_path: Path, pause: PauseSection
) -> None:
    """Refused by name in every kind of list, before anything is built; one token more, and it trains."""
    needed = 65 - (round(pause.rate * 64) if pause.window == "exact" else 0)
    document, cache = np.concatenate(paragraphs(3)), tmp_path / "none"
    few, enough, empty = (write_corpus(tmp_path / f"corpus{n}", [document[:n]]) for n in (needed - 1, needed, 0))
    message = rf"{few}: expected at least {needed} tokens .*sequence_length=64\) in its train split, got {needed - 1} "
    for blend in ([few], [corpora[0], few], ["1", corpora[0], "1", few], [few, enough]):
        for samples in (4, None) if "1" not in blend else (4,):
            with pytest.raises(DataError, match=message):
                build(blend, pause=pause, split="1", train_samples=samples, valid_samples=0, cache=str(cache))
    with pytest.raises(DataError, match=rf"{empty}: expected at least {needed} tokens .*, got 0 \(documents: 1 of 1"):
        build([empty, enough], pause=pause, split="1", valid_samples=0, cache=str(cache))
    with pytest.raises(DataError, match=r"in its train split, got 0 \(documents: 0 of 1, with data.split=4,6,0\)"):
        build([enough], pause=pause, split="4,6,0", valid_samples=0, cache=str(cache))
    with pytest.raises(DataError, match=r"in its valid split, got 0 \(documents: 0 of 1, .*data.valid_prefix"):
        build(["1", corpora[0], "1", enough], pause=pause, split="9,1,0", cache=str(cache))
    # Held-out windows are also scored without pauses: that takes a whole window of text.
    short = write_corpus(tmp_path / "short", [document[:64]])
    for held_out in ([short], [corpora[1], short], ["1", short, "1", corpora[1]]):
        with pytest.raises(
            DataError, match=rf"{short}: expected at least 65 tokens .*valid split, got 64 \(documents: 1\)"
        ):
            build(valid_prefix=held_out, pause=pause, split="1", cache=str(cache))
    assert not cache.exists()
    for blend in ([enough], [corpora[0], enough], ["1", corpora[0], "1", enough]):
        assert len(build(blend, pause=pause, split="1", train_samples=1, valid_samples=0).train) >= 1


def test_a_pause_id_that_is_eod(build: Callable[..., Datasets]) -> None:
    class Clash(ByteTokenizer):
        pause_id = ByteTokenizer.eod

    with pytest.raises(ConfigError, match=r"pause id: .* got 256, the tokenizer's end-of-document id"):
        build(tokenizer=Clash())


def test_a_tokenizer_with_pause_ids_is_accepted(build: Callable[..., Datasets]) -> None:
    assert build(tokenizer=PauseTokenizer(ByteTokenizer()), valid_samples=0).tokenizer.vocab_size == PAUSE + 1


def test_a_truncated_index_is_rebuilt(build: Callable[..., Datasets], tmp_path: Path) -> None:
    whole = [build().train[number]["tokens"] for number in range(40)]
    indices = sorted((tmp_path / "cache").glob("*.npy"))
    assert indices
    for keep in (0, 40, 200):
        for path in indices:
            path.write_bytes(path.read_bytes()[:keep])
        again = build()
        assert all(torch.equal(again.train[number]["tokens"], tokens) for number, tokens in enumerate(whole))


def test_validation_corpora_are_held_out_whole(build: Callable[..., Datasets], corpora: list[str]) -> None:
    """All documents of data.prefix train, all of data.valid_prefix are held out."""
    datasets = build([corpora[0]], valid_prefix=[corpora[1]], split="1,0,0")
    assert set(datasets.train.document_index.tolist()) == set(range(40))
    for valid in (datasets.valid, datasets.valid_without_pauses):
        assert valid.dataset_path == corpora[1] and set(valid.document_index.tolist()) == set(range(20))
    assert has_pauses(datasets.valid) and not has_pauses(datasets.valid_without_pauses)
    assert datasets.valid.injector.split == "valid"
    alone = build([corpora[0]], split="1,0,0", valid_samples=0).train
    assert all(torch.equal(datasets.train[number]["tokens"], alone[number]["tokens"]) for number in range(40))
    assert (datasets.train_names, datasets.valid_names) == ((), ())


def test_a_validation_blend(build: Callable[..., Datasets], corpora: list[str]) -> None:
    blend = ["1", corpora[0], "1", corpora[1]]
    datasets = build([corpora[0]], valid_prefix=blend, split="1,0,0", valid_samples=20)
    ids = [int(datasets.valid[number]["dataset_id"]) for number in range(20)]
    assert sorted(ids) == [0] * 10 + [1] * 10
    assert (datasets.train_names, datasets.valid_names) == ((), ("one", "two"))
    with pytest.raises(DataError, match=r"data\.valid_prefix: expected the files .*no\.bin"):
        build([corpora[0]], valid_prefix=["no"], split="1,0,0")


def test_names_of_corpora() -> None:
    assert names_of(["data/c4"]) == ()
    assert names_of(["data/c4", "data/wiki"]) == ("c4", "wiki")
    assert names_of(["c4/en", "wiki/en", "/x/en"]) == ("c4/en", "wiki/en", "x/en")
    assert names_of(["c4", "c4"]) == ("c4#1", "c4#2")
