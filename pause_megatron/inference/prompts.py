"""Prompts to token ids with pauses, answers back to text, and the "pause" entry of a model's config.json.

Pauses are token ids, never text. A prompt that spells `<pause>` (or another special token) is encoded as ordinary
text, and no pause is ever shown in an answer. Goyal et al., section 3.3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pause_megatron.data.supervised.examples import Prompting
from pause_megatron.data.tokenizer.continuation import Continuations
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN, ids_before
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference.decoding import NO_DECODING_PAUSES, DecodingPauses

_NO_PAUSES = range(0)
_DEFAULT = Prompting()


@dataclass(frozen=True)
class PauseInfo:
    """Pauses of a model: the "pause" entry of an export's config.json.

    Attributes:
        ids: The K pause ids, used in turn within a run of pauses; empty for a model without pauses.
        m_ft: M in finetuning; None if the model was not finetuned or its config.json does not name it.
        prompting: Location, filler and prefix attention in finetuning.
        positions: "own", or "shared": a pause has the position of the text token before it (`pause.positions`).
        decoding: Pauses within answers: those that the model was trained with ("decoding"), and its requests
            ("requests": the maximum before one token).
        not_decoded: Placement of training that chose places within texts which decoding cannot have; "" without.
    """

    ids: range = _NO_PAUSES
    m_ft: int | None = None
    prompting: Prompting = _DEFAULT
    positions: str = "own"
    decoding: DecodingPauses = NO_DECODING_PAUSES
    not_decoded: str = ""

    @property
    def without_positions(self) -> range | None:
        """Ids that use up no position; None where every token uses one."""
        return self.ids if self.positions == "shared" else None

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> PauseInfo:
        """Read the "pause" entry of a model's configuration; without one, look for `<pause>` in the tokenizer.

        Args:
            config: The model's `PretrainedConfig`.
            tokenizer: The model's tokenizer.

        Returns:
            The model's pauses.

        Raises:
            DataError: The entry is malformed, has ids outside the vocabulary, or differs from the tokenizer.
        """
        token_id = _special_id(tokenizer, PAUSE_TOKEN)
        entry = getattr(config, "pause", None)
        if entry is None:
            return cls() if token_id is None or token_id >= config.vocab_size else cls(range(token_id, token_id + 1))
        info = _parse(entry)
        if info.ids and info.ids.stop > config.vocab_size:
            raise DataError(
                f"config.json: pause.ids: expected ids below vocab_size={config.vocab_size}, got up to "
                f"{info.ids.stop - 1}"
            )
        if info.ids and token_id is not None and token_id != info.ids.start:
            raise DataError(
                f"config.json: pause.ids: expected the first one to be the tokenizer's {PAUSE_TOKEN}, {token_id}, got "
                f"{info.ids.start}"
            )
        return info

    def override(
        self, *, location: str | None = None, filler: str | None = None, prefix_attention: str | None = None
    ) -> Prompting:
        """Return the model's prompting with other values where some are given.

        Args:
            location: "append" or "prepend"; None for the model's own.
            filler: Text of one ordinary token that replaces `<pause>`; "" for `<pause>`; None for the model's own.
            prefix_attention: "causal" or "bidirectional"; None for the model's own.

        Raises:
            ConfigError: A value that does not exist.
        """
        own = self.prompting
        return replace(
            own,
            location=own.location if location is None else location,
            filler=own.filler if filler is None else filler or None,
            prefix_attention=own.prefix_attention if prefix_attention is None else prefix_attention,
        )


def _parse(entry: Any) -> PauseInfo:
    try:
        ids = [int(token_id) for token_id in entry["ids"]]
        m_ft = None if entry.get("m_ft") is None else int(entry["m_ft"])
        location, attention = entry.get("location", "append"), entry.get("prefix_attention", "causal")
        filler, positions = entry.get("filler"), entry.get("positions", "own")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f'config.json: "pause" is not readable ({type(error).__name__}: {error})') from None
    consecutive = range(ids[0], ids[0] + len(ids)) if ids else _NO_PAUSES
    if list(consecutive) != ids or consecutive.start < 0:
        raise DataError(f"config.json: pause.ids: expected consecutive ids, got {ids}")
    if m_ft is not None and m_ft < 0:
        raise DataError(f"config.json: pause.m_ft: expected null or 0 or more, got {m_ft}")
    if filler is not None and not (isinstance(filler, str) and filler):
        raise DataError(f"config.json: pause.filler: expected null or the text of a token, got {filler!r}")
    if positions not in ("own", "shared"):
        raise DataError(f"config.json: pause.positions: expected own or shared, got {positions!r}")
    try:
        prompting = Prompting(location, filler, attention)
    except ConfigError as error:
        raise DataError(f"config.json: pause.{error}") from None
    pretrained = entry.get("placement") if m_ft is None and entry.get("rate") else None
    not_decoded = entry.get("answer_placement") or (pretrained if pretrained in ("before", "scored") else "")
    return PauseInfo(consecutive, m_ft, prompting, positions, _decoding(entry, consecutive), str(not_decoded))


def _decoding(entry: Any, ids: range) -> DecodingPauses:
    """Pauses within answers, of the keys "decoding" and "requests"."""
    document, requests = entry.get("decoding"), entry.get("requests")
    if requests is not None and (not isinstance(requests, int) or isinstance(requests, bool) or requests < 0):
        raise DataError(f"config.json: pause.requests: expected null or 0 or more, got {requests!r}")
    own = NO_DECODING_PAUSES if document is None else DecodingPauses.parse(document, "config.json: pause.decoding")
    if requests:
        if isinstance(document, Mapping) and "limit" in document:
            raise DataError("config.json: pause.requests: expected no pause.decoding.limit beside it, got both")
        own = replace(own, requests=True, limit=requests)
    if own.active and not ids:
        key = "requests" if document is None else "decoding"
        raise DataError(f"config.json: pause.{key}: expected pause.ids with it, got none")
    return own


class PromptEncoder:
    """Encoder of prompts and decoder of answers, around a Hugging Face tokenizer.

    Args:
        tokenizer: The model's fast (Rust) tokenizer.
        pause: The model's pauses.

    Attributes:
        leading: Ids that the tokenizer puts before a text, such as a BOS.
    """

    def __init__(self, tokenizer: Any, pause: PauseInfo) -> None:
        self.tokenizer = tokenizer
        self.pause = pause
        self._continuations = Continuations(self._encode, self._decode)
        self.leading = self._leading()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Encode a prompt, with the ids that the tokenizer puts before a text (such as a BOS).

        Args:
            prompt: Text, in which no special token is recognized; or ids (of `apply_chat_template`, say), which are
                returned unchanged.

        Returns:
            Token ids.

        Raises:
            DataError: A text that has no UTF-8 form.
        """
        if not isinstance(prompt, str):
            return [int(token_id) for token_id in prompt]
        return self.leading + self._encode(prompt)

    def encode_continuation(self, text: str) -> list[int]:
        """Encode a text that follows another one, as an answer follows pauses.

        Args:
            text: The continuation, with its leading space.

        Returns:
            Token ids.

        Raises:
            DataError: No encoding decodes to exactly this text.
        """
        return self._continuations.encode(text)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Decode token ids that follow other text. Special tokens, pauses among them, are left out."""
        return self._continuations.decode(ids)

    def with_pauses(self, ids: Sequence[int], count: int, location: str, filler: Sequence[int] = ()) -> list[int]:
        """Put pauses before or after a prompt; see `paused`."""
        return self.paused(ids, count, location, filler)[0]

    def paused(
        self, ids: Sequence[int], count: int, location: str, filler: Sequence[int] = (), inside: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]:
        """Put pauses into a prompt.

        Args:
            ids: Prompt ids, [P].
            count: Number of pauses before or after it, M.
            location: "append" (after the prompt) or "prepend" (before it, after a leading BOS).
            filler: Id of the ordinary token that replaces `<pause>`; empty for the model's pause ids.
            inside: Further pauses: for each, the number of prompt ids before it.

        Returns:
            Token ids, [P + M + len(inside)], and the places of the pauses among them, ascending.
        """
        pause_ids = range(filler[0], filler[0] + 1) if filler else self.pause.ids
        kept = len(self.leading) if list(ids[: len(self.leading)]) == self.leading else 0
        added = Counter(inside)
        added[len(ids) if location == "append" else kept] += count
        tokens: list[int] = []
        places: list[int] = []
        run = 0  # pauses directly before, those that the ids contain among them
        for gap in range(len(ids) + 1):
            if gap:
                token_id = int(ids[gap - 1])
                tokens.append(token_id)
                run = run + 1 if token_id in self.pause.ids else 0
            for _ in range(added[gap]):
                places.append(len(tokens))
                tokens.append(pause_ids[run % len(pause_ids)])
                run += 1
        return tokens, places

    def filler_id(self, text: str) -> int:
        """Return the token id of a filler.

        Args:
            text: Text of exactly one token.

        Raises:
            ConfigError: The text is several tokens, or none.
        """
        return self._continuations.filler_id(text)

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except (TypeError, UnicodeError) as error:
            raise DataError(f"prompt cannot be encoded: {error}") from None

    def _decode(self, ids: Sequence[int]) -> str:
        shown = [token_id for token_id in ids if token_id not in self.pause.ids]
        return self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _leading(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text, without those after it (an EOS), which would end it."""
        whole = self.tokenizer("a", add_special_tokens=True, split_special_tokens=True)["input_ids"]
        return ids_before(whole, self._encode("a"))


def _special_id(tokenizer: Any, token: str) -> int | None:
    """Id of the tokenizer's special token of this name; None if it has none."""
    token_id = tokenizer.get_vocab().get(token)
    return token_id if token_id in tokenizer.all_special_ids or _is_added_special(tokenizer, token_id) else None


def _is_added_special(tokenizer: Any, token_id: int | None) -> bool:
    added = tokenizer.added_tokens_decoder.get(token_id)
    return added is not None and added.special
