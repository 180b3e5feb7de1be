"""Generation with pauses against the definition: a full forward pass over the whole text at every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_llama import llama, sentencepiece_tokenizer

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import FixedPauses, Limits, PauseGenerator, PauseInfo, Prompting, Sampling

PROMPTS = [
    "My fellow citizens,",
    "The state of the Union is strong, and we have reason to be thankful for the year that has passed. Let us",
    "A",
    "In 1862",
]
COUNTS = [3, 0, 10, 1]


def full_logits(model, ids, prefix=0):
    """Logits of the last position of one whole pass without a cache; the first `prefix` tokens see each other."""
    length = len(ids)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:prefix, :prefix] = True
    mask = torch.zeros(1, 1, length, length).masked_fill_(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0, -1]


def check_against_full(generator, generation, prefixes, bidirectional=False):
    """Every new token of every row is the one that a full pass would choose, from the same logits."""
    hidden = list(generator.pause.ids)
    for completion, prefix in zip(generation.completions, prefixes, strict=True):
        ids = list(prefix)
        for token_id, logits in zip(completion.ids, completion.logits, strict=False):
            expected = full_logits(generator.model, ids, len(prefix) if bidirectional else 0)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            expected[hidden] = float("-inf")
            assert token_id == int(expected.argmax())
            ids.append(token_id)


@pytest.fixture
def passes(generator):
    """Shapes [rows, tokens] of the model's forward passes, in order."""
    shapes = []
    hook = generator.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def test_one_prefill_then_one_pass_for_each_further_token(generator, passes):
    generation = generator.generate(PROMPTS[:1], pauses=10, max_new_tokens=5, limits=Limits(ignore_eos=True))
    prompt = generation.completions[0].prompt_tokens
    assert passes == [(1, prompt + 10), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert generation.cost.forward_passes == 5
    assert generation.cost.prefill_passes == 1
    assert generation.cost.positions == prompt + 10 + 4


def test_one_prefill_for_a_batch_of_different_pauses(generator, passes):
    generation = generator.generate(PROMPTS, pauses=COUNTS, max_new_tokens=3, limits=Limits(ignore_eos=True))
    longest = max(c.prompt_tokens + c.pauses for c in generation.completions)
    assert passes == [(4, longest), (4, 1), (4, 1)]
    assert [c.pauses for c in generation.completions] == COUNTS
    assert generation.cost.positions == sum(c.prompt_tokens + c.pauses + 2 for c in generation.completions)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_a_batch_equals_full_passes(sentencepiece, family):
    generator = PauseGenerator(llama(len(sentencepiece), cls=family, seed=3), sentencepiece)
    generation = generator.generate(PROMPTS, pauses=COUNTS, max_new_tokens=6, keep_logits=True)
    prefixes = [[*generator.encoder.encode(p), *[600] * m] for p, m in zip(PROMPTS, COUNTS, strict=True)]
    check_against_full(generator, generation, prefixes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bidirectional_prefix_equals_full_passes(sentencepiece, attention):
    """Prompt and pauses see each other in both directions, the answer is causal (Goyal et al., section 3.2)."""
    model = llama(len(sentencepiece), seed=4)
    model.set_attn_implementation(attention)
    generator = PauseGenerator(model, sentencepiece)
    generation = generator.generate(
        PROMPTS,
        pauses=COUNTS,
        max_new_tokens=5,
        prompting=Prompting(prefix_attention="bidirectional"),
        keep_logits=True,
    )
    prefixes = [[*generator.encoder.encode(p), *[600] * m] for p, m in zip(PROMPTS, COUNTS, strict=True)]
    check_against_full(generator, generation, prefixes, bidirectional=True)
    causal = generator.generate(PROMPTS, pauses=COUNTS, max_new_tokens=1, keep_logits=True)
    assert not torch.allclose(causal.completions[0].logits, generation.completions[0].logits[:1], atol=1e-2)


def test_the_configuration_can_ask_for_a_bidirectional_prefix(sentencepiece):
    model = llama(len(sentencepiece))
    model.config.pause["prefix_attention"] = "bidirectional"
    generator = PauseGenerator(model, sentencepiece)
    own = generator.generate(PROMPTS[:1], pauses=2, max_new_tokens=2, keep_logits=True).completions[0]
    given = generator.generate(
        PROMPTS[:1], pauses=2, max_new_tokens=2, keep_logits=True, prompting=Prompting(prefix_attention="bidirectional")
    )
    assert torch.equal(own.logits, given.completions[0].logits)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=7)])
