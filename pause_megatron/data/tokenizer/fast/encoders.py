"""How `prepare` turns documents into ids: by the tokenizer's own library, or by a faster one that gives the same ids.

The ids are the tokenizer's, whoever computes them: a corpus does not say which encoder made it, and its bytes do not
depend on it. The faster library is used where equal ids are proven (`gigatoken_documents`), and is watched while it
works: the first documents of each worker, and one of every batch after them, are encoded by both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np

from pause_megatron.data.tokenizer.backends import Encoded
from pause_megatron.data.tokenizer.fast.gigatoken_documents import gigatoken_document
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError

EncoderName = Literal["auto", "library", "gigatoken"]
ENCODERS: tuple[str, ...] = get_args(EncoderName)
FIRST_CHARACTERS = 1 << 16
CHECKED_CHARACTERS = 4096

# Spellings of special tokens, spaces and control characters, scripts, long words: where encoders have differed.
PROBES = (
    *(
        " ",
        "  ",
        "\n",
        "\t\t x",
        " a  b   c ",
        "\r\n\r\n",
        "\u00a0\u3000\u2028",
        "\ufeffa\u200bb",
        "▁ ▁▁",
        "\0\x01\x7f",
    ),
    *("<s>", "</s> <unk><pause>", "<|endoftext|>", "<0x0A><0xE2>", "[PAD]", "I'll, WE'VE don't", "3.14 12345678 ½①"),
    *(
        "e\u0301 \u0301\u0302",
        "ﬁ ß İ ı",
        "日本語 한국어 ไทย",
        "مرحبا שלום",
        "👩‍👩‍👧 🇩🇪 \U0010ffff",
        "def f(x):\n    return {x: [1]}\n",
    ),
    *("a" * 300, "ab" * 150, " " * 300, "." * 300 + "!?" * 50, "https://x.org/a?b=c&d=%20#e", "\ufffd\ue000\U000e0001"),
)


class Encoder(Protocol):
    """Turns documents into ids. A `Tokenizer` is one."""

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Ids of each text, without BOS or EOS; text that looks like a special token stays text."""


class GigatokenEncoder:
    """A tokenizer's ids, computed by `gigatoken` on the calling thread.

    Raises:
        DataError: it is not installed, or the tokenizer is of a kind for which equal ids are not proven.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        document = gigatoken_document(tokenizer.kind, tokenizer.content)
        try:
            import gigatoken
        except ImportError:
            raise DataError("gigatoken is not installed: pip install 'pause-megatron[fast]'") from None
        try:
            # The library under its Tokenizer: one document at a time costs 1 us, where its batches cost 2 ms each.
            self._model = gigatoken.Tokenizer.from_json(document).backend
        except Exception as error:  # the Rust library raises what it likes
            raise DataError(f"gigatoken cannot read the tokenizer ({error})") from None

    def encode_flat(self, texts: list[str]) -> Encoded:
        return Encoded.of([self._model.encode(text) for text in texts])


class CheckedEncoder:
    """A fast encoder that is compared with the tokenizer's own library while it works: about one document in a batch.

    Raises:
        DataError: they differ.
    """

    def __init__(self, fast: Encoder, tokenizer: Tokenizer, name: str) -> None:
        self._fast = fast
        self._tokenizer = tokenizer
        self._name = name
        self._batches = 0
        self._left = FIRST_CHARACTERS

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Ids of each text, without BOS or EOS."""
        encoded = self._fast.encode_flat(texts)
        self._batches += 1
        ends = np.cumsum(encoded.lengths)
        for index in self._chosen(texts):
            ids = encoded.ids[ends[index] - encoded.lengths[index] : ends[index]]
            text = texts[index]
            if len(text) > CHECKED_CHARACTERS:  # a long document would cost more than the batch
                text = text[:CHECKED_CHARACTERS]
                ids = self._fast.encode_flat([text]).ids
            self._compare(text, ids)
        return encoded

    def check(self, texts: Sequence[str]) -> None:
        """Compare some texts."""
        for text in texts:
            self._compare(text, self._fast.encode_flat([text]).ids)

    def _chosen(self, texts: list[str]) -> list[int]:
        """Numbers of the documents to compare: the first ones, then another one in each batch."""
        chosen = []
        for index, text in enumerate(texts):
            if self._left <= 0:
                break
            chosen.append(index)
            self._left -= len(text)
        return chosen or [self._batches % len(texts)]

    def _compare(self, text: str, ids: np.ndarray) -> None:
        expected = self._tokenizer.encode_flat([text]).ids
        if not np.array_equal(ids, expected):
            raise DataError(
                f"encoder {self._name}: expected the ids of the tokenizer's own library, {expected[:8].tolist()}..., "
                f"came {ids[:8].tolist()}... for the text {text[:60]!r}; use --encoder library, and please report it"
            )


def choose_encoder(name: EncoderName, tokenizer: Tokenizer) -> EncoderName:
    """Resolves "auto", after a check on texts in which encoders have differed.

    Args:
        name: "library": the tokenizer's own; "gigatoken"; "auto": gigatoken where it is installed and proven.
        tokenizer: to be encoded with.

    Returns:
        "library" or "gigatoken".

    Raises:
        DataError: gigatoken was asked for and cannot be used, or gave other ids.
    """
    if name not in ENCODERS:
        raise DataError(f"--encoder {name}: expected one of {', '.join(ENCODERS)}")
    if name == "library":
        return name
    try:
        fast = GigatokenEncoder(tokenizer)
    except DataError as error:
        if name == "auto":
            return "library"
        raise DataError(f"--encoder gigatoken: {error}") from None
    CheckedEncoder(fast, tokenizer, "gigatoken").check(PROBES)
    return "gigatoken"


def open_encoder(name: EncoderName, tokenizer: Tokenizer) -> Encoder:
    """The encoder that `choose_encoder` named, for one worker."""
    if name == "gigatoken":
        return CheckedEncoder(GigatokenEncoder(tokenizer), tokenizer, name)
    return tokenizer
