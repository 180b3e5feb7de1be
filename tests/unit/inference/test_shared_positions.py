"""Pauses that have the position of the text token before them, against full passes with these positions."""

from __future__ import annotations

import pytest
import torch
from support.tiny_llama import llama

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import PauseGenerator, Prompting, SettledPauses, pause_generate

PROMPTS = ["My fellow citizens, ...", "A", "The state of the Union is strong, and we have reason. Let us", "In 1862"]
COUNTS = [3, 0, 10, 1]


def sharing(tokenizer, *, cls="Llama", seed=3, **changes):
    model = llama(len(tokenizer), cls=cls, seed=seed, **changes)
    model.config.pause["positions"] = "shared"
    return PauseGenerator(model, tokenizer)


def full_logits(model, ids, is_pause, prefix=0, window=None):
    """Logits of every position of one whole pass; positions count text tokens, attention goes by order."""
    length, seen, text = len(ids), torch.ones(len(ids), len(ids), dtype=torch.bool).tril(), 0
    positions = []
    for pause in is_pause:
        text += not pause
        positions.append(max(text - 1, 0))
    if window is not None:
        seen = seen.triu(1 - window)
    seen[:prefix, :prefix] = True
    mask = torch.zeros(1, 1, length, length).masked_fill_(~seen, torch.finfo(torch.float32).min)
    given = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    with torch.no_grad():
        return model(**given, attention_mask=mask, use_cache=False).logits[0]


def check(generator, generation, prefixes, marks, *, bidirectional=False, window=None):
    for completion, prefix, is_pause in zip(generation.completions, prefixes, marks, strict=True):
        ids = [*prefix, *completion.ids]
        own = full_logits(
            generator.model,
            ids,
            [*is_pause, *[False] * len(completion.ids)],
            len(prefix) if bidirectional else 0,
            window,
        )
        expected = own[len(prefix) - 1 :][: len(completion.logits)]
        torch.testing.assert_close(completion.logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("prefix_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("location", ["append", "prepend"])
@pytest.mark.parametrize("filler", [None, "."])
def test_a_batch_equals_full_passes(sentencepiece, family, prefix_attention, location, filler):
    """A filler in place of a pause has no position; the same token of the prompt has one."""
    generator = sharing(sentencepiece, cls=family)
    counts = [count or 1 for count in COUNTS]
    prompting = Prompting(location, filler, prefix_attention)
    settings = {"max_new_tokens": 5, "keep_logits": True, "prompting": prompting}
    generation = generator.generate(PROMPTS, pauses=counts, **settings)
    texts = [generator.encoder.encode(prompt) for prompt in PROMPTS]
    token = 600 if filler is None else generator.encoder.filler_id(filler)
    rows = []
    for text, count in zip(texts, counts, strict=True):
        parts = [([False] * len(text), text), ([True] * count, [token] * count)]
        parts = parts if location == "append" else parts[::-1]
        rows.append(([*parts[0][1], *parts[1][1]], [*parts[0][0], *parts[1][0]]))
    prefixes, marks = [row[0] for row in rows], [row[1] for row in rows]
    check(generator, generation, prefixes, marks, bidirectional=prefix_attention == "bidirectional")
    for prompt, count, expected in zip(PROMPTS, counts, generation.completions, strict=True):
        alone = generator.generate([prompt], pauses=count, **settings).completions[0]
        assert alone.ids == expected.ids
    generator.pause = PauseGenerator(llama(len(sentencepiece)), sentencepiece).pause
    assert generator.pause.positions == "own"
    own = generator.generate(PROMPTS, pauses=counts, **settings)
    assert not torch.allclose(own.completions[2].logits[0], generation.completions[2].logits[0], atol=1e-3)


def test_a_sliding_window_counts_tokens_and_pauses(sentencepiece):
    generator = sharing(sentencepiece, cls="Mistral", sliding_window=6)
    generation = generator.generate(PROMPTS[2:3], pauses=4, max_new_tokens=5, keep_logits=True)
    text = generator.encoder.encode(PROMPTS[2])
    marks = [[False] * len(text) + [True] * 4]
    check(generator, generation, [[*text, *[600] * 4]], marks, window=6)


def test_pauses_among_the_ids_of_a_prompt_have_none_either(sentencepiece):
    generator = sharing(sentencepiece)
    ids = [9, 600, 600, 17, 30]
    generation = generator.generate([ids], pauses=2, max_new_tokens=4, keep_logits=True)
    check(generator, generation, [[*ids, 600, 600]], [[False, True, True, False, False, True, True]])


def test_a_filler_in_place_of_a_pause_is_not_the_same_token_of_a_prompt(sentencepiece):
    """Rows of the same ids, of which one has a position more, are two rows."""
    generator = sharing(sentencepiece)
    prompts, filler = [[9, 17, generator.encoder.filler_id(".")], [9, 17]], Prompting(filler=".")
    together, _ = generator.score(prompts, [" the"] * 2, pauses=[0, 1], prompting=filler)
    for score, prompt, count in zip(together, prompts, (0, 1), strict=True):
        ((alone,), _) = generator.score([prompt], [" the"], pauses=count, prompting=filler)
        assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5)
    assert abs(together[0].log_likelihood - together[1].log_likelihood) > 1e-3


def test_scores_and_adaptive_pauses_equal_full_passes(sentencepiece):
    generator = sharing(sentencepiece, seed=1, initializer_range=0.08)
    texts = [generator.encoder.encode(prompt) for prompt in PROMPTS]
    scores, _ = generator.score(PROMPTS, [" people of the Union"] * 4, pauses=COUNTS)
    target = generator.encoder.encode_continuation(" people of the Union")
    for score, text, count in zip(scores, texts, COUNTS, strict=True):
        ids = [*text, *[600] * count, *target]
        logits = full_logits(generator.model, ids, [token == 600 for token in ids])
        logits[:, 600] = float("-inf")
        rows = logits[-len(target) - 1 : -1].log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(rows, target, strict=True))
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
    policy = SettledPauses(change=0.03, block=4, limit=20)
    adaptive = generator.generate(PROMPTS, pauses=policy, max_new_tokens=5, keep_logits=True)
    used = [completion.pauses for completion in adaptive.completions]
    assert len(set(used)) > 1, "the test needs rows that differ"
    prefixes = [[*text, *[600] * count] for text, count in zip(texts, used, strict=True)]
    check(generator, adaptive, prefixes, [[token == 600 for token in ids] for ids in prefixes])