@pytest.mark.parametrize("prefix_attention", ["causal", "bidirectional"])
def test_batched_equals_unbatched(generator, sampling, prefix_attention):
    prompting = Prompting(prefix_attention=prefix_attention)
    settings = {"max_new_tokens": 12, "prompting": prompting, "keep_logits": True}
    together = generator.generate(PROMPTS, pauses=COUNTS, sampling=sampling, **settings).completions
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        own = replace(sampling, rows=[row])
        alone = generator.generate([prompt], pauses=count, sampling=own, **settings).completions[0]
        assert alone == together[row]
        torch.testing.assert_close(alone.logits, together[row].logits, atol=1e-5, rtol=0)


def test_order_of_a_batch_does_not_matter(generator):
    order = [2, 0, 3, 1]
    one = generator.generate(PROMPTS, pauses=COUNTS, max_new_tokens=8, sampling=Sampling(temperature=1.0)).completions
    other = generator.generate(
        [PROMPTS[i] for i in order],
        pauses=[COUNTS[i] for i in order],
        max_new_tokens=8,
        sampling=Sampling(temperature=1.0, rows=order),
    )
    assert [one[i] for i in order] == list(other.completions)


def test_prepended_pauses_stand_before_the_prompt_but_after_a_bos(tmp_path):
    for bos in (False, True):
        tokenizer = sentencepiece_tokenizer(tmp_path / str(bos), bos=bos)
        generator = PauseGenerator(llama(len(tokenizer)), tokenizer)
        text = tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]
        leading = [tokenizer.bos_token_id] if bos else []
        generation = generator.generate(
            PROMPTS[:1], pauses=4, prompting=Prompting(location="prepend"), max_new_tokens=4, keep_logits=True
        )
        assert generation.completions[0].prompt_tokens == len(leading + text)
        check_against_full(generator, generation, [[*leading, *[600] * 4, *text]])


def test_filler_is_an_ordinary_token_in_place_of_pauses(generator):
    generation = generator.generate(
        PROMPTS[:1], pauses=4, prompting=Prompting(filler="."), max_new_tokens=4, keep_logits=True
    )
    dot = generator.encoder.filler_id(".")
    assert generator.encoder.decode_continuation([dot] * 4) == "...."
    check_against_full(generator, generation, [[*generator.encoder.encode(PROMPTS[0]), *[dot] * 4]])
    with pytest.raises(ConfigError, match="filler: expected the text of one token"):
        generator.generate(PROMPTS[:1], pauses=1, prompting=Prompting(filler="several tokens of text"))


def test_distinct_pauses_are_used_in_turn(sentencepiece):
    model = llama(len(sentencepiece) + 2, pauses=3)
    generator = PauseGenerator(model, sentencepiece)
    generation = generator.generate(PROMPTS[:1], pauses=5, max_new_tokens=3, keep_logits=True)
    prefix = [*generator.encoder.encode(PROMPTS[0]), 600, 601, 602, 600, 601]
    check_against_full(generator, generation, [prefix])


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_pauses_are_never_emitted_however_likely(sentencepiece, temperature):
    model = llama(len(sentencepiece))
    with torch.no_grad():
        model.lm_head.weight[600] = 50 * model.lm_head.weight.abs().sum(0)
    generator = PauseGenerator(model, sentencepiece)
    generation = generator.generate(
        PROMPTS,
        pauses=COUNTS,
        max_new_tokens=30,
        sampling=Sampling(temperature=temperature),
        limits=Limits(ignore_eos=True),
    )
    assert any(c.logits is None for c in generation.completions)
    for completion in generation.completions:
        assert len(completion.ids) == 30 and 600 not in completion.ids
        assert "pause" not in completion.text
    scores, _ = generator.score(PROMPTS[:1], [" the Union"], pauses=2)
    assert scores[0].log_likelihood > -100


def test_literal_text_stays_text(generator):
    ids = generator.encoder.encode("a <pause> b</s>")
    assert 600 not in ids and 2 not in ids
    completion = generator.generate(["a <pause> b"], pauses=2, max_new_tokens=1).completions[0]
    assert completion.prompt_tokens == len(generator.encoder.encode("a <pause> b")) > 4


def test_ids_are_taken_as_they_are(generator):
    ids = generator.encoder.encode(PROMPTS[0])
    text = generator.generate(PROMPTS[:1], pauses=2, max_new_tokens=5).completions[0]
    assert generator.generate([[*ids, 600, 600]], pauses=0, max_new_tokens=5).completions[0].ids == text.ids


