"""Document boundaries in a window with pauses: positions, segments and `cu_seqlens` for intra-document masking.

A pause belongs to the document of the text token that it follows. So pauses after an EOD belong to the document
that the EOD ends, and the next document begins at its first text token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pause_megatron.data.windows.pause import Window


def document_begins(window: Window, eod: int) -> np.ndarray:
    """Return where documents begin, except at the window's first token.

    Args:
        window: A window of L tokens.
        eod: The id that ends a document.

    Returns:
        True at a text token whose predecessor in the text is EOD, bool [L].
    """
    begins = np.zeros(window.tokens.size, dtype=bool)
    text = np.flatnonzero(window.is_text)
    begins[text[1:]] = window.tokens[text[:-1]] == eod
    return begins


def restarting_positions(begins: np.ndarray) -> torch.Tensor:
    """Return position ids that restart at 0 with each document, int64 [N].

    Args:
        begins: Where documents begin, bool [N]; the first token needs no mark.
    """
    index = np.arange(begins.size)
    return torch.from_numpy(index - np.maximum.accumulate(index * begins))


def shared_positions(is_text: np.ndarray, begins: np.ndarray | None = None) -> torch.Tensor:
    """Return position ids that pauses do not use up, int64 [N]: a pause has that of the text token before it.

    Pauses before any text token have position 0, as the first text token has.

    Args:
        is_text: False at pauses, bool [N].
        begins: Where documents begin, at text tokens only, bool [N]; positions restart there. None: nowhere.
    """
    positions = np.maximum(is_text.cumsum() - 1, 0)
    if begins is not None:
        positions -= np.maximum.accumulate(positions * begins)
    return torch.from_numpy(positions)


def segments_of(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the number of each token's document within the window, from 0, int32 [N].

    Args:
        position_ids: Positions that are 0 where a document begins and nowhere else, int64 [N]; not shared ones.
    """
    return (position_ids == 0).cumsum(0, dtype=torch.int32) - 1


def packed_documents(window: Window, lengths: Sequence[int], *, shared: bool = False) -> dict[str, torch.Tensor]:
    """Return the arguments of variable-length attention that mask documents from each other.

    Args:
        window: A window of N + 1 tokens, the last of which is only a target.
        lengths: Text tokens that were drawn from each document, in order. Padding after them counts to the last
            document with a token.
        shared: Whether a pause has the position of the text token before it.

    Returns:
        position_ids int64 [N], from 0 in each document; cu_seqlens int32 [N + 1], the beginnings of the documents,
        filled up with N; max_seqlen int32 []. Documents without an input token are left out.
    """
    size = window.tokens.size - 1
    text = np.flatnonzero(window.is_text)
    ends = np.cumsum(lengths)  # index of the text token at which the next document begins
    begins = text[ends[ends < min(text.size, ends[-1])]]
    bounds = np.unique(np.concatenate([[0], begins[begins < size], [size]]))
    marks = np.zeros(size, dtype=bool)
    marks[bounds[:-1]] = True
    cu_seqlens = torch.full((size + 1,), size, dtype=torch.int32)
    cu_seqlens[: bounds.size] = torch.from_numpy(bounds)
    return {
        "position_ids": shared_positions(window.is_text[:-1], marks) if shared else restarting_positions(marks),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": torch.tensor(np.diff(bounds).max(), dtype=torch.int32),
    }
