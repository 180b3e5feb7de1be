"""Packed texts: each has the losses of a separate pass, and does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_model import SEQ, TEXT_SIZE, distance, take_gradients, tiny, whole

from pause_megatron.config.schema import ParallelSection
from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.model.attention import SDPACoreAttention, segment_mask

PAUSE = TEXT_SIZE
# (tokens, tokens of the prefix); a prefix ends with pauses.
LENGTHS = [(5, 2), (7, 4), (3, 1), (9, 5)]
PACKED = [[0, 1, 2], [3]]
ALONE = [[number] for number in range(len(LENGTHS))]


def texts(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(0, TEXT_SIZE, (length + 1,), generator=generator) for length, _ in LENGTHS]
    for text, (_, prefix) in zip(made, LENGTHS, strict=True):
        text[prefix // 2 : prefix] = PAUSE
    return made


def window(numbers: list[int], every: list[torch.Tensor], bidirectional: bool, left: int = 0) -> dict:
    """Return a sample with these texts in order, `left` padding tokens before and the rest after them."""
    sample = {name: torch.zeros(SEQ, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")}
    sample["loss_mask"] = torch.zeros(SEQ)
    sample["segments"] = torch.full((SEQ,), -1, dtype=torch.int32)
    prefix = torch.zeros(SEQ, dtype=torch.bool)
    start = left
    for segment, number in enumerate(numbers):
        length, marked = LENGTHS[number]
        places = slice(start, start + length)
        sample["tokens"][places], sample["labels"][places] = every[number][:-1], every[number][1:]
        sample["position_ids"][places] = torch.arange(length)
        sample["segments"][places] = segment
        sample["loss_mask"][start + marked - 1 : start + length] = 1
        prefix[start : start + marked] = bidirectional
        start += length
    return {**sample, "prefix": prefix} if bidirectional else sample


def losses(batch: MicroBatch, layout: list[list[int]], values: torch.Tensor) -> dict[int, list[float]]:
    """Return the token losses of each text, in order; `layout` lists the texts of each window."""
    found: dict[int, list[float]] = {}
    segments = batch.segments if batch.segments is not None else torch.zeros_like(batch.tokens)
    for row, value in zip(batch.target_rows.tolist(), values.tolist(), strict=True):
        position, sample = divmod(row, len(layout))
        found.setdefault(layout[sample][int(segments[sample, position])], []).append(value)
    return found


def dense_loss(model: torch.nn.Module, batch: MicroBatch):
    """What `lm_loss` is, by the mask."""
    return model(
        batch.tokens,
        batch.position_ids,
        attention_mask=segment_mask(batch.segments, batch.prefix),
        target_rows=batch.target_rows,
        targets=batch.targets,
    )


def run(
    layout: list[list[int]],
    every: list[torch.Tensor],
    bidirectional: bool,
    left: int,
    parallel: ParallelSection,
    dense: bool = False,
):
    """Losses by text, and the gradients of their sum."""
    from pause_megatron.distributed import initialize
    from pause_megatron.train.losses import lm_loss

    with initialize(parallel, device="cpu") as context:
        model = tiny(parallel=parallel)
        samples = [window(numbers, every, bidirectional, left) for numbers in layout]
        batch = collate(samples, sample_ids=range(len(layout)), pause_ids=range(PAUSE, PAUSE + 1))
        output = dense_loss(model, batch) if dense else lm_loss(model, batch, 1.0)
        output.loss.backward()
        return losses(batch, layout, output.token_losses), whole(model, take_gradients(model), context.tp_group)


def packed_and_alone(bidirectional: bool, tensor: int, sequence: bool, recompute: str) -> tuple[float, float]:
    """Return loss (nats) and gradient (relative) differences of packed, masked, padded and separate texts."""
    every, parallel = texts(), ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute)
    single = [run([numbers], every, bidirectional, 0, ParallelSection(tensor=tensor)) for numbers in ALONE]
    expected = {number: values for of_one, _ in single for number, values in of_one.items()}
    gradients = {name: sum(of_one[name] for _, of_one in single) for name in single[0][1]}
    apart, moved = 0.0, 0.0
    layouts = ((PACKED, 0, False), (PACKED, 0, True), (ALONE, 0, False), (ALONE, 5, False), (PACKED[::-1], 1, False))
    for layout, left, dense in layouts:
        found, theirs = run(layout, every, bidirectional, left, parallel, dense)
        assert found.keys() == expected.keys()
        apart = max(apart, *(abs(a - b) for n in found for a, b in zip(found[n], expected[n], strict=True)))
        moved = max(moved, distance(theirs, gradients))
    return apart, moved


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("tensor", "sequence", "recompute"),
    [(1, False, "none"), (1, False, "full"), (2, False, "none"), (2, True, "full")],
)
def test_packed_is_padded_is_one_at_a_time(bidirectional, tensor, sequence, recompute):
    for apart, moved in run_on_ranks(tensor, packed_and_alone, bidirectional, tensor, sequence, recompute):
        assert apart < 1e-6 and moved < 1e-6


def leak(bidirectional: bool) -> list[bool]:
    """Whether each text's losses are bit-identical when the tokens of text 0 are replaced."""
    every, others = texts(), texts(seed=1)
    changed = [others[0], *every[1:]]
    before, _ = run(PACKED, every, bidirectional, 0, ParallelSection())
    after, _ = run(PACKED, changed, bidirectional, 0, ParallelSection())
    return [before[number] == after[number] for number in range(len(LENGTHS))]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_nothing_leaks_into_a_neighbour(bidirectional):
    assert run_on_ranks(1, leak, bidirectional)[0] == [False, True, True, True]


def one_mask() -> tuple[int, torch.dtype, bool]:
    """How many masks the layers see, in what dtype, and whether losses have the bits of a mask made in every layer."""
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection(), device="cpu"), torch.no_grad():
        model, seen = tiny(parallel=ParallelSection()), []
        samples = [window(numbers, texts(), True) for numbers in PACKED]
        batch = collate(samples, sample_ids=range(2), pause_ids=range(PAUSE, PAUSE + 1))
        cores = [module for module in model.modules() if isinstance(module, SDPACoreAttention)]
        for core in cores:
            core.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
        shared = dense_loss(model, batch).token_losses
        hidden = segment_mask(batch.segments, batch.prefix)
        for core in cores:
            core.register_forward_pre_hook(lambda _, args: (*args[:3], hidden))
        return (
            len({id(mask) for mask in seen}),
            seen[0].dtype,
            torch.equal(dense_loss(model, batch).token_losses, shared),
        )


def test_all_layers_share_one_mask_of_their_dtype():
    assert run_on_ranks(1, one_mask)[0] == (1, torch.float32, True)


def test_windows_of_one_text_need_no_mask():
    def batch(layout, **options):
        samples = [window(numbers, texts(), **options) for numbers in layout]
        return collate(samples, sample_ids=range(len(layout)), pause_ids=range(PAUSE, PAUSE + 1))

    padded = batch(ALONE, bidirectional=False)
    assert padded.segments is None and padded.prefix is None
    assert padded.raw_tokens == sum(length for length, _ in LENGTHS)
    assert batch(ALONE, bidirectional=False, left=1).segments is not None
    assert batch(PACKED, bidirectional=False).segments is not None
    assert batch(ALONE, bidirectional=True).prefix is not None
