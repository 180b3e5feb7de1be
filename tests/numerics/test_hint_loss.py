"""Loss on hints, at pauses or by auxiliary heads: its value and gradient from logits, by hand; tensor parallelism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_on_ranks
from support.tiny_model import TEXT_SIZE, distance, section, take_gradients, whole

from pause_megatron.config.schema import ParallelSection
from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.data.supervised.examples import Arrangement, EncodedExample
from pause_megatron.data.supervised.windows import SupervisedWindows

LENGTH, HEADS = 24, 3
PAUSES = range(TEXT_SIZE, TEXT_SIZE + 2)
WEIGHT = 0.5


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# The second has fewer hints than there are heads, or pauses before the last.
EXAMPLES = [
    EncodedExample("1", ids(3, 4, 5, 6), ids(7, 1), ids(11, 12, 13)),
    EncodedExample("2", ids(9, 8), ids(10, 2, 1), ids(14, 15)),
    EncodedExample("3", ids(20, 21, 22), ids(23, 1), ids(16, 17, 18)),
]


def windows(place: str | None, **changes: object) -> SupervisedWindows:
    count = 5 if place == "pauses" else 0
    arrangement = Arrangement(LENGTH, range(count, count + 1), PAUSES, hints=place)
    return SupervisedWindows(EXAMPLES, replace(arrangement, **changes), seed=3, task="hints")


def batch_of(data: SupervisedWindows) -> MicroBatch:
    count = data.windows_in_epochs(1)
    return collate([data[number] for number in range(count)], sample_ids=range(count), pause_ids=PAUSES)


def model_of(place: str | None, parallel: ParallelSection):
    from pause_megatron.model import Vocabulary, build_model

    model = build_model(
        section(),
        vocabulary=Vocabulary(TEXT_SIZE, tuple(PAUSES)),
        sequence_length=LENGTH,
        parallel=parallel,
        seed=5,
        auxiliary_heads=HEADS if place == "heads" else 0,
    )
    if place == "heads":
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            model.auxiliary_heads.weight.normal_(0, 0.3, generator=draw)
    return model


def losses_by_hand(model, place: str, example: EncodedExample) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses of the answer and of the hints of one example, from the logits of the example alone."""
    pauses = [PAUSES[k % 2] for k in range(5)] if place == "pauses" else []
    text = torch.tensor([*example.prompt, *pauses, *example.target], dtype=torch.int64)
    tokens, positions = text[None, :-1], torch.arange(len(text) - 1)[None]
    logits = model.logits(tokens, positions)[0]
    first = len(example.prompt) + len(pauses)
    answer = F.cross_entropy(logits[first - 1 :], text[first:], reduction="none")
    hints = torch.from_numpy(example.hints).long()
    if place == "pauses":
        at = logits[len(example.prompt) : len(example.prompt) + len(hints)]
    else:
        state = model.hidden_states(tokens, positions)[first - 1, 0]
        maps = model.auxiliary_heads.weight.view(HEADS, len(state), len(state))[: len(hints)]
        table = model.embedding.word_embeddings.weight[: model.vocabulary.size]  # tied
        at = (state + maps @ state) @ table.t()
    return answer, F.cross_entropy(at, hints, reduction="none")


def against_logits(place: str, batching: str) -> tuple[float, float, float, bool]:
    """Distances of token losses, loss and gradient from those by hand; whether examples share a window."""
    from pause_megatron.distributed import initialize
    from pause_megatron.train.losses import lm_loss

    with initialize(ParallelSection(), device="cpu"):
        model, batch = model_of(place, ParallelSection()), batch_of(windows(place, batching=batching))
        output = lm_loss(model, batch, 2.0, WEIGHT)
        output.loss.backward()
        gradients = take_gradients(model)
        pairs = [losses_by_hand(model, place, example) for example in EXAMPLES]
        answers, hints = (torch.cat(each) for each in zip(*pairs, strict=True))
        expected = 2.0 * (answers.sum() + WEIGHT * hints.sum())
        expected.backward()
        apart = max(
            float((found.sort().values - by_hand.sort().values).abs().max())
            for found, by_hand in ((output.token_losses, answers), (output.hint_losses, hints))
        )
        assert output.count == len(answers) and float(output.sum) == pytest.approx(float(answers.sum()), rel=1e-6)
        return (
            apart,
            abs(float(output.loss / expected) - 1),
            distance(take_gradients(model), gradients),
            len(batch.tokens) < 3,
        )


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("place", ["pauses", "heads"])
def test_loss_and_gradient_are_those_of_the_logits(place, batching):
    apart, loss, gradient, shares = run_on_ranks(1, against_logits, place, batching)[0]
    assert apart < 1e-5 and loss < 1e-6 and gradient < 1e-5
    assert shares == (batching == "packed")


def without_weight(place: str) -> tuple[float, float]:
    """Weight 0 against no hints: distances of loss and gradient."""
    from pause_megatron.distributed import initialize
    from pause_megatron.train.losses import lm_loss

    with initialize(ParallelSection(), device="cpu"):
        found = []
        for used, weight in ((place, 0.0), (None, 1.0)):
            model = model_of(used, ParallelSection())
            count = 5 if place == "pauses" else 0
            output = lm_loss(model, batch_of(windows(used, pauses=range(count, count + 1))), 1.0, weight)
            output.loss.backward()
            found.append((float(output.loss), take_gradients(model)))
        (loss, gradients), (plain, expected) = found
        heads = gradients.pop("auxiliary_heads.weight", torch.zeros(1))
        assert not heads.any()
        return abs(loss - plain), distance(gradients, expected)


@pytest.mark.parametrize("place", ["pauses", "heads"])
def test_weight_0_is_training_without_hints(place):
    loss, gradient = run_on_ranks(1, without_weight, place)[0]
    assert loss < 1e-6 and gradient < 1e-6


def gradients_of(place: str, tensor: int, sequence: bool) -> tuple[float, dict[str, torch.Tensor]]:
    from pause_megatron.distributed import initialize
    from pause_megatron.train.losses import lm_loss

    parallel = ParallelSection(tensor=tensor, sequence=sequence)
    with initialize(parallel, device="cpu") as context:
        model = model_of(place, parallel)
        output = lm_loss(model, batch_of(windows(place)), 1.0, WEIGHT)
        output.loss.backward()
        return float(output.loss), whole(model, take_gradients(model), context.tp_group)


@pytest.mark.parametrize("place", ["pauses", "heads"])
def test_tensor_and_sequence_parallel_gradients_are_those_of_one_rank(place):
    loss, expected = run_on_ranks(1, gradients_of, place, 1, False)[0]
    for sequence in (False, True):
        for other, gradients in run_on_ranks(2, gradients_of, place, 2, sequence):
            assert other == pytest.approx(loss, rel=1e-6)
            assert distance(gradients, expected) < 1e-5
