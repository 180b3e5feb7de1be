"""A model and batches small enough for every test, and its gradients put together from tensor-parallel shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pause_megatron.config.model_schema import LoraSection, ModelSection
from pause_megatron.config.schema import ParallelSection

TEXT_SIZE = 50
SEQ = 16
BATCH = 3


def section(**changes: object) -> ModelSection:
    """Two layers, grouped queries; head chunks that do not divide the number of rows."""
    sizes = dict(preset=None, layers=2, hidden=32, heads=4, kv_heads=4, ffn=48, tied=True, head_chunk=7)
    return ModelSection(**{**sizes, "vocab_multiple": 4, **changes})


def tiny(
    *,
    parallel: ParallelSection,
    pauses: int = 1,
    softmax: str = "keep",
    precision: str = "fp32",
    kernels: str = "plain",
    lora: LoraSection | None = None,
    given_positions: bool = False,
    **changes: object,
):
    """A PauseGPTModel of `section(**changes)` on the process groups that exist."""
    from pause_megatron.model import Vocabulary, build_model

    vocabulary = Vocabulary(TEXT_SIZE, tuple(range(TEXT_SIZE, TEXT_SIZE + pauses)))
    return build_model(
        section(**changes),
        vocabulary=vocabulary,
        sequence_length=SEQ,
        parallel=parallel,
        softmax=softmax,
        precision=precision,
        seed=5,
        kernels=kernels,
        lora=lora,
        given_positions=given_positions,
    )


def batch(kept: float, *, pauses: int = 1, seed: int = 0, size: int = BATCH) -> dict[str, Tensor]:
    """Random windows. `kept` is the share of positions that have a target; labels are 0 elsewhere.

    tokens, position_ids, labels, mask: [batch, seq]; rows, targets: [targets], in sequence-first order.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (size, SEQ)
    tokens = torch.randint(0, TEXT_SIZE + pauses, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < kept
    labels = torch.randint(0, TEXT_SIZE, shape, generator=generator) * mask
    rows = mask.t().reshape(-1).nonzero().squeeze(1)
    return {
        "tokens": tokens,
        "position_ids": torch.arange(SEQ).expand(shape).contiguous(),
        "labels": labels,
        "mask": mask,
        "rows": rows,
        "targets": labels.t().reshape(-1)[rows],
    }


def loss_of(model: nn.Module, data: dict[str, Tensor], loss_scale: float | Tensor = 1.0):
    """The head's loss for a batch."""
    return model(
        data["tokens"],
        data["position_ids"],
        target_rows=data["rows"],
        targets=data["targets"],
        loss_scale=loss_scale,
    )


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """This rank's gradients by name; the model's are cleared."""
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def whole(model: nn.Module, shards: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Tensor-parallel shards put together, padding rows cut off: the tensors of the same model at TP 1."""
    result = {}
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(shards[name]) for _ in range(group.size())]
        dist.all_gather(parts, shards[name].contiguous(), group=group)
        if not getattr(parameter, "tensor_model_parallel", False):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            result[name] = parts[0]
        elif ".linear_fc1." in name:
            result[name] = torch.cat([half for k in (0, 1) for half in (p.chunk(2)[k] for p in parts)])
        elif parameter.partition_dim == 1:
            result[name] = torch.cat(parts, dim=1)
        else:
            joined = torch.cat(parts)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                live = model.vocabulary.size
                assert not joined[live:].any(), f"{name} has padding rows that are not zero"
                joined = joined[:live]
            result[name] = joined
    return result


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest |got - expected| of any tensor, relative to that tensor's largest magnitude (absolute if all zero)."""
    assert got.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        worst = max(worst, float((got[name] - value).abs().max()) / scale)
    return worst
