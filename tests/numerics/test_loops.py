"""A looped model is the unrolled plain model whose layers share weights: logits, loss, gradients, ZeRO."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_model import batch, distance, loss_of, take_gradients, tiny

from pause_megatron.config.presets import flops_per_token, layer_parameters, parameters
from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.errors import ConfigError

LOOPS = 3
# Layers, those that repeat, and the order of a forward pass.
WHOLE = ({"layers": 2, "loops": LOOPS}, (0, 1, 0, 1, 0, 1))
PART = ({"layers": 4, "loops": LOOPS, "loop_layers": "1..2"}, (0, 1, 2, 1, 2, 1, 2, 3))
LAST = ({"layers": 2, "loops": LOOPS, "loop_layers": "1"}, (0, 1, 1, 1))


def copies(name: str, order: tuple[int, ...]) -> list[str]:
    """The parameters of the plain model that copy a looped one's."""
    head, _, rest = name.partition("decoder.layers.")
    if not rest:
        return [name]
    index, _, rest = rest.partition(".")
    places = [place for place, number in enumerate(order) if number == int(index)]
    return [f"{head}decoder.layers.{place}.{rest}" for place in places]


def looped_and_unrolled(tensor: int, sequence: bool) -> list[tuple]:
    """Distances of logits, losses, and gradients from the unrolled model's, for tied and recomputed models."""
    from pause_megatron.distributed import initialize

    found = []
    with initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu"):
        cases = [*product((WHOLE, PART), (True, False), ("none", "full")), (LAST, True, "full")]
        for (sizes, order), tied, recompute in cases:
            parallel = ParallelSection(tensor=tensor, sequence=sequence, recompute=recompute)
            looped = tiny(parallel=parallel, tied=tied, **sizes)
            plain = tiny(parallel=parallel, tied=tied, layers=len(order))
            theirs = dict(plain.named_parameters())
            weights = dict(looped.named_parameters())
            with torch.no_grad():
                for name, weight in weights.items():
                    for copy in copies(name, order):
                        theirs[copy].copy_(weight)
            data = batch(0.7)
            logits = [model.logits(data["tokens"], data["position_ids"]) for model in (looped, plain)]
            losses = [loss_of(model, data).loss for model in (looped, plain)]
            for loss in losses:
                loss.backward()
            got, parts = take_gradients(looped), take_gradients(plain)
            summed = {name: sum(parts[copy] for copy in copies(name, order)) for name in weights}
            assert len(theirs) > len(weights) and looped.state_dict().keys() == weights.keys()
            found.append((torch.equal(*logits), torch.equal(*losses), distance(got, summed)))
    return found


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_it_is_the_unrolled_model_and_its_gradient_the_sum_of_the_copies(tensor, sequence):
    for found in run_on_ranks(tensor, looped_and_unrolled, tensor, sequence):
        assert len(found) == 9
        for same_logits, same_loss, difference in found:
            assert same_logits and same_loss and difference < 1e-5, found


def losses_of_steps(stage: int, recompute: str, tensor: int) -> list[float]:
    """Mean token loss before each step of two micro-batches under deepspeed.initialize."""
    import deepspeed
    import torch.distributed as dist

    from pause_megatron.distributed import initialize
    from pause_megatron.model import parameter_groups

    parallel = ParallelSection(tensor=tensor, sequence=tensor > 1, recompute=recompute)
    with initialize(parallel, device="cpu") as context:
        model = tiny(parallel=parallel, **PART[0])
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95))
        config = {
            "train_micro_batch_size_per_gpu": 2 // context.dp_size,
            "gradient_accumulation_steps": 2,
            # At stage 3 every weight is gathered for each use, and freed after it.
            "zero_optimization": {"stage": stage}
            | ({"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0} if stage == 3 else {}),
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=context.mpu)
        losses = []
        for _ in range(3):
            total = torch.zeros(())
            for seed in (0, 1):
                whole = [batch(1.0, seed=2 * seed + part, size=1) for part in range(2)]
                mine = whole[context.dp_rank :: context.dp_size]
                data = {
                    key: torch.cat([one[key] for one in mine]) for key in ("tokens", "position_ids", "labels", "mask")
                }
                targets = data["labels"].t().reshape(-1)
                # DeepSpeed divides by the accumulation steps and averages over data-parallel ranks.
                out = loss_of(engine, data | {"rows": torch.arange(len(targets)), "targets": targets}, 1 / len(targets))
                engine.backward(out.loss)
                engine.step()
                total += out.sum.detach() / 64
            dist.all_reduce(total, group=context.dp_group)
            losses.append(float(total))
        engine.destroy()
        return losses


def test_every_zero_stage_takes_the_same_steps(full):
    """Recomputed layers too: DeepSpeed gets one gradient of a parameter that several passes use."""
    (expected,) = run_on_ranks(1, losses_of_steps, 0, "none", 1)
    assert expected[-1] < 0.97 * expected[0]
    cases = [(2, 1, "full", 1), (2, 2, "full", 1), (2, 3, "none", 1), (2, 3, "full", 1), (2, 3, "full", 2)]
    for ranks, *case in [*cases, *([(2, 1, "none", 2), (2, 2, "none", 1), (2, 0, "full", 1)] if full else [])]:
        for losses in run_on_ranks(ranks, losses_of_steps, *case):
            assert losses == pytest.approx(expected, rel=1e-5), case


def test_flops_count_every_run_of_a_layer_and_parameters_count_it_once():
    from support.tiny_model import section

    sizes = ({}, {"loops": 3}, {"loops": 5, "loop_layers": "0..0"}, {"layers": 6})
    models = [check_shape(section(**each), ParallelSection(), 16) for each in sizes]
    once, looped, part, deep = (flops_per_token(model, 51, 16) for model in models)
    assert looped == part == deep == once + 6 * 4 * layer_parameters(models[0]) + 12 * 4 * 32 * 16
    counts = [parameters(model, 51) for model in models]
    assert counts[0] == counts[1] == counts[2] < counts[3]


def refused_when_built() -> str:
    from support.tiny_model import section

    from pause_megatron.distributed import initialize
    from pause_megatron.model import PauseGPTModel, Vocabulary
    from pause_megatron.model.build import transformer_config
    from pause_megatron.model.layers import block_spec

    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        config = transformer_config(check_shape(section(), parallel, 16), parallel, "fp32")
        vocabulary = Vocabulary(50, (50,))
        with pytest.raises(ConfigError) as refused:
            PauseGPTModel(config, block_spec(2), 52, 16, post_process=False, vocabulary=vocabulary, loops=2)
        with pytest.raises(ConfigError, match=r"loop_layers: expected a range within 0\.\.1, got range\(1, 3\)"):
            PauseGPTModel(config, block_spec(2), 52, 16, vocabulary=vocabulary, loops=2, loop_layers=range(1, 3))
        config.context_parallel_size = 2
        with pytest.raises(ConfigError, match=r"context_parallel_size: expected 1 with given_positions, got 2"):
            PauseGPTModel(config, block_spec(2), 52, 16, vocabulary=vocabulary, given_positions=True)
    return str(refused.value)


def test_what_the_model_refuses_when_it_is_built():
    assert run_on_ranks(1, refused_when_built) == ["loops: expected 1 under pipeline parallelism, got 2"]
