"""Both schemes of `pause.positions`, under the invariants of windows: only position_ids depend on the scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import EOD, ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus

from pause_megatron.data.stream.windows import StreamDataset
from pause_megatron.data.supervised.examples import Arrangement, EncodedExample
from pause_megatron.data.supervised.windows import SupervisedWindows
from pause_megatron.data.windows.boundaries import document_begins, packed_documents, shared_positions
from pause_megatron.data.windows.pause import POLICIES, PauseInjector, PausePlan
from pause_megatron.data.windows.targets import supervise
from pause_megatron.data.windows.token_texts import TokenTextTable
from pause_megatron.errors import ConfigError

PAUSE = ByteTokenizer.pause_id


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of a few bytes: windows hold many, also empty ones."""
    documents = [np.append(words[: number % 9], EOD) for number, words in enumerate(paragraphs(60))]
    return write_corpus(tmp_path_factory.mktemp("short") / "short", documents)


def by_definition(tokens: list[int], *, restarts: bool) -> list[int]:
    """The position of each token of a window that begins with text, one after the other."""
    found, position, ended = [], -1, False
    for token in tokens:
        if token < PAUSE:
            position = 0 if restarts and ended else position + 1
            ended = token == EOD
        found.append(position)
    return found


TEXTS = TokenTextTable(EOD + 1, lambda ids: "".join("a,"[token == EOD - 2] for token in ids), [])


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    window=st.sampled_from(["exact", "trim"]),
    rate=st.sampled_from([0.0, 0.1, 0.45]),
    run=st.integers(1, 3),
    embeddings=st.integers(1, 3),
    sample=st.integers(0, 1000),
)
@settings(max_examples=200)
def test_invariants_of_a_window(policy: str, window: str, rate: float, run: int, embeddings: int, sample: int) -> None:
    try:
        plan = PausePlan(33, rate, window, policy, run=run)
    except ConfigError:  # a policy that does not fit this window
        return
    rng = np.random.default_rng(sample)
    text = rng.integers(EOD - 5, EOD + 1, plan.text_length)
    injector = PauseInjector(plan, range(PAUSE, PAUSE + embeddings), "corpus", "train", TEXTS)
    made = injector(text, sample, side=rng.random(text.size))
    tokens, is_text = made.tokens.tolist(), made.is_text
    assert made.tokens[is_text].tolist() == text[: int(is_text.sum())].tolist()
    targets = supervise(made, None)
    predicted = [label for label, kept in zip(targets.labels.tolist(), targets.loss_mask.tolist(), strict=True) if kept]
    assert predicted == made.tokens[is_text].tolist()[1:] and max(predicted) < PAUSE
    begins = document_begins(made, EOD)
    for marks, restarts in ((None, False), (begins, True)):
        found = shared_positions(is_text, marks)
        assert found.dtype == torch.int64 and found.tolist() == by_definition(tokens, restarts=restarts)
        # Without its pauses, the window has the positions of plain text.
        plain = shared_positions(np.ones(int(is_text.sum()), bool), None if marks is None else marks[is_text])
        assert torch.equal(found[torch.from_numpy(is_text)], plain)
    if rate == 0:
        assert shared_positions(is_text).tolist() == list(range(len(tokens)))
    documents = np.diff(np.flatnonzero([True, *begins[is_text][1:], True])).tolist()
    packed = packed_documents(made, documents, shared=True)
    assert packed["position_ids"].tolist() == by_definition(tokens[:-1], restarts=True)
    assert torch.equal(packed["cu_seqlens"], packed_documents(made, documents)["cu_seqlens"])


class Texts:
    """The text windows of a dataset, as a stream has them."""

    def __init__(self, dataset) -> None:
        self.text = dataset.window_text


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_corpora_and_streams(corpus: str, masking: bool, eod_mask_loss: bool) -> None:
    """Tokens, targets and documents do not depend on the scheme; at rate 0 positions do not either."""
    resets = {"reset_position_ids": masking, "reset_attention_mask": masking, "document_segments": masking}
    settings = {**resets, "eod_mask_loss": eod_mask_loss, "pause_placement": "with_replacement"}

    def dataset(rate: float, positions: str):
        config = make_config(corpus, 33, 2, pause_rate=rate, pause_positions=positions, **settings)
        return make_dataset(corpus, config, 20)

    for rate in (0.0, 0.3):
        own, shared = dataset(rate, "own"), dataset(rate, "shared")

        options = {"intra_document_masking": masking, "eod_mask_loss": eod_mask_loss, "shared_positions": True}
        stream = StreamDataset(Texts(shared), shared.injector, 20, eod=EOD, **options)
        for sample in range(20):
            left, right = own[sample], shared[sample]
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left if key != "position_ids")
            expected = by_definition(right["tokens"].tolist(), restarts=masking)
            assert right["position_ids"].tolist() == expected
            assert rate or torch.equal(left["position_ids"], right["position_ids"])
            streamed = stream[sample]
            assert all(torch.equal(streamed[key], right[key]) for key in right)
    with pytest.raises(ConfigError, match="pause_positions: expected 'own' or 'shared', got 'none'"):
        dataset(0.3, "none")


EXAMPLES = [
    EncodedExample(str(number), np.arange(1, 1 + length), np.array([50, 7, 51]), np.zeros(0, np.int32))
    for number, length in enumerate((4, 9, 2, 6))
]


@pytest.mark.parametrize("location", ["append", "prepend"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("ids", [range(PAUSE, PAUSE + 2), range(7, 8)], ids=["pauses", "filler"])
def test_examples(location: str, batching: str, ids: range) -> None:
    """A filler in place of a pause has no position; the same token of a prompt or a target has one."""
    options = {"location": location, "batching": batching, "leading": 1, "prefix_attention": "bidirectional"}
    own, shared = (
        SupervisedWindows(
            EXAMPLES, Arrangement(24, range(6), ids, **options, shared_positions=chosen), seed=1, task="t"
        )
        for chosen in (False, True)
    )
    seen = set()
    for number in range(own.windows_in_epochs(2)):
        left, right = own[number], shared[number]
        assert all(torch.equal(left[key], right[key]) for key in left if key != "position_ids")
        epoch, within = shared.locate(number)
        expected: list[int] = []
        for item in shared.epoch(epoch).windows[within]:
            count, text = int(shared.epoch(epoch).counts[item]), len(EXAMPLES[item].prompt)
            kept = text if location == "append" else 1
            positions = [*range(text), *range(text, text + 2)]
            expected += [*positions[:kept], *[kept - 1] * count, *positions[kept:]]
            seen.add(count)
        assert right["position_ids"].tolist() == expected + [0] * (24 - len(expected))
    assert len(seen) > 2


def test_an_example_of_pauses_only_begins_at_position_0() -> None:
    example = EncodedExample("1", np.zeros(0, np.int64), np.array([3, 4, 5]), np.zeros(0, np.int32))
    arrangement = Arrangement(8, range(2, 3), range(PAUSE, PAUSE + 1), shared_positions=True)
    sample = SupervisedWindows([example], arrangement, seed=0, task="t")[0]
    assert sample["tokens"].tolist() == [PAUSE, PAUSE, 3, 4, 0, 0, 0, 0]
    assert sample["position_ids"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
