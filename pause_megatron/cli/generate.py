"""`pause-megatron generate`: generate answers to prompts with an exported model and pauses."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_megatron.cli.support.exported_model import (
    add_decoding_arguments,
    add_machine_arguments,
    add_model_argument,
    add_pause_arguments,
    decoding_pauses,
    default_pauses,
    load_model,
)
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.lines import lines_of
from pause_megatron.files.paths import path_option

if TYPE_CHECKING:
    from pause_megatron.inference import Completion, Generation, PauseGenerator, PausePolicy

HELP = "generate answers to prompts, with pauses in the prefill and never in the text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = "example:\n  pause-megatron generate --model out/ --prompt 'My fellow citizens,' --pauses 10"
    add_model_argument(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument(
        "--prompts-file", type=path_option, metavar="FILE", help="text file with a prompt a line; - for standard input"
    )
    pauses = parser.add_argument_group("pauses")
    pauses.add_argument(
        "--pauses",
        metavar="N|auto",
        help="pauses after each prompt; auto: until the next-token distribution has settled (default: M of the "
        "model's finetuning)",
    )
    add_pause_arguments(pauses)
    pauses.add_argument(
        "--auto-change",
        type=float,
        default=0.02,
        metavar="X",
        help="auto: settled if a pause changes the distribution by at most X, 0..1 (default: 0.02)",
    )
    pauses.add_argument(
        "--auto-limit", type=int, default=50, metavar="N", help="auto: maximum number of pauses (default: 50)"
    )
    add_decoding_arguments(parser)
    answer = parser.add_argument_group("answer")
    answer.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="maximum length in tokens (default: 64)"
    )
    answer.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)")
    answer.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="the N most likely tokens; 0: all (default: 0)"
    )
    answer.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="the most likely tokens that sum to X (default: 1)",
    )
    answer.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; may be repeated"
    )
    machine = add_machine_arguments(parser)
    machine.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts in a batch (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: answers, counts, seconds")


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its answer; the answer to a single prompt is streamed."""
    from pause_megatron.inference import Limits, Sampling

    prompts = _prompts(args)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected 1 or more, got {args.batch_size}")
    generator = load_model(args)
    pauses = _pauses(args, generator)
    decoding = decoding_pauses(args, generator)
    prompting = generator.pause.override(
        location=args.location, filler=args.filler, prefix_attention=args.prefix_attention
    )
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    limits = Limits(max_new_tokens=args.max_new_tokens, stop=args.stop)
    streamed = len(prompts) == 1 and not args.json
    batches = []
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        unprinted = iter(batch)  # a streamed prompt is printed with the first piece of its answer, after all checks
        generation = generator.generate(
            batch,
            pauses=pauses,
            prompting=prompting,
            sampling=replace(sampling, rows=range(start, start + len(batch))),
            limits=limits,
            stream=partial(_print_piece, unprinted) if streamed else None,
            decoding=decoding,
        )
        batches.append(generation)
        if streamed:
            _print_piece(unprinted, 0, "\n")
        elif not args.json:
            _print_batch(start, batch, generation)
    if args.json:
        print(json.dumps(_document(args, prompts, batches), ensure_ascii=False, indent=2))
    else:
        print(_summary(batches, within=decoding.active), file=sys.stderr)
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


def _pauses(args: argparse.Namespace, generator: PauseGenerator) -> int | PausePolicy:
    """M or a policy; without --pauses the model's own M, which is printed on standard error."""
    from pause_megatron.inference import SettledPauses

    if args.pauses is None:
        return default_pauses(generator)
    if args.pauses == "auto":
        return SettledPauses(change=args.auto_change, limit=args.auto_limit)
    if not args.pauses.isdecimal():
        raise ConfigError(f"--pauses: expected a number, 0 or more, or auto, got {args.pauses!r}")
    return int(args.pauses)


def _print_piece(unprinted: Iterator[str], row: int, piece: str) -> None:
    print(next(unprinted, "") + piece, end="", flush=True)


def _print_batch(start: int, prompts: list[str], generation: Generation) -> None:
    for number, (prompt, completion) in enumerate(zip(prompts, generation.completions, strict=True), start + 1):
        print(f"--- {number}: {completion.pauses} pauses{_inside(completion)}\n{prompt}{completion.text}", flush=True)


def _inside(completion: Completion) -> str:
    """Pauses within prompt and answer, where there are any."""
    counts = {"prompt": completion.prompt_pauses, "answer": completion.pauses_in_answer}
    return "".join(f", {count} within the {place}" for place, count in counts.items() if count)


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
                "prompt_pauses": completion.prompt_pauses,
                "answer_pauses": completion.answer_pauses,
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
        "batches": [asdict(batch.cost) for batch in batches],
    }


def _summary(batches: list[Generation], *, within: bool) -> str:
    completions = [completion for batch in batches for completion in batch.completions]
    costs = [batch.cost for batch in batches]
    count = sum(c.prompt_pauses + c.pauses_in_answer for c in completions)
    inside = f" and {count:,} within prompts and answers" if within else ""
    return (
        f"{sum(c.prompt_tokens for c in completions):,} prompt tokens, "
        f"{sum(c.pauses for c in completions):,} pauses{inside}, "
        f"{sum(len(c.ids) for c in completions):,} new tokens; {sum(c.forward_passes for c in costs):,} forward passes "
        f"({sum(c.prefill_passes for c in costs):,} of them prefill); prefill "
        f"{sum(c.prefill_seconds for c in costs):.2f} s, decode {sum(c.decode_seconds for c in costs):.2f} s"
    )
