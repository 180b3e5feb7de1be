"""Encoders of `prepare`: the tokenizer's own library, or gigatoken with runtime checks of equal ids.

The bytes of a corpus do not depend on the encoder, so the manifest does not record it. gigatoken is used where equal
ids are proven (`gigatoken_documents`), and is checked at run time: the first documents of each worker, and one of every
batch after them, are encoded by both.
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

# Texts for which encoders have differed: special tokens, spaces, control characters, scripts, long words.
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
    """An encoder of documents. A `Tokenizer` is one."""

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of the texts, without BOS or EOS; text that spells a special token is encoded as text."""


class GigatokenEncoder:
    """An encoder that uses `gigatoken`, on the calling thread.

    Args:
        tokenizer: Tokenizer whose ids are computed.

    Raises:
        DataError: gigatoken is not installed, or equal ids are not proven for this kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        document = gigatoken_document(tokenizer.kind, tokenizer.content)
        try:
            import gigatoken
        except ImportError:
            raise DataError("gigatoken is not installed: pip install 'pause-megatron[fast]'") from None
        try:
            # The backend directly: one document at a time costs 1 us, where its batches cost 2 ms each.
            self._model = gigatoken.Tokenizer.from_json(document).backend
        except Exception as error:  # the Rust library raises many exceptions
            raise DataError(f"gigatoken cannot read the tokenizer ({error})") from None

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of the texts, without BOS or EOS."""
        return Encoded.of([self._model.encode(text) for text in texts])


class CheckedEncoder:
    """A fast encoder that is compared with the tokenizer's own library for about one document of each batch.

    Args:
        fast: The encoder to check.
        tokenizer: The tokenizer to compare with.
        name: Name of the fast encoder, for messages.
    """

    def __init__(self, fast: Encoder, tokenizer: Tokenizer, name: str) -> None:
        self._fast = fast
        self._tokenizer = tokenizer
        self._name = name
        self._batches = 0
        self._left = FIRST_CHARACTERS

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of the texts, without BOS or EOS.

        Raises:
            DataError: The ids of a compared document differ.
        """
        encoded = self._fast.encode_flat(texts)
        self._batches += 1
        ends = np.cumsum(encoded.lengths)
        for index in self._indices_to_check(texts):
            ids = encoded.ids[ends[index] - encoded.lengths[index] : ends[index]]
            text = texts[index]
            if len(text) > CHECKED_CHARACTERS:  # a long document would cost more than the batch
                text = text[:CHECKED_CHARACTERS]
                ids = self._fast.encode_flat([text]).ids
            self._compare(text, ids)
        return encoded

    def check(self, texts: Sequence[str]) -> None:
        """Compare the ids of texts.

        Raises:
            DataError: The ids of a text differ.
        """
        for text in texts:
            self._compare(text, self._fast.encode_flat([text]).ids)

    def _indices_to_check(self, texts: list[str]) -> list[int]:
        """Return the indices of the documents to compare: the first ones, then one of each batch."""
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
                f"got {ids[:8].tolist()}... for the text {text[:60]!r}; use --encoder library, and please report it"
            )


def choose_encoder(name: EncoderName, tokenizer: Tokenizer) -> EncoderName:
    """Return the encoder to use, after comparing the encoders on difficult texts.

    Args:
        name: "library" for the tokenizer's own, "gigatoken", or "auto" for gigatoken where it is installed and proven.
        tokenizer: Tokenizer of the corpus.

    Returns:
        "library" or "gigatoken".

    Raises:
        DataError: gigatoken was requested and cannot be used, or its ids differ.
    """
    if name not in ENCODERS:
        raise DataError(f"--encoder: expected one of {', '.join(ENCODERS)}, got {name!r}")
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
    """Return the encoder of a worker.

    Args:
        name: "library" or "gigatoken", from `choose_encoder`.
        tokenizer: Tokenizer of the corpus.
    """
    if name == "gigatoken":
        return CheckedEncoder(GigatokenEncoder(tokenizer), tokenizer, name)
    return tokenizer
