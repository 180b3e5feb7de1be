"""One tokenizer for the whole project: text to ids, the end-of-document id, and the reserved id of `<pause>`.

The pause id is reserved here, once, when a corpus is prepared. By default it is the first id after the vocabulary;
a slot that the tokenizer already keeps free (a control piece, a special added token) can be named instead. No text,
the literal characters "<pause>" included, ever encodes to it.
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
        content: bytes of the tokenizer's file, which determine every id.
        vocab_size: ordinary ids (largest id in the tokenizer's file + 1).
        eod: id written after each document.
        pause_id: first id of `<pause>`; `vocab_size` unless the tokenizer has a slot for it.
        fingerprint: "KIND:SHA256" of the tokenizer's content; does not depend on where the file lies.
        leading: ids that the exported tokenizer puts before a prompt (a BOS, if it does); `encode` never does.
        companions: contents of the files beside it that an export takes along (chat templates and the like), by name.
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
        self.leading = ids_before(backend.encode_whole("a"), backend.encode_batch(["a"])[0])
        self.check_pause_ids(1)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS. Raises DataError on a lone surrogate, which no tokenizer can encode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, in order, each as `encode` gives it."""
        with _encodable(texts):
            return self._backend.encode_batch(list(texts))

    def encode_flat(self, texts: Sequence[str]) -> Encoded:
        """The same ids in one array, without a Python object for each."""
        with _encodable(texts):
            return self._backend.encode_flat(list(texts))

    def decode(self, ids: Sequence[int], pause_text: str = PAUSE_TOKEN, eod_text: str = "") -> str:
        """Text of ids, pauses shown as `pause_text` and ends of documents as `eod_text`.

        Ids past the vocabulary (further pause embeddings) are shown as pauses too. Without pauses this is the
        tokenizer's own decoding; the text around a pause is that of the same ids without it.
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
            # A pause stands inside a text; after an end of document a new text begins.
            started = is_pause and (started or bool(run))
            run = []
        pieces.append(self._decode_run(run, started))
        return "".join(pieces)

    def reachable(self, token_id: int) -> bool:
        """Whether encoding some text can give this id."""
        return self._backend.reachable(token_id)

    def token_of(self, token_id: int) -> str | None:
        """The piece of an id by its exact name; None where there is none."""
        return self._backend.token_of(token_id)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and its description into a folder that `load_tokenizer` opens without anything else."""
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
            "special_tokens": getattr(self._backend, "special_tokens", {}),
        }
        (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        write_companions(folder, self.companions)

    def check_pause_ids(self, count: int) -> None:
        """Check that `pause_id .. pause_id + count - 1` can serve as pauses: in nobody's use, out of reach of text.

        Raises:
            DataError: an id is EOD, PAD, BOS or UNK, or some text encodes to it.
        """
        roles = {token_id: role.upper() for role, token_id in self._backend.roles.items()}
        roles[self.eod] = "EOD"
        for token_id in range(self.pause_id, self.pause_id + count):
            if token_id < 0:
                raise DataError(f"pause id {token_id}: expected 0 or more")
            if token_id in roles:
                raise DataError(
                    f"pause id {token_id} is the tokenizer's {roles[token_id]} id: a pause must differ from it. Leave "
                    f"--pause-id out to reserve id {self.vocab_size}, the first one after the vocabulary"
                )
            if self._backend.reachable(token_id):
                raise DataError(
                    f"pause id {token_id} is an ordinary piece ({self._backend.decode([token_id])!r}) that text "
                    f"encodes to: a pause needs an id of its own. Leave --pause-id out to reserve id {self.vocab_size}"
                )

    def _decode_run(self, ids: list[int], started: bool) -> str:
        if not ids or not started:
            return self._backend.decode(ids) if ids else ""
        # Decoders strip the space before the first piece; an anchor in front keeps the one that belongs to the text.
        anchor = self._backend.encode_batch(["a"])[0]
        return self._backend.decode(anchor + ids)[len(self._backend.decode(anchor)) :]


def ids_before(whole: list[int], ids: list[int]) -> list[int]:
    """What stands in `whole` before `ids`; nothing if they are not there."""
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return whole[:start]
    return []


def load_tokenizer(path: str | Path, *, eod_token: str | None = None, pause_id: int | None = None) -> Tokenizer:
    """Open a SentencePiece model, a Hugging Face tokenizer, or the `PREFIX.tokenizer/` folder of a prepared corpus.

    Args:
        path: `.model` file, `tokenizer.json`, folder, or `hf:NAME`.
        eod_token: piece to end documents with; default: the tokenizer's end-of-sequence token.
        pause_id: existing slot to use; default: the tokenizer's own `<pause>`, else the first id after the vocabulary.

    Raises:
        DataError: no tokenizer there, no end-of-document token, or a pause id that text or another role uses.
    """
    path = str(path)
    described = Path(path) / DESCRIPTION_NAME
    if described.is_file():
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
    """Those of a folder, or beside a tokenizer.json; a .model may lie anywhere, beside other people's files."""
    if path.is_dir():
        return companions_of(path)
    return companions_of(path.parent) if path.name == HuggingFaceBackend.file_name else {}


def _load_saved(folder: Path, *, eod_token: str | None, pause_id: int | None) -> Tokenizer:
    description_path = folder / DESCRIPTION_NAME
    try:
        description = json.loads(description_path.read_bytes())
        version, kind = description["version"], description["kind"]
        if version != DESCRIPTION_VERSION:
            raise DataError(f"{description_path}: version {version}, expected {DESCRIPTION_VERSION}")
        eod, own_pause_id = int(description["eod"]), int(description["pause_id"])
        fingerprint, special_tokens = description["fingerprint"], description["special_tokens"]
        content = (folder / _FILE_NAMES[kind]).read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer folder {folder}: {error.filename} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{description_path}: not a tokenizer description ({type(error).__name__}: {error})") from None
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
            f"tokenizer folder {folder}: its content was altered (expected {fingerprint}, came {tokenizer.fingerprint})"
        )
    return tokenizer


_FILE_NAMES = {backend.kind: backend.file_name for backend in (SentencePieceBackend, HuggingFaceBackend)}


def _eod(backend: TokenizerBackend, eod_token: str | None, path: str) -> int:
    if eod_token is not None:
        token_id = backend.id_of(eod_token)
        if token_id is None:
            raise DataError(f"tokenizer {path}: --eod-token {eod_token!r} is not one of its pieces")
        return token_id
    if "eos" not in backend.roles:
        raise DataError(
            f"tokenizer {path}: it names no end-of-sequence token (a bare tokenizer.json never does); "
            "give the piece that ends a document with --eod-token"
        )
    return backend.roles["eos"]


def _own_pause_id(backend: TokenizerBackend, path: str) -> int:
    """The slot that the tokenizer keeps for `<pause>`, else the first id after its vocabulary."""
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
            f"tokenizer {path}: its piece {PAUSE_TOKEN!r} (id {token_id}) is matched in ordinary text, so a document "
            f"that spells {PAUSE_TOKEN} would be full of pauses; {fix}"
        )
    return token_id


@contextlib.contextmanager
def _encodable(texts: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, UnicodeError, TypeError) as error:
        raise DataError(f"text cannot be encoded: {_why_not_encodable(texts, error)}") from None


def _why_not_encodable(texts: Sequence[str], error: Exception) -> str:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return f"item {number} is {type(text).__name__}, expected str"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as found:
            return f"item {number} holds the lone surrogate U+{ord(text[found.start]):04X} at character {found.start}"
    return str(error)
