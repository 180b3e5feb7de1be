"""Chat models go in and come out as they were, but for the pause: templates, tokens, flags, and where answers end."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from support.chat_forms import FORMS, tokenizer_document, write_chat_model, write_tokenizer_files
from support.prose import documents, train_model

from pause_megatron.cli import main
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import CheckpointError, PauseMegatronError
from pause_megatron.hf.export import export
from pause_megatron.hf.importing import import_folder

TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
MESSAGES = [{"role": "user", "content": "Why, fellow citizens?"}]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}


def chat_tokenizer(cls: str):
    """A byte-level BPE with markers of a chat, one token that is no marker, and a tool template beside the default."""
    import transformers

    base = transformers.Qwen2Tokenizer().train_new_from_iterator(documents(200), 500)
    tokenizer = base
    if cls != "Qwen2Tokenizer":
        tokenizer = getattr(transformers, cls)(tokenizer_object=base.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([transformers.AddedToken("<tool>", special=False, normalized=False, lstrip=True)])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side, tokenizer.model_max_length = "left", 4096
    return tokenizer


def chat_model(folder: Path, cls: str, tokenizer_cls: str, ends: list[int] | None = None) -> Path:
    """A folder as the Hub has it: the model, its tokenizer, and a generation_config.json with two ends."""
    import transformers

    tokenizer = chat_tokenizer(tokenizer_cls)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ 'tools: ' ~ tools }}" + TEMPLATE}
    config = getattr(transformers, f"{cls}Config")(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **SIZES
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{cls}ForCausalLM")(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends or [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.6,
        top_k=40,
        repetition_penalty=1.05,
    )
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def there_and_back(source: Path, folder: Path, **options) -> Path:
    import_folder(source, folder / "native")
    export(folder / "native", folder / "back", **options)
    return folder / "back"


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def flags(tokenizer) -> dict[int, tuple]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        index: tuple(getattr(token, name) for name in names) for index, token in tokenizer.added_tokens_decoder.items()
    }


def generation_of(folder: Path) -> dict:
    from transformers import GenerationConfig

    found = GenerationConfig.from_pretrained(str(folder)).to_dict()
    return {key: value for key, value in found.items() if key not in ("transformers_version", "_from_model_config")}


@pytest.mark.parametrize("name", FORMS)
def test_a_chat_model_comes_back_equal_but_for_the_pause(tmp_path, name):
    source = write_chat_model(tmp_path / "hf", FORMS[name])
    back = there_and_back(source, tmp_path, finetuned_pauses=3)
    before, after = tokenizer_of(source), tokenizer_of(back)
    pause = after.convert_tokens_to_ids("<pause>")
    own = before.chat_template if isinstance(before.chat_template, dict) else {"default": before.chat_template}
    assert after.chat_template == own | {"pause": after.chat_template["pause"]}
    assert next(iter(after.chat_template)) == "default"  # which some servers take without being told
    kept, written = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (source, back))
    assert written.get("chat_template") == kept.get("chat_template")
    for template in own:
        chats = [
            each.apply_chat_template(
                MESSAGES,
                chat_template=template if len(own) > 1 or each is after else None,
                **{"tools": [], "add_generation_prompt": True, "tokenize": False},
            )
            for each in (before, after)
        ]
        assert chats[0] == chats[1] and before(chats[0])["input_ids"] == after(chats[1])["input_ids"]
    for text in ("a <tool_call> b<|im_end|>[INST] c", "don't  12345\r\n\tDé ▁ é", *documents(3)):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    unused = {index: token for index, token in flags(after).items() if token[0] == f"<|unused_{index}|>"}
    assert flags(after) == flags(before) | unused | {pause: ("<pause>", False, False, False, False, True)}
    # The pause has the last free row, and the rows between have names; without a free row there is one more.
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    assert pause == (rows - 1 if FORMS[name].rows else rows) and len(after) == pause + 1
    assert set(after.all_special_tokens) == {*before.all_special_tokens, "<pause>"}
    same = ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side", "model_max_length", "truncation_side")
    for attribute in (*same, "clean_up_tokenization_spaces", "model_input_names"):
        assert getattr(after, attribute) == getattr(before, attribute), attribute
    assert type(after) is type(before)
    assert generation_of(back) == generation_of(source) | {"suppress_tokens": [pause]}
    ends = before.convert_tokens_to_ids(list(FORMS[name].ends))
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == (ends if len(ends) > 1 else ends[0])


@pytest.mark.parametrize("name", FORMS)
def test_the_variant_of_a_template_ends_in_the_pauses(tmp_path, name):
    """The variant renders what the model's own template renders, then the pauses, after whatever ends the prompt."""
    from pause_megatron.hf.chat_template import with_pauses_appended

    write_tokenizer_files(tmp_path, FORMS[name], tokenizer_document(FORMS[name]))
    tokenizer, own = tokenizer_of(tmp_path), FORMS[name].template
    tokenizer.add_special_tokens({"extra_special_tokens": ["<pause>"]})
    variant = with_pauses_appended(own, 3, ["<pause>"])
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    turns = [*MESSAGES, {"role": "assistant", "content": "So."}, *MESSAGES]
    for messages, given in ((MESSAGES, {}), (turns, {"enable_thinking": False}), (MESSAGES, {"tools": [tool]})):
        given = {"return_dict": False, **given}
        prompt = tokenizer.apply_chat_template(messages, chat_template=own, add_generation_prompt=True, **given)
        pauses = [tokenizer.convert_tokens_to_ids("<pause>")] * 3
        render = functools.partial(tokenizer.apply_chat_template, messages, chat_template=variant, **given)
        assert render(add_generation_prompt=True) == prompt + pauses
        assert render(add_generation_prompt=True, pauses=1) == prompt + pauses[:1]
        assert render() == tokenizer.apply_chat_template(messages, chat_template=own, **given)
    parts = [{"type": "text", "text": "a <pause>"}]
    spelled = [{"role": "user", "content": parts}, {"role": "user", "content": "<pause>"}]
    for message, tools in ((spelled[0], None), (spelled[1], None), (MESSAGES[0], [{**tool, "name": "<pause>"}])):
        with pytest.raises(jinja2.TemplateError, match="a message spells <pause>"):
            tokenizer.apply_chat_template([message], chat_template=variant, tools=tools)


