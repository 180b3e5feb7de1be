"""Learning-rate schedules as a pure function of the step, so that a checkpoint holds no scheduler state."""

from __future__ import annotations

import math

from pause_megatron.config.schema import OptimSection


def learning_rate(optim: OptimSection, step: int, total_steps: int, extended_from: int | None = None) -> float:
    """Return the learning rate of an optimizer step.

    Linear warm-up from 0 over `optim.warmup_steps`, then by `optim.schedule`:
      cosine    half a cosine from the peak to `min_lr_fraction` of it at the last step;
      wsd       the peak, then a linear decay to `min_lr_fraction` over the last `decay_fraction` of all steps;
      constant  the peak.

    In an extended run, the steps after `extended_from` have the schedule of a run of `total_steps - extended_from`
    steps. `constant` has no second warm-up: it stays at the peak.

    Args:
        optim: Peak learning rate and schedule.
        step: Optimizer step, from 1 on.
        total_steps: Steps of the run.
        extended_from: Last step of the run that this one extends; None: it extends none.
    """
    if extended_from is not None:
        if optim.schedule == "constant":
            return optim.lr
        return learning_rate(optim, step - extended_from, total_steps - extended_from)
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    low = optim.lr * optim.min_lr_fraction
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
        return low + (optim.lr - low) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = max(round(optim.decay_fraction * total_steps), 1)
    remaining = (total_steps - step) / decay_steps
    return low + (optim.lr - low) * min(max(remaining, 0.0), 1.0)
