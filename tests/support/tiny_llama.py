"""Small Llama-family models with random weights, real tokenizers, and a pause token: folders as an export is."""

from __future__ import annotations

from pathlib import Path

import torch

from support.prose import train_hugging_face, train_model

PAUSE = "<pause>"


def sentencepiece_tokenizer(folder: Path, *, pause: bool = True, bos: bool = False):
    """A SentencePiece BPE tokenizer of 600 pieces as transformers holds it; `<pause>` is id 600."""
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    train_model(folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=bos, legacy=False)
    return _with_pause(tokenizer) if pause else tokenizer


def byte_level_tokenizer(folder: Path):
    """A byte-level BPE tokenizer (as of Llama 3 and Qwen2) of the same speeches."""
    from transformers import PreTrainedTokenizerFast

    train_hugging_face(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>")
    return _with_pause(tokenizer)


def llama(vocab_size: int, *, seed: int = 0, cls: str = "Llama", pauses: int = 1, **changes: object):
    """A two-layer model with grouped queries. The last `pauses` ids are the pauses; weights are large enough that
    logits differ between tokens and depend on what stands before.
    """
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2, "initializer_range": 0.2}
    config = getattr(transformers, f"{cls}Config")(vocab_size=vocab_size, **{**sizes, **changes})
    if pauses:
        first = vocab_size - pauses
        config.pause = {
            "token": PAUSE,
            "ids": list(range(first, vocab_size)),
            "m_ft": None,
            "prefix_attention": "causal",
        }
    torch.manual_seed(seed)
    return getattr(transformers, f"{cls}ForCausalLM")(config).eval()


def write_folder(folder: Path, *, m_ft: int | None = None, **changes: object) -> Path:
    """A model folder: safetensors, config.json with its "pause" entry, generation_config.json, tokenizer."""
    tokenizer = sentencepiece_tokenizer(folder)
    model = llama(len(tokenizer), **changes)
    model.config.pause["m_ft"] = m_ft
    model.generation_config.suppress_tokens = list(model.config.pause["ids"])
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def _with_pause(tokenizer):
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(PAUSE, special=True, normalized=False)], special_tokens=True)
    return tokenizer