def test_an_answer_ends_where_it_ended_with_pauses_and_without(tmp_path, capsys):
    """The second end of the source ends the answer of the export, in transformers and in `generate`."""
    import transformers

    prompt = "fellow citizens"
    source = chat_model(tmp_path / "hf", "Llama", "PreTrainedTokenizerFast")
    free = there_and_back(source, tmp_path / "free")

    def answer(folder: Path, pauses: int, **options) -> list[int]:
        tokenizer, model = tokenizer_of(folder), transformers.AutoModelForCausalLM.from_pretrained(str(folder))
        inputs = tokenizer(prompt + "<pause>" * pauses, return_tensors="pt")
        settings = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0, **options}
        return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()

    unended = {pauses: answer(free, pauses, eos_token_id=None) for pauses in (0, 3)}
    assert answer(source, 0, eos_token_id=None) == unended[0] and unended[0] != unended[3]
    # Among the ends of the chat model are now tokens of these answers, which are not the tokenizer's eos.
    ends = {pauses: next(i for i in range(3, 12) if ids[i] not in ids[:i]) for pauses, ids in unended.items()}
    stops = [tokenizer_of(source).eos_token_id, *(unended[pauses][ends[pauses]] for pauses in unended)]
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": stops}))
    back = there_and_back(source, tmp_path)

    def cut(ids: list[int]) -> list[int]:
        return ids[: next(i for i, token in enumerate(ids) if token in stops) + 1]

    assert answer(source, 0) == answer(back, 0) == cut(unended[0])
    assert answer(back, 3) == cut(unended[3])
    for pauses in (0, 3):
        capsys.readouterr()
        options = ["--pauses", str(pauses), "--max-new-tokens", "12", "--json"]
        assert main(["generate", "--model", str(back), "--prompt", prompt, *options]) == 0
        completion = json.loads(capsys.readouterr().out)["completions"][0]
        text = len(cut(unended[pauses])) - 1  # the end itself is not counted
        assert (completion["finish"], completion["new_tokens"]) == ("eos", text)


