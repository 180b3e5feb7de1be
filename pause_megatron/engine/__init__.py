"""DeepSpeed, behind the few calls that a training loop needs. Knows neither data nor model."""

from pause_megatron.engine.engine import Engine, StepOutcome
from pause_megatron.engine.schedule import learning_rate
from pause_megatron.engine.state import ADAM_STATE, Address, OptimizerState

__all__ = ["ADAM_STATE", "Address", "Engine", "OptimizerState", "StepOutcome", "learning_rate"]
