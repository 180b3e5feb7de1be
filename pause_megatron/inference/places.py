"""The pauses at the places of a text, and the pauses of one row, while an answer is decoded or scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pause_megatron.inference.decoding import DecodingPauses
from pause_megatron.inference.prompts import PromptEncoder


class Places:
    """The pauses of one batch of answers: the places that texts decide, and the ids at them.

    Args:
        encoder: Encoder of the model; it knows the text of a token.
        decoding: Where answers get pauses.
        ids: Ids of the pauses, used in turn within a run; or the one id of a filler.
    """

    def __init__(self, encoder: PromptEncoder, decoding: DecodingPauses, ids: Sequence[int]) -> None:
        self.decoding = decoding
        self.ids = ids
        self._encoder = encoder
        self._own = frozenset(encoder.pause.ids)
        self._matches: dict[int, bool] = {}

    def after(self, token_id: int, number: int) -> int:
        """Return the number of pauses after a token.

        Args:
            token_id: Its id.
            number: Number of the token, from 1.
        """
        decoding = self.decoding
        if decoding.every is not None and number % decoding.every == 0:
            return decoding.count
        return decoding.count if self._match(token_id) else 0

    def _match(self, token_id: int) -> bool:
        """Return whether `after` names a token."""
        pattern = self.decoding.pattern
        if pattern is None:
            return False
        if token_id not in self._matches:
            text = self._encoder.decode_continuation([token_id])
            self._matches[token_id] = text != "" and pattern.search(text) is not None
        return self._matches[token_id]

    def in_prompt(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """Return the gaps of a prompt's pauses, and the number of its last token.

        Pauses that the ids contain already (of a chat template) are no tokens of the text.

        Args:
            ids: Ids of the prompt.

        Returns:
            For each pause the number of ids before it, ascending; and the number of text tokens that `every` counts.
        """
        if not self.decoding.in_prompt:
            return [], 0
        gaps: list[int] = []
        number = 0
        for index, token_id in enumerate(ids, 1):
            if token_id not in self._own:
                number += 1
                gaps += [index] * self.after(token_id, number)
        return gaps, number

    def longest(self, ids: Sequence[int], leading: Sequence[int], room: int) -> int:
        """Return how many tokens of a prompt fit with the pauses within them, in one pass from its right end.

        Args:
            ids: Ids of the prompt, which is cut from the left.
            leading: Ids that are kept before the cut, if the prompt begins with them and one more is kept.
            room: Available positions.
        """
        if not self.decoding.in_prompt:
            return max(min(room, len(ids)), 0)
        count, every = self.decoding.count, self.decoding.every or 0
        begins = bool(leading) and list(ids[: len(leading)]) == list(leading)
        heads = [(len(head), *self.in_prompt(head)) for head in ([], leading)]
        found = text = matches = 0  # `text` and `matches` of ids[start:]
        by_number = [0] * (every or 1)  # matches, by their number from the right modulo `every`
        for start in reversed(range(len(ids))):
            if len(ids) - start > room:
                break
            if ids[start] not in self._own:
                text += 1
                matched = self._match(ids[start])
                matches += matched
                by_number[text % len(by_number)] += matched
            for length, gaps, before in heads:
                size = len(ids) - start + length
                if not (begins and start >= length if length else not begins or not start or size <= len(leading)):
                    continue  # such a cut is not made
                places = matches
                if every:  # a token that both modes name has one place
                    places += (before + text) // every - before // every - by_number[(before + text + 1) % every]
                if size + len(gaps) + places * count <= room:
                    found = max(found, size)
        return found

    def interleave(self, ids: Sequence[int], number: int, run: int) -> tuple[list[int], list[int]]:
        """Put the pauses of the places into a text that is given as a whole.

        Args:
            ids: Ids of the text; no pauses follow the last one.
            number: Tokens that `every` has counted before it.
            run: Pauses directly before it.

        Returns:
            Ids with pauses, without the last token; and the index there after which each further token is predicted.
        """
        row = PauseRun(self, run)
        mixed: list[int] = []
        predicting = []
        for index, token_id in enumerate(ids[:-1], 1):
            mixed += row.follow(token_id, number + index)
            predicting.append(len(mixed) - 1)
        return mixed, predicting

    def most(self, new_tokens: int, number: int) -> int:
        """Return the maximum number of pauses of an answer.

        Args:
            new_tokens: Its maximum length; the last token is never followed by pauses.
            number: Tokens that `every` has counted before it.
        """
        decoding, read = self.decoding, new_tokens - 1
        places = 0
        if decoding.after is not None:
            places = read
        elif decoding.every is not None:
            places = (number + read) // decoding.every - number // decoding.every
        return places * decoding.count + (decoding.limit * new_tokens if decoding.granted else 0)


class PauseRun:
    """Pauses of one row, whose K ids are used in turn within a run.

    Args:
        places: Pauses of the batch.
        run: Pauses directly before the row's first new token.
    """

    def __init__(self, places: Places, run: int) -> None:
        self._places = places
        self._run = run

    def follow(self, token_id: int, number: int) -> list[int]:
        """Return a token and the pauses after it.

        Args:
            token_id: Id of the token.
            number: Number of the token, from 1.
        """
        self._run = 0
        return [token_id, *self.more(self._places.after(token_id, number))]

    def more(self, count: int) -> list[int]:
        """Return the ids of the next pauses of the run."""
        ids = self._places.ids
        found = [ids[(self._run + i) % len(ids)] for i in range(count)]
        self._run += count
        return found


def pauses_between(predicting: Sequence[int]) -> list[tuple[int, int]]:
    """Return (tokens before them, number) of the pauses of an interleaved text.

    Args:
        predicting: Index after which each token but the first is predicted, as `Places.interleave` returns it.
    """
    ends = [-1, *predicting]
    lengths = [end - start for start, end in pairwise(ends)]
    return [(index, length - 1) for index, length in enumerate(lengths, 1) if length > 1]


def pause_marks(length: int, predicting: Sequence[int]) -> list[bool]:
    """Return which tokens of an interleaved text are pauses.

    Args:
        length: Number of its tokens.
        predicting: As for `pauses_between`.
    """
    marks = [True] * length
    for end in [-1, *predicting[:-1]] if length else []:
        marks[end + 1] = False
    return marks
