"""The best checkpoint interval, from the time of a save and of a failure.

With d seconds a save and M seconds between failures, saving every T seconds loses about d / T to saves and T / 2M to
steps (a failure loses half an interval on average). The sum is least at T = sqrt(2 d M): Young 1974, "A first order
approximation to the optimum checkpoint interval", CACM 17(9). Daly 2006, FGCS 22(3), has the higher orders, which
matter where d is no longer small beside M. Restarts cost their seconds / M at any interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pause_megatron.plan.layout import Layout
from pause_megatron.plan.machine import Assumptions, Cluster

STATE_BYTES = 12  # fp32 weights and two moments an element; every element is written once


@dataclass(frozen=True)
class SavePlan:
    """Checkpoints of a run.

    Attributes:
        bytes: Bytes of a checkpoint.
        seconds: Seconds of a save, during which training waits.
        mtbf_seconds: Mean time between failures of the job.
        interval_seconds: Best interval, sqrt(2 x seconds x MTBF).
        every: Best interval in steps.
        lost: Expected share of time for saves, lost steps and restarts at that interval.
        lost_as_configured: The same at `checkpoint.every`.
    """

    bytes: int
    seconds: float
    mtbf_seconds: float
    interval_seconds: float
    every: int
    lost: float
    lost_as_configured: float


def save_plan(layout: Layout, cluster: Cluster, step_seconds: float, assumptions: Assumptions) -> SavePlan:
    """Return the checkpoint interval that loses least time.

    Args:
        layout: A run on its ranks.
        cluster: Nodes and GPUs.
        step_seconds: Seconds of a step.
        assumptions: File system speed, failure rate and restart time.
    """
    size = STATE_BYTES * layout.numel * layout.tensor
    speed = min(assumptions.write_bytes.value * cluster.nodes, assumptions.write_limit_bytes.value)
    seconds = size / speed
    mtbf = assumptions.node_mtbf_hours.value * 3600 / cluster.nodes
    interval = math.sqrt(2 * seconds * mtbf)
    every = max(1, round(interval / step_seconds))
    restart = assumptions.restart_seconds.value / mtbf

    def lost(steps: int) -> float:
        between = steps * step_seconds
        return seconds / (between + seconds) + between / (2 * mtbf) + restart

    configured = layout.config.checkpoint.every or (layout.batch.steps or every)
    return SavePlan(size, seconds, mtbf, interval, every, lost(every), lost(configured))
