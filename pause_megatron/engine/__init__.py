"""The training engine: DeepSpeed behind the few calls of a training loop. Independent of data and model."""

from pause_megatron.engine.engine import Engine, StepOutcome
from pause_megatron.engine.schedule import learning_rate
from pause_megatron.engine.state import ADAM_STATE, Address, OptimizerState

__all__ = ["ADAM_STATE", "Address", "Engine", "OptimizerState", "StepOutcome", "learning_rate"]