def test_default_is_what_the_model_was_finetuned_with(sentencepiece):
    model = llama(len(sentencepiece))
    assert PauseGenerator(model, sentencepiece).generate(PROMPTS[:1], max_new_tokens=1).completions[0].pauses == 0
    model.config.pause["m_ft"] = 7
    assert PauseGenerator(model, sentencepiece).generate(PROMPTS[:1], max_new_tokens=1).completions[0].pauses == 7


def test_end_of_sequence_ends_a_row_and_is_not_shown(sentencepiece):
    model = llama(len(sentencepiece))
    generator = PauseGenerator(model, sentencepiece)
    free = generator.generate(PROMPTS, pauses=COUNTS, max_new_tokens=8).completions
    end = free[0].ids[3]
    model.generation_config.eos_token_id = [2, end]
    bound = PauseGenerator(model, sentencepiece).generate(PROMPTS, pauses=COUNTS, max_new_tokens=8).completions
    assert bound[0].ids == free[0].ids[: free[0].ids.index(end)] and bound[0].finish == "eos"
    for one, other in zip(bound, free, strict=True):
        assert one.ids == other.ids[: len(one.ids)]


def test_score_is_the_sum_of_log_probabilities(generator):
    continuations = [" the state of the Union", " and", " we must go on, all of us together", " it"]
    scores, cost = generator.score(PROMPTS, continuations, pauses=COUNTS)
    assert cost.forward_passes == 2
    for prompt, count, text, score in zip(PROMPTS, COUNTS, continuations, scores, strict=True):
        ids, expected = [*generator.encoder.encode(prompt), *[600] * count], 0.0
        wanted = generator.encoder.encode_continuation(text)
        assert generator.encoder.decode_continuation(wanted) == text
        for token_id in wanted:
            logits = full_logits(generator.model, ids)
            logits[600] = float("-inf")
            expected += float(logits.log_softmax(-1)[token_id])
            ids.append(token_id)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert (score.tokens, score.pauses) == (len(wanted), count)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_prompt_of_several_continuations_is_computed_once(generator, attention):
    texts = [" the state of the Union", " and", " we must go on, all of us together", " it", " war", " peace"]
    options = {"pauses": [3, 3, 0, 3, 5, 0], "prompting": Prompting(prefix_attention=attention)}
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[0]]
    scores, cost = generator.score(prompts, texts, **options)
    read = {(prompt, count) for prompt, count in zip(prompts, options["pauses"], strict=True)}
    given = sum(len(generator.encoder.encode(prompt)) + count for prompt, count in read)
    assert cost.positions == given + sum(score.tokens - 1 for score in scores) and cost.forward_passes == 2
    for prompt, text, count, score in zip(prompts, texts, options["pauses"], scores, strict=True):
        [alone], _ = generator.score([prompt], [text], pauses=count, prompting=Prompting(prefix_attention=attention))
        assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)
        assert (score.tokens, score.pauses) == (alone.tokens, alone.pauses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pauses": 300}, r"prompt 0: 11 prompt tokens \+ 300 pauses \+ 64 new tokens = 375 positions, .* has 256"),
        ({"max_new_tokens": 250}, r"= 261 positions, but the model has 256 \(max_position_embeddings\)"),
        ({"pauses": -1}, "pauses: expected 0 or more, got -1"),
        ({"pauses": [1, 2]}, "pauses: expected 1 numbers, one for each prompt, got 2"),
        ({"pauses": 2.5}, "pauses: expected a number, a PausePolicy, or a list of these, got 2.5"),
        ({"prompting": {"location": "inside"}}, "location: expected one of append, prepend, got 'inside'"),
        (
            {"prompting": {"prefix_attention": "full"}},
            "prefix_attention: expected one of causal, bidirectional, got 'full'",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"sampling": {"temperature": -1.0}}, "temperature: expected 0 or more"),
        ({"sampling": {"top_p": 0.0}}, "top_p: expected more than 0"),
        ({"sampling": {"top_k": -1}}, "top_k: expected 0"),
        ({"limits": {"stop": [""]}}, "stop: expected a list of texts"),
        ({"limits": {"stop": "text"}}, "stop: expected a list of texts"),
        ({"sampling": {"rows": [1, 2]}}, "rows: expected 1 numbers"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(generator, passes, settings, message):
    records = {"prompting": Prompting, "sampling": Sampling, "limits": Limits}
    with pytest.raises(ConfigError, match=message):
        generator.generate(PROMPTS[:1], **{k: records[k](**v) if k in records else v for k, v in settings.items()})
    assert passes == []


def test_prompts_that_cannot_be_continued(generator, passes):
    with pytest.raises(ConfigError, match="prompt 1: expected a non-empty prompt"):
        generator.generate(["a", ""])
    with pytest.raises(ConfigError, match="prompts: expected a list of prompts, got one string"):
        generator.generate("text")
    with pytest.raises(DataError, match="prompt cannot be encoded"):
        generator.generate(["\ud800"])
    assert passes == []
    assert generator.generate([""], pauses=1, max_new_tokens=1).completions[0].prompt_tokens == 0
    assert generator.generate([]).completions == ()


def test_a_model_without_pauses(tmp_path):
    tokenizer = sentencepiece_tokenizer(tmp_path, pause=False)
    generator = PauseGenerator(llama(len(tokenizer), pauses=0), tokenizer)
    assert generator.pause == PauseInfo()
    with pytest.raises(ConfigError, match=r"the model has no pause token.*or a filler"):
        generator.generate(PROMPTS[:1], pauses=1)
    assert generator.generate(PROMPTS[:1], max_new_tokens=2).completions[0].pauses == 0
    assert (
        generator.generate(PROMPTS[:1], pauses=3, prompting=Prompting(filler="."), max_new_tokens=2)
        .completions[0]
        .pauses
        == 3
    )


def test_a_tokenizer_with_a_pause_token_is_enough(sentencepiece):
    model = llama(len(sentencepiece))
    del model.config.pause
    assert PauseGenerator(model, sentencepiece).pause == PauseInfo(range(600, 601))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ids": [600, 602]}, "expected consecutive ids"),
        ({"ids": [600, 601]}, "expected ids below vocab_size=601, got up to 601"),
        ({"ids": [599]}, "expected the first one to be the tokenizer's <pause>, 600, got 599"),
        ({"ids": [600], "m_ft": -1}, "m_ft: expected null or 0 or more"),
        ({"ids": [600], "prefix_attention": "x"}, "expected one of causal, bidirectional"),
        ({"ids": "six"}, "not readable"),
        ({}, "not readable"),
        ([600], "not readable"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(sentencepiece, entry, message):
    model = llama(len(sentencepiece))
    model.config.pause = entry
    with pytest.raises(DataError, match=message):
        PauseGenerator(model, sentencepiece)


def test_policies_and_numbers_can_be_mixed(generator):
    mixed = generator.generate(PROMPTS[:2], pauses=[FixedPauses(3), 5], max_new_tokens=3)
    assert mixed.completions == generator.generate(PROMPTS[:2], pauses=[3, 5], max_new_tokens=3).completions


def test_a_model_brings_its_location_filler_and_prefix_attention(generator):
    """Left out, they are the configuration's; given, they win; filler "" asks for pauses themselves."""
    prompting = Prompting(location="prepend", filler=".", prefix_attention="bidirectional")
    info = replace(generator.pause, m_ft=3, prompting=prompting)
    own = PauseGenerator(generator.model, generator.encoder.tokenizer, info)

    def first_logits(model: PauseGenerator, **options: object) -> torch.Tensor:
        completion = model.generate(["My fellow citizens"], max_new_tokens=1, keep_logits=True, **options)
        return completion.completions[0].logits

    assert torch.equal(first_logits(own), first_logits(generator, pauses=3, prompting=prompting))
    back = info.override(location="append", filler="", prefix_attention="causal")
    assert back == Prompting() and info.override() == prompting
    assert torch.equal(first_logits(own, prompting=back), first_logits(generator, pauses=3))
    assert not torch.equal(first_logits(own), first_logits(own, prompting=back))


def test_the_earlier_keywords_give_the_answers_of_the_records_and_warn(generator):
    records = {
        "prompting": Prompting(location="prepend"),
        "sampling": Sampling(temperature=0.8, seed=3),
        "limits": Limits(stop=("the",), ignore_eos=True),
    }
    with pytest.warns(FutureWarning, match=r"write prompting=Prompting\(location='prepend'\), sampling=") as found:
        earlier = generator.generate(
            PROMPTS[:2],
            pauses=2,
            max_new_tokens=5,
            location="prepend",
            temperature=0.8,
            seed=3,
            stop=("the",),
            ignore_eos=True,
        )
    assert found[0].filename == __file__
    assert earlier.completions == generator.generate(PROMPTS[:2], pauses=2, max_new_tokens=5, **records).completions
    with pytest.warns(FutureWarning, match=r"filler=: write prompting=Prompting\(filler=''\)"):
        scores, _ = generator.score(["A"], ["b"], pauses=1, filler="")
    assert scores == generator.score(["A"], ["b"], pauses=1)[0]
    with pytest.raises(TypeError, match="temperatur"):
        generator.generate(["A"], temperatur=1.0)
