"""The two tokenizer libraries behind one small protocol.

The rest of the code uses `pause_megatron.data.tokenizer.tokenizer`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pause_megatron.data.tokenizer.fast.document_cuts import PiecewiseEncoder, can_be_cut
from pause_megatron.errors import DataError

ROLES = ("eos", "bos", "pad", "unk")


class Encoded(NamedTuple):
    """Ids of several texts, end to end.

    Attributes:
        ids: int32, uint32 or int64 [sum of the lengths].
        lengths: int64 [texts], tokens of each text.
    """

    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, texts: list[np.ndarray]) -> Encoded:
        """Of ids text by text."""
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        return cls(np.concatenate(texts) if texts else np.empty(0, np.int32), lengths)


class TokenizerBackend(Protocol):
    """What a tokenizer library must answer.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        file_name: name under which `content` is kept in a tokenizer folder.
        content: bytes that determine every id; the fingerprint is taken over them.
        vocab_size: number of ids in the file (largest id + 1).
        roles: ids of "eos", "bos", "pad", "unk", where the tokenizer has them.
    """

    kind: str
    file_name: str
    content: bytes
    vocab_size: int
    roles: dict[str, int]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; no BOS or EOS added; text that looks like a special token stays text."""

    def encode_whole(self, text: str) -> list[int]:
        """Ids of a text with what an exported tokenizer puts around it."""

    def encode_flat(self, texts: list[str]) -> Encoded:
        """The same ids in one array: what `prepare` needs, without a Python object for each."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids below `vocab_size`; special tokens are left out."""

    def id_of(self, token: str) -> int | None:
        """Id of a piece by its exact name, or None."""

    def token_of(self, token_id: int) -> str | None:
        """The other way round."""

    def reachable(self, token_id: int) -> bool:
        """Whether encoding some text can give this id."""


class SentencePieceBackend:
    """A SentencePiece `.model` file (BPE with byte fallback is what the project trains; any type is read)."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, content: bytes, origin: str) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size = self._model.get_piece_size()
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{origin}: not a SentencePiece model ({error})") from None
        if not content or self.vocab_size == 0:
            raise DataError(f"{origin}: not a SentencePiece model (it holds no pieces)")
        self.content = content
        self._piecewise = PiecewiseEncoder(self._model, content) if can_be_cut(content) else None
        ids = {
            "eos": self._model.eos_id(),
            "bos": self._model.bos_id(),
            "pad": self._model.pad_id(),
            "unk": self._model.unk_id(),
        }
        self.roles = {role: token_id for role, token_id in ids.items() if token_id >= 0}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self._encode(texts)]

    def encode_flat(self, texts: list[str]) -> Encoded:
        return Encoded.of(self._encode(texts))

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if self._piecewise is not None:
            return self._piecewise.encode(texts)
        return self._model.encode(texts, return_type="numpy", num_threads=1)

    def encode_whole(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]  # export-hf writes SentencePiece tokenizers without BOS or EOS

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def id_of(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def token_of(self, token_id: int) -> str | None:
        return self._model.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else None

    def reachable(self, token_id: int) -> bool:
        # Control and unused pieces never match text; normal, user-defined and byte pieces do; unknown stands for text.
        if token_id >= self.vocab_size:
            return False
        return not (self._model.is_control(token_id) or self._model.is_unused(token_id))


class HuggingFaceBackend:
    """A `tokenizer.json` (Rust `tokenizers`), encoding with special tokens, truncation and padding switched off."""

    kind = "huggingface"
    file_name = "tokenizer.json"

    def __init__(self, content: bytes, origin: str, special_tokens: dict[str, str]) -> None:
        import tokenizers

        try:
            document = json.loads(content)
            # Settings of a model's serving side, which would cut or pad documents here.
            document.update(truncation=None, padding=None)
            self.content = json.dumps(document, sort_keys=True, ensure_ascii=False).encode()
            self._model = tokenizers.Tokenizer.from_str(self.content.decode())
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(f"{origin}: not a Hugging Face tokenizer.json ({error})") from None
        # Literal "</s>" or "<pause>" in a document must stay text.
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
        return [item.ids for item in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_whole(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=True).ids

    def encode_flat(self, texts: list[str]) -> Encoded:
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=int(lengths.sum()))
        return Encoded(flat, lengths)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._vocabulary.get(token) if token else None

    def token_of(self, token_id: int) -> str | None:
        return self._model.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def reachable(self, token_id: int) -> bool:
        return token_id in self._used and token_id not in self._special


def special_tokens_of(folder: Path) -> dict[str, str]:
    """Names of the eos, bos, pad and unk tokens, from the JSON files that lie beside a `tokenizer.json`."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not readable as JSON ({error})") from None
        for role in ROLES:
            token = document.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[role] = token
    return found


def open_backend(path: str) -> TokenizerBackend:
    """Open a SentencePiece model, a `tokenizer.json`, a Hugging Face folder, or `hf:NAME` through transformers.

    Raises:
        DataError: nothing there, or not a tokenizer.
    """
    if path.startswith("hf:"):
        return _from_transformers(path[3:], origin=path)
    location = Path(path)
    if not location.exists():
        raise DataError(
            f"tokenizer {path!r} not found: expected a SentencePiece .model file, a tokenizer.json, a folder that "
            "holds one, or hf:NAME for one from the Hugging Face Hub"
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
    """A tokenizer that transformers can turn into a fast one (vocab.json + merges.txt, a Hub name, ...)."""
    from transformers import AutoTokenizer

    try:
        # Said outright: left open, transformers asks on the terminal whether to run code that comes with the tokenizer.
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is no usable tokenizer
        raise DataError(f"tokenizer {origin!r}: transformers cannot load it as a fast tokenizer ({error})") from None
    return backend_of(loaded, origin)


def backend_of(tokenizer: Any, origin: str) -> HuggingFaceBackend:
    """The backend that encodes as a transformers tokenizer does.

    Raises:
        DataError: it is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"tokenizer {origin!r}: expected a fast tokenizer of transformers, got a {type(tokenizer).__name__}"
        )
    content = tokenizer.backend_tokenizer.to_str().encode()
    names = {role: getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    return HuggingFaceBackend(content, origin, {role: token for role, token in names.items() if token})
