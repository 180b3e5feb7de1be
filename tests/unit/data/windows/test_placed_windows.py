"""Policies that see more than text, in the windows of corpora and streams: side values, documents, texts, weights."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.prose import documents, small_tokenizer, write_shards
from support.tiny_llama import byte_level_tokenizer
from transformers import AddedToken

from pause_megatron import data
from pause_megatron.config.pauses import PauseCounts
from pause_megatron.config.schema import DataSection, PauseSection
from pause_megatron.data.corpus.corpora import open_corpora
from pause_megatron.data.corpus.side_writing import register_values
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.stream.windows import StreamDataset
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.build import DatasetOptions, Datasets, build_datasets
from pause_megatron.data.windows.dataset import PauseGPTDataset
from pause_megatron.data.windows.pause import PauseInjector, PausePlan, TextWindow
from pause_megatron.data.windows.pieces import pieces_of
from pause_megatron.data.windows.placement import resolve_policy
from pause_megatron.data.windows.token_texts import token_texts
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.train.guards.same_run import corpora_record

LENGTH = 64


class Recorder:
    """A user's policy of the second generation, named by its class: pauses at the ends of documents, else uniform."""

    def __init__(self) -> None:
        self.seen: list[TextWindow] = []

    def place(self, window: TextWindow, rng: np.random.Generator) -> np.ndarray:
        self.seen.append(window)
        return (
            rng.choice(window.documents[1:], window.count)
            if window.documents.size > 1
            else rng.integers(1, window.text.size + 1, window.count)
        )


class NeedsArguments:
    def __init__(self, count: int) -> None:
        self.count = count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placed")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return small_tokenizer(folder)


@pytest.fixture(scope="module")
def prefix(folder: Path, tokenizer: Tokenizer) -> str:
    """A corpus of short documents with a side array: distinct values in a random order."""
    texts = [text[: 40 + 13 * (number % 9)] for number, text in enumerate(documents(150))]
    prepare([write_shards(folder / "s", texts, 1)], tokenizer, folder / "c", workers=1)
    values = side_of(str(folder / "c"))
    np.save(folder / "v.npy", values)
    register_values(folder / "c", "score", folder / "v.npy")
    return str(folder / "c")


def side_of(prefix: str) -> np.ndarray:
    size = Path(f"{prefix}.bin").stat().st_size // 2
    return np.random.default_rng(0).permutation(size).astype(np.float32)


def build(prefix: str, tokenizer: Tokenizer, cache: Path, **changes: object) -> Datasets:
    pause = PauseSection(**{"rate": 0.2, **{key: changes.pop(key) for key in [*changes] if key in PAUSE_KEYS}})
    options = {
        "split": "90,10,0",
        "sequence_length": LENGTH,
        "seed": 3,
        "train_samples": 60,
        "valid_samples": 4,
        "cache": str(cache),
        **changes,
    }
    return build_datasets(DatasetOptions([prefix], tokenizer=tokenizer, pause=pause, **options))


PAUSE_KEYS = ("rate", "window", "placement", "run", "pattern", "embeddings")


def pause_gaps(dataset: PauseGPTDataset, tokens: np.ndarray) -> list[int]:
    """The gap of each pause of a window, read off its tokens."""
    is_pause = tokens >= dataset.injector.pause_ids.start
    return (~is_pause).cumsum()[is_pause].tolist()


