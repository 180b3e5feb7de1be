"""Adaptive pauses: as many as needed, the same in any batch and block size, and equal to that many fixed ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.tiny_llama import llama

from pause_megatron.errors import ConfigError
from pause_megatron.inference import FixedPauses, PauseGenerator, PausePolicy, Prompting, Sampling, SettledPauses

PROMPTS = ["My fellow citizens,", "A", "The state of the Union is strong, and we", "In 1862"]


@pytest.fixture(scope="module")
def calm(sentencepiece):
    """A model whose distributions settle: small weights change little from pause to pause."""
    return PauseGenerator(llama(len(sentencepiece), seed=1, initializer_range=0.08), sentencepiece)


def distributions(*rows):
    return torch.tensor(rows).log()


def test_settles_when_the_last_changes_are_small():
    log_probabilities = distributions([0.9, 0.1], [0.5, 0.5], [0.45, 0.55], [0.2, 0.8], [0.21, 0.79], [0.2, 0.8])
    assert SettledPauses(change=0.06, patience=1).stop(log_probabilities) == 2
    assert SettledPauses(change=0.06, patience=2).stop(log_probabilities) == 5
    assert SettledPauses(change=0.06, patience=2).stop(log_probabilities[:5]) is None
    assert SettledPauses(change=0.005, patience=1).stop(log_probabilities) is None
    assert SettledPauses(change=1.0, patience=1).stop(log_probabilities) == 1
    assert SettledPauses(change=1.0, patience=6).stop(log_probabilities) is None


def test_settles_when_the_entropy_is_small():
    log_probabilities = distributions([0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.99, 0.01, 0.0])
    assert SettledPauses(change=None, entropy=0.4).stop(log_probabilities) == 1
    assert SettledPauses(change=None, entropy=0.1).stop(log_probabilities) == 2
    assert SettledPauses(change=None, entropy=0.7).stop(log_probabilities) == 0
    assert SettledPauses(change=None, entropy=0.01).stop(log_probabilities) is None


@pytest.mark.parametrize("block", [1, 3, 4, 20, 50])
def test_where_it_stops_does_not_depend_on_blocks_or_on_the_batch(calm, block):
    def settings(size):
        return {"pauses": SettledPauses(change=0.03, block=size, limit=20), "max_new_tokens": 6, "keep_logits": True}

    expected = calm.generate(PROMPTS, **settings(2))
    assert len({completion.pauses for completion in expected.completions}) > 1, "the test needs rows that differ"
    got = calm.generate(PROMPTS, **settings(block))
    assert got.completions == expected.completions
    for row, prompt in enumerate(PROMPTS):
        alone = calm.generate([prompt], sampling=Sampling(rows=[row]), **settings(block))
        assert alone.completions[0] == expected.completions[row]
        torch.testing.assert_close(alone.completions[0].logits, expected.completions[row].logits, atol=1e-5, rtol=0)
        used, computed = alone.completions[0].pauses, min(20, -(-alone.completions[0].pauses // block) * block)
        assert alone.cost.prefill_passes == max(1, -(-used // block))
        assert alone.cost.positions == alone.completions[0].prompt_tokens + max(computed, min(block, 20)) + 5


def test_adaptive_equals_that_many_fixed_pauses(calm):
    adaptive = calm.generate(PROMPTS, pauses=SettledPauses(change=0.03, limit=20), max_new_tokens=6, keep_logits=True)
    counts = [completion.pauses for completion in adaptive.completions]
    fixed = calm.generate(PROMPTS, pauses=counts, max_new_tokens=6, keep_logits=True)
    assert fixed.completions == adaptive.completions
    for one, other in zip(fixed.completions, adaptive.completions, strict=True):
        torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=0)
    assert fixed.cost.prefill_passes == 1


def test_a_threshold_that_is_never_met_gives_the_cap(calm):
    completions = calm.generate(PROMPTS, pauses=SettledPauses(change=0.0, limit=9), max_new_tokens=2).completions
    assert [completion.pauses for completion in completions] == [9] * 4
    first = calm.generate(PROMPTS, pauses=SettledPauses(change=1.0, patience=1, first=3), max_new_tokens=2).completions
    assert [completion.pauses for completion in first] == [4] * 4


def test_fixed_and_adaptive_rows_share_a_batch(calm):
    settled = SettledPauses(change=0.03, limit=20)
    mixed = calm.generate(PROMPTS, pauses=[settled, 2, FixedPauses(7), settled], max_new_tokens=5).completions
    assert mixed[:1] == calm.generate(PROMPTS[:1], pauses=settled, max_new_tokens=5).completions
    assert mixed[1:3] == calm.generate(PROMPTS[1:3], pauses=[2, 7], max_new_tokens=5).completions


def test_a_score_can_be_adaptive(calm):
    texts = [" the Union", " and so", " it", " we do"]
    scores, _ = calm.score(PROMPTS, texts, pauses=SettledPauses(change=0.03, limit=20))
    counts = [score.pauses for score in scores]
    fixed, _ = calm.score(PROMPTS, texts, pauses=counts)
    for one, other in zip(scores, fixed, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)


@dataclass
class Everywhere:
    """A user's policy that stops at a given index."""

    index: int | None
    first: int = 1
    block: int = 2
    limit: int = 8

    def stop(self, log_probabilities):
        assert log_probabilities.shape[1] == 601 and float(log_probabilities[:, 600].max()) == float("-inf")
        return self.index


def test_any_policy_of_the_protocols_shape_is_one(calm):
    assert isinstance(Everywhere(0), PausePolicy)
    assert calm.generate(["A"], pauses=Everywhere(0), max_new_tokens=1).completions[0].pauses == 1
    assert calm.generate(["A"], pauses=Everywhere(None), max_new_tokens=1).completions[0].pauses == 8
    with pytest.raises(ConfigError, match="pause policy: expected an index from 0 to 2, got 7"):
        calm.generate(["A"], pauses=Everywhere(7))
    with pytest.raises(ConfigError, match="expected 0 <= first <= limit and block >= 1"):
        calm.generate(["A"], pauses=Everywhere(0, first=9))


def test_adaptive_pauses_need_room_and_an_appended_causal_prefix(calm, sentencepiece):
    settled = SettledPauses(limit=20)
    with pytest.raises(ConfigError, match="location: expected append for adaptive pauses, got prepend"):
        calm.generate(["A"], pauses=settled, prompting=Prompting(location="prepend"))
    with pytest.raises(ConfigError, match="prefix_attention: expected causal for adaptive pauses, got bidirectional"):
        calm.generate(["A"], pauses=settled, prompting=Prompting(prefix_attention="bidirectional"))
    with pytest.raises(ConfigError, match=r"\+ 250 pauses \+ 64 new tokens"):
        calm.generate(["A"], pauses=SettledPauses(limit=250))
    windowed = PauseGenerator(llama(len(sentencepiece), cls="Mistral", sliding_window=16), sentencepiece)
    with pytest.raises(ConfigError, match="sliding window of 16"):
        windowed.generate(["A"], pauses=settled)
    assert windowed.generate(["A"], pauses=10, max_new_tokens=20).completions[0].pauses == 10


@pytest.mark.parametrize(
    "settings",
    [{"change": None}, {"change": 2.0}, {"entropy": -1.0}, {"patience": 0}, {"block": 0}, {"first": 60}, {"limit": -1}],
)
def test_thresholds_out_of_range(settings):
    with pytest.raises(ConfigError, match="SettledPauses"):
        SettledPauses(**settings)
