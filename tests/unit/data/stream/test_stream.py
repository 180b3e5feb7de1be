"""Streaming: the windows are consecutive cuts of the documents, pauses those of the prepared path, resuming exact."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.prose import documents, json_lines, small_tokenizer, write_shards

from pause_megatron.config.schema import DataSection
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.stream.documents import MALFORMED_IN_A_ROW, open_documents
from pause_megatron.data.stream.server import WindowClient, WindowServer
from pause_megatron.data.stream.windows import StreamDataset, StreamPosition, TextWindows
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.dataset import PauseGPTDataset
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.errors import DataError

TEXTS = documents(150)
LENGTH = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return small_tokenizer(folder)


@pytest.fixture(scope="module", params=["shards", "datasets"])
def data(request: pytest.FixtureRequest, folder: Path) -> DataSection:
    write_shards(folder / "s", TEXTS, 4)
    files = sorted(map(str, (folder / "s").iterdir()))
    return DataSection(source=tuple(files if request.param == "shards" else ["hf:json", *files]))


def _windows(data: DataSection, tokenizer: Tokenizer, position: StreamPosition | None = None) -> TextWindows:
    return TextWindows(lambda state: open_documents(data, state), tokenizer, LENGTH, position)


def test_windows_are_consecutive_cuts_of_the_prepared_corpus(
    data: DataSection, tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    prepare([str(folder / "s" / "*")], tokenizer, tmp_path / "c", workers=1)
    corpus = IndexedDataset(str(tmp_path / "c"))
    epoch = np.concatenate([corpus[number] for number in range(len(corpus))])
    tokens = np.concatenate([epoch, epoch, epoch])  # after the last document comes the first again
    windows = _windows(data, tokenizer)
    for sample in range((tokens.size - 1) // (LENGTH - 1)):
        start = sample * (LENGTH - 1)
        assert windows.text(sample).tolist() == tokens[start : start + LENGTH].tolist()
        windows.forget(sample, sample)
    with pytest.raises(DataError, match=r"data\.source: expected a request .*, got one for window 0, .* dropped"):
        windows.text(0)


def test_a_stream_resumes_exactly_at_every_window(data: DataSection, tokenizer: Tokenizer) -> None:
    windows = _windows(data, tokenizer)
    count = 3 * sum(map(len, TEXTS)) // 2 // LENGTH  # more than one pass
    expected = [windows.text(sample) for sample in range(count)]
    for sample in random.Random(0).sample(range(count), 12):
        position = json.loads(json.dumps(vars(windows.position(sample))))
        again = _windows(data, tokenizer, StreamPosition(**position))
        for number in range(sample, min(sample + 40, count)):
            assert np.array_equal(again.text(number), expected[number])
        # and once more from there, before anything new was read
        twice = _windows(data, tokenizer, again.position(sample))
        assert np.array_equal(twice.text(sample), expected[sample])


@pytest.mark.parametrize("window", ["exact", "trim"])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_samples_are_those_of_the_dataset(tokenizer: Tokenizer, window: str, rate: float) -> None:
    """Same text and number, same sample: pauses, labels and masks."""
    plan = PausePlan(64, rate, window)
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 600, plan.text_length) for _ in range(5)]
    pause_ids = range(tokenizer.pause_id, tokenizer.pause_id + 1)

    class Given:
        def text(self, sample: int) -> np.ndarray:
            return texts[sample]

    injector = PauseInjector(plan, pause_ids, "c", "train")
    stream = StreamDataset(Given(), injector, 5, eod=tokenizer.eod)
    for sample, text in enumerate(texts):
        tokens = injector(text, sample)
        found = stream[sample]
        kept = [token for token in [*found["tokens"].tolist(), int(tokens.tokens[-1])] if token != tokenizer.pause_id]
        assert kept == text[: len(kept)].tolist()
        after = tokens.tokens[1:]
        assert found["loss_mask"].tolist() == [float(token != tokenizer.pause_id) for token in after]
        assert found["labels"].tolist() == [0 if token == tokenizer.pause_id else token for token in after]
        assert found["position_ids"].tolist() == list(range(64))
        assert {name: value.dtype for name, value in found.items()} == _DTYPES


_DTYPES = {
    **{name: torch.int64 for name in ("tokens", "labels", "position_ids")},
    "loss_mask": torch.float32,
}


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(("masking", "eod_mask_loss"), [(False, False), (True, False), (True, True)])
def test_samples_are_those_of_the_dataset_with_the_same_windows(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, rate: float, masking: bool, eod_mask_loss: bool
) -> None:
    from pause_megatron.config.schema import PauseSection
    from pause_megatron.data.windows.build import DatasetOptions, build_datasets

    prefix = tmp_path / "c"
    prepare([write_shards(folder / "same", TEXTS, 1)], tokenizer, prefix, workers=1)
    train: PauseGPTDataset = build_datasets(
        DatasetOptions(
            [str(prefix)],
            split="1,0,0",
            sequence_length=64,
            tokenizer=tokenizer,
            pause=PauseSection(rate=rate),
            seed=1,
            train_samples=20,
            valid_samples=0,
            intra_document_masking=masking,
            eod_mask_loss=eod_mask_loss,
        )
    ).train
    ends = {"eod": tokenizer.eod, "intra_document_masking": masking, "eod_mask_loss": eod_mask_loss}
    streamed = StreamDataset(_Texts(train), train.injector, 20, **ends)
    for sample in range(20):
        assert streamed[sample].keys() == train[sample].keys()
        assert all(torch.equal(streamed[sample][name], value) for name, value in train[sample].items())
    assert ("segments" in train[0]) == masking
    if masking:
        assert max(int(train[sample]["segments"].max()) for sample in range(20)) > 0


class _Texts:
    def __init__(self, dataset: PauseGPTDataset) -> None:
        self._dataset = dataset

    def text(self, sample: int) -> np.ndarray:
        return self._dataset.window_text(sample)


def test_malformed_lines_are_left_out_and_empty_sources_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"[]\n" + json_lines(["one"]) + b"not json\n" + json_lines(["two"]))
    reader = open_documents(DataSection(source=(str(path),)))
    assert list(itertools.chain(reader.take(1), reader.take(2), reader.take(5))) == ["one", "two", "one", "two"]
    assert reader.malformed.counts["not-json"] == 2
    assert [(place.file, place.line) for place in reader.malformed.places["not-json"]] == [(str(path), 3)] * 2
    for source, content, message in [
        ((str(path),), b"[]\n{}\n", "holds no documents"),
        (("hf:json", str(path)), b'{"text": null}\n', "holds no documents"),
        (
            ("hf:json", str(path)),
            b'{"body": "x"}\n',
            r"expected a text column among body, got 'text' \(data\.text_key\)",
        ),
        ((str(tmp_path / "no*.jsonl"),), b"", "no such file"),
        (("hf:json", str(tmp_path / "no.jsonl")), b"", "cannot open it"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_documents(DataSection(source=source)).take(1)


def test_errors_name_the_key_at_fault_and_what_there_is(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / "set" / "en").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "en" / f"{name}.jsonl").write_bytes(json_lines(["one"]))
    configs = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: en/train.jsonl}}\n"
        f"  - {{split: validation, path: en/validation.jsonl}}\n"
        for name in ("en", "de")
    )
    (tmp_path / "set" / "README.md").write_text(f"---\n{configs}---\n")
    source = {"source": (f"hf:{tmp_path}/set",), "source_config": "en"}
    assert open_documents(DataSection(**source)).take(1) == ["one"]
    for wrong, message in [
        ({"source_config": "fr"}, "data.source_config: expected one of en, de .hf:.*/set., got 'fr'"),
        ({"source_config": None}, "data.source_config: expected one of en, de .hf:.*/set., got nothing"),
        (
            {"source_split": "test"},
            "data.source_split: expected one of train, validation .hf:.*/set., got 'test'",
        ),
        (
            {"text_key": "body"},
            r"set: expected a text column among text, timestamp, url, got 'body' \(data\.text_key\)",
        ),
        ({"source": (f"hf:{tmp_path}/nowhere",)}, "data.source=hf:.*/nowhere: datasets cannot open it"),
    ]:
        with pytest.raises(DataError, match=message):
            open_documents(DataSection(**{**source, **wrong})).take(1)


def test_a_wrong_text_key_stops_before_the_whole_source_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": 3}\n' * (MALFORMED_IN_A_ROW - 1) + json_lines(["one"]))
    assert open_documents(DataSection(source=(str(path),))).take(1) == ["one"]
    path.write_bytes(b'{"text": 3}\n' * MALFORMED_IN_A_ROW + json_lines(["one"]))
    with pytest.raises(DataError, match=r"(?s)10,000 records one after another.*data\.text_key.*text-not-string"):
        open_documents(DataSection(source=(str(path),))).take(1)


def test_the_ranks_of_a_host_share_one_reader(data: DataSection, tokenizer: Tokenizer) -> None:
    alone = _windows(data, tokenizer)
    expected = [alone.text(sample) for sample in range(600)]
    opened = []
    stream = TextWindows(lambda state: opened.append(state) or open_documents(data, state), tokenizer, LENGTH)
    server = WindowServer(stream, local_ranks=3, history=8)
    found: dict[int, np.ndarray] = {}
    clients = [server, WindowClient(server.address), WindowClient(server.address)]

    def ask(rank: int) -> None:
        for sample in range(rank, 600, 3):
            found[sample] = clients[rank].text(sample)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[sample], text) for sample, text in enumerate(expected))
    assert opened == [None]
    assert server.position(597).token <= 597 * (LENGTH - 1)
    with pytest.raises(DataError, match=r"window 0, .* has been dropped"):  # an error of the reader reaches the client
        clients[1].text(0)
    clients[1].close()
    server.close()
    with pytest.raises(DataError, match=r"data\.source: expected window \d+ from .*, got a closed connection"):
        for sample in range(600, 610):
            clients[2].text(sample)
    assert not Path(server.address).exists()


def test_opening_documents_imports_no_torch() -> None:
    """Neither torch nor megatron is imported, so that `--help` and the error of a wrong source are fast."""
    code = "import sys, pause_megatron.data.stream.documents; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
