"""Adding `<pause>` to a transformers model and its tokenizer, before training with pauses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.errors import ConfigError
from pause_megatron.hf.tokenizer import pause_entry, pause_names
from pause_megatron.model.init import pause_row


def add_pause_token(tokenizer: Any, model: Any, *, embeddings: int = 1, seed: int = 1234) -> range:
    """Add `<pause>` to a tokenizer and its rows to a causal language model.

    A new row is drawn from a normal distribution with the mean and standard deviation of the text rows, per channel, in
    the embedding and in an untied output layer, as by `import-hf`. A token with a row in the model is not changed. The
    model's configuration gets a "pause" entry, which `pause-megatron generate` and `evaluate` read. Its generation
    configuration suppresses the pauses. Call this before Trainer, PEFT or an optimizer wrap the model.

    Args:
        tokenizer: A transformers tokenizer; changed in place.
        model: A transformers model; changed in place.
        embeddings: Number of distinct pause vectors, K, used in turn within a run of pauses.
        seed: Seed of the new rows.

    Returns:
        The K pause ids.

    Raises:
        ConfigError: Ordinary text is encoded to the tokenizer's `<pause>`, the ids are not consecutive, or the model's
            matrices are sharded or empty in this process (ZeRO-3, the meta device), or its pauses share positions.
    """
    if (getattr(model.config, "pause", None) or {}).get("positions") == "shared":
        raise ConfigError(
            "model: expected pauses with positions of their own, got pause.positions=shared (config.json): samples for "
            "transformers have no such positions; train it with pause-megatron finetune"
        )
    if embeddings < 1:
        raise ConfigError(f"embeddings: expected 1 or more, got {embeddings}")
    weights = [model.get_input_embeddings().weight]
    _check_whole(weights[0])
    rows = weights[0].shape[0]
    pause_ids, added = _token_ids(tokenizer, pause_names(embeddings))
    if pause_ids.stop > rows:
        model.resize_token_embeddings(pause_ids.stop, mean_resizing=False)
    _fill_rows(
        model, pause_ids, {*added, *range(rows, pause_ids.stop)}, text_rows=min(pause_ids.start, rows), seed=seed
    )
    _describe(model, tokenizer, pause_ids)
    return pause_ids


def _check_whole(weight: Tensor) -> None:
    if weight.is_meta or not weight.numel() or hasattr(weight, "ds_id"):
        raise ConfigError(
            "model: expected its whole embedding in this process, got one that is empty or sharded (meta device, "
            "ZeRO-3). Add the token first: load the model without a DeepSpeed configuration, call add_pause_token, "
            "save model and tokenizer, and train from that folder"
        )


def _token_ids(tokenizer: Any, names: tuple[str, ...]) -> tuple[range, list[int]]:
    """Return the ids of the pause tokens, which are added where missing, and the ids of the added ones."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name in names:
        if name in known and name not in special:
            raise ConfigError(
                f"tokenizer: expected its token {name!r} (id {known[name]}) to be special, got one that ordinary text "
                f"is encoded to: text that spells {name} would turn into pauses. Add it with special=True"
            )
    missing = [name for name in names if name not in known]
    added = [AddedToken(name, special=True, normalized=False) for name in missing]
    tokenizer.add_tokens(added, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(names))
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ConfigError(f"tokenizer: expected {', '.join(names)} at consecutive ids, got {ids}")
    return range(ids[0], ids[0] + len(ids)), tokenizer.convert_tokens_to_ids(missing)


@torch.no_grad()
def _fill_rows(model: Any, pause_ids: range, new: set[int], *, text_rows: int, seed: int) -> None:
    if not new:
        return
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    matrices = [layer.weight for layer in layers if layer is not None]
    if len(matrices) == 2 and matrices[0] is matrices[1]:
        matrices.pop()
    # Named as by import-hf, so that a seed gives the same rows.
    for name, matrix in zip(VOCABULARY, matrices, strict=False):
        variance, mean = torch.var_mean(matrix[:text_rows].float(), dim=0, correction=0)
        for index, row in enumerate(pause_ids):
            if row in new:
                matrix[row] = pause_row(seed, name, index, mean.cpu(), variance.sqrt().cpu()).to(matrix)


def _describe(model: Any, tokenizer: Any, pause_ids: range) -> None:
    """Set the entries for pauses that an export has in config.json and generation_config.json."""
    names = tokenizer.convert_ids_to_tokens(list(pause_ids))
    known = getattr(model.config, "pause", None) or {"m_ft": None}
    model.config.pause = {**known, **pause_entry(names, pause_ids)}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *pause_ids})
