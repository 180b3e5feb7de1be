"""A model whose weights come from a file, one batch, its loss and gradients: the same on any device.

As a program it computes them in fp32 on a CPU, for a process that has a GPU: the package does not mix the two.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from torch import Tensor

TEXT_SIZE = 32_000
LOSS_SCALE = 1e-3


def model_of(overrides: list[str]):
    """A model of the keys, with its initial weights, on the device that there is. Process groups must exist."""
    from pause_megatron.config.load import load
    from pause_megatron.train.run import new_model

    tokenizer = SimpleNamespace(vocab_size=TEXT_SIZE)
    data = SimpleNamespace(tokenizer=tokenizer, pause_ids=[TEXT_SIZE], auxiliary_heads=0)
    return new_model(load(overrides=overrides), data)


def batch_of(samples: int, length: int) -> dict[str, Tensor]:
    """Random windows on the CPU; nine in ten positions have a target."""
    generator = torch.Generator().manual_seed(11)
    rows = (torch.rand(length * samples, generator=generator) < 0.9).nonzero().squeeze(1)
    return {
        "input_ids": torch.randint(0, TEXT_SIZE + 1, (samples, length), generator=generator),
        "position_ids": torch.arange(length).expand(samples, length).contiguous(),
        "target_rows": rows,
        "targets": torch.randint(0, TEXT_SIZE, rows.shape, generator=generator),
    }


def loss_and_gradients(model, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean loss in nats under "loss", and fp32 gradients by name, all on the CPU."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    device = next(model.parameters()).device
    out = model(**{name: value.to(device) for name, value in batch.items()}, loss_scale=LOSS_SCALE)
    out.loss.backward()
    found = {name: parameter.grad.float().cpu() for name, parameter in model.named_parameters()}
    return {"loss": out.sum.detach().cpu().double() / out.count, **found}


def main(source: str, target: str) -> None:
    """Read keys, weights and batch from a file; write what `loss_and_gradients` says to another."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    given = torch.load(source, weights_only=True)
    with initialize(ParallelSection()):
        model = model_of([*given["overrides"], "engine.precision=fp32", "engine.kernels=plain"])
        torch.save(loss_and_gradients(model, given["weights"], given["batch"]), target)


if __name__ == "__main__":
    main(*sys.argv[1:])
