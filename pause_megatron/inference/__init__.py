"""Generation and scoring with pauses on an exported model: prefill of prompt and pauses, decoding, chat templates."""

from pause_megatron.data.supervised.examples import Prompting
from pause_megatron.inference.adaptive import FixedPauses, PausePolicy, SettledPauses
from pause_megatron.inference.chat import pause_chat_template, write_chat_template
from pause_megatron.inference.custom_generate import pause_generate
from pause_megatron.inference.decoding import DecodingPauses
from pause_megatron.inference.generate import PauseGenerator
from pause_megatron.inference.limits import Limits
from pause_megatron.inference.loading import load, write_custom_generate
from pause_megatron.inference.prompts import PauseInfo
from pause_megatron.inference.results import Completion, Cost, Generation, Score
from pause_megatron.inference.sampling import Sampling

__all__ = [
    "Completion",
    "Cost",
    "DecodingPauses",
    "FixedPauses",
    "Generation",
    "Limits",
    "PauseGenerator",
    "PauseInfo",
    "PausePolicy",
    "Prompting",
    "Sampling",
    "Score",
    "SettledPauses",
    "load",
    "pause_chat_template",
    "pause_generate",
    "write_chat_template",
    "write_custom_generate",
]
