"""`pause-megatron generate`: continue prompts with an exported model and pauses."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_megatron.cli.support.exported_model import (
    add_machine_arguments,
    add_model_argument,
    add_pause_arguments,
    default_pauses,
    load_model,
)
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.lines import lines_of
from pause_megatron.files.paths import path_option

if TYPE_CHECKING:
    from pause_megatron.inference import Generation, PauseGenerator, SettledPauses

HELP = "continue prompts with pauses in the prefill, never in the text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = "example:\n  pause-megatron generate --model out/ --prompt 'My fellow citizens,' --pauses 10"
    add_model_argument(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given repeatedly"
    )
    parser.add_argument(
        "--prompts-file", type=path_option, metavar="FILE", help="a prompt a line; - for standard input"
    )
    pauses = parser.add_argument_group("pauses")
    pauses.add_argument(
        "--pauses",
        metavar="N|auto",
        help="pauses behind each prompt; auto: until the next-token distribution has settled (default: what the "
        "model was finetuned with)",
    )
    add_pause_arguments(pauses)
    pauses.add_argument(
        "--auto-change",
        type=float,
        default=0.02,
        metavar="X",
        help="auto: settled if a pause changes the distribution by at most this, 0..1 (default: 0.02)",
    )
    pauses.add_argument("--auto-limit", type=int, default=50, metavar="N", help="auto: at most this many (default: 50)")
    answer = parser.add_argument_group("answer")
    answer.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    answer.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    answer.add_argument("--top-k", type=int, default=0, metavar="N", help="the N likeliest tokens; 0: all (default: 0)")
    answer.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="the likeliest tokens that sum to X (default: 1)"
    )
    answer.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be given repeatedly"
    )
    machine = add_machine_arguments(parser)
    machine.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answers, counts, seconds")


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its answer, as it comes where there is one prompt."""
    prompts = _prompts(args)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected 1 or more, came {args.batch_size}")
    generator = load_model(args)
    pauses = _pauses(args, generator)
    batches = []
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        shown = iter(batch)  # a streamed prompt is shown with the first piece of its answer, so not before an error
        streamed = len(prompts) == 1 and not args.json
        generation = generator.generate(
            batch,
            pauses=pauses,
            location=args.location,
            filler=args.filler,
            prefix_attention=args.prefix_attention,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            stop=args.stop,
            rows=range(start, start + len(batch)),
            stream=(lambda row, piece, shown=shown: _show(next(shown, "") + piece)) if streamed else None,
        )
        batches.append(generation)
        if streamed:
            _show(next(shown, "") + "\n")
        elif not args.json:
            _print_batch(start, batch, generation)
    if args.json:
        print(json.dumps(_document(args, prompts, batches), ensure_ascii=False, indent=2))
    else:
        print(_summary(batches), file=sys.stderr)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        try:
            content = sys.stdin.buffer.read() if args.prompts_file == "-" else Path(args.prompts_file).read_bytes()
            prompts += filter(None, lines_of(content, f"--prompts-file {args.prompts_file}"))
        except OSError as error:
            raise DataError(f"--prompts-file {args.prompts_file}: cannot be read ({error.strerror})") from None
    if not prompts:
        raise ConfigError("expected a prompt: --prompt TEXT, or --prompts-file FILE with a prompt a line")
    return prompts


def _pauses(args: argparse.Namespace, generator: PauseGenerator) -> int | SettledPauses:
    """M or the policy; where neither was given, says on standard error what was taken and why."""
    from pause_megatron.inference import SettledPauses

    if args.pauses is None:
        return default_pauses(generator)
    if args.pauses == "auto":
        return SettledPauses(change=args.auto_change, limit=args.auto_limit)
    if not args.pauses.isdecimal():
        raise ConfigError(f"--pauses: expected a number, 0 or more, or auto, came {args.pauses!r}")
    return int(args.pauses)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _print_batch(start: int, prompts: list[str], generation: Generation) -> None:
    for number, (prompt, completion) in enumerate(zip(prompts, generation.completions, strict=True), start + 1):
        print(f"--- {number}: {completion.pauses} pauses\n{prompt}{completion.text}", flush=True)


def _document(args: argparse.Namespace, prompts: list[str], batches: list[Generation]) -> dict[str, Any]:
    completions = [completion for batch in batches for completion in batch.completions]
    return {
        "model": args.model,
        "completions": [
            {
                "prompt": prompt,
                "text": completion.text,
                "finish": completion.finish,
                "prompt_tokens": completion.prompt_tokens,
                "pauses": completion.pauses,
                "new_tokens": len(completion.ids),
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
        "batches": [asdict(batch.cost) for batch in batches],
    }


def _summary(batches: list[Generation]) -> str:
    completions = [completion for batch in batches for completion in batch.completions]
    costs = [batch.cost for batch in batches]
    return (
        f"{sum(c.prompt_tokens for c in completions):,} prompt tokens, {sum(c.pauses for c in completions):,} pauses, "
        f"{sum(len(c.ids) for c in completions):,} new tokens; {sum(c.forward_passes for c in costs):,} forward passes "
        f"({sum(c.prefill_passes for c in costs):,} of them prefill); prefill "
        f"{sum(c.prefill_seconds for c in costs):.2f} s, decode {sum(c.decode_seconds for c in costs):.2f} s"
    )
