"""Objectives: what is minimized at the rows of the targets. Host side and device side; imports only torch and numpy."""

from pause_megatron.objective.chunk import Chunk
from pause_megatron.objective.plan import LossPlan, loss_plan, resolve_objective
from pause_megatron.objective.protocol import Objective, Terms
from pause_megatron.objective.steps import Steps

__all__ = ["Chunk", "LossPlan", "Objective", "Steps", "Terms", "loss_plan", "resolve_objective"]