def test_pieces_address_the_text_and_documents_are_those_of_eod(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = build(prefix, tokenizer, tmp_path, placement="scored", side="score").train
    tokens, side = np.fromfile(f"{prefix}.bin", dtype=np.uint16), side_of(prefix)
    starts = dataset.dataset.index.sequence_pointers // 2
    several = 0
    for sample in range(len(dataset)):
        text = dataset.window_text(sample)
        pieces = pieces_of(dataset, sample)
        places = np.concatenate([starts[document] + offset + np.arange(size) for document, offset, size in pieces])
        assert np.array_equal(tokens[places], text)
        known = dataset.surroundings(sample, text.size)
        assert np.array_equal(known.side, side[places])
        by_eod = [0, *(np.flatnonzero(text[:-1] == tokenizer.eod) + 1)]
        assert known.documents.tolist() == by_eod
        several += len(by_eod) > 2
    assert several > 5


def test_values_are_not_rounded(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Those of int32 and int64 have more bits than float32."""
    for path in Path(prefix).parent.glob("c.*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    np.save(tmp_path / "v.npy", side_of(prefix).astype(np.int64) + 2**40)
    register_values(tmp_path / "c", "wide", tmp_path / "v.npy")
    wide = build(str(tmp_path / "c"), tokenizer, tmp_path, placement="scored", side="wide").train
    narrow = build(prefix, tokenizer, tmp_path, placement="scored", side="score").train
    for sample in range(4):
        assert torch.equal(wide[sample]["tokens"], narrow[sample]["tokens"])


@pytest.mark.parametrize("run", [1, 3])
def test_scored_is_before_the_tokens_of_highest_value(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path, run: int
) -> None:
    """DIT by its definition, with a loop; the same for the validation windows."""
    datasets = build(prefix, tokenizer, tmp_path, placement="scored", side="score", run=run)
    for dataset in (datasets.train, datasets.valid):
        for sample in range(4):
            text = dataset.window_text(sample)
            side = dataset.surroundings(sample, text.size).side
            places = -(-dataset.injector.plan.count // run)
            gaps = sorted(sorted(range(1, text.size), key=lambda gap, side=side: -side[gap])[:places])
            expected = [gap for gap in gaps for _ in range(run)][: dataset.injector.plan.count]
            assert dataset.window(dataset.injector, sample).places.size == len(expected) == round(0.2 * LENGTH)
            assert pause_gaps(dataset, dataset[sample]["tokens"].numpy()) == expected


def test_weights_are_the_values_of_the_labels(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = {"side": "score", "side_weights": True}
    datasets = build(prefix, tokenizer, tmp_path, eod_mask_loss=True, embeddings=2, **options)
    without = build(prefix, tokenizer, tmp_path, eod_mask_loss=True, embeddings=2)
    pairs = [(datasets.train, without.train), (datasets.valid_without_pauses, without.valid_without_pauses)]
    for dataset, plain in pairs:
        for sample in range(4):
            item, text = dataset[sample], dataset.window_text(sample)
            side = iter(dataset.surroundings(sample, text.size).side[1:])
            window = dataset.window(dataset.injector, sample)
            expected = [float(next(side)) if is_text else 0.0 for is_text in window.is_text[1:]]
            expected = [value * mask for value, mask in zip(expected, item["loss_mask"].tolist(), strict=True)]
            weights = item.pop("weights")
            assert weights.dtype == torch.float32 and weights.tolist() == expected
            assert item.keys() == plain[sample].keys()
            assert all(torch.equal(item[name], value) for name, value in plain[sample].items())
    assert not datasets.train[None]["weights"].any()


def test_weights_below_zero_name_corpus_and_sample(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for extension in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefix}.{extension}", tmp_path / f"c.{extension}")
    shutil.copytree(f"{prefix}.tokenizer", tmp_path / "c.tokenizer")
    values = side_of(prefix)
    values[:] = -1
    np.save(tmp_path / "v.npy", values)
    register_values(tmp_path / "c", "negative", tmp_path / "v.npy")
    dataset = build(str(tmp_path / "c"), tokenizer, tmp_path, side="negative", side_weights=True).train
    with pytest.raises(
        DataError, match=r"c\.negative\.npy: expected values of 0 or more.*got -1\.0 .*sample 2 \(train"
    ):
        dataset[2]
    with pytest.raises(DataError, match="nosuch"):
        build(str(tmp_path / "c"), tokenizer, tmp_path, side="nosuch", side_weights=True)
    with pytest.raises(ConfigError, match=r"side: expected the name of a side array with pause_placement=scored"):
        build(prefix, tokenizer, tmp_path, placement="scored")
    with pytest.raises(ConfigError, match=r"side: expected pause_placement=scored, .* got pause_placement=uniform"):
        build(prefix, tokenizer, tmp_path, side="score")


def test_a_pattern_that_no_token_matches_is_no_uniform_placement(prefix, tokenizer, tmp_path) -> None:
    for placement in ("after", "before"):
        train = build(prefix, tokenizer, tmp_path, placement=placement, pattern="Answer:").train
        with pytest.raises(ConfigError, match=r"got 'Answer:', which none of \d+ tokens does; .*sample 0\)"):
            train[0]


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize("placement", ["after", "before"])
def test_pauses_by_pattern(prefix: str, tokenizer: Tokenizer, tmp_path: Path, placement: str, run: int) -> None:
    """Every pause is after (before) a token with a match, where a window has one; the stream has the same windows."""
    train = build(prefix, tokenizer, tmp_path, placement=placement, run=run, pattern="[.,]|^ t").train
    texts = [tokenizer.decode([*tokenizer.encode("a"), token])[1:] for token in range(tokenizer.vocab_size)]

    class Texts:
        def text(self, sample: int) -> np.ndarray:
            return train.window_text(sample)

    stream = StreamDataset(Texts(), train.injector, 60, eod=tokenizer.eod)
    found = 0
    for sample in range(30):
        text, item = train.window_text(sample), train[sample]
        wanted = [gap for gap, token in enumerate(text.tolist(), start=1) if any(c in texts[token] for c in ".,")]
        wanted += [gap for gap, token in enumerate(text.tolist(), start=1) if texts[token].startswith(" t")]
        gaps = {gap - (placement == "before") for gap in wanted} - {0}
        placed = pause_gaps(train, item["tokens"].numpy())
        if gaps:
            assert set(placed) <= gaps
            found += 1
        assert all(torch.equal(stream[sample][name], value) for name, value in item.items())
    assert found > 20


@pytest.mark.parametrize("run", [1, 2, 5])
def test_every_token_has_its_run(prefix: str, tokenizer: Tokenizer, tmp_path: Path, run: int) -> None:
    datasets = build(prefix, tokenizer, tmp_path, placement="every", run=run, window="exact")
    dataset = datasets.train
    counts = PauseCounts(LENGTH, 0.2, "exact", "every", run)
    assert counts.nominal_rate == pytest.approx(counts.fraction, abs=1 / LENGTH)
    for sample in range(5):
        tokens = dataset[sample]["tokens"].numpy()
        is_text = tokens < dataset.injector.pause_ids.start
        assert is_text.tolist() == [place % (run + 1) == 0 for place in range(LENGTH)]
        assert 1 - is_text.mean() == counts.input_fraction
    assert dataset.injector.plan.text_length == -(-(LENGTH + 1) // (run + 1))
    assert datasets.valid_without_pauses.injector.plan.text_length == LENGTH + 1


def test_a_policy_of_the_second_generation_sees_its_window(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = f"{__name__}:Recorder"
    train = build(prefix, tokenizer, tmp_path, placement=name, side="score", run=2).train
    recorder = train.injector.plan.policy._policy  # made for this dataset
    assert isinstance(recorder, Recorder)
    recorder.seen.clear()
    train[7]
    (window,) = recorder.seen
    assert (window.sample, window.dataset, window.split) == (7, "c", "train")
    assert (window.count, window.rate) == (-(-round(0.2 * LENGTH) // 2), 0.1)
    assert np.array_equal(window.text, train.window_text(7)) and not window.text.flags.writeable
    assert window.side.shape == window.text.shape and window.documents[0] == 0
    assert not window.side.flags.writeable
    assert window.texts is token_texts(tokenizer)

    class Texts:
        def text(self, sample: int) -> np.ndarray:
            return train.window_text(sample)

    stream, several = StreamDataset(Texts(), train.injector, 60, eod=tokenizer.eod), 0
    for sample in range(20):
        recorder.seen.clear()
        assert torch.equal(stream[sample]["tokens"], train[sample]["tokens"])  # Recorder draws among the documents
        streamed, read = recorder.seen
        assert streamed.documents.tolist() == read.documents.tolist() and streamed.side is None
        several += read.documents.size > 1
    assert several > 5


def test_the_policy_of_the_readme(
    prefix: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(data.__file__).parent / "README.md").read_text()
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", readme, re.S) if "class AtBeginnings" in text)
    (tmp_path / "policies_of_the_readme.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    train = build(prefix, tokenizer, tmp_path, placement="policies_of_the_readme:AtBeginnings", side="score").train
    at_begins = 0
    for sample in range(10):
        documents = train.surroundings(sample, train.window_text(sample).size).documents
        gaps = pause_gaps(train, train[sample]["tokens"].numpy())
        assert set(documents[1:].tolist()) <= set(gaps)
        at_begins += documents.size - 1
    assert at_begins > 3


def test_a_run_compares_the_content_of_its_side_arrays(prefix: str) -> None:
    record = corpora_record(open_corpora(DataSection(prefix=(prefix,), side="score"), 1))
    without = corpora_record(open_corpora(DataSection(prefix=(prefix,)), 1))
    assert record["content of data.prefix"] != without.pop("content of data.prefix")
    assert {name for name in record if name not in without} == {"content of data.side", "content of data.prefix"}


def test_datasets_of_workers_open_the_side_array_again(prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = build(prefix, tokenizer, tmp_path, placement="scored", side="score").train
    values = pickle.dumps(train._side)
    assert len(values) < side_of(prefix).nbytes // 2
    pieces = pieces_of(train, 1) if train[1] else []
    size = train.injector.plan.text_length
    assert np.array_equal(pickle.loads(values).of(pieces, size), train.surroundings(1, size).side)


def test_texts_of_tokens(tokenizer: Tokenizer) -> None:
    texts = token_texts(tokenizer)
    ids = tokenizer.encode("Of the people, by the people.")
    assert "".join(texts[token] for token in ids).strip() == "Of the people, by the people."
    assert any(texts[token].startswith(" ") for token in ids)
    assert texts[tokenizer.eod] == "" and len(texts) == tokenizer.vocab_size
    assert not texts.matches("")[tokenizer.eod] and not texts.matches("a")[-1]


def test_texts_of_added_tokens(tmp_path: Path) -> None:
    """Those of GPT-NeoX, which are runs of blanks, are beyond `vocab_size`; special ones are no text."""
    transformers_tokenizer = byte_level_tokenizer(tmp_path / "t")
    transformers_tokenizer.add_tokens(["    "])
    transformers_tokenizer.add_tokens([AddedToken("<|role|>", special=True)])
    blanks, role = transformers_tokenizer.convert_tokens_to_ids(["    ", "<|role|>"])
    texts = token_texts(transformers_tokenizer)
    assert (texts[blanks], texts[role]) == ("    ", "") and blanks >= transformers_tokenizer.vocab_size
    assert texts.matches("^ {4}").nonzero()[0].tolist() == [blanks]


@pytest.mark.parametrize("name", ["NeedsArguments", "LENGTH"])
def test_what_is_no_policy(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"pause\.placement: expected one of uniform.*(without arguments|cannot be ca)"
    ):
        resolve_policy(f"{__name__}:{name}")


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([9, 1, 3, 3, 3], 2, [2, 3]),  # ties by position; the first token has no place before it
        ([9, 1, np.nan, 3, np.nan], 3, [1, 3, 3]),  # fewer than M: longer runs, the highest first
        ([9, 1, np.inf, 3, 2], 2, [2, 3]),
    ],
)
def test_scored_by_hand(values: list[float], count: int, expected: list[int]) -> None:
    window = TextWindow(np.arange(5), count, side=np.array(values))
    gaps = resolve_policy("scored").place(window, np.random.default_rng(0))
    assert sorted(gaps.tolist()) == expected


def test_scored_without_values_is_uniform() -> None:
    scored, uniform = (
        PauseInjector(PausePlan(40, 0.2, placement=name), range(99, 100), "c", "train")
        for name in ("scored", "uniform")
    )
    text = np.arange(33)
    gaps = scored.gaps(text, 5, side=np.full(33, np.nan))
    assert gaps.tolist() == uniform.gaps(text, 5).tolist()


@pytest.mark.parametrize("window", ["exact", "trim"])
@pytest.mark.parametrize("run", [1, 2, 7, 40])
def test_counts_are_the_mean_of_uniform_runs(window: str, run: int) -> None:
    plan = PausePlan(200, 0.2, window, run=run)
    injector, text, samples = PauseInjector(plan, range(999, 1000), "c", "train"), np.arange(plan.text_length), 1500
    kept = np.array([injector(text, sample).is_text for sample in range(samples)])
    pauses, inputs = (~kept).sum(1), (~kept[:, :-1]).sum(1)
    error = 4 * max(pauses.std(), inputs.std()) / samples**0.5 + 0.02
    slack = 0.5 if run > 1 and window == "trim" else 0.05
    assert abs(pauses.mean() - plan.counts.expected) < error + slack
    assert abs(inputs.mean() - plan.counts.input_fraction * 200) < error + slack
