"""What an export states about pauses within answers, and what its card says of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pause_megatron.config.families import FAMILIES
from pause_megatron.config.load import load
from pause_megatron.hf.export import pause_record
from pause_megatron.hf.model_card import model_card
from pause_megatron.inference import DecodingPauses
from pause_megatron.inference.prompts import PauseInfo

AFTER = "task.name=gsm8k finetune.answer_placement=after"
CASES = [
    # overrides, "decoding", another entry, placement that decoding lacks, words of the card
    ("pause.placement=after", {"after": "[.,:;!?]", "count": 1, "in_prompt": True}, {}, "", "'[.,:;!?]'. The call"),
    ("pause.placement=after pause.rate=0", {}, {}, "", "inputs = tokenizer(prompt, return_tensors"),
    ("task.name=gsm8k finetune.pauses=0", {}, {}, "", "inputs = tokenizer(prompt, return_tensors"),
    ("task.name=gsm8k finetune.pauses=3", {}, {}, "", 'inputs = tokenizer(prompt + "<pause>" * 3, return_tensors'),
    ("pause.placement=isolated", {}, {}, "", 'inputs = tokenizer(prompt + "<pause>" * 10, return_tensors'),
    ("pause.placement=every pause.run=2", {"every": 1, "count": 2, "in_prompt": True}, {}, "", "2 after each token of"),
    ("pause.placement=before", {}, {"placement": "before"}, "before", "placed pauses by `before`, which no decoding"),
    ("pause.placement=before pause.pattern=a", {}, {}, "before", "| placement | `before` 'a' |"),
    ("pause.placement=uniform", {}, {"placement": "uniform"}, "", "need not gain"),
    (
        f"{AFTER} pause.run=3 pause.pattern=[0-9]",
        {"after": "[0-9]", "count": 3},
        {},
        "",
        "3 after each token of answers",
    ),
    (f"{AFTER} pause.pattern=''", {"after": "(?:)", "count": 1}, {}, "", "finetuned with pauses on gsm8k"),
    (f"{AFTER} finetune.answer_rate=0", {}, {"answer_placement": None}, "", "finetuned without pauses on gsm8k"),
    (f"{AFTER} objective=cyb_anytime pause.run=2", {}, {"requests": 2, "answer_placement": None}, "", "up to 2 before"),
    ("task.name=gsm8k pause.placement=before", {}, {"answer_placement": None}, "", "finetuned without pauses"),
    (
        *("task.name=gsm8k finetune.answer_placement=bernoulli", {}, {"answer_placement": "bernoulli"}, "bernoulli"),
        "placed pauses by `bernoulli`, which no decoding",
    ),
]


@pytest.mark.parametrize(("overrides", "decoding", "others", "lacking", "words"), CASES)
def test_generation_has_the_places_of_training_or_the_card_says_so(overrides, decoding, others, lacking, words):
    given = overrides.split() if "task.name" in overrides else ["data.prefix=x", *overrides.split()]
    config = load(overrides=given)
    manifest = SimpleNamespace(progress={})
    checkpoint = SimpleNamespace(config=config, pause_ids=range(600, 601), reader=SimpleNamespace(manifest=manifest))
    record = pause_record(checkpoint, ["<pause>"], None)
    assert record.get("decoding", {}) == decoding
    assert {name: record.get(name) for name in others} == others
    tokenizer = SimpleNamespace(get_vocab=dict, all_special_ids=[], added_tokens_decoder={})
    info = PauseInfo.of(SimpleNamespace(pause=record, vocab_size=601), tokenizer)
    asked = {"requests": True, "limit": 2} if "requests" in record else {}
    assert info.decoding == DecodingPauses(**decoding, **asked)
    assert info.not_decoded == lacking
    given = {"family": FAMILIES["llama"], "progress": {}, "step": 1, "live_rows": 601, "dtype": "fp32"}
    card = model_card(config, pause=record, **given)
    assert words in card and ("no decoding does" in card) == bool(lacking)
    assert ("pause_tokenizer=tokenizer" in card) == ("after" in decoding)
    shared = model_card(config, pause=record | {"positions": "shared"}, **given)
    assert "** 0" not in shared.replace('"<pause>" *', "**") and ("import torch" in shared) == (
        "pauses=0" not in shared
    )
    assert ("training drew some of these" in card) == ("after" in decoding)
