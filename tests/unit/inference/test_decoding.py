"""Pauses within answers against their definition: one row, no cache, a full pass over the whole text at every step."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from support.tiny_llama import llama

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import DecodingPauses, Limits, PauseGenerator, Prompting, Sampling, SettledPauses

PROMPTS = [
    "My fellow citizens,",
    "The state of the Union is strong, and we have reason to be thankful for the year. Let us",
    "A",
    "In 1862",
]
COUNTS = [3, 0, 4, 1]
MODES = {
    "every": DecodingPauses(every=3, count=2),
    "everywhere": DecodingPauses(every=1, in_prompt=True),
    "after": DecodingPauses(after="[aeiou]", count=2, in_prompt=True),
    "entropy": DecodingPauses(entropy=4.9, count=2, limit=3),
    "requests": DecodingPauses(requests=True, limit=3),
    "all": DecodingPauses(every=4, after="^ ", entropy=5.1, requests=True, count=1, limit=4, in_prompt=True),
}


def asking(tokenizer, *, bias=0.0, pauses=1, **changes):
    """A generator whose pause logit is as likely as text, so that pauses are requested here and there."""
    model = llama(len(tokenizer) + pauses - 1, pauses=pauses, seed=3, **changes)
    with torch.no_grad():
        model.lm_head.weight[600] *= 1 + bias
    return PauseGenerator(model, tokenizer)


@pytest.fixture(scope="module")
def asker(sentencepiece):
    return asking(sentencepiece, bias=4)


def after(generator, decoding, token, number):
    """Pauses after a token, from the definition."""
    if decoding.every and number % decoding.every == 0:
        return decoding.count
    text = generator.encoder.decode_continuation([token])
    return decoding.count if decoding.after and text and re.search(decoding.after, text) else 0


class Reference:
    """One row: ids, which of them are pauses, and where pauses stand within the answer."""

    def __init__(self, generator, prompt, count, decoding, *, filler=None):
        self.generator, self.decoding, self.ids, self.marks = generator, decoding, [], []
        self.pause_ids = generator.pause.ids if filler is None else [generator.encoder.filler_id(filler)]
        self.number, self.where = 0, {}
        for token in generator.encoder.encode(prompt):
            self.text(token)
            if decoding.in_prompt:
                self.number += 1
                self.pause(after(generator, decoding, token, self.number))
        self.pause(count)

    def text(self, token):
        self.ids.append(token)
        self.marks.append(False)

    def pause(self, count, index=None):
        for _ in range(count):
            run = next((n for n, mark in enumerate(self.marks[::-1]) if not mark), len(self.marks))
            self.ids.append(self.pause_ids[run % len(self.pause_ids)])
            self.marks.append(True)
        if count and index is not None:
            self.where[index] = self.where.get(index, 0) + count

    def logits(self):
        positions = torch.tensor(self.marks).logical_not().cumsum(0).sub(1).clamp(min=0)
        if self.generator.pause.positions == "own":
            positions = torch.arange(len(self.ids))
        given = {"input_ids": torch.tensor([self.ids]), "position_ids": positions[None]}
        with torch.no_grad():
            return self.generator.model(**given, attention_mask=torch.ones(1, len(self.ids)), use_cache=False).logits[
                0, -1
            ]

    def answer(self, new, sampling=None, row=0, target=None):
        """Greedy or sampled answer; with `target`, its log-likelihood under greedy requests."""
        found, kept, total, decoding = [], [], 0.0, self.decoding
        for index in range(new):
            granted = attempts = 0
            while True:
                raw = self.logits()
                allowed = raw.clone()
                allowed[list(self.generator.pause.ids)] = float("-inf")
                entropy = torch.distributions.Categorical(logits=allowed).entropy()
                if decoding.entropy is not None and granted < decoding.limit and entropy > decoding.entropy:
                    count = min(decoding.count, decoding.limit - granted)
                    self.pause(count, index)
                    granted += count
                    continue
                choice = allowed.clone()
                if decoding.requests and granted < decoding.limit:
                    choice[600] = raw[600]
                if sampling is None or target is not None:
                    token = int(choice.argmax())
                else:
                    token = replace(sampling, rows=[row]).select(choice[None], index, [attempts])[0]
                if token == 600:
                    self.pause(1, index)
                    granted, attempts = granted + 1, attempts + 1
                    continue
                break
            token = token if target is None else target[index]
            total += float(allowed.log_softmax(-1)[token])
            found.append(token)
            kept.append(raw)
            if target is None and token in self.generator.eos:
                return found[:-1], kept, total
            if index == new - 1:
                return found, kept, total
            self.text(token)
            self.number += 1
            self.pause(after(self.generator, decoding, token, self.number), index + 1)
        raise AssertionError


@pytest.mark.parametrize("temperature", [0, 1.1])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_full_passes(asker, mode, temperature):
    decoding, sampling = MODES[mode], Sampling(temperature=temperature, seed=5, top_p=0.95)
    settings = {"max_new_tokens": 9, "keep_logits": True, "decoding": decoding}
    generation = asker.generate(PROMPTS, pauses=COUNTS, sampling=sampling, **settings)
    for row, (prompt, count, completion) in enumerate(zip(PROMPTS, COUNTS, generation.completions, strict=True)):
        reference = Reference(asker, prompt, count, decoding)
        before = len(reference.ids)
        ids, logits, _ = reference.answer(9, sampling if temperature else None, row)
        assert list(completion.ids) == ids
        torch.testing.assert_close(completion.logits, torch.stack(logits), atol=2e-5, rtol=0)
        assert dict(completion.answer_pauses) == reference.where
        assert completion.prompt_tokens + completion.prompt_pauses + completion.pauses == before
        alone = asker.generate([prompt], pauses=count, sampling=replace(sampling, rows=[row]), **settings)
        assert alone.completions[0] == completion
    assert sum(c.pauses_in_answer for c in generation.completions) > 1, "the test needs pauses"
    assert 600 not in [token for c in generation.completions for token in c.ids]
    assert not any("<pause>" in c.text for c in generation.completions)


@pytest.mark.parametrize("mode", MODES)
def test_the_cost_is_what_the_model_computed(asker, mode):
    """Places take no pass of their own; a granted pause takes one. Positions are counted without padding."""
    shapes, real = [], []

    def note(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        mask = kwargs["attention_mask"]
        width = kwargs["input_ids"].shape[1]
        real.append(kwargs["input_ids"].numel() if mask is None else int(mask[:, -width:].sum()))

    hook = asker.model.register_forward_pre_hook(note, with_kwargs=True)
    generation = asker.generate(
        PROMPTS, pauses=COUNTS, max_new_tokens=7, decoding=MODES[mode], limits=Limits(ignore_eos=True)
    )
    hook.remove()
    cost = generation.cost
    assert (cost.forward_passes, cost.positions) == (len(shapes), sum(real))
    assert cost.positions == sum(
        c.prompt_tokens + c.prompt_pauses + c.pauses + c.pauses_in_answer + len(c.ids) - 1
        for c in generation.completions
    )
    if not MODES[mode].granted:
        assert cost.forward_passes == 7
    elif MODES[mode].entropy is None:
        assert cost.forward_passes == 7 + max(c.pauses_in_answer for c in generation.completions)


def test_nothing_changes_without_them(asker):
    """The default, and modes that grant nothing, give the answers, logits and passes of before."""
    settings = {"pauses": COUNTS, "max_new_tokens": 6, "keep_logits": True, "sampling": Sampling(temperature=1.0)}
    plain = asker.generate(PROMPTS, **settings)
    for decoding in (DecodingPauses(), DecodingPauses(every=50), DecodingPauses(entropy=99.0)):
        other = asker.generate(PROMPTS, decoding=decoding, **settings)
        assert other.completions == plain.completions
        assert all(torch.equal(a.logits, b.logits) for a, b in zip(other.completions, plain.completions, strict=True))
        assert other.cost.positions == plain.cost.positions
        assert other.cost.forward_passes == plain.cost.forward_passes
    scores, _ = asker.score(PROMPTS, [" of the Union"] * 4, pauses=COUNTS)
    again, _ = asker.score(PROMPTS, [" of the Union"] * 4, pauses=COUNTS, decoding=DecodingPauses(every=50))
    assert scores == again


def test_requests_end_at_the_limit(sentencepiece):
    """A model that would request without end gets `limit` pauses before each token, and its token then."""
    generator = asking(sentencepiece)
    head = generator.model.lm_head.weight
    with torch.no_grad():
        head[600] = 0
    generator.model.lm_head.register_forward_hook(lambda module, args, output: (output[..., 600].fill_(1e3), None)[1])
    for limit in (1, 4):
        decoding = DecodingPauses(requests=True, limit=limit)
        for temperature in (0, 1.0):
            found = generator.generate(
                PROMPTS[:2], pauses=2, max_new_tokens=5, decoding=decoding, limits=Limits(ignore_eos=True),
                sampling=Sampling(temperature=temperature),
            )  # fmt: skip
            for completion in found.completions:
                assert completion.answer_pauses == tuple((index, limit) for index in range(5))
                assert 600 not in completion.ids
            assert found.cost.forward_passes == 1 + 5 * limit + 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("positions", "filler"), [("own", None), ("own", "."), ("shared", None), ("shared", ".")])
def test_positions_and_fillers(sentencepiece, mode, positions, filler):
    generator = asking(sentencepiece, bias=4)
    generator.pause = replace(generator.pause, positions=positions)
    generation = generator.generate(
        PROMPTS,
        pauses=COUNTS,
        max_new_tokens=6,
        keep_logits=True,
        decoding=MODES[mode],
        prompting=Prompting(filler=filler),
    )
    for prompt, count, completion in zip(PROMPTS, COUNTS, generation.completions, strict=True):
        ids, logits, _ = Reference(generator, prompt, count, MODES[mode], filler=filler).answer(6)
        assert list(completion.ids) == ids
        torch.testing.assert_close(completion.logits, torch.stack(logits), atol=2e-5, rtol=0)
    texts, settings = [" of the Union"] * 4, {"decoding": MODES[mode], "prompting": Prompting(filler=filler)}
    target = generator.encoder.encode_continuation(texts[0])
    scores, _ = generator.score(PROMPTS, texts, pauses=COUNTS, **settings)
    for prompt, count, score in zip(PROMPTS, COUNTS, scores, strict=True):
        reference = Reference(generator, prompt, count, MODES[mode], filler=filler)
        assert score.log_likelihood == pytest.approx(reference.answer(len(target), target=target)[2], abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_distinct_pauses_are_used_in_turn_over_a_whole_run(sentencepiece, mode):
    generator = asking(sentencepiece, bias=4, pauses=3)
    generation = generator.generate(PROMPTS, pauses=COUNTS, max_new_tokens=6, keep_logits=True, decoding=MODES[mode])
    for prompt, count, completion in zip(PROMPTS, COUNTS, generation.completions, strict=True):
        ids, logits, _ = Reference(generator, prompt, count, MODES[mode]).answer(6)
        assert list(completion.ids) == ids
        torch.testing.assert_close(completion.logits, torch.stack(logits), atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_scores(asker, mode):
    """A continuation has the pauses that it would have as an answer, and their log-likelihood."""
    texts = [" of the Union", " people of the States and all that we have", " 1", " the law"]
    targets = [asker.encoder.encode_continuation(text) for text in texts]
    scores, cost = asker.score(PROMPTS, texts, pauses=COUNTS, decoding=MODES[mode])
    for prompt, count, target, score in zip(PROMPTS, COUNTS, targets, scores, strict=True):
        reference = Reference(asker, prompt, count, MODES[mode])
        _, _, expected = reference.answer(len(target), target=target)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert dict(score.answer_pauses) == reference.where
    assert not any(score.greedy for score in scores)
    if not MODES[mode].granted:
        assert cost.forward_passes == 2
    answer = asker.generate(PROMPTS[:1], pauses=3, max_new_tokens=6, decoding=MODES[mode]).completions[0]
    if answer.finish == "length":
        score = asker.score(PROMPTS[:1], [answer.ids], pauses=3, decoding=MODES[mode])[0][0]
        assert score.greedy
        assert score.answer_pauses == answer.answer_pauses


def test_stop_texts_and_streams_do_not_see_pauses(asker):
    plain = asker.generate(PROMPTS[:1], pauses=2, max_new_tokens=12, decoding=MODES["everywhere"]).completions[0]
    stop = plain.text[3:8]
    pieces = []
    stopped = asker.generate(
        PROMPTS[:1], pauses=2, max_new_tokens=12, decoding=MODES["everywhere"], limits=Limits(stop=[stop]),
        stream=lambda row, piece: pieces.append(piece),
    ).completions[0]  # fmt: skip
    assert stopped.finish == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)] == "".join(pieces)


def test_adaptive_pauses_and_a_bidirectional_prefix(asker):
    """Both come before the answer; its own pauses follow in either case, in a batch as alone."""
    for settings in (
        {"pauses": SettledPauses(change=0.05, limit=8)},
        {"pauses": 3, "prompting": Prompting(prefix_attention="bidirectional")},
        {"pauses": 3, "prompting": Prompting("prepend")},
    ):
        for decoding in MODES.values():
            together = asker.generate(PROMPTS, max_new_tokens=5, decoding=decoding, **settings).completions
            alone = [asker.generate([p], max_new_tokens=5, decoding=decoding, **settings) for p in PROMPTS]
            assert [each.completions[0] for each in alone] == list(together)


def test_a_sliding_window_needs_one_prompt_at_a_time(sentencepiece):
    generator = asking(sentencepiece, bias=4, cls="Mistral", sliding_window=6)
    decoding = MODES["all"]
    completion = generator.generate(PROMPTS[1:2], pauses=2, max_new_tokens=5, decoding=decoding).completions[0]
    assert list(completion.ids) == Reference(generator, PROMPTS[1], 2, decoding).answer(5)[0]
    with pytest.raises(ConfigError, match="one prompt at a time"):
        generator.generate(PROMPTS, pauses=2, max_new_tokens=5, decoding=decoding)


@pytest.mark.parametrize("decoding", [None, MODES["everywhere"]])
def test_scores_past_a_sliding_window_do_not_depend_on_the_batch(sentencepiece, decoding):
    """Choices of unequal length: no slots of padding lie between a prompt and its choice."""
    generator = asking(sentencepiece, bias=4, cls="Mistral", sliding_window=6)
    choices = [" of the Union", " a", " the state of the Union is strong, and we have reason", " of"]
    for prompts in (PROMPTS, PROMPTS[3:] * 4):
        together, _ = generator.score(prompts, choices, pauses=COUNTS, decoding=decoding)
        for score, prompt, choice, count in zip(together, prompts, choices, COUNTS, strict=True):
            ((alone,), _) = generator.score([prompt], [choice], pauses=count, decoding=decoding)
            assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=2e-5)
            assert score.answer_pauses == alone.answer_pauses


def test_pauses_that_a_prompt_has_as_ids_are_no_text(asker):
    """The chat template with pauses gives such ids."""
    ids = [9, 17, 30, 600, 600]
    found = asker.generate([ids], max_new_tokens=2, decoding=DecodingPauses(every=1, in_prompt=True)).completions[0]
    assert found.prompt_pauses == 3
    same = asker.generate([[9, 600, 17, 600, 30, 600, 600, 600]], max_new_tokens=2, decoding=DecodingPauses(every=1))
    assert same.completions[0].ids == found.ids
    several = asking(asker.encoder.tokenizer, pauses=3)
    typed, added = ([5, 600, 601], 2), ([5, 600, 601, 602, 600], 0)
    assert several.encoder.with_pauses(typed[0], 2, "append") == added[0]
    one, other = (several.generate([ids], pauses=count, max_new_tokens=3) for ids, count in (typed, added))
    assert one.completions[0].ids == other.completions[0].ids


def test_the_room_that_pauses_may_take_is_checked_first(asker):
    prompt = len(asker.encoder.encode("A"))
    for decoding, most in (
        (DecodingPauses(every=2, count=4), 4 * 49),
        (DecodingPauses(after="a", count=2), 2 * 99),
        (DecodingPauses(requests=True, limit=2), 200),
        (DecodingPauses(every=1, requests=True, limit=1), 99 + 100),
    ):
        limit = asker.model.config.max_position_embeddings
        assert prompt + 1 + 100 + most > limit
        with pytest.raises(
            ConfigError, match=rf"100 new tokens \+ {most} pauses among them = {prompt + 101 + most} pos"
        ):
            asker.generate(["A"], pauses=1, max_new_tokens=100, decoding=decoding)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": 0}, "decoding.every: expected 1 or more, got 0"),
        ({"every": True}, "decoding.every: expected 1 or more, got True"),
        ({"after": "("}, "decoding.after: expected a regular expression"),
        ({"after": ""}, "decoding.after: expected a regular expression, not empty"),
        ({"entropy": float("nan")}, "decoding.entropy: expected 0 nats or more, got nan"),
        ({"entropy": "much"}, "decoding.entropy: expected 0 nats or more, got 'much'"),
        ({"requests": 3}, "decoding.requests: expected true or false, got 3"),
        ({"limit": 0, "requests": True}, "decoding.limit: expected 1 or more, got 0"),
        ({"in_prompt": True}, "decoding.in_prompt: expected decoding.every or decoding.after with it"),
        ({"count": 2}, "decoding.count: expected decoding.every, decoding.after or decoding.entropy with it"),
        ({"limit": 3}, "decoding.limit: expected decoding.entropy or decoding.requests with it, got neither"),
        ({"limit": 3, "every": 1}, "decoding.limit: expected decoding.entropy or decoding.requests with it"),
    ],
)
def test_wrong_fields_are_refused(sentencepiece, fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DecodingPauses(**fields)
    model = llama(len(sentencepiece))
    model.config.pause["decoding"] = fields
    with pytest.raises(DataError, match=re.escape(f"config.json: pause.decoding: {message}")):
        PauseGenerator(model, sentencepiece)


def test_a_model_brings_its_own(sentencepiece):
    model = llama(len(sentencepiece), seed=3)
    model.config.pause |= {"requests": 4, "decoding": {"every": 1, "count": 2, "in_prompt": True}}
    generator = PauseGenerator(model, sentencepiece)
    own = DecodingPauses(every=1, count=2, in_prompt=True, requests=True, limit=4)
    assert generator.pause.decoding == own
    given = generator.generate(PROMPTS, max_new_tokens=4, decoding=own)
    assert generator.generate(PROMPTS, max_new_tokens=4).completions == given.completions
    off = generator.generate(PROMPTS, max_new_tokens=4, decoding=DecodingPauses()).completions
    assert all(c.pauses_in_answer == c.prompt_pauses == 0 for c in off)
    assert own.override(every=0, requests=False) == DecodingPauses()
    assert own.override(every=0) == DecodingPauses(requests=True, limit=4)
    assert own.override(entropy=2.0, count=3) == replace(own, entropy=2.0, count=3)
    with pytest.raises(ConfigError, match=r"decoding.limit: expected decoding.entropy or decoding.requests"):
        own.override(requests=False, limit=3)
    for key, value, message in (
        ("requests", -1, "pause.requests: expected null or 0 or more, got -1"),
        ("decoding", {"evry": 1}, "pause.decoding: expected some of every, after, .*, got 'evry'"),
        ("decoding", 3, "pause.decoding: expected an object with some of every"),
        ("decoding", {"entropy": 1.0, "limit": 3}, "pause.requests: expected no pause.decoding.limit beside it"),
    ):
        wrong = llama(len(sentencepiece))
        wrong.config.pause |= {"requests": 2, key: value}
        with pytest.raises(DataError, match=message):
            PauseGenerator(wrong, sentencepiece)


def test_a_model_without_pauses_needs_a_filler(sentencepiece):
    model = llama(len(sentencepiece), pauses=0)
    model.config.pause = {"ids": []}
    generator = PauseGenerator(model, sentencepiece)
    with pytest.raises(ConfigError, match=r"decoding.requests: expected a model with a pause token"):
        generator.generate(["A"], decoding=DecodingPauses(requests=True))
    with pytest.raises(ConfigError, match="decoding: expected a model with a pause token, or a filler"):
        generator.generate(["A"], decoding=DecodingPauses(every=1))
    prompting = Prompting(filler=".")
    found = generator.generate(["A"], max_new_tokens=3, decoding=DecodingPauses(every=1), prompting=prompting)
    assert found.completions[0].pauses_in_answer == len(found.completions[0].ids) - (
        found.completions[0].finish == "length"
    )
