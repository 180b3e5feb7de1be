"""R17: a corpus prepared anew under its name. Is it read through the index of the old one?

Plain megatron-core's GPTDataset with `path_to_cache`, and the datasets of a run of this program. What is read is
compared with what a fresh cache gives.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.results import Result
from benchmarks.faults.runs import arguments
from support.forked_ranks import fork
from support.prose import documents, json_lines, train_model

KINDS = ("as many documents", "fewer documents", "more documents")
LENGTH, WINDOWS = 64, 64


def stale_index(system: str, count: int) -> Result:
    """R17, in one process: `count` corpora, each replaced once."""
    with tempfile.TemporaryDirectory() as name:
        output, log = Path(name, "found.txt"), Path(name, "log.txt")
        for process in fork(_replace, (system, count, output), log, ranks=1):
            process.join()
        lines = output.read_text().splitlines() if output.exists() else []
        if len(lines) < count:
            raise RuntimeError(f"{system}: not all corpora were tried\n{log.read_text()[-4000:]}")
    result = Result(note=f"the first {WINDOWS} windows of {LENGTH} tokens of a run were read")
    for line in lines:
        kind, _, outcome = line.partition("\t")
        result.count(f"R17: a corpus was replaced under its name by one of {kind}", outcome)
    return result


def _replace(system: str, count: int, output: Path) -> None:
    texts = documents(600)
    with tempfile.TemporaryDirectory() as name, open(output, "w") as file:
        model = train_model(Path(name, "tokenizer.model"))
        for number in range(count):
            rng, kind = random.Random(number), KINDS[number % len(KINDS)]
            folder = Path(name, str(number))
            folder.mkdir()
            before = rng.randrange(60, 120)
            after = {KINDS[0]: before, KINDS[1]: before - rng.randrange(5, 50), KINDS[2]: before + rng.randrange(5, 50)}
            for size in (before, after[kind]):
                _prepare(folder, model, rng.sample(texts, size))
                outcome = _compared(system, folder)
            print(kind, outcome, sep="\t", file=file, flush=True)
    os._exit(0)


def _prepare(folder: Path, model: Path, texts: Sequence[str]) -> None:
    from pause_megatron.cli import main

    shard = folder / "shard.jsonl"
    shard.write_bytes(json_lines(texts))
    words = ["prepare", "--input", str(shard), "--tokenizer", str(model), "--output", str(folder / "corpus")]
    assert main([*words, "--workers", "1", "--overwrite"]) == 0


def _compared(system: str, folder: Path) -> str:
    read = _stock if system == "megatron-core" else _ours
    with tempfile.TemporaryDirectory() as fresh:
        right = read(folder, Path(fresh))
    try:
        windows = read(folder, folder / "cache")
    except Exception as error:
        return f"an error: {type(error).__name__}"
    if windows == right:
        return "read as it is"
    wrong = sum(window not in (None, other) for window, other in zip(windows, right, strict=True))
    errors = windows.count(None)
    if not wrong:
        return "an error at every window that the old index has wrong"
    return f"**windows are read through the old index**, in silence{', others are errors' if errors else ''}"


def _ours(folder: Path, cache: Path) -> list[list[int] | None]:
    from pause_megatron.config.load import load
    from pause_megatron.train.pretrain import corpus_data

    keys = {"data__cache": cache, "train__steps": WINDOWS // 8, "data__sequence_length": LENGTH, "data__split": "1,0,0"}
    words = arguments(str(folder / "corpus"), folder / "run", **keys)
    data = corpus_data(load(recipe="tiny-pause", overrides=[word for word in words if "=" in word]), 1)
    return _windows(data.train)


def _stock(folder: Path, cache: Path) -> list[list[int] | None]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from pause_megatron.data.corpus.corpus import open_corpus
    from pause_megatron.data.windows.dataset import PauseTokenizer

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        blend=([str(folder / "corpus")], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=PauseTokenizer(open_corpus(str(folder / "corpus")).tokenizer, 1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [WINDOWS, 0, 0], lambda: True, config).build()
    return _windows(train)


def _windows(dataset: Any) -> list[list[int] | None]:
    """The first windows; None: reading it is an error."""
    found: list[list[int] | None] = []
    for number in range(WINDOWS):
        try:
            found.append(dataset[number]["tokens"].tolist())
        except (IndexError, ValueError):
            found.append(None)
    return found
