"""The options of every verb that asks an exported model, and the model that they name."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from pause_megatron.files.paths import path_option

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pause_megatron.inference import PauseGenerator


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Which model: --model."""
    parser.add_argument(
        "--model",
        type=path_option,
        required=True,
        metavar="DIR",
        help="folder that export-hf wrote, or a Llama-like one",
    )


def add_pause_arguments(parser: Any) -> None:
    """How the pauses stand, whatever their number: --location, --filler, --prefix-attention.

    Args:
        parser: or a group of one.
    """
    parser.add_argument("--location", choices=("append", "prepend"), help="default: the model's own")
    parser.add_argument(
        "--filler",
        metavar="TEXT",
        help="an ordinary token in place of <pause>, such as '.' (a control); '': <pause> (default: the model's own)",
    )
    parser.add_argument("--prefix-attention", choices=("causal", "bidirectional"), help="default: the model's own")


def add_machine_arguments(parser: argparse.ArgumentParser) -> Any:
    """Where it runs: --device, --dtype. Returns their group."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    machine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored")
    return machine


def load_model(args: argparse.Namespace) -> PauseGenerator:
    """The model of these options, without what transformers has to say about loading it."""
    from transformers.utils import logging

    from pause_megatron.inference import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(args.model, device=args.device, dtype=args.dtype)


def default_pauses(generator: PauseGenerator) -> int:
    """The model's own number of pauses, for a call that gives none; says on standard error which and why."""
    count = generator.default_pauses
    known = generator.pause.m_ft is not None
    why = "the model was finetuned with them" if known else "its config.json names no m_ft; give --pauses N"
    log.info(f"pauses: {count} ({why})")
    return count
