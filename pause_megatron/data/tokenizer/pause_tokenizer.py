"""Any tokenizer, plus the ids of its pauses: what the data sets and a Megatron-LM script take in place of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.errors import ConfigError

NO_PAD = -1
"""What megatron-core takes for the padding id where a tokenizer has none: no token is ever equal to it."""

_ROLES = {"padding": "pad", "end-of-document": "eod", "unknown-token": "unk", "beginning-of-text": "bos"}


class PauseTokenizer:
    """Any tokenizer, plus K pause ids. All other attributes are those of the tokenizer it wraps.

    Args:
        tokenizer: Has `vocab_size` and `eod`, and `unique_identifiers` (Megatron-LM's) or `fingerprint` (this
            project's). May have `pad`, `pause_id`, and `inv_vocab`, `get_vocab()` or `vocab`.
        embeddings: K, number of distinct pause ids, used in turn within a run of pauses.
        pause_id: The first pause id. Default: the tokenizer's own `pause_id`; else that of the token `<pause>` in its
            vocabulary; else the first id after its vocabulary.

    Raises:
        ConfigError: a pause id with another role (padding, end of document, ...), a `<pause>` that is ordinary text,
            or less than one pause id.
    """

    def __init__(self, tokenizer: object, embeddings: int = 1, pause_id: int | None = None) -> None:
        if embeddings < 1:
            raise ConfigError(f"pause.embeddings: expected 1 or more, got {embeddings}")
        self.tokenizer = tokenizer
        # Hugging Face counts tokens; ids can have holes, and then go further than their number.
        self.text_size = max(int(tokenizer.vocab_size), _ids_end(tokenizer))
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
                    f"pause id {token} is also the tokenizer's {name} id: choose another, for example "
                    f"{self.text_size}, the first id after the vocabulary"
                )

    @property
    def pause_id(self) -> int:
        """The first pause id."""
        return self.pause_ids.start

    @property
    def vocab_size(self) -> int:
        """Ids that a model needs, the pauses included. Pad the model's vocabulary from this number."""
        return max(self.text_size, self.pause_ids.stop)

    @property
    def pad(self) -> int:
        """The padding id; -1, as in megatron-core, where the tokenizer has none."""
        pad = _role(self.tokenizer, "pad")
        return NO_PAD if pad is None else pad

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What megatron-core puts into the key of its index caches."""
        inner = getattr(self.tokenizer, "unique_identifiers", None) or getattr(self.tokenizer, "fingerprint", None)
        if inner is None:
            raise ConfigError(
                f"tokenizer: expected a unique_identifiers or fingerprint attribute for the index cache's key, "
                f"{type(self.tokenizer).__name__} has neither"
            )
        return OrderedDict(
            [("class", type(self).__name__), ("tokenizer", inner), ("pause_ids", [*self.pause_ids])],
        )

    def detokenize(self, ids: Iterable[int], **options: object) -> str:
        """The text of token ids. Pauses are never shown (Goyal et al., section 3.3)."""
        return self.tokenizer.detokenize([token for token in map(int, ids) if token not in self.pause_ids], **options)

    def __getattr__(self, name: str) -> object:
        # Only called for what is not found here. Dunders and the wrapped object itself must not be looked up in it:
        # copy and pickle ask for them before __init__ has run.
        if name.startswith("__") or name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def _own_pause_id(self) -> int:
        """The id of the vocabulary's `<pause>`, if it is reserved; else the first id after the vocabulary."""
        token = id_of_token(self.tokenizer, PAUSE_TOKEN)
        if token is None:
            return self.text_size
        if _is_ordinary(self.tokenizer, token):
            raise ConfigError(
                f"tokenizer: its token {PAUSE_TOKEN!r} (id {token}) is ordinary text, so a document that spells it "
                f"would hold pauses. Make it a special token (SentencePiece: a control symbol), or say which id is "
                f"meant: PauseTokenizer(tokenizer, pause_id={self.text_size}), the first after the vocabulary, or "
                f"pause_id={token} where no document spells it"
            )
        return token


def id_of_token(tokenizer: object, text: str) -> int | None:
    """Find a token by its exact text.

    Args:
        tokenizer: of megatron-core or Megatron-LM (`inv_vocab`), of Hugging Face (`get_vocab()`), or with a `vocab`,
            a dictionary from text to id or a list of texts in the order of their ids.

    Returns:
        Its id; None where the vocabulary has no such token, or cannot be read.
    """
    # megatron-core's `vocab` comes last: for a Hugging Face tokenizer it cannot be made if ids have holes.
    by_id = _read(tokenizer, "inv_vocab")
    if isinstance(by_id, Mapping):
        return next((int(token) for token, name in by_id.items() if name == text), None)
    get_vocab = _read(tokenizer, "get_vocab")
    vocabulary = get_vocab() if callable(get_vocab) else _read(tokenizer, "vocab")
    if isinstance(vocabulary, Mapping):
        return vocabulary.get(text)
    return vocabulary.index(text) if isinstance(vocabulary, list) and text in vocabulary else None


def _ids_end(tokenizer: object) -> int:
    """One more than the largest id of a Hugging Face vocabulary; 0 for other tokenizers."""
    for library in _layers(tokenizer):
        if callable(get_vocab := _read(library, "get_vocab")):
            return max(get_vocab().values(), default=-1) + 1
    return 0


def _is_ordinary(tokenizer: object, token: int) -> bool:
    """Whether `<pause>` is a token that text encodes to and that is no special token either."""
    for library in _layers(tokenizer):
        if isinstance(added := _read(library, "added_tokens_decoder"), Mapping):  # Hugging Face
            if token in added and added[token].special:
                return False
        elif callable(_read(library, "is_control")):  # SentencePiece; megatron-core can add special tokens behind it
            if token >= library.get_piece_size() or library.is_control(token) or library.is_unused(token):
                return False
        elif (special := _read(library, "special_tokens_set")) is not None:  # tiktoken
            return PAUSE_TOKEN not in special  # megatron-core 0.16 names other ids than text encodes to
    try:
        return token in tokenizer.tokenize(PAUSE_TOKEN)
    except (AttributeError, NotImplementedError):
        return False


def _layers(tokenizer: object) -> Iterator[object]:
    """The tokenizer, what it wraps, and so on: megatron-core's class holds another one, which holds the library's."""
    for _ in range(3):
        yield tokenizer
        tokenizer = _read(tokenizer, "_tokenizer") or _read(tokenizer, "tokenizer")
        if tokenizer is None:
            return


def _role(tokenizer: object, attribute: str) -> int | None:
    token = _read(tokenizer, attribute)
    return token if isinstance(token, int) and token >= 0 else None


def _read(tokenizer: object, attribute: str) -> object | None:
    # Tokenizers of megatron-core say in many ways that they have no such thing; GPTDataset catches all for the padding.
    try:
        return getattr(tokenizer, attribute)
    except Exception:
        return None
