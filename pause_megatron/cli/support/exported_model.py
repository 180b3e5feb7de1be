"""Options of the verbs that run an exported model, and the loading of that model."""

from __future__ import annotations

import argparse
import logging
import re
from typing import TYPE_CHECKING

from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pause_megatron.inference import DecodingPauses, PauseGenerator


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --model."""
    parser.add_argument(
        "--model",
        type=path_option,
        required=True,
        metavar="DIR",
        help="folder that export-hf wrote, or another of the Llama family",
    )


def add_pause_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare --location, --filler and --prefix-attention.

    Args:
        parser: A parser, or a group of one.
    """
    parser.add_argument("--location", choices=("append", "prepend"), help="default: the model's own")
    parser.add_argument(
        "--filler",
        metavar="TEXT",
        help="an ordinary token in place of <pause>, such as '.' (a control); '': <pause> (default: the model's own)",
    )
    parser.add_argument("--prefix-attention", choices=("causal", "bidirectional"), help="default: the model's own")


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of pauses within answers.

    Args:
        parser: The parser; they get a group of their own.
    """
    group = parser.add_argument_group("pauses within answers (default: the model's own, or none)")
    group.add_argument(
        "--pause-every", type=int, metavar="N", help="--pause-count pauses after each N-th token of an answer; 0: never"
    )
    group.add_argument(
        "--pause-after",
        metavar="REGEX",
        help="the same after each token whose text, with its leading blank, contains REGEX; '': never",
    )
    group.add_argument(
        "--pause-entropy",
        type=float,
        metavar="NATS",
        help="--pause-count pauses at a time while the next token's distribution has more entropy; inf: never",
    )
    group.add_argument(
        "--pause-requests",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one pause each time that the model selects <pause>, which is never shown",
    )
    group.add_argument("--pause-count", type=int, metavar="N", help="pauses at each place (default: 1)")
    group.add_argument(
        "--pause-limit",
        type=int,
        metavar="N",
        help="maximum number of pauses before one token on entropy and requests (default: 10)",
    )
    group.add_argument(
        "--pause-in-prompt",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="--pause-every and --pause-after also within prompts; every then counts from the prompt's first token",
    )


def decoding_pauses(args: argparse.Namespace, generator: PauseGenerator) -> DecodingPauses:
    """Return the model's own pauses within answers, with the values that options give, and log where there are any.

    Raises:
        ConfigError: Options that do not fit each other; the message names them.
    """
    try:
        decoding = generator.pause.decoding.override(
            every=args.pause_every,
            after=args.pause_after,
            entropy=args.pause_entropy,
            requests=args.pause_requests,
            count=args.pause_count,
            limit=args.pause_limit,
            in_prompt=args.pause_in_prompt,
        )
    except ConfigError as error:
        named = re.sub(r"decoding\.(\w+)", lambda field: f"--pause-{field[1].replace('_', '-')}", str(error))
        raise ConfigError(named) from None
    if words := decoding.words:
        why = "as its config.json says" if decoding == generator.pause.decoding else "as the options say"
        log.info(f"pauses within answers: {words} ({why})")
    elif placement := generator.pause.not_decoded:
        log.info(f"pauses within answers: none; training placed them by {placement}, which no --pause-* option does")
    return decoding


def add_machine_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare --device and --dtype, and return their group."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    machine.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as stored")
    return machine


def load_model(args: argparse.Namespace) -> PauseGenerator:
    """Load the model that the options name, without the log messages and progress bars of transformers."""
    from transformers.utils import logging

    from pause_megatron.inference import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(args.model, device=args.device, dtype=args.dtype)


def default_pauses(generator: PauseGenerator) -> int:
    """Return the model's own number of pauses, and log which number and why."""
    count = generator.default_pauses
    named = generator.pause.m_ft is not None
    why = "the model was finetuned with them" if named else "its config.json names no m_ft; give --pauses N"
    log.info(f"pauses: {count} ({why})")
    return count
