"""Samples of the dataset -> one micro-batch, in the shape that the pause-aware LM head wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class MicroBatch:
    """The windows of one forward and backward pass on one rank.

    The supervised positions are given as rows of the sequence-first flattening [seq * batch] that megatron-core's
    hidden states [seq, batch, hidden] have: row = position * batch + number of the sample in the micro-batch. So the
    head computes nothing for the others, pause targets among them.

    Attributes:
        tokens: int64 [batch, seq], text and pause ids.
        position_ids: int64 [batch, seq].
        target_rows: int64 [R], ascending.
        targets: int64 [R], the next token at each of these rows; never a pause.
        after_pause: bool [R], whether the input token at that row is a pause.
        sample_ids: int64 [batch], the global sample numbers.
        pause_tokens: Number of pauses among the input tokens.
        dataset_ids: int64 [batch], which corpus of a blend each window is of. None: there is one corpus.
        segments: int32 [batch, seq], texts of a window that do not see each other, numbered from 0; -1 is padding.
            None: every window is one text (with padding behind it, if any), which plain causal attention serves.
        prefix: bool [batch, seq], tokens that see all tokens of their segment that are marked too, those behind them
            as well (a prefix-LM). None: causal. Segments and prefixes stay on the host: attention wants their lengths.
        padding_tokens: Number of input tokens that are padding.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    target_rows: torch.Tensor
    targets: torch.Tensor
    after_pause: torch.Tensor
    sample_ids: torch.Tensor
    pause_tokens: int
    dataset_ids: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    padding_tokens: int = 0

    @property
    def target_datasets(self) -> torch.Tensor | None:
        """int64 [R], which corpus of a blend each target is of."""
        return None if self.dataset_ids is None else self.dataset_ids[self.target_rows % self.dataset_ids.numel()]

    @property
    def targets_count(self) -> int:
        """R, supervised positions."""
        return self.targets.numel()

    @property
    def raw_tokens(self) -> int:
        """Input tokens, pauses included, padding not."""
        return self.tokens.numel() - self.padding_tokens

    @property
    def text_tokens(self) -> int:
        """Input tokens that are not pauses."""
        return self.raw_tokens - self.pause_tokens

    def packed(self, *, pinned: bool) -> MicroBatch:
        """The same micro-batch in one buffer, so that `to` makes one copy.

        Args:
            pinned: in page-locked memory, from which a GPU copies while the host goes on. (torch does not give such
                memory to anybody else before a copy from it is done.)
        """
        tensors = self._on_device()
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        views = {}
        for name, tensor in tensors.items():
            part = buffer[starts[name] : starts[name] + tensor.nbytes]
            views[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return replace(self, **views)

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device, but for segments and prefix; one copy if it is packed.

        The copy is asynchronous where the memory is pinned.
        """
        tensors = self._on_device()
        (first, *others) = (tensor.untyped_storage() for tensor in tensors.values())
        if first.device == torch.device(device):
            return self
        if any(storage.data_ptr() != first.data_ptr() for storage in others):
            return replace(self, **{name: each.to(device, non_blocking=True) for name, each in tensors.items()})
        buffer = torch.empty(0, dtype=torch.uint8).set_(first).to(device, non_blocking=True)
        parts = {
            name: buffer[each.storage_offset() * each.itemsize :][: each.nbytes].view(each.dtype).view(each.shape)
            for name, each in tensors.items()
        }
        return replace(self, **parts)

    def _on_device(self) -> dict[str, torch.Tensor]:
        """What the device works with, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and name not in ("segments", "prefix")
        }


def collate(
    samples: Sequence[Mapping[str, torch.Tensor]], *, sample_ids: Sequence[int], pause_ids: range
) -> MicroBatch:
    """Stacks samples of PauseGPTDataset (or GPTDataset) and lists their supervised positions.

    Args:
        samples: Dictionaries with tokens, labels, position_ids int64 [seq] and loss_mask float [seq] of zeros and ones;
            those of a BlendedDataset have a dataset_id; all of them may have segments int32 [seq] and prefix bool
            [seq] besides, as in MicroBatch.
        sample_ids: Their global sample numbers.
        pause_ids: The pause ids, to tell pauses from text.
    """
    tokens = torch.stack([sample["tokens"] for sample in samples])
    sequence_first = {
        name: torch.stack([sample[name] for sample in samples], dim=1).flatten() for name in ("labels", "loss_mask")
    }
    is_pause = (tokens >= pause_ids.start) & (tokens < pause_ids.stop)
    segments, prefix = (
        torch.stack([sample[name] for sample in samples]) if name in samples[0] else None
        for name in ("segments", "prefix")
    )
    padding_tokens = 0 if segments is None else int((segments < 0).sum())
    if segments is not None and prefix is None and _is_one_text(segments):
        segments = None
    target_rows = sequence_first["loss_mask"].nonzero().squeeze(1)
    return MicroBatch(
        tokens=tokens,
        position_ids=torch.stack([sample["position_ids"] for sample in samples]),
        target_rows=target_rows,
        targets=sequence_first["labels"][target_rows],
        after_pause=is_pause.t().flatten()[target_rows],
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        pause_tokens=int(is_pause.sum()),
        dataset_ids=torch.tensor([int(sample["dataset_id"]) for sample in samples])
        if "dataset_id" in samples[0]
        else None,
        segments=segments,
        prefix=prefix,
        padding_tokens=padding_tokens,
    )


def _is_one_text(segments: torch.Tensor) -> bool:
    """Whether all windows are segment 0 with nothing but padding behind it: causal attention hides that by itself."""
    return bool((segments[:, 0] == 0).all()) and bool((segments.diff(dim=1) <= 0).all())
