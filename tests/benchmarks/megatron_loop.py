"""The peer of `prepare`: megatron-core's IndexedDatasetBuilder in the loop that Megatron's preprocessing runs.

A line is parsed and tokenized by a worker (or in the loop itself), the parent adds the document to the builder. As
there: one document at a time, `imap` with chunks of 32 lines, one shard after the other.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pause_megatron.data.tokenizer.tokenizer import DESCRIPTION_NAME, load_tokenizer

_state: dict[str, object] = {}


def _open_sentencepiece(folder: str):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
    return model.encode


def _open_hugging_face(folder: str):
    import tokenizers

    model = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    model.encode_special_tokens = True
    return lambda text: model.encode(text, add_special_tokens=False).ids


OPENERS = {"SentencePiece": _open_sentencepiece, "Hugging Face": _open_hugging_face}


def _start(library: str, folder: str) -> None:
    _state["encode"] = OPENERS[library](folder)
    _state["eod"] = json.loads((Path(folder) / DESCRIPTION_NAME).read_bytes())["eod"]


def _ids_of(line: bytes) -> list[int]:
    ids = _state["encode"](json.loads(line)["text"])
    ids.append(_state["eod"])
    return ids


def megatron_loop(shards: list[Path], folder: Path, library: str, output: Path, workers: int) -> None:
    """Writes OUTPUT.bin and OUTPUT.idx.

    Args:
        shards: JSON lines, gzipped.
        folder: `PREFIX.tokenizer/`, with a tokenizer.json of the same ids beside the model.
        library: "SentencePiece" or "Hugging Face".
        output: prefix.
        workers: processes that tokenize; 1: the loop does it itself.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # not in the workers

    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=np.uint16)
    with ExitStack() as stack:
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(workers, initializer=_start, initargs=(library, str(folder))))
            documents = pool.imap(_ids_of, _lines(shards), 32)
        else:
            _start(library, str(folder))
            documents = map(_ids_of, _lines(shards))
        for ids in documents:
            builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{output}.idx")


def _lines(shards: list[Path]) -> Iterator[bytes]:
    for shard in shards:
        with gzip.open(shard, "rb") as lines:
            yield from lines


def write_hugging_face(folder: Path, document: dict) -> None:
    """Puts a tokenizer.json of the same ids beside the model of a tokenizer folder."""
    load_tokenizer(folder)  # it must be one
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
