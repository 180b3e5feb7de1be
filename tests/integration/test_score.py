"""The verb `score`: values of a plain loop, the same for any number of processes and after kills; refusals."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import children, has_ended, wait_until
from support.prose import documents, small_tokenizer, write_shards
from support.tiny_llama import llama, sentencepiece_tokenizer, write_folder

from pause_megatron.cli import main
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.side import open_side
from pause_megatron.data.prepare.run import prepare
from pause_megatron.files.durable import write_whole
from pause_megatron.inference.loading import load
from pause_megatron.score.units import unit_tokens
from pause_megatron.score.windows import document_offsets

WORKER = "spawn_main"  # on the command line of a pool's process

CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several units, and a model of its tokenizer."""
    folder = tmp_path_factory.mktemp("score")
    tokenizer = small_tokenizer(folder)
    prepare([write_shards(folder / "shards", documents(400), 1)], tokenizer, folder / "c", workers=1)
    write_folder(folder / "model")
    assert CorpusManifest.load(folder / "c").counts.tokens > 4 * unit_tokens(1)
    return folder


@pytest.fixture
def corpus(folder: Path, tmp_path: Path) -> Path:
    for path in folder.glob("c.*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    return tmp_path / "c"


def arguments(corpus: Path, model: Path, *options: str) -> list[str]:
    return [
        *("score", str(corpus), "--model", str(model), "--context", str(CONTEXT), "--batch-tokens", "1024"),
        *options,
    ]


@torch.no_grad()
def plain_loop(corpus: Path, model_folder: Path, kind: str, stop: int, bos: int | None = None) -> np.ndarray:
    """The values of the first `stop` tokens, one window after the other, from whole logits in fp64."""
    model, manifest = load(model_folder, dtype="fp32", attention="eager").model, CorpusManifest.load(corpus)
    pauses = torch.tensor(getattr(model.config, "pause", {"ids": []})["ids"], dtype=torch.int64)
    tokens = np.fromfile(f"{corpus}.bin", dtype=manifest.dtype).astype(np.int64)
    start = manifest.tokenizer.eod if bos is None else bos
    values, offsets = np.zeros(stop), document_offsets(corpus, manifest.counts.documents)
    for first, end in itertools.pairwise(offsets):
        if first >= stop:
            break
        text = np.concatenate([[start], tokens[first:end]])
        begin = 0
        while True:
            ids = torch.from_numpy(text[begin : begin + CONTEXT + 1])
            logits = model(input_ids=ids[None, :-1]).logits[0].double()
            logits[:, pauses] = -torch.inf
            found = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            if kind == "entropy":
                found = torch.distributions.Categorical(logits=logits).entropy()
            for at, value in enumerate(found.tolist()):
                place = first + begin + at
                if place < stop and (begin == 0 or at >= CONTEXT // 2):
                    values[place] = value
            if begin + CONTEXT >= len(text) - 1:
                break
            begin += CONTEXT // 2
    return values


def test_values_are_those_of_a_plain_loop(folder: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    for kind in ("loss", "entropy"):
        assert main(arguments(corpus, folder / "model", "--kind", kind, "--name", kind, "--processes", "1")) == 0
        np.testing.assert_allclose(
            open_side(corpus, kind)[:4000], plain_loop(corpus, folder / "model", kind, 4000), rtol=1e-5, atol=1e-5
        )
    manifest = CorpusManifest.load(corpus)
    record = manifest.sides["loss"]
    assert (record.kind, record.model, record.context, record.start) == ("loss", "model", 64, manifest.tokenizer.eod)
    assert not Path(f"{corpus}.loss.parts").exists() and not list(corpus.parent.glob("*.lock"))
    capsys.readouterr()
    assert main(arguments(corpus, folder / "model", "--name", "loss")) == 0
    assert "already scored with this model and these options: nothing to do" in capsys.readouterr().out
    assert main(arguments(corpus, folder / "model", "--name", "loss", "--kind", "entropy")) == 2


def test_logits_with_a_soft_cap_after_a_bos(folder: Path, corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "gemma"
    shutil.copytree(folder / "model", model)
    (model / "model.safetensors").unlink()
    tokens = len(load(folder / "model").encoder.tokenizer)
    llama(tokens, cls="Gemma2", head_dim=8, final_logit_softcapping=2.0, sliding_window=16).save_pretrained(str(model))
    sentencepiece_tokenizer(model, bos=True).save_pretrained(str(model))
    assert main(arguments(corpus, model, "--processes", "1", "--store", "float16")) == 0
    found = open_side(corpus, "score")[:500]
    assert found.dtype == np.float16 and CorpusManifest.load(corpus).sides["score"].start == 1
    np.testing.assert_allclose(found, plain_loop(corpus, model, "loss", 500, bos=1), rtol=2e-3)


def test_any_number_of_processes_and_of_kills(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The bytes of two processes, which are killed in every way and resumed, are those of one process."""
    options = ("--batch-tokens", "128", "--name")
    assert main(arguments(corpus, folder / "model", "--processes", "1", *options, "one")) == 0
    parts, log = Path(f"{corpus}.two.parts"), tmp_path / "log"
    two = arguments(corpus, folder / "model", "--processes", "2", *options, "two")

    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, "-m", "pause_megatron", *two], stdout=output, stderr=output)
        wait_until(lambda: any(parts.glob("*.values")) or process.poll() is not None)
        workers = children(process.pid, WORKER)
        process.kill()
        assert process.wait() == -signal.SIGKILL and len(workers) == 2, log.read_text()
    wait_until(lambda: all(map(has_ended, workers)))  # no process is left behind
    kept = sorted(parts.glob("*.values"))
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # of another length: computed again
    (parts / "000001.values.1.tmp").write_bytes(b"half")

    others = set(children(os.getpid(), WORKER))  # ranks that other tests keep

    def kill_one() -> None:
        wait_until(lambda: len(list(parts.glob("*.values"))) > len(kept))
        os.kill(next(worker for worker in children(os.getpid(), WORKER) if worker not in others), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    capsys.readouterr()
    assert main(two) == 2
    killer.join()
    assert re.search(r"a process was killed while these units were computed: \d+", capsys.readouterr().err)
    assert not Path(f"{corpus}.two.lock").exists() and set(children(os.getpid(), WORKER)) <= others

    assert main([*two, "--kind", "entropy"]) == 2
    refused = capsys.readouterr().err
    assert "there is an unfinished scoring" in refused and "kind: loss there, entropy now" in refused
    assert main(two) == 0
    assert "tokens were kept" in capsys.readouterr().out
    assert Path(f"{corpus}.one.npy").read_bytes() == Path(f"{corpus}.two.npy").read_bytes()
    sides = CorpusManifest.load(corpus).sides
    assert sides["one"] == sides["two"] and not parts.exists()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as in a terminal: a job in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_finished_units(
    folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def then_signal(path: Path, data: bytes) -> None:
        write_whole(path, data)
        if path.name == "000001.values":
            os.kill(os.getpid(), number)

    monkeypatch.setattr("pause_megatron.score.plan.write_whole", then_signal)
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments(corpus, folder / "model", "--processes", "1")) == 128 + number
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list(Path(f"{corpus}.score.parts").glob("*.values"))) == 2
    assert not Path(f"{corpus}.score.lock").exists()


def test_an_end_between_the_file_and_its_record(folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command continues there too, and after an end before the units are removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    parts = Path(f"{corpus}.score.parts")
    monkeypatch.setattr("pause_megatron.data.corpus.side_writing.sync_folder", stop)
    assert main(arguments(corpus, folder / "model", "--processes", "1")) == 128 + signal.SIGINT
    monkeypatch.undo()
    assert Path(f"{corpus}.score.npy").exists() and not CorpusManifest.load(corpus).sides  # between file and record
    monkeypatch.setattr("pause_megatron.score.plan.Parts.remove", stop)
    moved = corpus.parent / "moved"
    moved.symlink_to(folder / "model")  # the same model under another name
    assert main(arguments(corpus, moved, "--processes", "1")) == 128 + signal.SIGINT
    monkeypatch.undo()
    assert CorpusManifest.load(corpus).sides and parts.exists()
    (parts / "plan.json").write_bytes(b"{")
    assert main(arguments(corpus, folder / "model", "--processes", "1", "--kind", "entropy", "--overwrite")) == 0
    assert CorpusManifest.load(corpus).sides["score"].kind == "entropy" and not parts.exists()


def test_what_is_refused_before_the_model_is_loaded(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *words: str) -> None:
        assert main([*words]) == 2
        assert message in capsys.readouterr().err

    monkeypatch.setattr("pause_megatron.score.unit_scorer.UnitScorer", None)
    model = folder / "model"
    refused("name of a side array: expected", *arguments(corpus, model, "--name", "a.b"))
    refused("--context: expected 2 to 256", *arguments(corpus, model, "--context", "512"))
    refused("--batch-tokens: expected at least --context 64, got 8", *arguments(corpus, model, "--batch-tokens", "8"))
    refused("no corpus at", *arguments(tmp_path / "absent", model))
    refused("there is no such folder", *arguments(corpus, tmp_path / "absent"))
    if not torch.cuda.is_available():
        refused("--device cuda: expected a CUDA device", *arguments(corpus, model, "--device", "cuda"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = {index: name for name, index in vocabulary.items()}
    vocabulary[names[400]], vocabulary[names[401]] = 401, 400
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("expected the tokenizer of corpus", *arguments(corpus, other))
    np.save(tmp_path / "own.npy", np.zeros(3, np.float32))
    own = ("score", str(corpus), "--values", str(tmp_path / "own.npy"))
    refused("--kind: expected --model with it, got --values", *own, "--kind", "loss")
    refused("own.npy: expected the shape", *own)
    np.save(tmp_path / "own.npy", np.zeros(CorpusManifest.load(corpus).counts.tokens, np.uint8))
    assert main([*own]) == 0
    refused("there is a side array 'score' already (uint8, values of the user's own)", *arguments(corpus, model))


def test_a_full_disk(
    folder: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.name == "000002.values":
            raise OSError(28, "No space left on device", str(path))
        write_whole(path, data)

    monkeypatch.setattr("pause_megatron.score.plan.write_whole", full)
    assert main(arguments(corpus, folder / "model", "--processes", "1")) == 2
    assert "000002.values: No space left on device; finished units are kept" in capsys.readouterr().err
    monkeypatch.undo()
    unit = Path(f"{corpus}.score.parts/000001.values")
    content = bytearray(unit.read_bytes())
    content[7] ^= 1
    unit.write_bytes(content)
    assert main(arguments(corpus, folder / "model", "--processes", "1")) == 2
    assert "000001.values: altered since it was written" in capsys.readouterr().err
    assert main(arguments(corpus, folder / "model", "--processes", "1")) == 0


def test_a_model_that_gives_no_number(folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    norm = weights["model.norm.weight"].clone()
    weights["model.norm.weight"] = 1e5 * norm
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(corpus, tmp_path / "model", "--processes", "1", "--store", "float16")) == 2
    message = capsys.readouterr().err
    assert "expected a finite loss in float16" in message and "choose --store float32" in message
    weights["model.norm.weight"] = norm.index_fill(0, torch.tensor(0), torch.nan)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main(arguments(corpus, tmp_path / "model", "--processes", "1")) == 2
    message = capsys.readouterr().err
    assert "unit 0 (tokens 0 to " in message and "token 0: expected a finite loss in float32, got nan" in message
