"""SentencePiece and Hugging Face tokenizers behind one protocol, which `tokenizer.tokenizer` builds on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pause_megatron.data.tokenizer.fast.document_cuts import PiecewiseEncoder, can_be_cut
from pause_megatron.errors import DataError

ROLES = ("eos", "bos", "pad", "unk")
"""Roles of special tokens."""


class Encoded(NamedTuple):
    """Concatenated ids of several texts.

    Attributes:
        ids: Ids of all texts, int32, uint32 or int64 [sum of lengths].
        lengths: Number of tokens of each text, int64 [texts].
    """

    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, texts: list[np.ndarray]) -> Encoded:
        """Return the concatenation of the ids of each text."""
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        return cls(np.concatenate(texts) if texts else np.empty(0, np.int32), lengths)


class TokenizerBackend(Protocol):
    """The interface to a tokenizer library.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        file_name: Name of the file with `content` in a tokenizer folder.
        content: Bytes that determine every id; the fingerprint is their digest.
        vocab_size: Number of ids in the file (largest id + 1).
        roles: Ids of "eos", "bos", "pad", "unk", as far as the tokenizer has them.
        special_tokens: Texts of the tokens with a role, where they are stored apart from `content`.
    """

    kind: str
    file_name: str
    content: bytes
    vocab_size: int
    roles: dict[str, int]
    special_tokens: dict[str, str]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS or EOS; text that spells a special token is encoded as text."""

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that an exported tokenizer adds."""

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of `encode_batch` in one array."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids below `vocab_size`, without special tokens."""

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its exact text, or None."""

    def token_of(self, token_id: int) -> str | None:
        """Return the text of a token by its id, or None."""

    def reachable(self, token_id: int) -> bool:
        """Return whether some text encodes to this id."""


class SentencePieceBackend:
    """A SentencePiece `.model` file of any type.

    Args:
        content: Bytes of the file.
        origin: Path of the file, for messages.

    Raises:
        DataError: The bytes are not a SentencePiece model.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, content: bytes, origin: str) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{origin}: expected a SentencePiece model, got other content ({error})") from None
        if not content or self.vocab_size == 0:
            raise DataError(f"{origin}: expected a SentencePiece model, got one without pieces")
        self.content = content
        self._piecewise = PiecewiseEncoder(self._model, content) if can_be_cut(content) else None
        ids = {
            "eos": self._model.eos_id(),
            "bos": self._model.bos_id(),
            "pad": self._model.pad_id(),
            "unk": self._model.unk_id(),
        }
        self.roles = {role: token_id for role, token_id in ids.items() if token_id >= 0}
        self.special_tokens: dict[str, str] = {}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS or EOS; text that spells a special token is encoded as text."""
        return [ids.tolist() for ids in self._encode(texts)]

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of `encode_batch` in one array."""
        return Encoded.of(self._encode(texts))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if self._piecewise is not None:
            return self._piecewise.encode(texts)
        return self._model.encode(texts, return_type="numpy", num_threads=1)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that an exported tokenizer adds."""
        return self.encode_batch([text])[0]  # export-hf writes SentencePiece tokenizers without BOS and EOS

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids below `vocab_size`, without special tokens."""
        return self._model.decode(ids)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its exact text, or None."""
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def token_of(self, token_id: int) -> str | None:
        """Return the text of a token by its id, or None."""
        return self._model.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else None

    def reachable(self, token_id: int) -> bool:
        """Return whether some text encodes to this id."""
        # Control and unused pieces never match text. Normal, user-defined, byte and unknown pieces do.
        if token_id >= self.vocab_size:
            return False
        return not (self._model.is_control(token_id) or self._model.is_unused(token_id))


class HuggingFaceBackend:
    """A `tokenizer.json` of the `tokenizers` library, with special tokens, truncation and padding disabled.

    Args:
        content: Bytes of the file.
        origin: Path or name of the tokenizer, for messages.
        special_tokens: Texts of the tokens with a role, see `ROLES`.

    Raises:
        DataError: The bytes are not a tokenizer.json.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, origin: str, special_tokens: dict[str, str]) -> None:
        import tokenizers

        try:
            document = json.loads(content)
            # Settings for inference, which would truncate or pad documents here.
            document.update(truncation=None, padding=None)
            self.content = json.dumps(document, sort_keys=True, ensure_ascii=False).encode()
            self._model = tokenizers.Tokenizer.from_str(self.content.decode())
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(f"{origin}: expected a Hugging Face tokenizer.json, got other content ({error})") from None
        # A literal "</s>" or "<pause>" in a document must be encoded as text.
        self._model.encode_special_tokens = True
        self._vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(self._vocabulary.values(), default=-1)
        self._used = set(self._vocabulary.values())
        self._special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self.special_tokens = special_tokens
        self.roles = {}
        for role in ROLES:
            token_id = self.id_of(special_tokens.get(role, ""))
            if token_id is not None:
                self.roles[role] = token_id

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS or EOS; text that spells a special token is encoded as text."""
        return [item.ids for item in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that an exported tokenizer adds."""
        return self._model.encode(text, add_special_tokens=True).ids

    def encode_flat(self, texts: list[str]) -> Encoded:
        """Return the ids of `encode_batch` in one array."""
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=int(lengths.sum()))
        return Encoded(flat, lengths)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids below `vocab_size`, without special tokens."""
        return self._model.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its exact text, or None."""
        return self._vocabulary.get(token) if token else None

    def token_of(self, token_id: int) -> str | None:
        """Return the text of a token by its id, or None."""
        return self._model.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def reachable(self, token_id: int) -> bool:
        """Return whether some text encodes to this id."""
        return token_id in self._used and token_id not in self._special


