"""`inspect`: its numbers are those of the corpus and of the datasets that a run would train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.prose import documents, small_tokenizer, write_shards

from pause_megatron.cli import main
from pause_megatron.config.schema import PauseSection
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.side_writing import register_values
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.windows.build import DatasetOptions, build_datasets
from pause_megatron.data.windows.pause import POLICIES

TEXTS = documents(120)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    prepare([write_shards(folder / "s", TEXTS, 2)], small_tokenizer(folder), folder / "c", workers=1)
    return folder / "c"


@pytest.fixture
def inspect(prefix: Path, capsys: pytest.CaptureFixture):
    def call(*options: str) -> str:
        assert main(["inspect", str(prefix), "--data.sequence_length", "64", "--windows", "40", *options]) == 0
        return capsys.readouterr().out

    return call


def test_counts_lengths_and_fertility(prefix: Path, inspect) -> None:
    found = json.loads(inspect("--json"))
    lengths = np.array([len(document) for document in IndexedDataset(str(prefix))])
    assert found["counts"]["documents"] == lengths.size and found["counts"]["tokens"] == lengths.sum()
    said = found["lengths"]
    assert (said["shortest"], said["longest"]) == (lengths.min(), lengths.max())
    assert said["mean"] == pytest.approx(lengths.mean())
    assert said["counts"] == np.histogram(lengths, said["edges"])[0].tolist() and sum(said["counts"]) == lengths.size
    for percent, value in said["quantiles"].items():
        assert value == np.percentile(lengths, int(percent), method="inverted_cdf")
    ids = lengths.sum() - lengths.size
    assert found["fertility"]["per_byte"] == pytest.approx(ids / sum(len(text.encode()) for text in TEXTS))
    assert found["fertility"]["per_character"] == pytest.approx(ids / sum(map(len, TEXTS)))
    assert found["fertility"]["per_word"] == pytest.approx(ids / sum(len(text.split()) for text in TEXTS))


@pytest.mark.parametrize("window", ["exact", "trim"])
def test_policies_are_those_of_the_datasets(prefix: Path, inspect, tmp_path: Path, window: str) -> None:
    found = json.loads(inspect("--json", "--pause.rate", "0.2", "--pause.window", window))["policies"]
    assert [policy["placement"] for policy in found] == [name for name in POLICIES if name != "scored"]
    corpus = open_corpus(prefix)
    for policy in found:
        assert policy["window"] == {"bernoulli": "trim", "every": "exact"}.get(policy["placement"], window)
        dataset = build_datasets(
            DatasetOptions(
                [str(prefix)],
                split="1,0,0",
                sequence_length=64,
                tokenizer=corpus.tokenizer,
                pause=PauseSection(rate=0.2, window=policy["window"], placement=policy["placement"]),
                seed=1234,
                train_samples=40,
                valid_samples=0,
                cache=str(tmp_path),
            )
        ).train
        windows = [(dataset[number]["tokens"] == corpus.tokenizer.pause_id).tolist() for number in range(40)]
        assert policy["rate"] == pytest.approx(sum(map(sum, windows)) / (40 * 64))
        assert (policy["fewest"], policy["most"]) == (min(map(sum, windows)), max(map(sum, windows)))
        words = [word for row in windows for word in "".join(" x"[pause] for pause in row).split()]
        runs = [len(word) for word in words]
        shares = [sum(min(run, 5) == size for run in runs) / len(runs) for size in range(1, 6)]
        assert policy["runs"] == pytest.approx(shares) and policy["longest_run"] == max(runs)


def test_windows_are_shown_with_their_pauses(prefix: Path, inspect, tmp_path: Path) -> None:
    text = inspect("--sample", "3", "--sample", "0", "--png", str(tmp_path / "x.png"))
    for words in ("120 from 2 sources", "tokens/word", "* uniform", "window 3: 64 tokens, 6 of them pauses (9.38%)"):
        assert words in text
    assert text.count("<pause>") == 1 + 12 and "\033" not in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (shown,) = json.loads(inspect("--sample", "3", "--json"))["windows"]
    without = shown["text"].replace("<pause>", "").split("<eod>\n")
    assert all(any(piece.strip() in text for text in TEXTS) for piece in without)
    assert not list(prefix.parent.glob("cache"))


@pytest.mark.parametrize("rate", ["0", "0.6"])
def test_no_pauses_and_many(inspect, rate: str) -> None:
    policies = json.loads(inspect("--json", "--pause.rate", rate))["policies"]
    assert {policy["placement"] for policy in policies} >= {"uniform", "with_replacement", "interval"}
    assert all((policy["rate"] == 0) == (rate == "0") for policy in policies)


def test_wrong_options_and_corpora(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in [
        ([str(prefix), "--pause.rate", "2"], "pause.rate"),
        ([str(prefix), "pause.rate=2"], "command line: pause.rate: expected"),
        ([str(prefix), "optim.lr=1"], "command line: expected one of pause.rate, "),
        ([str(tmp_path / "no")], "no corpus at"),
        ([str(prefix), "--data.sequence_length", "64", "--windows", "2", "--png", "/proc/x.png"], "cannot be written"),
    ]:
        assert main(["inspect", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_scored_beside_any_policy_and_a_lost_side_array(prefix: Path, inspect, tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.arange(open_corpus(prefix).manifest.counts.tokens, dtype=np.int32))
    register_values(prefix, "own", tmp_path / "own.npy")
    for placement in ("uniform", "after", "scored", "every", f"{__name__}:second"):
        found = json.loads(inspect("--json", "--data.side", "own", f"pause.placement={placement}"))["policies"]
        assert [policy["placement"] for policy in found][: len(POLICIES)] == list(POLICIES)
        assert next(policy for policy in found if policy["placement"] == "scored")["most"] == 6
    Path(f"{prefix}.own.npy").unlink()
    assert "own              not usable: " in inspect()
    assert "got no such file" in json.loads(inspect("--json"))["sides"]["own"]["error"]


def second(text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return np.arange(2, count + 2)
