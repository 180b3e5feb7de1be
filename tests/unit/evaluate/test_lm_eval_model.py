"""lm-eval's model with pauses gives the generator's answers, and without pauses HFLM's own."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.inference import DecodingPauses, Limits, PauseGenerator, Prompting

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from pause_megatron.evaluate.lm_eval_model import PauseLM
from pause_megatron.evaluate.lm_eval_tasks import _needed

NEW = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
SETTINGS = [
    {"pauses": 0},
    {"pauses": 1},
    {"pauses": 10},
    {"pauses": 10, "location": "prepend"},
    {"pauses": 10, "filler": "."},
]


def asked(kind: str, pairs) -> list[Instance]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(pairs)]


def pairs_of(examples) -> list[tuple[str, str]]:
    return [(example.prompt, choice) for example in examples for choice in example.choices]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("positions", ["own", "shared"])
def test_log_likelihoods_and_answers_are_the_generators(generator, examples, settings, positions, monkeypatch):
    if positions == "shared":
        monkeypatch.setitem(generator.model.config.pause, "positions", "shared")
        generator = PauseGenerator(generator.model, generator.encoder.tokenizer)
        if "filler" in settings:
            with pytest.raises(ConfigError, match=r"expected <pause> with pause.positions=shared .*, got a filler"):
                PauseLM(generator, **settings, quiet=True)
            return
    model = PauseLM(generator, **settings, batch_size=3, quiet=True)
    pairs = pairs_of(examples)
    own = {"pauses": settings["pauses"], "prompting": Prompting(**{k: v for k, v in settings.items() if k != "pauses"})}
    scores, _ = generator.score(*zip(*pairs, strict=True), **own)
    found = model.loglikelihood(asked("loglikelihood", pairs))
    assert [value for value, _ in found] == pytest.approx([score.log_likelihood for score in scores], abs=1e-4)
    prompts = [example.prompt for example in examples]
    texts = model.generate_until(asked("generate_until", [(prompt, NEW) for prompt in prompts]))
    generation = generator.generate(prompts, **own, max_new_tokens=6, limits=Limits(stop=["\n"]))
    # Ids are compared: of bytes that are no characters, as random models write them, texts are not shown alike.
    decode = generator.encoder.tokenizer.decode
    written = [decode(completion.ids, skip_special_tokens=True) for completion in generation.completions]
    assert texts == [text.split("\n")[0] for text in written]
    assert len(set(texts)) > 3


@pytest.mark.parametrize("positions", ["own", "shared"])
def test_pauses_within_answers_are_refused_or_switched_off(generator, examples, positions, monkeypatch):
    """The model's own ones too: what config.json says must not reach the answers past lm-eval."""
    own = {"decoding": {"every": 1, "count": 2, "in_prompt": True}, "requests": 2, "positions": positions}
    for name, value in own.items():
        monkeypatch.setitem(generator.model.config.pause, name, value)
    generator = PauseGenerator(generator.model, generator.encoder.tokenizer)
    for given in (None, DecodingPauses(every=3)):
        with pytest.raises(ConfigError, match=r"lm-eval: expected no pauses within answers \(decoding\), got .*every"):
            PauseLM(generator, pauses=2, quiet=True, decoding=given)
    model = PauseLM(generator, pauses=2, batch_size=3, quiet=True, decoding=DecodingPauses())
    prompts = [example.prompt for example in examples if len(example.prompt) < 100]
    texts = model.generate_until(asked("generate_until", [(prompt, NEW) for prompt in prompts]))
    settings = {"pauses": 2, "max_new_tokens": 6, "limits": Limits(stop=["\n"])}
    plain = generator.generate(prompts, **settings, decoding=DecodingPauses()).completions
    paused = generator.generate(prompts, **settings).completions
    decode = generator.encoder.tokenizer.decode
    written = [decode(completion.ids, skip_special_tokens=True).split("\n")[0] for completion in plain]
    assert texts == written
    assert [completion.ids for completion in paused] != [completion.ids for completion in plain]


def test_without_pauses_it_is_lm_evals_own(without_pause, examples):
    """Bit for bit; on a model that has no pause token to keep out of the softmax."""
    tokenizer = without_pause.encoder.tokenizer
    theirs = HFLM(without_pause.model, tokenizer=tokenizer, backend="causal", batch_size=3)
    ours = PauseLM(without_pause, pauses=0, batch_size=3, quiet=True)
    pairs = [*pairs_of(examples), ("a blank at the end ", "of it"), ("", " nothing before"), ("of " * 400, " war")]
    requests = asked("loglikelihood", pairs)
    assert ours.loglikelihood(requests) == theirs.loglikelihood(requests, disable_tqdm=True)
    requests = asked("generate_until", [(context, NEW) for context, _ in pairs_of(examples)])
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_pauses_are_all_that_is_added(generator, examples, settings):
    """The ids of every request without its pauses are those that HFLM has for it at M = 0."""
    plain, paused = (PauseLM(generator, **options, quiet=True) for options in ({"pauses": 0}, settings))
    count = settings["pauses"]
    fill = {generator.encoder.filler_id(".")} if "filler" in settings else set(generator.pause.ids)
    for pair in [*pairs_of(examples), ("a blank at the end ", "of it")]:
        [request] = paused.paused(asked("loglikelihood", [pair]))
        context, continuation = paused._encode_pair(*request.args)
        text, same = plain._encode_pair(*pair)
        assert continuation == same
        lead = len(generator.encoder.leading) if settings.get("location") == "prepend" else len(text)
        assert context[:lead] + context[lead + count :] == text and set(context[lead : lead + count]) == fill