@pytest.mark.parametrize("pauses", [0, 5])
def test_transformers_generate_with_the_copied_method_equals_the_generator(sentencepiece, pauses):
    generator = sharing(sentencepiece, seed=2)
    sentencepiece.pad_token, sentencepiece.padding_side = "</s>", "left"
    batch = sentencepiece(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    output = generator.model.generate(**batch, custom_generate=pause_generate, pauses=pauses, **settings)
    expected = generator.generate(PROMPTS, pauses=pauses, max_new_tokens=8)
    for row, completion in zip(output[:, batch.input_ids.shape[1] :].tolist(), expected.completions, strict=True):
        assert row[: len(completion.ids)] == list(completion.ids)
    typed = torch.cat([batch.input_ids, torch.full((4, pauses), 600)], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones(4, pauses, dtype=torch.int64)], dim=1)
    again = generator.model.generate(
        input_ids=typed, attention_mask=mask, custom_generate=pause_generate, pauses=0, **settings
    )
    assert torch.equal(again[:, typed.shape[1] :], output[:, batch.input_ids.shape[1] :])


def test_pauses_take_no_room_among_the_positions_of_the_model(sentencepiece):
    generator = sharing(sentencepiece, max_position_embeddings=24)
    text = generator.encoder.encode(PROMPTS[0])
    new = 24 - len(text)
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 2}
    assert generator.generate([PROMPTS[0]], pauses=50, max_new_tokens=new).completions[0].pauses == 50
    generator.model.generate(torch.tensor([text]), custom_generate=pause_generate, pauses=50, **settings)
    with pytest.raises(ConfigError, match=f"{len(text)} prompt tokens \\+ {new + 1} new tokens = 25 positions"):
        generator.generate([PROMPTS[0]], pauses=50, max_new_tokens=new + 1)


def test_an_attention_that_infers_packed_texts_is_refused(sentencepiece, monkeypatch):
    generator = sharing(sentencepiece)
    monkeypatch.setattr(generator.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ConfigError, match="expected a model loaded with attn_implementation='sdpa' or 'eager'"):
        generator.generate(["A"], pauses=1, max_new_tokens=1)
    with pytest.raises(ValueError, match="expected a model loaded with attn_implementation='sdpa' or 'eager'"):
        generator.model.generate(torch.tensor([[9]]), custom_generate=pause_generate, pauses=1, max_new_tokens=1)


def test_an_unknown_scheme_is_refused(sentencepiece):
    model = llama(len(sentencepiece))
    model.config.pause["positions"] = "half"
    with pytest.raises(DataError, match="expected own or shared, got 'half'"):
        PauseGenerator(model, sentencepiece)
