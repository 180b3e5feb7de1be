"""Collation of samples into a micro-batch, with the target rows that the pause-aware LM head computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pause_megatron.objective import LossPlan, Steps

_ALIGNMENT = 64  # bytes
_STEPS = ("steps.rows", "steps.sizes", "steps.is_pause", "steps.weights")


@dataclass(frozen=True)
class MicroBatch:
    """The windows of one forward and backward pass on one rank.

    The supervised positions are rows of the flattening [seq * batch] of megatron-core's sequence-first hidden states
    [seq, batch, hidden]: row = position * batch + number of the sample in the micro-batch. The head computes logits for
    these rows only. Positions whose next token is a pause are not among them.

    Attributes:
        tokens: Text and pause ids, int64 [batch, seq].
        position_ids: Positions, int64 [batch, seq].
        target_rows: Supervised rows, int64 [R], ascending.
        targets: The next token at each supervised row, int64 [R]; never a pause.
        after_pause: Whether the input token at each supervised row is a pause, bool [R].
        sample_ids: Global sample numbers, int64 [batch].
        pause_tokens: Number of pauses among the input tokens.
        dataset_ids: Number of the corpus in a blend, for each window, int64 [batch]. None: there is one corpus.
        segments: Documents of a window for intra-document masking, int32 [batch, seq], numbered from 0; -1 is padding.
            None: every window is one document (with padding after it, if any), so plain causal attention is correct.
        prefix: Tokens with bidirectional attention to the marked tokens of their segment (a prefix-LM), bool
            [batch, seq]. None: causal. Segments and prefix stay on the host, because attention needs their lengths.
        padding_tokens: Number of input tokens that are padding.
        hint_rows: Rows that predict hints, int64 [H]; ascending by head where heads predict them. None: no hints.
        hint_targets: The hint at each of these rows, int64 [H]; never a pause.
        hints_by_head: Number of hints of each auxiliary head, in order; () where pauses predict the hints.
        steps: Rows and weights of the targets for an objective; None: the cross-entropy of `target_rows`.
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
    hint_rows: torch.Tensor | None = None
    hint_targets: torch.Tensor | None = None
    hints_by_head: tuple[int, ...] = ()
    steps: Steps | None = None

    @property
    def weight(self) -> float:
        """Sum of the weights of the targets; without weights, their number."""
        return self.targets_count if self.steps is None else self.steps.weight_sum

    @property
    def target_datasets(self) -> torch.Tensor | None:
        """Number of the corpus in a blend, for each target, int64 [R]; None with one corpus."""
        return None if self.dataset_ids is None else self.dataset_ids[self.target_rows % self.dataset_ids.numel()]

    @property
    def targets_count(self) -> int:
        """R, the number of supervised positions."""
        return self.targets.numel()

    @property
    def hints_count(self) -> int:
        """H, the number of supervised hints."""
        return 0 if self.hint_targets is None else self.hint_targets.numel()

    @property
    def raw_tokens(self) -> int:
        """Number of input tokens, pauses included, padding excluded."""
        return self.tokens.numel() - self.padding_tokens

    @property
    def text_tokens(self) -> int:
        """Number of input tokens that are text."""
        return self.raw_tokens - self.pause_tokens

    def packed(self, *, pinned: bool) -> MicroBatch:
        """Return the same micro-batch in one buffer, so that `to` makes one copy.

        Args:
            pinned: Whether the buffer is page-locked, so that a GPU copies it asynchronously. (torch reuses pinned
                memory only after a copy from it has ended.)

        Returns:
            A micro-batch whose tensors are views of the buffer.
        """
        tensors = self.device_tensors()
        starts, end = {}, 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        views = {}
        for name, tensor in tensors.items():
            part = buffer[starts[name] : starts[name] + tensor.nbytes]
            views[name] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return self._with(views)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return the same micro-batch on a device; segments and prefix stay on the host.

        A packed micro-batch takes one copy, which is asynchronous from pinned memory.

        Args:
            device: The device of the model.

        Returns:
            The micro-batch on that device.
        """
        tensors = self.device_tensors()
        (first, *others) = (tensor.untyped_storage() for tensor in tensors.values())
        if first.device == torch.device(device):
            return self
        if any(storage.data_ptr() != first.data_ptr() for storage in others):
            return self._with({name: each.to(device, non_blocking=True) for name, each in tensors.items()})
        buffer = torch.empty(0, dtype=torch.uint8).set_(first).to(device, non_blocking=True)
        parts = {
            name: buffer[each.storage_offset() * each.itemsize :][: each.nbytes].view(each.dtype).view(each.shape)
            for name, each in tensors.items()
        }
        return self._with(parts)

    def device_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are copied to the device, by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and name not in ("segments", "prefix")
        } | {name: getattr(self.steps, name.partition(".")[2]) for name in _STEPS if self.steps is not None}

    def _with(self, tensors: Mapping[str, torch.Tensor]) -> MicroBatch:
        """Return the same micro-batch with other device tensors, all of them."""
        return replace(
            self,
            tokens=tensors["tokens"],
            position_ids=tensors["position_ids"],
            target_rows=tensors["target_rows"],
            targets=tensors["targets"],
            after_pause=tensors["after_pause"],
            sample_ids=tensors["sample_ids"],
            dataset_ids=tensors.get("dataset_ids"),
            hint_rows=tensors.get("hint_rows"),
            hint_targets=tensors.get("hint_targets"),
            steps=None if self.steps is None else self.steps.with_tensors(*(tensors[name] for name in _STEPS)),
        )


def collate(
    samples: Sequence[Mapping[str, torch.Tensor]],
    *,
    sample_ids: Sequence[int],
    pause_ids: range,
    plan: LossPlan | None = None,
) -> MicroBatch:
    """Stack samples of PauseGPTDataset (or GPTDataset) and list their supervised positions.

    Args:
        samples: Dictionaries with tokens, labels, position_ids int64 [seq] and loss_mask float [seq] of zeros and ones.
            Samples of a BlendedDataset also have a dataset_id. All samples may have segments int32 [seq] and prefix
            bool [seq], as in MicroBatch, hints int64 [hints, 3]: position, head or -1, target, and weights float32
            [seq]: weight of the label at each position, for `objective.token_weights=side`.
        sample_ids: Global sample numbers, one for each sample.
        pause_ids: The K pause ids.
        plan: What is minimized; None: the mean cross-entropy of the targets.

    Returns:
        The micro-batch, on the host.
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
    target_rows = sequence_first["loss_mask"].nonzero().squeeze(1)
    targets = sequence_first["labels"][target_rows]
    steps = None
    if plan is not None:
        weights = [sample["weights"] for sample in samples] if "weights" in samples[0] else None
        steps = plan.steps(
            is_pause=is_pause,
            segments=segments,
            target_rows=target_rows,
            targets=targets,
            side=None if weights is None else torch.stack(weights, dim=1).flatten(),
            sample_ids=sample_ids,
        )
    if segments is not None and prefix is None and _is_one_document(segments):
        segments = None
    return MicroBatch(
        tokens=tokens,
        position_ids=torch.stack([sample["position_ids"] for sample in samples]),
        target_rows=target_rows,
        targets=targets,
        after_pause=is_pause.t().flatten()[target_rows],
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        pause_tokens=int(is_pause.sum()),
        dataset_ids=torch.tensor([int(sample["dataset_id"]) for sample in samples])
        if "dataset_id" in samples[0]
        else None,
        segments=segments,
        prefix=prefix,
        padding_tokens=padding_tokens,
        steps=steps,
        **(_hints([sample["hints"] for sample in samples]) if "hints" in samples[0] else {}),
    )


def _hints(hints: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the fields of a micro-batch about the hints of its samples."""
    rows = torch.cat([each[:, 0] * len(hints) + number for number, each in enumerate(hints)])
    heads, targets = torch.cat([each[:, 1] for each in hints]), torch.cat([each[:, 2] for each in hints])
    if not len(heads) or int(heads[0]) < 0:
        return {"hint_rows": rows, "hint_targets": targets}
    order = heads.argsort(stable=True)
    return {
        "hint_rows": rows[order],
        "hint_targets": targets[order],
        "hints_by_head": tuple(heads.bincount().tolist()),
    }


def _is_one_document(segments: torch.Tensor) -> bool:
    """Return whether each window is segment 0 with only padding after it, which causal attention hides anyway."""
    return bool((segments[:, 0] == 0).all()) and bool((segments.diff(dim=1) <= 0).all())
