"""Where documents begin in a window that holds pauses. A corpus and a stream cut windows in two ways; this is common.

A pause belongs to the text token that it stands behind, so that pauses behind an EOD belong to the document that it
ends, and the next one begins at its first text token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pause_megatron.data.windows.pause import Window


def document_begins(window: Window, eod: int) -> np.ndarray:
    """Where a text token stands whose predecessor in the text is EOD: bool [L], for a window of L tokens."""
    begins = np.zeros(window.tokens.size, dtype=bool)
    places = np.flatnonzero(window.is_text)
    begins[places[1:]] = window.tokens[places[:-1]] == eod
    return begins


def restarting_positions(begins: np.ndarray) -> torch.Tensor:
    """Position ids that start again at 0 with each document: int64 [N].

    Args:
        begins: bool [N], where a document begins; the window's first token needs no mark.
    """
    index = np.arange(begins.size)
    return torch.from_numpy(index - np.maximum.accumulate(index * begins))


def segments_of(position_ids: torch.Tensor) -> torch.Tensor:
    """The documents of a window, numbered from 0: int32 [N], from position ids [N] that are 0 where each begins."""
    return (position_ids == 0).cumsum(0, dtype=torch.int32) - 1


def packed_documents(window: Window, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """What variable-length attention needs to keep the documents of a window apart.

    Args:
        window: of N + 1 tokens, the last of which is only a target.
        lengths: text tokens that were drawn from each document, in order; padding behind them counts to the last
            that has a token.

    Returns:
        position_ids int64 [N], from 0 in each document; cu_seqlens int32 [N + 1], where documents begin, then N;
        max_seqlen int32 []. Documents of which no token is an input are left out.
    """
    size = window.tokens.size - 1
    places = np.flatnonzero(window.is_text)
    ends = np.cumsum(lengths)  # the text token that the next document begins with
    begins = places[ends[ends < min(places.size, ends[-1])]]
    bounds = np.unique(np.concatenate([[0], begins[begins < size], [size]]))
    marks = np.zeros(size, dtype=bool)
    marks[bounds[:-1]] = True
    cu_seqlens = torch.full((size + 1,), size, dtype=torch.int32)
    cu_seqlens[: bounds.size] = torch.from_numpy(bounds)
    return {
        "position_ids": restarting_positions(marks),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": torch.tensor(np.diff(bounds).max(), dtype=torch.int32),
    }
