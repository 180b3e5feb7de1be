"""A wrapper that adds pause ids to any tokenizer, for datasets and Megatron-LM scripts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.errors import ConfigError

NO_PAD = -1
"""Padding id in megatron-core for a tokenizer without one: no token is equal to it."""

_ROLES = {"padding": "pad", "end-of-document": "eod", "unknown-token": "unk", "beginning-of-text": "bos"}


class PauseTokenizer:
    """Any tokenizer with K additional pause ids. All other attributes are those of the wrapped tokenizer.

    Args:
        tokenizer: Has `vocab_size` and `eod`, and `unique_identifiers` (Megatron-LM's) or `fingerprint` (this
            project's). It may have `pad`, `pause_id`, and `inv_vocab`, `get_vocab()` or `vocab`.
        embeddings: K, number of distinct pause ids, used in turn within a run of pauses.
        pause_id: The first pause id. Default: the tokenizer's own `pause_id`; else that of the token `<pause>` in its
            vocabulary; else the first id after its vocabulary.

    Raises:
        ConfigError: A pause id with another role (padding, end of document, ...), a `<pause>` that is ordinary text,
            or less than one pause id.
    """

    def __init__(self, tokenizer: Any, embeddings: int = 1, pause_id: int | None = None) -> None:
        if embeddings < 1:
            raise ConfigError(f"pause.embeddings: expected 1 or more, got {embeddings}")
        self.tokenizer = tokenizer
        # vocab_size of Hugging Face is the number of tokens; with gaps, ids can exceed it.
        self.text_size = max(int(tokenizer.vocab_size), ids_end(tokenizer))
        if pause_id is None:
            pause_id = getattr(tokenizer, "pause_id", None)
        if pause_id is None:
            pause_id = self._own_pause_id()
        self.pause_ids = range(pause_id, pause_id + embeddings)
        if pause_id < 0:
            raise ConfigError(f"pause id: expected 0 or more, got {pause_id}")
        for name, attribute in _ROLES.items():
            token = _role(tokenizer, attribute)
            if token in self.pause_ids:
                raise ConfigError(
                    f"pause id: expected one without another role, got {token}, the tokenizer's {name} id: choose for "
                    f"example {self.text_size}, the first id after the vocabulary"
                )

    @property
    def pause_id(self) -> int:
        """The first pause id."""
        return self.pause_ids.start

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model needs, pauses included; a model's padded vocabulary is at least this."""
        return max(self.text_size, self.pause_ids.stop)

    @property
    def pad(self) -> int:
        """The padding id; -1, as in megatron-core, where the tokenizer has none."""
        pad = _role(self.tokenizer, "pad")
        return NO_PAD if pad is None else pad

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """The key of the tokenizer in the index caches of megatron-core."""
        inner = getattr(self.tokenizer, "unique_identifiers", None) or getattr(self.tokenizer, "fingerprint", None)
        if inner is None:
            raise ConfigError(
                f"tokenizer: expected a unique_identifiers or fingerprint attribute for the index cache's key, got "
                f"{type(self.tokenizer).__name__} with neither"
            )
        return OrderedDict(
            [("class", type(self).__name__), ("tokenizer", inner), ("pause_ids", [*self.pause_ids])],
        )

    def detokenize(self, ids: Iterable[int], **options: object) -> str:
        """Return the text of token ids without the pauses (Goyal et al., section 3.3).

        Args:
            ids: Token ids.
            **options: Options of the wrapped tokenizer's `detokenize`.
        """
        kept = [token for token in map(int, ids) if token not in self.pause_ids]
        text: str = self.tokenizer.detokenize(kept, **options)
        return text

    def __getattr__(self, name: str) -> Any:
        # Called only for attributes not found here. Dunders and `tokenizer` itself must not be forwarded:
        # copy and pickle look them up before __init__ has run.
        if name.startswith("__") or name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def _own_pause_id(self) -> int:
        """Return the id of the vocabulary's `<pause>` if it is reserved, else the first id after the vocabulary."""
        token = id_of_token(self.tokenizer, PAUSE_TOKEN)
        if token is None:
            return self.text_size
        if _is_ordinary(self.tokenizer, token):
            raise ConfigError(
                f"tokenizer: expected {PAUSE_TOKEN!r} to be a special token, got ordinary text (id {token}): a "
                "document that spells it would contain pauses. Make it a special token (SentencePiece: a control one), "
                f"or choose PauseTokenizer(tokenizer, pause_id={self.text_size}), the first id after the vocabulary, "
                f"or pause_id={token} if no document spells it"
            )
        return token


def id_of_token(tokenizer: object, text: str) -> int | None:
    """Find a token by its exact text.

    Args:
        tokenizer: Tokenizer of megatron-core or Megatron-LM (`inv_vocab`), of Hugging Face (`get_vocab()`), or with
            a `vocab`, a dictionary from text to id or a list of texts in the order of their ids.
        text: Text of the token.

    Returns:
        Its id; None if the vocabulary has no such token or cannot be read.
    """
    # megatron-core's `vocab` is tried last: it fails for a Hugging Face tokenizer whose ids have gaps.
    by_id = _read(tokenizer, "inv_vocab")
    if isinstance(by_id, Mapping):
        return next((int(token) for token, name in by_id.items() if name == text), None)
    get_vocab = _read(tokenizer, "get_vocab")
    vocabulary = get_vocab() if callable(get_vocab) else _read(tokenizer, "vocab")
    if isinstance(vocabulary, Mapping):
        return vocabulary.get(text)
    return vocabulary.index(text) if isinstance(vocabulary, list) and text in vocabulary else None


def ids_end(tokenizer: object) -> int:
    """Return one more than the largest id of a Hugging Face vocabulary; 0 for other tokenizers.

    Args:
        tokenizer: Any tokenizer.
    """
    for library in _layers(tokenizer):
        if callable(get_vocab := _read(library, "get_vocab")):
            return max(get_vocab().values(), default=-1) + 1
    return 0


def _is_ordinary(tokenizer: Any, token: int) -> bool:
    """Return whether `<pause>` is a token that text encodes to and that is not special."""
    for library in _layers(tokenizer):
        if isinstance(added := _read(library, "added_tokens_decoder"), Mapping):  # Hugging Face
            if token in added and added[token].special:
                return False
        elif callable(_read(library, "is_control")):  # SentencePiece; megatron-core can add special tokens after it
            if token >= library.get_piece_size() or library.is_control(token) or library.is_unused(token):
                return False
        elif (special := _read(library, "special_tokens_set")) is not None:  # tiktoken
            return PAUSE_TOKEN not in special  # in megatron-core 0.16 its ids differ from those that text encodes to
    try:
        return token in tokenizer.tokenize(PAUSE_TOKEN)
    except (AttributeError, NotImplementedError):
        return False


def _layers(tokenizer: Any) -> Iterator[Any]:
    """Yield the tokenizer and those that it wraps, such as megatron-core's wrapper and the library's tokenizer."""
    for _ in range(3):
        yield tokenizer
        tokenizer = _read(tokenizer, "_tokenizer") or _read(tokenizer, "tokenizer")
        if tokenizer is None:
            return


def _role(tokenizer: object, attribute: str) -> int | None:
    token = _read(tokenizer, attribute)
    return token if isinstance(token, int) and token >= 0 else None


def _read(tokenizer: Any, attribute: str) -> Any:
    # Tokenizers of megatron-core raise many exceptions for missing attributes; GPTDataset catches all too.
    try:
        return getattr(tokenizer, attribute)
    except Exception:
        return None