def special_tokens_of(folder: Path) -> dict[str, str]:
    """Return the texts of the eos, bos, pad and unk tokens, from the JSON files beside a `tokenizer.json`.

    Args:
        folder: Folder of the tokenizer.json.

    Raises:
        DataError: A file is not readable as JSON.
    """
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: expected JSON, got other content ({error})") from None
        for role in ROLES:
            token = document.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles[role] = token
    return roles


def open_backend(path: str) -> TokenizerBackend:
    """Open a tokenizer with the library of its format.

    Args:
        path: SentencePiece model, `tokenizer.json`, folder that contains one, or `hf:NAME` for transformers.

    Raises:
        DataError: There is no such file, or it is not a tokenizer.
    """
    if path.startswith("hf:"):
        return _from_transformers(path[3:], origin=path)
    location = Path(path)
    if not location.exists():
        raise DataError(
            f"tokenizer {path!r}: expected a SentencePiece .model file, a tokenizer.json, a folder that contains one, "
            "or hf:NAME for one of the Hugging Face Hub, got no such file"
        )
    if location.is_dir():
        for name in (HuggingFaceBackend.file_name, SentencePieceBackend.file_name):
            if (location / name).is_file():
                return _from_file(location / name)
        return _from_transformers(path, origin=path)
    return _from_file(location)


def _from_file(path: Path) -> TokenizerBackend:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".json":
        return HuggingFaceBackend(content, str(path), special_tokens_of(path.parent))
    return SentencePieceBackend(content, str(path))


def _from_transformers(name: str, origin: str) -> HuggingFaceBackend:
    """Load a tokenizer that transformers can convert into a fast one (vocab.json + merges.txt, a Hub name, ...)."""
    from transformers import AutoTokenizer

    try:
        # Explicit: by default transformers asks on the terminal whether to run code of the tokenizer.
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many exceptions; each means that there is no usable tokenizer
        raise DataError(f"tokenizer {origin!r}: transformers cannot load it as a fast tokenizer ({error})") from None
    return backend_of(loaded, origin)


def backend_of(tokenizer: Any, origin: str) -> HuggingFaceBackend:
    """Return the backend that encodes as a transformers tokenizer does.

    Args:
        tokenizer: A tokenizer of transformers.
        origin: Its path or name, for messages.

    Raises:
        DataError: It is not a fast tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"tokenizer {origin!r}: expected a fast tokenizer of transformers, got a {type(tokenizer).__name__}"
        )
    content = tokenizer.backend_tokenizer.to_str().encode()
    names = {role: getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    return HuggingFaceBackend(content, origin, {role: token for role, token in names.items() if token})
