"""The command line: one verb a file. Nothing heavy is imported before a verb runs, so that --help is instant."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn

from pause_megatron.distributed.ranks import discover, discover_task
from pause_megatron.errors import ConfigError, OutputError, PauseMegatronError, SharedError
from pause_megatron.host import launcher
from pause_megatron.terminal.log import EVERY_RANK, log_to_stderr, set_rank
from pause_megatron.terminal.output import standard_streams

log = logging.getLogger(__name__)

# A copy of each verb's HELP (a test compares), so that --help imports no verb.
VERBS = {
    "train-tokenizer": "train a SentencePiece BPE tokenizer on shards of text",
    "prepare": "turn shards of text into a tokenized corpus (.bin, .idx, manifest)",
    "adopt": "check a corpus that Megatron-LM's preprocess_data.py made, and write its manifest",
    "verify": "read a corpus and its side arrays whole and compare them with the digests of its manifest",
    "score": "write a model's loss or entropy at each token of a corpus (parallel, resumable) or of a task's answers",
    "inspect": "show what a corpus holds, and its windows with their pauses",
    "pretrain": "pretrain a model on windows with pauses",
    "finetune": "finetune a model on a task with pauses after the prompts",
    "import-hf": "import a Hugging Face folder (Llama, Qwen2, Mistral, Qwen3, OLMo 2) as a checkpoint with pauses",
    "export-hf": "export a checkpoint to a Hugging Face folder for transformers and vLLM",
    "import-megatron": "import a GPT checkpoint of Megatron-LM as a checkpoint with pauses",
    "export-megatron": "export a checkpoint as a GPT checkpoint of Megatron-LM",
    "generate": "generate answers to prompts, with pauses in the prefill and never in the text",
    "evaluate": "score a model on tasks with several numbers of pauses; resumable",
    "experiment": "run a grid of pretraining, finetuning and evaluation, and compare the results with the paper's",
    "launch": "write or submit the SLURM job of a run, after checks",
    "plot": "draw the loss curves of runs as a PNG",
    "plan": "estimate memory, communication, days and GPU-hours of a run on a cluster",
    "benchmark": "time training steps of a configuration on this machine: tokens/s, MFU, memory, kernels, waits",
    "doctor": "check what this machine has, what works, and what is missing",
}

# Verbs that train or occupy GPUs for long.
_END_WITH_LAUNCHER = ("pretrain", "finetune", "benchmark", "evaluate", "experiment")

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # 128 + SIGPIPE, as in a shell


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments after the program's name; None for those of the process.

    Returns:
        The exit code: that of the verb; 2 for input that cannot be run, or output that cannot be written; 130 after
        Ctrl-C; 141 if the reader of the output is gone.
    """
    with standard_streams() as stdout, log_to_stderr(timestamps=False):
        try:
            code = _main(argv)
            stdout.flush()
        except OutputError as error:
            code = EXIT_READER_GONE if error.reader_gone else EXIT_ERROR
            if not error.reader_gone:
                log.error(error)
    store = sys.modules.get("pause_megatron.distributed.store")
    if argv is None and store is not None and store.is_connecting():
        os._exit(code)  # its thread would keep the process alive
    return code


def _main(argv: Sequence[str] | None) -> int:
    # `module:attribute` names resolve in the working folder, as under `python -m`; last, so that no package is hidden.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        arguments = _take_local_rank(list(sys.argv[1:] if argv is None else argv))
        set_rank(_rank_or_zero())
        # Only as the main program: a program that calls `main` decides when it exits.
        if (
            argv is None
            and arguments[:1]
            and arguments[0] in _END_WITH_LAUNCHER
            and not {"-h", "--help"} & {*arguments}
        ):
            launcher.end_with_launcher()
        return launcher.left(_dispatch(arguments))
    except OutputError:
        raise
    except PauseMegatronError as error:
        _report(error)
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        from pause_megatron.cli.support.packages import absent_package

        if (line := absent_package(error)) is None:
            raise
        _report(ConfigError(f"{arguments[0]}: {line}"))
        return EXIT_ERROR
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _report(ConfigError(f"{error.filename}: {error.strerror}"))  # a PREFIX whose PREFIX.manifest.json is too long
        return EXIT_ERROR
    except KeyboardInterrupt:
        log.info("interrupted", extra=EVERY_RANK)
        return EXIT_INTERRUPTED
    except SystemExit as error:  # argparse: --help and wrong options
        return error.code if isinstance(error.code, int) else EXIT_ERROR


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_ERROR
    if arguments[0] == "--version":
        from pause_megatron import __version__

        print(f"pause-megatron {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        from pause_megatron.config.spelling import nearest

        raise ConfigError(f"verb: expected one of {', '.join(VERBS)}; got {verb!r}{nearest(verb, VERBS)}")
    # Intermixed: overrides may be anywhere (`pretrain --recipe R run.dir=a --dry-run log.every=1`). That loses a "--",
    # after which names may begin with "-".
    parser = parser_of(verb)
    return _module(verb).run(parser.parse_args(rest) if "--" in rest else parser.parse_intermixed_args(rest))


class _Parser(argparse.ArgumentParser):
    """An argument parser whose error explains how configuration keys are written."""

    def error(self, message: str) -> NoReturn:
        key = re.search(r"unrecognized arguments:.*?--([a-z_]+\.\w+)", message)
        super().error(f"{message}; write configuration keys as {key[1]}=VALUE" if key else message)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the options of one of `VERBS`.

    Args:
        verb: Name of the verb.
    """
    module = _module(verb)
    parser = _Parser(
        prog=f"pause-megatron {verb}",
        description=module.HELP[0].upper() + module.HELP[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"pause_megatron.cli.{verb.replace('-', '_')}")


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: pause-megatron VERB [options]\n\n"
        f"Pause-token pretraining with megatron-core and DeepSpeed.\n\n{verbs}\n\n"
        "  pause-megatron VERB --help   the options of a verb\n"
        "  pause-megatron --version     the version"
    )


def _take_local_rank(arguments: list[str]) -> list[str]:
    """Remove `--local_rank=N` or `--local-rank N`, which launchers add before or after the verb.

    Launchers set LOCAL_RANK too. Old torch launchers give only the option: it becomes LOCAL_RANK.

    Raises:
        ConfigError: The value is not a number.
    """
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value.isdecimal():
            raise ConfigError(f"{name}: expected a number >= 0, got {value!r}")
        os.environ.setdefault("LOCAL_RANK", value)
    return kept


def note(text: str) -> None:
    """Log a note about a run before it starts.

    Args:
        text: One line.
    """
    log.info(f"note: {text}")


def at_least(least: int) -> Callable[[str], int]:
    """Return a type for argparse: an integer of at least `least`.

    Args:
        least: The smallest value.
    """

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return integer


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only one.

    Raises:
        ConfigError: As `discover`.
    """
    return discover().rank == 0


def _rank_or_zero() -> int:
    try:
        return discover_task().rank
    except ConfigError:  # the verb reports it, if it needs its rank
        return 0


def _report(error: PauseMegatronError) -> None:
    """Log an error once: a wrong configuration is the same on every rank; other errors name the rank that met them."""
    try:
        ranks = discover_task()
    except ConfigError:  # the rank is unknown, so no other rank is known to report it
        log.error(error)
        return
    # LOCAL_RANK is 0 on every rank where each sees only its own GPU.
    reported_by_another = ranks.rank if isinstance(error, SharedError) else ranks.local_rank
    if not (isinstance(error, ConfigError) and reported_by_another):
        log.error(error)
