"""P3: a training step with pauses against the plain megatron-core step, same raw tokens (target: <= 1.00).

python -m tests.benchmarks.step [--layers 4] [--hidden 256] [--vocabulary 8192] [--windows 4] [--rounds 9]

Forward, backward, clipping and fused AdamW, fp32, one thread, 2048-token windows of which 205 tokens are pauses. The
plain step is a stock GPTModel with the same layers and the same attention core (megatron-core's own needs CUDA), its
output layer and cross-entropy over all positions, masked afterwards.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment

from pause_megatron.config.model_schema import ModelSection
from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import initialize
from pause_megatron.model import Vocabulary, build_model, parameter_groups, transformer_config
from pause_megatron.model.layers import block_spec

SEQ = 2048
PAUSES = 205


def training_step(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """A step of `model` with an optimizer of its own; `forward` gives the scalar loss."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def step() -> None:
        forward().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """The plain step and ours, from the same weights, on the same windows."""
    from megatron.core.models.gpt import GPTModel

    section = ModelSection(
        preset=None,
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.hidden // 64,
        kv_heads=arguments.hidden // 64,
        ffn=arguments.hidden * 8 // 3 // 16 * 16,
        tied=True,
    )
    parallel = ParallelSection()
    vocabulary = Vocabulary(arguments.vocabulary - 1, (arguments.vocabulary - 1,))
    ours = build_model(section, vocabulary=vocabulary, sequence_length=SEQ, parallel=parallel)
    plain = GPTModel(
        transformer_config(check_shape(section, parallel, SEQ), parallel, "fp32"),
        block_spec(section.layers),
        vocabulary.padded(section.vocab_multiple, 1),
        SEQ,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=section.rope_base,
    )
    plain.load_state_dict(ours.state_dict())

    shape = (arguments.windows, SEQ)
    pause = torch.rand(shape).argsort(dim=1) < PAUSES
    tokens = torch.randint(0, vocabulary.text_size, shape).masked_fill(pause, vocabulary.text_size)
    positions = torch.arange(SEQ).expand(shape)
    mask = ~torch.cat([pause[:, 1:], torch.zeros(arguments.windows, 1, dtype=torch.bool)], dim=1)
    labels = torch.randint(0, vocabulary.text_size, shape) * mask
    rows = mask.t().reshape(-1).nonzero().squeeze(1)
    targets = labels.t().reshape(-1)[rows]
    count = len(rows)

    def plain_loss() -> Tensor:
        return (plain(tokens, positions, None, labels=labels) * mask).sum() / count

    def pause_loss() -> Tensor:
        return ours(tokens, positions, target_rows=rows, targets=targets, loss_scale=1 / count).loss

    return {"plain megatron-core": training_step(plain, plain_loss), "with pauses": training_step(ours, pause_loss)}


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=4, help="windows of 2048 tokens in a step")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, at least 7")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with initialize(ParallelSection(), device="cpu"):
        timings = compare(contestants(arguments), rounds=arguments.rounds)
    plain, ours = timings["plain megatron-core"], timings["with pauses"]
    raw = arguments.windows * SEQ
    text = arguments.windows * (SEQ - PAUSES)
    print(
        f"P3 step with pauses / plain megatron-core step: {ours.ratio:.3f} [{ours.low:.3f} .. {ours.high:.3f}] "
        f"(target <= 1.00); {raw / ours.seconds:.0f} raw and {text / ours.seconds:.0f} text tokens/s against "
        f"{raw / plain.seconds:.0f} raw tokens/s"
    )
    print(
        f"   {arguments.layers} layers, hidden {arguments.hidden}, vocabulary {arguments.vocabulary}, "
        f"{arguments.windows} x {SEQ} tokens, {arguments.rounds} rounds; {environment('torch', 'megatron-core')}"
    )


if __name__ == "__main__":
    main()
