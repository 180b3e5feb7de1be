"""Pauses in transformers' own generate: as a callable, and as a file that a model folder carries."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest
import torch
import transformers
from support.tiny_llama import llama, write_folder

from pause_megatron.inference import (
    DecodingPauses,
    Limits,
    PauseGenerator,
    custom_generate,
    load,
    pause_generate,
    write_custom_generate,
)

PROMPTS = ["My fellow citizens,", "A", "The state of the Union is strong, and we"]

# transformers runs a folder's own code for callers who say so; the folder of these tests is ours.
OPT_IN = True


@pytest.fixture
def batch(sentencepiece):
    sentencepiece.pad_token, sentencepiece.padding_side = "</s>", "left"
    return sentencepiece(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


@pytest.mark.parametrize("pauses", [0, 5])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_equals_the_generator(sentencepiece, batch, family, pauses):
    model = llama(len(sentencepiece), cls=family, seed=2)
    output = model.generate(
        **batch, custom_generate=pause_generate, pauses=pauses, max_new_tokens=8, do_sample=False, pad_token_id=2
    )
    expected = PauseGenerator(model, sentencepiece).generate(PROMPTS, pauses=pauses, max_new_tokens=8)
    assert torch.equal(output[:, : batch.input_ids.shape[1]], batch.input_ids)
    for row, completion in zip(output[:, batch.input_ids.shape[1] :].tolist(), expected.completions, strict=True):
        assert row[: len(completion.ids)] == list(completion.ids)
        assert all(token_id == 2 for token_id in row[len(completion.ids) :])
        assert len(completion.ids) == 8 or completion.finish == "eos"


def test_without_pauses_it_is_transformers_own_greedy_search(sentencepiece, batch):
    model = llama(len(sentencepiece), seed=2)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "suppress_tokens": [600]}
    ours = model.generate(**batch, **settings, custom_generate=pause_generate, pauses=0)
    assert torch.equal(ours, model.generate(**batch, **settings))


def test_with_pauses_it_is_plain_generate_after_pause_ids(sentencepiece):
    model = llama(len(sentencepiece), seed=2)
    model.config.pause["m_ft"] = 6
    ids = sentencepiece(PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "suppress_tokens": [600]}
    plain = model.generate(torch.cat([ids, torch.full((1, 6), 600)], dim=1), **settings)
    ours = model.generate(ids, custom_generate=pause_generate, **settings)
    assert plain[0, ids.shape[1] + 6 :].tolist() == ours[0, ids.shape[1] :].tolist()


def test_settings_see_text_only(sentencepiece):
    """Sampling, penalties, minimum length and max_length count no pauses; a pause is never drawn."""
    model = llama(len(sentencepiece), seed=2)
    with torch.no_grad():
        model.lm_head.weight[600] = 50 * model.lm_head.weight.abs().sum(0)
    ids = sentencepiece(PROMPTS[0], return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, custom_generate=pause_generate, pauses=10, do_sample=True, temperature=1.5, repetition_penalty=1.3,
        min_new_tokens=5, max_length=ids.shape[1] + 9, pad_token_id=2,
    )  # fmt: skip
    assert ids.shape[1] + 5 <= output.shape[1] <= ids.shape[1] + 9
    assert 600 not in output


def test_scores_and_logits_are_those_of_transformers(sentencepiece):
    """After pauses that are granted too: from logits that have them, a pause excluded from the scores."""
    model = llama(len(sentencepiece))
    ids = sentencepiece(PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "repetition_penalty": 1.3}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    ours = model.generate(
        ids, custom_generate=pause_generate, pauses=3, pause_entropy=0.0, pause_limit=2, pause_count=2, **settings
    )
    assert ours.sequences.shape[1] == ids.shape[1] + 4 and len(ours.scores) == len(ours.logits) == 4
    text, pauses = ids, torch.full((1, 2), 600)
    for step in range(4):
        text = torch.cat([text, torch.full((1, 3), 600)] if not step else [text], dim=1)
        text = torch.cat([text, pauses], dim=1)
        with torch.no_grad():
            expected = model(text).logits[:, -1]
        assert torch.allclose(ours.logits[step], expected, atol=1e-5)
        seen = ours.sequences[:, : ids.shape[1] + step]
        scores = transformers.RepetitionPenaltyLogitsProcessor(1.3)(seen, expected.index_fill(1, pauses[0], -torch.inf))
        assert torch.allclose(ours.scores[step], scores, atol=1e-5)
        assert int(scores.argmax()) == int(ours.sequences[0, ids.shape[1] + step])
        text = torch.cat([text, ours.sequences[:, ids.shape[1] + step, None]], dim=1)
    assert model.compute_transition_scores(ours.sequences, ours.scores).shape == (1, 4)
    plain = model.generate(ids, custom_generate=pause_generate, pauses=0, **settings)
    theirs = model.generate(ids, suppress_tokens=[600], **settings)
    for step in range(4):
        assert torch.allclose(plain.logits[step], theirs.logits[step], atol=1e-5)
        assert torch.allclose(plain.scores[step], theirs.scores[step], atol=1e-5)


def test_one_prefill(sentencepiece):
    model = llama(len(sentencepiece))
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(
        torch.tensor([[5, 6, 7]]), custom_generate=pause_generate, pauses=10, max_new_tokens=3, eos_token_id=None
    )
    assert shapes == [13, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pauses": 500}, r"3 prompt tokens \+ 500 pauses \+ 4 new tokens = 507 positions, but the model has 256"),
        ({"pauses": -1}, "expected a whole number, 0 or more, got -1"),
        ({"pauses": True}, "expected a whole number, 0 or more, got True"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "input_ids: expected at least one token, or a pause"),
        ({"pauses": 2, "num_beams": 2}, "expected num_beams=1"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: not supported"),
    ],
)
def test_wrong_settings_are_refused(generator, settings, message):
    with pytest.raises(ValueError, match=message):
        generator.model.generate(
            torch.tensor([[5, 6, 7]]), custom_generate=pause_generate, max_new_tokens=4, **settings
        )


def test_embeddings_are_refused_and_stop_texts_see_no_pauses(generator, sentencepiece):
    model, settings = generator.model, {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    ids = sentencepiece(PROMPTS[0], return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="inputs_embeds: expected input_ids"):
        embeddings = model.get_input_embeddings()(ids)
        model.generate(inputs_embeds=embeddings, custom_generate=pause_generate, pauses=1, **settings)
    decoding = DecodingPauses(every=1, count=2)
    [whole] = generator.generate(PROMPTS[:1], pauses=1, max_new_tokens=12, decoding=decoding).completions
    stop = next(piece for token in whole.ids[3:] if (piece := sentencepiece.decode([token])).isalpha())
    limits = Limits(max_new_tokens=12, stop=[stop])
    [stopped] = generator.generate(PROMPTS[:1], pauses=1, limits=limits, decoding=decoding).completions
    output = model.generate(
        ids, custom_generate=pause_generate, pauses=1, pause_every=1, pause_count=2,
        stopping_criteria=[transformers.StopStringCriteria(sentencepiece, [stop])], **settings,
    )  # fmt: skip
    assert stopped.finish == "stop" and output[0, ids.shape[1] :].tolist() == list(stopped.ids)


def test_a_bidirectional_model_is_refused():
    model = llama(601)
    model.config.pause["prefix_attention"] = "bidirectional"
    with pytest.raises(ValueError, match="the model's prefix_attention is 'bidirectional'"):
        model.generate(torch.tensor([[5]]), custom_generate=pause_generate, pauses=1, max_new_tokens=1)


def test_a_model_without_pauses_is_refused():
    with pytest.raises(ValueError, match="the model has none"):
        llama(601, pauses=0).generate(torch.tensor([[5]]), custom_generate=pause_generate, pauses=1, max_new_tokens=1)


def test_the_file_needs_nothing_of_this_project():
    with open(custom_generate.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= {
        "__future__", "collections", "re", "torch", "transformers", "typing"
    }  # fmt: skip


def test_a_folder_can_carry_it_and_runs_it_only_for_those_who_trust_it(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_folder(tmp_path / "out", m_ft=4)
    generator = load(folder)
    expected = generator.generate(PROMPTS[:1], max_new_tokens=6).completions[0]
    assert expected.pauses == 4
    ids = torch.tensor([generator.encoder.encode(PROMPTS[0])])
    path = write_custom_generate(folder)
    assert path == folder / "custom_generate" / "generate.py"
    if not transformers.__version__.startswith("5.0."):  # which trusts every local folder
        with pytest.raises(ValueError, match="contains custom generation code"):
            generator.model.generate(ids, custom_generate=str(folder), trust_remote_code=False, max_new_tokens=6)
    settings = {"max_new_tokens": 6, "do_sample": False}
    output = generator.model.generate(ids, custom_generate=str(folder), trust_remote_code=OPT_IN, **settings)
    assert tuple(output[0, ids.shape[1] :].tolist()[: len(expected.ids)]) == expected.ids
    trusting = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=OPT_IN)
    assert torch.equal(trusting.generate(ids, pauses=4, **settings), output)
    assert load(folder).generate(PROMPTS[:1], max_new_tokens=6).completions[0] == expected
    spec = importlib.util.spec_from_file_location("carried", path)
    carried = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(carried)
    with pytest.raises(ValueError, match="streamer: not supported"):
        carried.generate(ids, model=generator.model, streamer=object())


MODES = {
    "every": {"every": 3, "count": 2},
    "everywhere": {"every": 1, "in_prompt": True},
    "after": {"after": "[aeiou]", "count": 2, "in_prompt": True},
    "entropy": {"entropy": 4.9, "count": 2, "limit": 3},
    "requests": {"requests": True, "limit": 3},
    "all": {"every": 4, "after": "^ ", "entropy": 5.1, "requests": True, "limit": 4, "in_prompt": True},
}


@pytest.mark.parametrize("positions", ["own", "shared"])
@pytest.mark.parametrize("mode", MODES)
def test_pauses_within_answers_equal_those_of_the_generator(sentencepiece, batch, mode, positions):
    """Greedy, and with sampling from one token, as options of the call and as those of the configuration."""
    fields = MODES[mode]
    model = llama(len(sentencepiece) + 2, seed=3, pauses=3)
    with torch.no_grad():
        model.lm_head.weight[600] *= 5
    model.config.pause["positions"] = positions
    generator = PauseGenerator(model, sentencepiece)
    expected = generator.generate(PROMPTS, pauses=2, max_new_tokens=9, decoding=DecodingPauses(**fields)).completions
    assert sum(c.pauses_in_answer for c in expected) > 1
    settings = {"max_new_tokens": 9, "pad_token_id": 2, "suppress_tokens": [600, 601, 602], "pauses": 2}
    given = {f"pause_{name}": value for name, value in fields.items()}
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 1}):
        for own in (False, True):
            model.config.pause["decoding"] = fields if own else None
            output = model.generate(
                **batch, custom_generate=pause_generate, pause_tokenizer=sentencepiece, **settings, **options,
                **({} if own else given),
            )  # fmt: skip
            for row, completion in zip(output[:, batch.input_ids.shape[1] :].tolist(), expected, strict=True):
                assert row[: len(completion.ids)] == list(completion.ids)
                assert all(token_id == 2 for token_id in row[len(completion.ids) :])
    off = {"pause_every": 0, "pause_after": "", "pause_entropy": float("inf"), "pause_requests": False}
    plain = generator.generate(PROMPTS, pauses=2, max_new_tokens=9, decoding=DecodingPauses()).completions
    output = model.generate(**batch, custom_generate=pause_generate, **settings, do_sample=False, **off)
    for row, completion in zip(output[:, batch.input_ids.shape[1] :].tolist(), plain, strict=True):
        assert row[: len(completion.ids)] == list(completion.ids)


def test_a_sliding_window_needs_one_prompt_at_a_time(sentencepiece, batch):
    model = llama(len(sentencepiece), seed=3, cls="Mistral", sliding_window=6)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "pauses": 2, "pause_every": 2}
    ids = sentencepiece(PROMPTS[2], return_tensors="pt")["input_ids"]
    output = model.generate(ids, custom_generate=pause_generate, **settings)
    generator, decoding = PauseGenerator(model, sentencepiece), DecodingPauses(every=2)
    [completion] = generator.generate(PROMPTS[2:], pauses=2, max_new_tokens=5, decoding=decoding).completions
    assert output[0, ids.shape[1] :].tolist()[: len(completion.ids)] == list(completion.ids)
    with pytest.raises(ValueError, match="one prompt at a time past the sliding window of 6, got 3"):
        model.generate(**batch, custom_generate=pause_generate, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pause_every": -1}, "pause_every: expected a whole number, 0 or more, got -1"),
        ({"pause_every": 1, "pause_count": 0}, "pause_count: expected a whole number, 1 or more, got 0"),
        ({"pause_entropy": -1.0}, "pause_entropy: expected 0 nats or more, got -1.0"),
        ({"pause_after": "a"}, "pause_after: expected pause_tokenizer=TOKENIZER with it"),
        ({"pause_after": "("}, r"pause_after: expected a regular expression, got '\('"),
        ({"pause_requests": "no"}, "pause_requests: expected True or False, got 'no'"),
        (
            {"pause_count": 2, "pause_requests": True},
            "pause_count: expected pause_every or pause_after or pause_en",
        ),
        ({"pause_limit": 2, "pause_every": 1}, "pause_limit: expected pause_entropy or pause_requests with it"),
        ({"pause_in_prompt": True}, "pause_in_prompt: expected pause_every or pause_after with it"),
        ({"pause_requests": True, "pause_limit": 100}, r"4 new tokens \+ up to 400 pauses within them = 407 positions"),
    ],
)
def test_wrong_options_within_answers_are_refused(generator, settings, message):
    with pytest.raises(ValueError, match=message):
        generator.model.generate(
            torch.tensor([[5, 6, 7]]), custom_generate=pause_generate, max_new_tokens=4, **settings
        )


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"decoding": {"limit": 3}},
            "pause.decoding.limit: expected pause.decoding.entropy or pause.decoding.req",
        ),
        ({"decoding": {"every": -1}}, "pause.decoding.every: expected a whole number, 0 or more, got -1"),
        ({"decoding": {"entropy": 1.0, "limit": 3}, "requests": 2}, "pause.requests: expected no pause.decoding.limit"),
    ],
)
def test_wrong_options_of_the_configuration_are_refused(generator, monkeypatch, own, message):
    monkeypatch.setattr(generator.model.config, "pause", generator.model.config.pause | own)
    with pytest.raises(ValueError, match=f"^config.json: {re.escape(message)}"):
        generator.model.generate(torch.tensor([[5, 6, 7]]), custom_generate=pause_generate, max_new_tokens=4)
