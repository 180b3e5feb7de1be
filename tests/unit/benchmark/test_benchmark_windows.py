"""Made-up windows: everything but the meaning of the text is that of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pause_megatron.benchmark.measure import Sizes, _with_steps
from pause_megatron.benchmark.windows import DOCUMENT_TOKENS, SyntheticIds, SyntheticText, synthetic_windows
from pause_megatron.config.load import load
from pause_megatron.data.batches.batch import collate
from pause_megatron.errors import ConfigError

TEXT_SIZE = 300


def windows(*overrides: str):
    config = load(recipe="tiny-pause", overrides=["data.sequence_length=64", "pause.embeddings=2", *overrides])
    return synthetic_windows(config, TEXT_SIZE)


def micro_batch(data, numbers: range):
    return collate([data.train[n] for n in numbers], sample_ids=numbers, pause_ids=data.pause_ids)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_kept_rows_are_those_of_the_pause_plan(rate):
    data = windows(f"pause.rate={rate}")
    batch = micro_batch(data, range(5))
    pauses = round(rate * 64)
    # A window has N + 1 - M text tokens, and each but the first is a target.
    assert batch.targets_count == 5 * (64 - pauses)
    assert batch.raw_tokens == 5 * 64
    assert batch.targets.max() < TEXT_SIZE <= data.pause_ids.start
    ids = set(batch.tokens[batch.tokens >= TEXT_SIZE].tolist())
    assert ids <= set(data.pause_ids) and bool(ids) == bool(rate)


def test_removing_the_pauses_gives_the_text_back():
    data = windows()
    text = SyntheticText(SyntheticIds(TEXT_SIZE), 64 + 1 - 6, 1234).text(3)
    sample = data.train[3]
    tokens = torch.cat([sample["tokens"], sample["labels"][-1:] if sample["loss_mask"][-1] else torch.tensor([])])
    assert tokens[tokens < TEXT_SIZE].long().tolist() == text[: int((tokens < TEXT_SIZE).sum())].tolist()


def test_a_window_is_a_function_of_its_number():
    first, again = windows(), windows()
    for number in (7, 0, 7):
        assert all(torch.equal(first.train[number][key], value) for key, value in again.train[number].items())
    assert not torch.equal(first.train[0]["tokens"], first.train[1]["tokens"])


def test_documents_are_about_as_long_as_they_say():
    made = SyntheticText(SyntheticIds(TEXT_SIZE), 2048, 1)
    ends = sum(int((made.text(number) == 0).sum()) for number in range(200))
    assert ends == pytest.approx(200 * 2048 / DOCUMENT_TOKENS, rel=0.15)
    assert set(np.unique(made.text(0))) <= set(range(TEXT_SIZE))


def test_intra_document_masking_gives_segments():
    data = windows("data.sequence_length=2048", "data.intra_document_masking=true", "data.eod_mask_loss=true")
    batch = micro_batch(data, range(4))
    documents = [int(row.max()) + 1 for row in batch.segments]
    assert max(documents) > 1
    # Behind every EOD a document begins, at position 0 and without a loss.
    assert int((batch.position_ids == 0).sum()) == sum(documents)
    assert batch.targets_count == 4 * (2048 - 205) - sum(d - 1 for d in documents) - _ends_behind(data, range(4))


def _ends_behind(data, numbers: range) -> int:
    """Windows whose last target, which is no input, begins a document."""
    plain = windows("data.sequence_length=2048", "data.intra_document_masking=true")
    return sum(
        bool(plain.train[number]["loss_mask"][-1]) and not bool(data.train[number]["loss_mask"][-1])
        for number in numbers
    )


def test_an_extended_run_is_measured_from_its_first_step():
    config = load(overrides=["train.extended_from=100", "train.steps=150"])
    running = _with_steps(config, Sizes())
    assert running.train.extended_from is None and running.train.steps == 150
    assert _with_steps(config, Sizes(steps=500)).train.steps > 500


@pytest.mark.parametrize(
    "reads",
    ["pause.placement=scored", "pause.placement=after", "pause.placement=before", "objective.token_weights=side"],
)
def test_made_up_ids_have_no_texts_and_no_values(reads):
    side = ["data.side=score", "data.prefix=c"] if reads.endswith(("scored", "side")) else []
    with pytest.raises(ConfigError, match=f"data.prefix: expected a corpus with {reads}, got none"):
        windows(reads, *side)


@pytest.mark.parametrize("run", [1, 3])
def test_every_text_has_its_run(run):
    batch = micro_batch(windows("pause.placement=every", f"pause.run={run}"), range(2))
    assert ((batch.tokens < TEXT_SIZE).nonzero()[:, 1] % (run + 1) == 0).all()
    assert batch.targets_count == 2 * (-(-65 // (run + 1)) - 1)
