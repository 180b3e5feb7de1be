"""Folders of small chat models in the forms in which the families publish theirs: tokenizer, templates, ends of answers.

The files are written by hand, since `save_pretrained` of today's transformers would bring them into one form.
"""

# ruff: noqa: E501 (templates and a regular expression, as the families have them)

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.prose import documents

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PLAIN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = 'Be brief.' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' ~ system ~ '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' ~ message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
CHATML = """{%- if tools %}{{- '<|im_start|>system\\n# Tools' }}{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}{%- set ns.count = ns.count + 1 %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}
"""
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if message['role'] == 'user' %}{{- '[INST] ' ~ message['content'] ~ '[/INST]' }}
{%- else %}{{- ' ' ~ message['content'] ~ eos_token }}{%- endif %}{%- endfor %}"""
OLMO = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>
' + message['content'] + '
' }}{% else %}{{ '<|assistant|>
' + message['content'] + eos_token + '
' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class Form:
    """How a family publishes a chat model.

    Attributes:
        template: Its chat template.
        special: Added special tokens, in the order of their ids.
        ends: Names of the ends of answers in generation_config.json.
        roles: Special tokens by role.
        tokenizer_class: The class that tokenizer_config.json names.
        model: The model's class in transformers, without Config and ForCausalLM.
        rows: Rows of the embedding beyond the tokenizer's ids.
        first: Whether the special tokens have the first ids instead of the last ones.
        hole: Ids that are left out before the last special token. The library then gives it the next id, except with:
        in_vocabulary: Whether the added tokens are in the vocabulary too, with their ids.
        ordinary: Added tokens that are not special.
        where: Where the template is: "config" (a text), "list" (of named ones) or "file".
        config: Further keys of tokenizer_config.json.
        generation: Further keys of generation_config.json.
        digits: Repetition of digits in the pre-tokenizer; "" for GPT-2's pre-tokenizer.
        ignore_merges: The option of Llama 3's BPE.
        nfc: Whether the text is normalized, as by Qwen.
        bos: Whether the post-processor puts the BOS before a text.
        vocabulary_files: Whether vocab.json and merges.txt are beside tokenizer.json.
        special_map: Whether there is a special_tokens_map.json.
        names: Whether the configuration lists additional_special_tokens.
    """

    template: str
    special: Sequence[str]
    ends: Sequence[str]
    roles: dict[str, str]
    tokenizer_class: str
    model: str = "Llama"
    rows: int = 0
    first: bool = False
    hole: int = 0
    in_vocabulary: bool = False
    ordinary: Sequence[str] = ()
    where: str = "config"
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    digits: str = ""
    ignore_merges: bool = False
    nfc: bool = False
    bos: bool = False
    vocabulary_files: bool = False
    special_map: bool = True
    names: bool = False


_HEADERS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
FORMS = {
    "llama3": Form(
        LLAMA, _HEADERS, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"}, "PreTrainedTokenizerFast",
        digits="{1,3}", ignore_merges=True, bos=True, generation=_SAMPLING,
        config={"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": True},
    ),
    "qwen2.5": Form(
        CHATML, _CHATML, ("<|im_end|>", "<|endoftext|>"), {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
        "Qwen2Tokenizer", "Qwen2", rows=60, digits="", nfc=True, vocabulary_files=True, special_map=False, names=True,
        ordinary=("<tool_call>", "</tool_call>"), generation=_SAMPLING | {"repetition_penalty": 1.1, "top_k": 20},
        config={"bos_token": None, "unk_token": None, "split_special_tokens": False, "add_prefix_space": False},
    ),
    "qwen3": Form(
        CHATML, _CHATML, ("<|im_end|>", "<|endoftext|>"), {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
        "Qwen2Tokenizer", "Qwen3", rows=60, digits="", nfc=True, vocabulary_files=True, special_map=False, names=True,
        ordinary=("<tool_call>", "</tool_call>", "<think>", "</think>"), generation=_SAMPLING | {"top_k": 20},
        hole=2, in_vocabulary=True, config={"bos_token": None, "unk_token": None, "add_bos_token": False},
    ),
    "mistral": Form(
        MISTRAL, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), ("</s>",),
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, "LlamaTokenizer", "Mistral", first=True, bos=True, where="list",
        config={"legacy": False, "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True},
    ),
    "smollm2": Form(
        CHATML, (*_CHATML, "<repo_name>"), ("<|im_end|>",),
        {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}, "GPT2Tokenizer",
        first=True, vocabulary_files=True, names=True, config={"vocab_size": 49152},
    ),
    "olmo2": Form(
        OLMO, ("<|extra_id_0|>", "<|endoftext|>", "<|pad|>"), ("<|endoftext|>",),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>", "unk": "<|endoftext|>"}, "GPT2Tokenizer",
        "Olmo2", rows=30, hole=3, digits="{1,3}", vocabulary_files=True, where="file",
    ),
}  # fmt: skip


def _split(digits: str) -> Any:
    import tokenizers
    from tokenizers import pre_tokenizers as pre

    split = pre.Split(tokenizers.Regex(_GPT4.replace("{DIGITS}", digits)), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(form: Form) -> Any:
    """A byte-level BPE as of GPT-2, Llama 3 or Qwen."""
    import tokenizers
    from tokenizers import decoders, models, trainers
    from tokenizers import pre_tokenizers as pre

    own = form.tokenizer_class == "GPT2Tokenizer" and not form.digits
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=form.ignore_merges))
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if own else _split(form.digits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = tokenizers.normalizers.NFC() if form.nfc else None
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=list(form.special) if form.first else [],
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(100), trainer)
    return tokenizer


def _sentencepiece_like(form: Form) -> Any:
    """A BPE with bytes for unknown characters, as transformers converts Llama 2's and Mistral's SentencePiece models."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre.Metaspace()
    special = [*form.special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        documents(100), trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=special)
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][: len(form.special)]  # bytes are pieces, not added tokens
    document["pre_tokenizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def tokenizer_document(form: Form) -> dict[str, Any]:
    """Content of the form's tokenizer.json."""
    tokenizer = _sentencepiece_like(form) if form.model == "Mistral" else _byte_level(form)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    if not form.first:
        names = [*form.special[:-1], *form.ordinary, form.special[-1]]
        start = len(document["model"]["vocab"])
        ids = [*range(start, start + len(names) - 1), start + len(names) - 1 + form.hole]
        document["added_tokens"] = [
            {"id": index, "content": name, **_PLAIN_FLAGS, "special": name in form.special}
            for index, name in zip(ids, names, strict=True)
        ]
        if form.in_vocabulary:
            document["model"]["vocab"] |= dict(zip(names, ids, strict=True))
    if form.bos:
        token = form.roles["bos"]
        ids = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
        single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]}}
        document["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
        }  # fmt: skip
    return document


