"""Weight initialization that depends only on the seed and the parameter's name, not on ranks, padding or order.

Every matrix is drawn whole on the model's device, in fp32, from a generator of its own, and sharded afterwards. A CPU
and a CUDA device draw different numbers from the same seed.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from pause_megatron.model.vocabulary import Vocabulary
from pause_megatron.seeds import torch_seed


def initialize_weights(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    layers: int,
    vocabulary: Vocabulary,
    rank: int,
    ranks: int,
) -> None:
    """Fill all parameters of a model that `build_model` made.

    Matrices are normal(0, std); those that write into the residual stream normal(0, std / sqrt(2 layers)) (GPT-2,
    Megatron-LM); norms 1; biases and auxiliary heads 0. A pause row is normal with the mean and standard deviation of
    the text rows, per channel; padding rows are 0.

    Args:
        model: This rank's shard.
        seed: Seed of the run.
        std: Standard deviation.
        layers: Number of transformer layers that a forward pass runs through (layers times loops).
        vocabulary: Text, pause and padding rows.
        rank: Tensor-parallel rank.
        ranks: Tensor-parallel size.
    """
    for name, parameter in model.named_parameters():
        shape, draw = parameter.shape, partial(normal, seed, device=parameter.device)
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            text = draw(name, (vocabulary.text_size, shape[1]), std)
            value = _vocabulary_matrix(seed, name, vocabulary, text, shape[0] * ranks).chunk(ranks)[rank]
        elif name.endswith("linear_qkv.weight"):
            # Rows are ordered by query group (its queries, its key, its value), and a rank has whole groups.
            value = draw(name, (shape[0] * ranks, shape[1]), std).chunk(ranks)[rank]
        elif name.endswith("linear_fc1.weight"):
            # SwiGLU: a rank has its part of the gate, then its part of the up projection.
            half = (shape[0] // 2 * ranks, shape[1])
            parts = [draw(f"{name}/{part}", half, std).chunk(ranks)[rank] for part in ("gate", "up")]
            value = torch.cat(parts)
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            whole = draw(name, (shape[0], shape[1] * ranks), std / math.sqrt(2 * layers))
            value = whole.chunk(ranks, dim=1)[rank]
        elif name.endswith((".bias", "auxiliary_heads.weight")):
            value = torch.zeros(shape, device=parameter.device)
        elif parameter.dim() == 1 and "norm" in name:
            value = torch.ones(shape, device=parameter.device)
        else:
            raise ValueError(f"{name}: expected a parameter with an initialization rule, got shape {tuple(shape)}")
        with torch.no_grad():
            parameter.copy_(value)


def _vocabulary_matrix(seed: int, name: str, vocabulary: Vocabulary, text: Tensor, rows: int) -> Tensor:
    value = text.new_zeros(rows, text.shape[1])
    value[: vocabulary.text_size] = text
    mean, spread = text.mean(dim=0), text.std(dim=0, correction=0)
    for index, row in enumerate(vocabulary.pause_ids):
        value[row] = pause_row(seed, name, index, mean, spread)
    return value


def pause_row(seed: int, name: str, index: int, mean: Tensor, spread: Tensor) -> Tensor:
    """Draw the initial row of one pause in a vocabulary matrix, fp32 [width], from a key of its own.

    Args:
        seed: Seed of the run.
        name: Name of the matrix.
        index: Index of the pause, from 0 on.
        mean: Mean of the text rows, per channel, [width].
        spread: Standard deviation of the text rows, per channel, [width].
    """
    return mean + spread * normal(seed, f"{name}/pause/{index}", tuple(mean.shape), 1.0, mean.device)


def normal(seed: int, name: str, shape: tuple[int, ...], std: float, device: torch.device) -> Tensor:
    """Draw a matrix that depends on the seed and a name, fp32 [*shape].

    Args:
        seed: Seed of the run.
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        std: Standard deviation.
        device: Where it is drawn.
    """
    generator = torch.Generator(device).manual_seed(torch_seed(seed, name))
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)
