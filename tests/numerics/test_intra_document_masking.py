"""data.intra_document_masking=true: each document of a window, with its pauses, has the losses of a separate pass."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import pytest
import torch
from support.corpora import ByteTokenizer, write_corpus
from support.ranks import run_on_ranks
from support.tiny_model import SEQ, TEXT_SIZE, tiny

from pause_megatron.config.schema import ParallelSection, PauseSection
from pause_megatron.data.batches.batch import collate

EOD = TEXT_SIZE - 1
WINDOWS = 8
# Pauses and number of pause vectors; the last case has runs of pauses before and after EODs.
PAUSES = {
    "none": PauseSection(rate=0.0),
    "exact": PauseSection(rate=0.25),
    "trim": PauseSection(rate=0.25, window="trim", embeddings=3),
    "runs": PauseSection(rate=0.5, placement="with_replacement", embeddings=2),
    "shared": PauseSection(rate=0.5, placement="with_replacement", embeddings=2, positions="shared"),
}


class SmallTokenizer(ByteTokenizer):
    vocab_size = TEXT_SIZE
    eod = EOD
    pause_id = TEXT_SIZE
    fingerprint = "small"
    special_tokens_dict: ClassVar = OrderedDict(eod_token=EOD)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of 1 to 8 tokens, EOD included."""
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(0, EOD, rng.integers(0, 8)), EOD) for _ in range(300)]
    return write_corpus(tmp_path_factory.mktemp("short") / "short", documents)


def windows(corpus: str, pause: PauseSection, masking: bool, eod_mask_loss: bool = False) -> list[dict]:
    """The first windows of a run."""
    from pause_megatron.data.windows.build import DatasetOptions, build_datasets

    dataset = build_datasets(
        DatasetOptions(
            [corpus],
            split="1,0,0",
            sequence_length=SEQ,
            tokenizer=SmallTokenizer(),
            pause=pause,
            seed=3,
            train_samples=WINDOWS,
            valid_samples=0,
            intra_document_masking=masking,
            eod_mask_loss=eod_mask_loss,
        )
    ).train
    return [dataset[number] for number in range(WINDOWS)]


def documents_of(tokens: list[int]) -> list[slice]:
    """Return the documents of a window by definition: one begins at the first text token after an EOD."""
    begins, ended = [0], False
    for place, token in enumerate(tokens):
        if token < TEXT_SIZE:  # a pause changes nothing
            begins += [place] * ended
            ended = token == EOD
    return list(itertools.starmap(slice, itertools.pairwise([*begins, len(tokens)])))


def losses(model: torch.nn.Module, samples: list[dict], pauses: int) -> torch.Tensor:
    """Token losses fp32 [windows, seq], nan where there is no target."""
    from pause_megatron.train.losses import lm_loss

    batch = collate(samples, sample_ids=range(len(samples)), pause_ids=range(TEXT_SIZE, TEXT_SIZE + pauses))
    with torch.no_grad():
        found = lm_loss(model, batch, 1.0).token_losses
    flat = torch.full((batch.tokens.numel(),), float("nan"))
    flat[batch.target_rows] = found
    return flat.view(-1, len(samples)).t()


def together_and_alone(corpus: str, name: str, tensor: int) -> dict[str, float]:
    """Return the relative difference between losses in windows and in separate passes, and what the windows contain."""
    from pause_megatron.distributed import initialize

    pause, parallel = PAUSES[name], ParallelSection(tensor=tensor)
    with initialize(parallel, device="cpu"):
        shared = pause.positions == "shared"
        model = tiny(parallel=parallel, pauses=pause.embeddings, given_positions=shared)
        samples = windows(corpus, pause, True)
        found = losses(model, samples, pause.embeddings)
        expected = torch.full_like(found, float("nan"))
        seen = dict.fromkeys(("documents", "before_eod", "behind_eod", "targets"), 0)
        for number, sample in enumerate(samples):
            tokens = sample["tokens"].tolist()
            for places in documents_of(tokens):
                length = places.stop - places.start
                alone = {name: sample[name][places] for name in ("tokens", "labels", "loss_mask")}
                text = (alone["tokens"] < TEXT_SIZE).cumsum(0) - 1  # each document begins with text
                alone["position_ids"] = text if shared else torch.arange(length)
                expected[number, places] = losses(model, [alone], pause.embeddings)[0]
            seen["documents"] += len(documents_of(tokens))
            pairs = list(itertools.pairwise(tokens))
            seen["before_eod"] += sum(left >= TEXT_SIZE and right == EOD for left, right in pairs)
            seen["behind_eod"] += sum(left == EOD and right >= TEXT_SIZE for left, right in pairs)
    assert torch.equal(found.isnan(), expected.isnan())
    seen["targets"] = int((~found.isnan()).sum())
    return {**seen, "apart": float(((found - expected).abs() / expected).nan_to_num().max())}


@pytest.mark.parametrize("name", PAUSES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_document_in_a_window_equals_a_separate_pass(corpus: str, name: str, tensor: int) -> None:
    for seen in run_on_ranks(tensor, together_and_alone, corpus, name, tensor):
        assert seen["apart"] < 1e-5
        assert seen["documents"] > 1.5 * WINDOWS
        if name == "none":
            assert seen["targets"] == WINDOWS * SEQ
        else:
            assert min(seen["before_eod"], seen["behind_eod"]) > 2


def change_one(corpus: str, masking: bool) -> list[tuple[bool, bool]]:
    """Whether losses before and after each document are bit-identical when that document changes."""
    from pause_megatron.distributed import initialize

    pause, outcomes = PAUSES["exact"], []
    with initialize(ParallelSection(), device="cpu"):
        model = tiny(parallel=ParallelSection())
        samples = windows(corpus, pause, masking, eod_mask_loss=True)
        for sample in samples:
            before = losses(model, [sample], 1)[0]
            for places in documents_of(sample["tokens"].tolist())[1:]:
                changed = {name: value.clone() for name, value in sample.items()}
                inside = torch.zeros(SEQ, dtype=torch.bool)
                inside[places] = sample["tokens"][places] < EOD
                changed["tokens"][inside] = (changed["tokens"][inside] + 7) % EOD
                changed["labels"][:-1][inside[1:]] = (changed["labels"][:-1][inside[1:]] + 7) % EOD
                after = losses(model, [changed], 1)[0]
                same = (before == after) | (before.isnan() & after.isnan())
                moved = not bool(same[places].all())
                if moved and not before[places.stop :].isnan().all():
                    outcomes.append((bool(same[: places.start].all()), bool(same[places.stop :].all())))
    return outcomes


def test_nothing_leaks_into_another_document(corpus: str) -> None:
    """With eod_mask_loss: else a document's first token is a target at the end of the document before it."""
    outcomes = run_on_ranks(1, change_one, corpus, True)[0]
    assert len(outcomes) >= WINDOWS // 2
    assert all(before and behind for before, behind in outcomes)
    joined = run_on_ranks(1, change_one, corpus, False)[0]
    assert all(before for before, _ in joined)
    assert not any(behind for _, behind in joined)
