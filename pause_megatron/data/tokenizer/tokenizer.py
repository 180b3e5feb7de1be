"""The tokenizer of a corpus: text to ids, the end-of-document id, and the reserved id of `<pause>`.

The pause id is reserved when a corpus is prepared. By default it is the first id after the vocabulary; an id that the
tokenizer reserves already (a control piece, a special added token) can be chosen instead. No text encodes to it, not
even the literal "<pause>".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pause_megatron.data.tokenizer.backends import (
    Encoded,
    HuggingFaceBackend,
    SentencePieceBackend,
    TokenizerBackend,
    open_backend,
)
from pause_megatron.data.tokenizer.companions import companions_of, write_companions
from pause_megatron.errors import DataError

PAUSE_TOKEN = "<pause>"
DESCRIPTION_NAME = "pause_tokenizer.json"
DESCRIPTION_VERSION = 1


class Tokenizer:
    """A vocabulary with an end-of-document id and a reserved pause id.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        content: Bytes of the tokenizer's file, which determine every id.
        vocab_size: Number of ids without the pauses (largest id in the tokenizer's file + 1).
        eod: Id written after each document.
        pause_id: First id of `<pause>`; `vocab_size` unless the tokenizer reserves one.
        fingerprint: "KIND:SHA256" of the content; it does not depend on the path.
        leading: Ids that the exported tokenizer puts before a prompt, such as a BOS; `encode` never adds them.
        companions: Contents of the files that an export copies (such as chat templates), by name.
    """

    def __init__(
        self, backend: TokenizerBackend, *, eod: int, pause_id: int, companions: Mapping[str, bytes] | None = None
    ) -> None:
        self._backend = backend
        self.companions = dict(companions or {})
        self.kind = backend.kind
        self.content = backend.content
        self.vocab_size = backend.vocab_size
        self.eod = eod
        self.pause_id = pause_id
        self.fingerprint = f"{backend.kind}:{hashlib.sha256(backend.content).hexdigest()}"
        self.leading = ids_before(backend.encode_with_special_tokens("a"), backend.encode_batch(["a"])[0])
        self.check_pause_ids(1)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS or EOS.

        Raises:
            DataError: The text contains a lone surrogate, which no tokenizer can encode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""
        with _encodable(texts):
            return self._backend.encode_batch(list(texts))

    def encode_flat(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of all texts in one array, without a Python object per id."""
        with _encodable(texts):
            return self._backend.encode_flat(list(texts))

    def decode(self, ids: Sequence[int], pause_text: str = PAUSE_TOKEN, eod_text: str = "") -> str:
        """Return the text of ids, with pauses and ends of documents spelled out.

        The text around a pause is that of the same ids without it.

        Args:
            ids: Token ids; those after the vocabulary are pauses too (further pause embeddings).
            pause_text: Text of a pause.
            eod_text: Text of an end of document.
        """
        pieces: list[str] = []
        run: list[int] = []
        started = False
        for token_id in map(int, ids):
            is_pause = token_id == self.pause_id or token_id >= self.vocab_size
            if not is_pause and token_id != self.eod:
                run.append(token_id)
                continue
            pieces += [self._decode_run(run, started), pause_text if is_pause else eod_text]
            # A pause is inside a text; after an end of document a new text begins.
            started = is_pause and (started or bool(run))
            run = []
        pieces.append(self._decode_run(run, started))
        return "".join(pieces)

    def reachable(self, token_id: int) -> bool:
        """Return whether some text encodes to this id."""
        return self._backend.reachable(token_id)

    def token_of(self, token_id: int) -> str | None:
        """Return the text of a token by its id, or None."""
        return self._backend.token_of(token_id)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer with its EOD and pause ids into a folder that `load_tokenizer` can open."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self._backend.file_name).write_bytes(self._backend.content)
        description = {
            "version": DESCRIPTION_VERSION,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "pause_id": self.pause_id,
            "special_tokens": self._backend.special_tokens,
        }
        (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        write_companions(folder, self.companions)

    def check_pause_ids(self, count: int) -> None:
        """Check that `pause_id .. pause_id + count - 1` have no other use and that no text encodes to them.

        Args:
            count: Number of pause ids.

        Raises:
            DataError: An id is EOD, PAD, BOS or UNK, or some text encodes to it.
        """
        roles = {token_id: role.upper() for role, token_id in self._backend.roles.items()}
        roles[self.eod] = "EOD"
        for token_id in range(self.pause_id, self.pause_id + count):
            if token_id < 0:
                raise DataError(f"pause id: expected 0 or more, got {token_id}")
            if token_id in roles:
                raise DataError(
                    f"pause id: expected one without another role, got {token_id}, the tokenizer's {roles[token_id]} "
                    f"id. Leave --pause-id out to reserve id {self.vocab_size}, the first one after the vocabulary"
                )
            if self._backend.reachable(token_id):
                raise DataError(
                    f"pause id: expected one that no text encodes to, got {token_id}, an ordinary piece "
                    f"({self._backend.decode([token_id])!r}). Leave --pause-id out to reserve id {self.vocab_size}"
                )

    def _decode_run(self, ids: list[int], started: bool) -> str:
        if not ids or not started:
            return self._backend.decode(ids) if ids else ""
        # Decoders strip the space before the first piece; an anchor in front keeps it.
        anchor = self._backend.encode_batch(["a"])[0]
        return self._backend.decode(anchor + ids)[len(self._backend.decode(anchor)) :]


def ids_before(whole: list[int], ids: list[int]) -> list[int]:
    """Return the ids in `whole` before the first occurrence of `ids`.

    Args:
        whole: Ids with special tokens.
        ids: Ids of the text.

    Returns:
        The leading ids; empty if `ids` does not occur in `whole`.
    """
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return whole[:start]
    return []


def load_tokenizer(path: str | Path, *, eod_token: str | None = None, pause_id: int | None = None) -> Tokenizer:
    """Open a SentencePiece model, a Hugging Face tokenizer, or the `PREFIX.tokenizer/` folder of a prepared corpus.

    Args:
        path: `.model` file, `tokenizer.json`, folder, or `hf:NAME`.
        eod_token: Token that ends documents; None for the tokenizer's end-of-sequence token.
        pause_id: Reserved id to use; None for the tokenizer's own `<pause>`, else the first id after the vocabulary.

    Raises:
        DataError: There is no tokenizer, it has no end-of-document token, or the pause id has another use.
    """
    path = str(path)
    if (Path(path) / DESCRIPTION_NAME).is_file():
        return _load_saved(Path(path), eod_token=eod_token, pause_id=pause_id)
    backend = open_backend(path)
    eod = _eod(backend, eod_token, path)
    return Tokenizer(
        backend,
        eod=eod,
        pause_id=_own_pause_id(backend, path) if pause_id is None else pause_id,
        companions=_companions(Path(path)),
    )


def _companions(path: Path) -> dict[str, bytes]:
    """Return the companions in a folder or beside a tokenizer.json; files beside a .model may be unrelated."""
    if path.is_dir():
        return companions_of(path)
    return companions_of(path.parent) if path.name == HuggingFaceBackend.file_name else {}


def _load_saved(folder: Path, *, eod_token: str | None, pause_id: int | None) -> Tokenizer:
    description_path = folder / DESCRIPTION_NAME
    try:
        description = json.loads(description_path.read_bytes())
        version, kind = description["version"], description["kind"]
        if version != DESCRIPTION_VERSION:
            raise DataError(f"{description_path}: version: expected {DESCRIPTION_VERSION}, got {version}")
        eod, own_pause_id = int(description["eod"]), int(description["pause_id"])
        fingerprint, special_tokens = description["fingerprint"], description["special_tokens"]
        content = (folder / _FILE_NAMES[kind]).read_bytes()
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{description_path}: expected the description of a tokenizer, got other content ({type(error).__name__}: "
            f"{error})"
        ) from None
    backend: TokenizerBackend
    if kind == SentencePieceBackend.kind:
        backend = SentencePieceBackend(content, str(folder))
    else:
        backend = HuggingFaceBackend(content, str(folder), special_tokens)
    tokenizer = Tokenizer(
        backend,
        eod=eod if eod_token is None else _eod(backend, eod_token, str(folder)),
        pause_id=own_pause_id if pause_id is None else pause_id,
        companions=companions_of(folder, generation=True),
    )
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"{folder}: expected a tokenizer with fingerprint {fingerprint}, got {tokenizer.fingerprint}: its files "
            "were altered"
        )
    return tokenizer


_FILE_NAMES = {backend.kind: backend.file_name for backend in (SentencePieceBackend, HuggingFaceBackend)}


def _eod(backend: TokenizerBackend, eod_token: str | None, path: str) -> int:
    if eod_token is not None:
        token_id = backend.id_of(eod_token)
        if token_id is None:
            raise DataError(f"tokenizer {path}: --eod-token: expected one of its tokens, got {eod_token!r}")
        return token_id
    if "eos" not in backend.roles:
        raise DataError(
            f"tokenizer {path}: expected an end-of-sequence token, got none (a tokenizer.json alone has none); give "
            "the token that ends a document with --eod-token"
        )
    return backend.roles["eos"]


def _own_pause_id(backend: TokenizerBackend, path: str) -> int:
    """Return the id that the tokenizer reserves for `<pause>`, else the first id after its vocabulary."""
    token_id = backend.id_of(PAUSE_TOKEN)
    if token_id is None:
        return backend.vocab_size
    if backend.reachable(token_id):
        fix = (
            "make it a CONTROL symbol, or train without it"
            if backend.kind == SentencePieceBackend.kind
            else 'add it with "special": true'
        )
        raise DataError(
            f"tokenizer {path}: expected {PAUSE_TOKEN!r} to be a special token, got a piece that text encodes to (id "
            f"{token_id}): a document that spells it would contain pauses; {fix}"
        )
    return token_id


@contextlib.contextmanager
def _encodable(texts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, UnicodeError, TypeError) as error:
        raise DataError(f"text cannot be encoded: {_encoding_error(texts, error)}") from None


def _encoding_error(texts: Sequence[str], error: Exception) -> str:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return f"item {number}: expected str, got {type(text).__name__}"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as surrogate:
            at = surrogate.start
            return f"item {number}: expected Unicode, got the lone surrogate U+{ord(text[at]):04X} at character {at}"
    return str(error)
