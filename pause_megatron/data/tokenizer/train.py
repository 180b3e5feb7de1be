"""Training of a SentencePiece BPE model with byte fallback on shards of text.

The settings are those of Llama: such a model converts exactly to a Hugging Face tokenizer, and decode(encode(text)) ==
text. `<pause>` is not in the model: `prepare` reserves the id after its last piece.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.data.text.documents import Tally
from pause_megatron.data.text.hub import HubOptions
from pause_megatron.data.text.sources import ReadOptions, find_sources
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import write_whole

# SentencePiece silently skips longer sentences, so longer lines are cut at spaces.
SENTENCE_BYTES = 16384
_LONG_LINE = re.compile(r".{1,4000}(?:\s|$)|.{1,4000}", re.DOTALL)


@dataclass(frozen=True)
class TrainedTokenizer:
    """The result of `train_tokenizer`.

    Attributes:
        tokenizer: The trained tokenizer.
        documents: Number of documents of the sample.
        text_bytes: Size of their text as UTF-8.
        malformed: Malformed lines that were skipped.
        bytes_per_token: Bytes of UTF-8 per token, over the first documents of the sample.
    """

    tokenizer: Tokenizer
    documents: int
    text_bytes: int
    malformed: Tally
    bytes_per_token: float


def train_tokenizer(
    inputs: Sequence[str],
    output: str | Path,
    *,
    vocab_size: int,
    hub: HubOptions | None = None,
    text_key: str = "text",
    max_documents: int | None = None,
    max_bytes: int = 200_000_000,
    split_digits: bool = True,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda documents, text_bytes: None,
) -> TrainedTokenizer:
    """Train a tokenizer on a sample that is spread evenly over the shards. The same input gives the same bytes.

    Args:
        inputs: Paths and globs of shards, or one `hf:NAME`.
        output: Path of the `.model` file, which is written atomically.
        vocab_size: Number of pieces, the 259 special and byte pieces included.
        hub: The part of the dataset to read, for `hf:NAME`.
        text_key: Key of the text in a JSON object.
        max_documents: Largest number of documents; None for no limit but `max_bytes`.
        max_bytes: Largest size of the text as UTF-8.
        split_digits: Whether each digit is a piece of its own, as in Llama.
        overwrite: Replace an existing file.
        on_progress: Called after each document with the number of documents and of bytes of text so far.

    Returns:
        The tokenizer, and what it was trained on.

    Raises:
        DataError: Invalid input, an existing output, or too little text for the vocabulary.
    """
    output = Path(output)
    if output.suffix != ".model":
        raise DataError(f"--output: expected a path that ends in .model, got {str(output)!r}")
    if output.exists() and not overwrite:
        raise DataError(
            f"--output {output}: expected no such file, got an existing one, which corpora may depend on. Name another "
            "--output, or give --overwrite"
        )
    for name, value, least in (
        ("max-documents", max_documents, 1),
        ("max-bytes", max_bytes, 1),
        ("vocab-size", vocab_size, 260),
    ):
        if value is not None and value < least:
            raise DataError(f"--{name}: expected {least} or more, got {value}")
    sample = _Sample(inputs, hub, text_key, max_documents, max_bytes, on_progress)
    model = _train(sample, vocab_size, split_digits)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, model)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}") from None
    tokenizer = load_tokenizer(output)
    return TrainedTokenizer(
        tokenizer, sample.documents, sample.text_bytes, sample.malformed, _bytes_per_token(tokenizer, sample.first)
    )


def _train(sample: _Sample, vocab_size: int, split_digits: bool) -> bytes:
    import sentencepiece

    sentences = sample.sentences()
    first = list(itertools.islice(sentences, 1))
    if not first:
        raise sample.error or DataError(
            f"--input: expected documents, got none\n{sample.malformed.describe()}".rstrip()
        )
    writer = io.BytesIO()
    failure = ""
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(first, sentences),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            # No normalization of Unicode or spaces, so that decoding restores the text.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            split_digits=split_digits,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=SENTENCE_BYTES,
            # Deterministic pieces: no subsampling, and no threads whose order could matter.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        failure = (str(error).strip().splitlines() or ["unknown"])[-1]
    if sample.error:
        raise sample.error
    if limit := re.search(r"Vocabulary size too high .*<= (\d+)", failure):
        raise DataError(
            f"--vocab-size: expected at most {int(limit[1])} for {sample.text_bytes:,} bytes of text, got {vocab_size}"
        )
    if failure:
        raise DataError(
            f"SentencePiece could not train {vocab_size:,} pieces on {sample.documents:,} documents "
            f"({sample.text_bytes:,} bytes): {failure}"
        )
    return writer.getvalue()


class _Sample:
    """A sample of documents from the front of every shard. The unused share of a shard goes to the shards after it."""

    def __init__(
        self,
        inputs: Sequence[str],
        hub: HubOptions | None,
        text_key: str,
        max_documents: int | None,
        max_bytes: int,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._on_progress = on_progress
        self._sources = find_sources(inputs, hub, text_key)
        self._options = ReadOptions(text_key=text_key)
        self._max_documents = max_documents
        self._max_bytes = max_bytes
        self.documents = 0
        self.text_bytes = 0
        self.malformed = Tally()
        self.first: list[str] = []
        self.error: DataError | None = None

    def sentences(self) -> Iterator[str]:
        """Yield the lines of the sampled documents, none longer than `SENTENCE_BYTES`.

        An error ends the iteration and is stored in `error`: SentencePiece would replace it by another one.
        """
        try:
            for document in self._documents():
                for line in filter(None, document.split("\n")):
                    yield from [line] if len(line) <= SENTENCE_BYTES // 4 else _LONG_LINE.findall(line)
        except DataError as error:
            self.error = error

    def _documents(self) -> Iterator[str]:
        for number, source in enumerate(self._sources):
            left = len(self._sources) - number
            byte_limit = self.text_bytes + -(-(self._max_bytes - self.text_bytes) // left)
            document_limit = sys.maxsize
            if self._max_documents is not None:
                document_limit = self.documents + -(-(self._max_documents - self.documents) // left)
            for document in source.open(self._options).documents():
                if not isinstance(document, str):
                    self.malformed.add(source.name, document)
                    continue
                size = len(document.encode())
                # The first document is used whatever its size: at least one is needed.
                if self.documents and (self.text_bytes + size > byte_limit or self.documents >= document_limit):
                    break
                self.documents += 1
                self.text_bytes += size
                if len(self.first) < 256:
                    self.first.append(document)
                self._on_progress(self.documents, self.text_bytes)
                yield document


def _bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / sum(len(ids) for ids in tokenizer.encode_batch(texts))