def write_chat_model(folder: Path, form: Form, positions: int = 128) -> Path:
    """A folder of the form with a small random model."""
    import torch
    import transformers

    document = tokenizer_document(form)
    ids = {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    top = max([*ids.values(), *document["model"]["vocab"].values()])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": positions, "initializer_range": 0.3, "head_dim": 8}
    if form.model in ("Qwen2", "Olmo2"):
        del sizes["head_dim"]
    tokens = {f"{role}_token_id": ids[name] for role, name in form.roles.items() if role != "unk"}
    tokens = {"bos_token_id": None, "pad_token_id": None} | tokens
    torch.manual_seed(3)
    config = getattr(transformers, f"{form.model}Config")(vocab_size=top + 1 + form.rows, **sizes, **tokens)
    model = getattr(transformers, f"{form.model}ForCausalLM")(config)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(str(folder))
    ends = [ids[name] for name in form.ends]
    _write(folder / "generation_config.json", {
        **{key: value for key, value in tokens.items() if value is not None},
        "eos_token_id": ends if len(ends) > 1 else ends[0], **form.generation, "transformers_version": "4.45.0",
    })  # fmt: skip
    write_tokenizer_files(folder, form, document)
    return folder


def write_tokenizer_files(folder: Path, form: Form, document: dict[str, Any]) -> None:
    """The files of the form's tokenizer, of which `document` is tokenizer.json."""
    _write(folder / "tokenizer.json", document)
    roles = {f"{role}_token": name for role, name in form.roles.items()}
    decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in document["added_tokens"]}
    config = {"added_tokens_decoder": decoder, "tokenizer_class": form.tokenizer_class, "model_max_length": 4096}
    config |= {"clean_up_tokenization_spaces": False, **form.config, **roles}
    if form.names:
        config["additional_special_tokens"] = list(form.special)
    if form.where == "file":
        (folder / "chat_template.jinja").write_text(form.template)
    elif form.where == "list":
        named = {"default": form.template, "tool_use": "{{ 'tools: ' ~ (tools | tojson) }}" + form.template}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    else:
        config["chat_template"] = form.template
    _write(folder / "tokenizer_config.json", config)
    if form.special_map:
        _write(folder / "special_tokens_map.json", {
            key: {"content": name, **_PLAIN_FLAGS} for key, name in roles.items()
        })  # fmt: skip
    if form.vocabulary_files:
        _write(folder / "vocab.json", document["model"]["vocab"])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        _write(folder / "added_tokens.json", {entry["content"]: entry["id"] for entry in document["added_tokens"]})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