@pytest.mark.parametrize("location", ["append", "prepend"])
def test_what_does_not_fit_is_cut_from_the_text(generator, location):
    model = PauseLM(generator, pauses=10, location=location, quiet=True)
    pause = generator.pause.ids.start
    [request] = model.paused(asked("loglikelihood", [("of war " * 300, " and peace")]))
    context, continuation = model._encode_pair(*request.args)
    assert len(context) + len(continuation) == model.max_length + 1 and context.count(pause) == 10
    assert (context[-10:] if location == "append" else context[:10]) == [pause] * 10
    ids, mask = model.tok_batch_encode([request.args[0], model.paused(asked("", [("a", NEW)]))[0].args[0]], "left", 40)
    assert ids.shape == mask.shape == (2, 40) and mask[0].all() and int((ids[0] == pause).sum()) == 10
    assert int(mask[1].sum()) == 11 + len(generator.encoder.leading) and mask[1, -1]
    with pytest.raises(ConfigError, match="expected room for text beside 10 pauses, got 10 positions"):
        model.tok_batch_encode([request.args[0]], "left", 10)


def test_an_empty_context_becomes_the_prefix_token(generator):
    model = PauseLM(generator, pauses=2, quiet=True)
    [(found, _)] = model.loglikelihood(asked("loglikelihood", [("", " and peace")]))
    [score], _ = generator.score([[model.prefix_token_id]], [" and peace"], pauses=2)
    assert found == pytest.approx(score.log_likelihood, abs=1e-4)


def test_rolling_log_likelihood_has_no_place_for_pauses(generator, examples):
    requests = asked("loglikelihood_rolling", [(example.prompt,) for example in examples[:4]])
    found = [PauseLM(generator, pauses=count, quiet=True).loglikelihood_rolling(requests) for count in (0, 10)]
    assert found[0] == found[1] and len(set(found[0])) == 4


def test_a_pause_is_never_likely_and_never_generated(generator, examples):
    """A model that would say nothing but pauses: HFLM sees it say them, and this model does not."""
    import torch

    head, embedding = generator.model.lm_head.weight, generator.model.model.norm.weight
    pause = generator.pause.ids.start
    kept = head.data.clone(), embedding.data.clone()
    prompts = [example.prompt for example in examples[:3]]
    model = PauseLM(generator, pauses=2, quiet=True)
    requests = asked("loglikelihood", [(prompt, " and peace") for prompt in prompts])
    before = model.loglikelihood(requests)
    try:
        with torch.no_grad():
            head[pause] *= 100
        assert [value for value, _ in model.loglikelihood(requests)] == pytest.approx([value for value, _ in before])
        texts = model.generate_until(asked("generate_until", [(prompt, NEW) for prompt in prompts]))
        assert all(texts)
    finally:
        head.data, embedding.data = kept


def test_text_that_spells_a_pause_is_refused(generator):
    model = PauseLM(generator, pauses=1, quiet=True)
    for kind, pair in (
        ("loglikelihood", ("say <pause>", " now")),
        ("loglikelihood", ("say", " <pause>")),
        ("generate_until", ("<pause>", NEW)),
        ("loglikelihood_rolling", ("a <pause> b",)),
    ):
        with pytest.raises(DataError, match="a request: expected text without <pause>"):
            getattr(model, kind)(asked(kind, [pair]))


def test_settings_that_cannot_be_are_refused(generator, without_pause):
    with pytest.raises(ConfigError, match="the model has no pause token"):
        PauseLM(without_pause, pauses=1)
    with pytest.raises(ConfigError, match="filler: expected the text of one token"):
        PauseLM(without_pause, pauses=1, filler="two words")
    prefix = replace(generator.pause, prompting=Prompting(prefix_attention="bidirectional"))
    with pytest.raises(ConfigError, match="got one that has a bidirectional prefix"):
        PauseLM(PauseGenerator(generator.model, generator.encoder.tokenizer, prefix), pauses=1)


class Counting(PauseLM):
    """Counts the requests that reach the model; interrupted behind the third batch, if asked."""

    calls = 0
    limit = 1 << 30

    def _model_call(self, inps, attn_mask=None, labels=None):
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return super()._model_call(inps, attn_mask, labels)


def test_lm_evals_store_of_answers_survives_and_knows_its_pauses(without_pause, examples, tmp_path):
    options = {"pauses": 2, "filler": ".", "batch_size": 1, "quiet": True}
    requests = asked("loglikelihood", pairs_of(examples))
    batches = Counting(without_pause, **options)
    expected = batches.loglikelihood(requests)
    store = str(tmp_path / "store.db")
    first = Counting(without_pause, **options)
    first.limit = 3
    with pytest.raises(KeyboardInterrupt):
        CachingLM(first, store).loglikelihood(requests)
    second = Counting(without_pause, **options)
    assert CachingLM(second, store).loglikelihood(requests) == [pytest.approx(pair) for pair in expected]
    assert second.calls == batches.calls - 3
    with pytest.raises(
        DataError, match=r"use_cache: expected answers with 3 x append '\.\.\.', got a cache of answers"
    ):
        CachingLM(PauseLM(without_pause, **{**options, "pauses": 3}), store)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("x", name="langdetect"), "langdetect, .* pip install 'lm-eval\\[ifeval\\]'"),
        (ModuleNotFoundError("x", name="math_verify.parser"), "math-verify, .* pip install 'lm-eval\\[math\\]'"),
        (ModuleNotFoundError("x", name="of_nobody"), "needs the package of-nobody, .* pip install 'of-nobody'"),
        (ModuleNotFoundError("Please install\nfrom there"), "^Please install from there$"),
    ],
)
def test_a_package_of_one_task_is_named_with_its_extra(error, message):
    assert re.search(message, _needed(error))