def test_end_of_answer_ids_may_be_only_in_config_json(tmp_path):
    source = chat_model(tmp_path / "hf", "Llama", "PreTrainedTokenizerFast")
    ends = json.loads((source / "generation_config.json").read_text())["eos_token_id"]
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    import_folder(source, tmp_path / "native")
    kept = load_tokenizer(tmp_path / "native" / "tokenizer").companions["generation_config.json"]
    assert json.loads(kept)["eos_token_id"] == ends


def test_the_files_go_through_a_corpus_and_a_checkpoint(tmp_path):
    """What `prepare` keeps beside a corpus is what a run writes into its checkpoints."""
    source = chat_model(tmp_path / "hf", "Llama", "PreTrainedTokenizerFast")
    import_folder(source, tmp_path / "native")
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(20)))
    given = ["--input", str(tmp_path / "s.jsonl"), "--output", str(tmp_path / "c"), "--workers", "1"]
    assert main(["prepare", "--tokenizer", str(tmp_path / "native" / "tokenizer"), *given]) == 0
    imported, kept = load_tokenizer(tmp_path / "native" / "tokenizer"), load_tokenizer(tmp_path / "c.tokenizer")
    assert {"generation_config.json", "chat_template.jinja", "chat_template.tool_use.jinja"} <= set(imported.companions)
    assert kept.companions == imported.companions and kept.fingerprint == imported.fingerprint
    # A corpus of the source's own tokenizer belongs to no model yet: how a model generates is not taken over.
    assert set(load_tokenizer(source).companions) == set(imported.companions) - {"generation_config.json"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("generation_config.json", '{"eos_token_id": [1, 99999]}', r"eos_token_id .*: expected ids below the \d+ rows"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("generation_config.json", "[", "expected JSON"),
        ("tokenizer_config.json", "[1]", "expected a JSON object"),
        ("special_tokens_map.json", '"x"', "expected a JSON object"),
        ("additional_chat_templates/a b.jinja", "", "expected a chat template's name"),
        ("additional_chat_templates/x.jinja/y", "", "expected a file"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "../x", "template": ""}]}', "expected names of letters"),
        ("tokenizer_config.json", '{"chat_template": [{"template": ""}]}', "expected text, or a list of entries"),
        ("tokenizer_config.json", '{"chat_template": 5}', "expected text, or a list of entries"),
    ],
)
def test_files_that_cannot_be_carried_are_refused(tmp_path, name, content, expected):
    source = chat_model(tmp_path / "hf", "Llama", "PreTrainedTokenizerFast")
    if name == "tokenizer_config.json":  # whose templates count where there is no file
        (source / "chat_template.jinja").unlink()
        shutil.rmtree(source / "additional_chat_templates")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(content)
    with pytest.raises(PauseMegatronError, match=expected):
        import_folder(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_template_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    source = chat_model(tmp_path / "hf", "Llama", "PreTrainedTokenizerFast")
    (source / "additional_chat_templates" / "evil.jinja").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        import_folder(source, tmp_path / "native")


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_after_a_sentencepiece_model_are_not_lost_silently(tmp_path, where):
    source = chat_model(tmp_path / "hf", "Llama", "PreTrainedTokenizerFast")
    (source / "tokenizer.json").unlink()
    train_model(source / "tokenizer.model", vocab_size=450)
    added = {"<|im_end|>": 451} if where == "added_tokens.json" else {"added_tokens_decoder": {"451": {"content": "x"}}}
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (source / name).write_text(json.dumps(added if name == where else {}))
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json, as tokens were added after the 450 pieces"):
        import_folder(source, tmp_path / "native")
