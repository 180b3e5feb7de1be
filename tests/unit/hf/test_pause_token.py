"""`<pause>` for a transformers model: the new row, unchanged weights, and the saved folder."""

from __future__ import annotations

import peft
import pytest
import torch
from support.tiny_llama import byte_level_tokenizer, llama, sentencepiece_tokenizer
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.errors import ConfigError
from pause_megatron.hf.loss import PauseLoss
from pause_megatron.hf.pause_token import add_pause_token
from pause_megatron.inference import load
from pause_megatron.model.init import pause_row


@pytest.fixture
def tokenizer(tmp_path):
    return sentencepiece_tokenizer(tmp_path / "tokenizer", pause=False)


def _row(name: str, matrix: torch.Tensor, index: int = 0, seed: int = 1234) -> torch.Tensor:
    text = matrix.detach()[:600].double()
    return pause_row(seed, name, index, text.mean(0).float(), text.std(0, correction=0).float())


@pytest.mark.parametrize("tied", [False, True])
def test_the_row_is_drawn_like_a_text_row_and_text_rows_stay(tokenizer, tied):
    model = llama(600, pauses=0, tie_word_embeddings=tied)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.lm_head)]
    assert add_pause_token(tokenizer, model) == range(600, 601)
    after = [model.get_input_embeddings().weight, model.lm_head.weight]
    assert (after[0] is after[1]) == tied and model.config.vocab_size == 601
    for name, old, new in zip(VOCABULARY, before, after, strict=True):
        assert new.shape == (601, 32) and torch.equal(new[:600], old)
        torch.testing.assert_close(new[600].detach(), _row(VOCABULARY[0] if tied else name, old))
    assert tokenizer.encode("<pause>", add_special_tokens=False) == [600]
    again = after[0].detach().clone()
    assert add_pause_token(tokenizer, model, seed=7) == range(600, 601)  # there already: left alone
    assert torch.equal(model.get_input_embeddings().weight, again)


def test_rows_that_only_pad_the_vocabulary_are_used_and_do_not_count(tokenizer):
    model = llama(640, pauses=0)
    with torch.no_grad():
        model.lm_head.weight[600:] = 1e6
    assert add_pause_token(tokenizer, model, embeddings=2) == range(600, 602)
    weight = model.lm_head.weight.detach()
    assert weight.shape[0] == 640 and (weight[602:] == 1e6).all()
    for index in range(2):
        torch.testing.assert_close(weight[600 + index], _row(VOCABULARY[1], weight, index))


def test_a_further_pause_vector_leaves_the_learned_one_unchanged(tokenizer):
    model = llama(600, pauses=0)
    add_pause_token(tokenizer, model)
    learned = model.lm_head.weight.detach()[600].clone()
    assert add_pause_token(tokenizer, model, embeddings=2) == range(600, 602)
    assert torch.equal(model.lm_head.weight.detach()[600], learned)
    assert model.config.pause["ids"] == [600, 601] and model.config.pause["tokens"] == ["<pause>", "<pause_1>"]


def test_a_saved_model_pauses_in_generate_and_never_emits_pauses(tmp_path):
    tokenizer, model = byte_level_tokenizer(tmp_path / "tokenizer"), llama(600, pauses=0, eos_token_id=None)
    size = len(tokenizer)  # has <pause> already, as its last token
    model.resize_token_embeddings(size - 1, mean_resizing=False)
    (pause,) = add_pause_token(tokenizer, model)
    assert pause == size - 1
    with torch.no_grad():
        model.lm_head.weight[pause] = 100 * model.lm_head.weight[:pause].abs().max()  # it would like to
    for part in (tokenizer, model):
        part.save_pretrained(str(tmp_path / "out"))
    assert load(tmp_path / "out").pause.ids == range(pause, size)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert loaded.config.pause["m_ft"] is None
    prompt = AutoTokenizer.from_pretrained(str(tmp_path / "out"))("We the<pause>", return_tensors="pt")
    assert (prompt["input_ids"] == pause).sum() == 1
    assert (loaded.generate(**prompt, max_new_tokens=8, do_sample=False)[0, -8:] != pause).all()


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_the_row_if_it_is_listed(tokenizer, tied):
    """As hf/README.md says."""
    model = llama(600, pauses=0, tie_word_embeddings=tied)
    pause_ids = add_pause_token(tokenizer, model)
    before = model.get_input_embeddings().weight.detach().clone()
    options = {"trainable_token_indices": list(pause_ids)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **options))
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=1e-2)
    ids = torch.randint(3, 600, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 5:8] = pause_ids.start
    total, count = PauseLoss(pause_ids).sum(adapted(ids).logits, ids)
    (total / count).backward()
    optimizer.step()
    after = adapted.merge_and_unload().get_input_embeddings().weight.detach()
    assert torch.equal(after[:600], before[:600]) and not torch.allclose(after[600], before[600], atol=1e-3)


def test_what_would_go_wrong_later_is_refused(tokenizer):
    tokenizer.add_tokens([AddedToken("<pause>", special=False)])
    with pytest.raises(ConfigError, match=r"expected its token '<pause>' \(id 600\) to be special.*turn into pauses"):
        add_pause_token(tokenizer, llama(601, pauses=0))
    with pytest.raises(ConfigError, match=r"whole embedding in this process, got one that is empty.*ZeRO-3"):
        add_pause_token(tokenizer, llama(601, pauses=0).to("meta"))
    with pytest.raises(ConfigError, match="embeddings: expected 1 or more, got 0"):
        add_pause_token(tokenizer, llama(601, pauses=0), embeddings=0)
