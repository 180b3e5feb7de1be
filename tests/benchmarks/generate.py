"""P8: the prefill of a prompt and its M pauses (targets: exactly one forward pass; <= 1.05 of the time of a bare
forward pass over P + M tokens; >= 10 times faster than M single decoding steps). With --adaptive: adaptive pauses next
to fixed M, in quality and cost.

python -m tests.benchmarks.generate [--prompt 100 250] [--pauses 10 50] [--threads 1] [--rounds 9]
python -m tests.benchmarks.generate --adaptive [--model DIR] [--steps 1500]

P8: a Llama of about 100 M parameters with random weights, fp32, batch 1. "Single steps" are the M pauses fed one by one
through the key-value cache, as a decoder would do that emits them; what they are compared with is what the pauses add
to the prefill: the time of prompt + M pauses minus that of the prompt alone.

--adaptive: an exported model (--model), or else a small Llama that is pause-pretrained here (10 % pauses, placed
uniformly) on real speeches. Quality is the mean log-likelihood (nats per token) of held-out continuations; cost is
positions computed and forward passes before the first answer token, batch 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Timing, compare, environment
from support.prose import documents
from support.tiny_llama import sentencepiece_tokenizer

from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.inference import PauseGenerator, PausePolicy, SettledPauses, load
from pause_megatron.inference.custom_generate import CACHE

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}


def new_model(tokenizer: Any, vocab_size: int, **sizes: int) -> Any:
    """A Llama with random weights whose last id is the pause."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=2048, tie_word_embeddings=True, **sizes)
    pause = tokenizer.get_vocab()["<pause>"]
    config.pause = {"token": "<pause>", "ids": [pause], "m_ft": None, "prefix_attention": "causal"}
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def p8(arguments: argparse.Namespace, tokenizer: Any) -> None:
    """Prints one line for each prompt length and number of pauses."""
    generator = PauseGenerator(new_model(tokenizer, 32000, **SIZES), tokenizer)
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    passes = count_passes(generator.model)
    print(
        f"P8 {parameters / 1e6:.0f} M parameters, fp32, {arguments.threads} threads, {arguments.rounds} rounds; "
        f"{environment('torch', 'transformers')}",
        flush=True,
    )
    pause = generator.pause.ids.start
    for prompt_length in arguments.prompt:
        for count in arguments.pauses:
            prompt = torch.randint(10, pause, (prompt_length,)).tolist()
            ids = torch.tensor([[*prompt, *[pause] * count]])
            passes.clear()
            generator.generate([prompt], pauses=count, max_new_tokens=1)
            calls = list(passes)
            timings = compare(contestants(generator, prompt, ids, count), rounds=arguments.rounds)
            report(prompt_length, count, calls, timings)


def contestants(
    generator: PauseGenerator, prompt: list[int], ids: torch.Tensor, count: int
) -> dict[str, Callable[[], object]]:
    """Name -> one measurement; the first is the bare forward pass over P + M tokens."""
    model = generator.model

    @torch.no_grad()
    def bare(tokens: torch.Tensor) -> Any:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    def single_steps() -> None:
        output = bare(ids[:, : len(prompt)])
        with torch.no_grad():
            for _ in range(count):
                output = model(input_ids=ids[:, -1:], use_cache=True, logits_to_keep=1, **{CACHE: output[CACHE]})

    return {
        "bare pass over P + M": lambda: bare(ids),
        "generate, first token": lambda: generator.generate([prompt], pauses=count, max_new_tokens=1),
        "bare pass over P": lambda: bare(ids[:, : len(prompt)]),
        "P, then M single steps": single_steps,
    }


def report(prompt_length: int, count: int, calls: Sequence[int], timings: dict[str, Timing]) -> None:
    """One line: passes, the two ratios of the targets, and the times they come from."""
    whole, ours, alone, steps = timings.values()
    # Ratios are taken within a round, so a machine that drifts between rounds does not get into these differences.
    added = (1 - alone.ratio) * whole.seconds
    single = (steps.ratio - alone.ratio) * whole.seconds
    print(
        f"P = {prompt_length:3d}, M = {count:2d}: {len(calls)} pass of {'+'.join(map(str, calls))} tokens; "
        f"time / bare pass {ours.ratio:.3f} [{ours.low:.3f} .. {ours.high:.3f}] (target <= 1.05); "
        f"M single steps / what M pauses add: {single / added:.1f} (target >= 10); whole latency with single steps "
        f"{steps.ratio:.1f} x; {ours.seconds * 1e3:.0f} ms, of it pauses {added * 1e3:.0f} ms; single steps "
        f"{single * 1e3:.0f} ms",
        flush=True,
    )


def count_passes(model: Any) -> list[int]:
    """A list that grows by the number of tokens of each forward pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def train(tokenizer: Any, texts: Sequence[str], steps: int, sequence: int = 128, batch: int = 16) -> Any:
    """Pause-pretraining in a few lines of torch: 10 % uniform pauses, no loss where the next token is one."""
    model = new_model(tokenizer, len(tokenizer), **SMALL).train()
    pause = tokenizer.get_vocab()["<pause>"]
    stream = np.array([i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)])
    plan = PausePlan(sequence, 0.1)
    inject = PauseInjector(plan, range(pause, pause + 1), "speeches", "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    begun = time.perf_counter()
    for step in range(steps):
        starts = rng.integers(len(stream) - plan.text_length, size=batch)
        windows = [inject(stream[s : s + plan.text_length], step * batch + i).tokens for i, s in enumerate(starts)]
        tokens = torch.from_numpy(np.stack(windows))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == pause, -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"   trained here: {parameters / 1e6:.1f} M parameters, {steps} steps of {batch} x {sequence} tokens, 10 % "
        f"uniform pauses, final loss {loss.item():.2f} nats per token, {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return model.eval()


def adaptive(arguments: argparse.Namespace, tokenizer: Any) -> None:
    """Prints a line for each policy."""
    texts = [text for text in documents(12_000) if len(text) > 700]
    held_out, rest = texts[:: len(texts) // arguments.samples], texts
    held_out = held_out[: arguments.samples]
    if arguments.model:
        generator = load(arguments.model, dtype="fp32")
    else:
        kept = set(held_out)
        generator = PauseGenerator(train(tokenizer, [t for t in rest if t not in kept], arguments.steps), tokenizer)
    cuts = [text.index(" ", 300) for text in held_out]
    prompts = [text[:cut] for text, cut in zip(held_out, cuts, strict=True)]
    # Whole words, so that the first token of the answer is one that was trained.
    answers = [text[cut : text.rindex(" ", cut, cut + 60)] for text, cut in zip(held_out, cuts, strict=True)]
    policies: dict[str, int | PausePolicy] = {f"fixed {count}": count for count in (0, 1, 2, 5, 10, 20)}
    for change in (0.2, 0.1, 0.05):
        policies[f"settled, change <= {change}"] = SettledPauses(change=change, limit=20)
    policies["settled, entropy <= 2 nats"] = SettledPauses(change=None, entropy=2.0, limit=20)
    print(
        f"   {len(prompts)} held-out paragraphs; prompts of 300 characters, answers of up to 60; "
        f"{environment('torch', 'transformers')}"
    )
    baseline: list[float] = []
    for name, policy in policies.items():
        results = [generator.score([p], [a], pauses=policy) for p, a in zip(prompts, answers, strict=True)]
        scores, costs = [s[0] for s, _ in results], [cost for _, cost in results]
        each = [score.log_likelihood / score.tokens for score in scores]
        baseline = baseline or each
        gain = [mine - without for mine, without in zip(each, baseline, strict=True)]
        error = statistics.stdev(gain) / math.sqrt(len(gain))
        positions = statistics.fmean(c.positions - s.tokens + 1 for c, s in zip(costs, scores, strict=True))
        passes = statistics.fmean(cost.prefill_passes for cost in costs)
        milliseconds = statistics.median(cost.prefill_seconds for cost in costs) * 1e3
        print(
            f"   {name:26s} {statistics.fmean(each):7.4f} nats/token, {statistics.fmean(gain):+.4f} +- {error:.4f} to "
            f"no pauses; {statistics.fmean(score.pauses for score in scores):5.2f} pauses, {positions:6.1f} positions, "
            f"{passes:.2f} passes, {milliseconds:5.1f} ms",
            flush=True,
        )


def main() -> None:
    """Prints P8, or the adaptive report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, nargs="+", default=[100, 250], help="P, prompt tokens")
    parser.add_argument("--pauses", type=int, nargs="+", default=[10, 50], help="M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, at least 7")
    parser.add_argument("--adaptive", action="store_true", help="the adaptive report in place of P8")
    parser.add_argument("--model", help="exported folder for --adaptive; default: one that is trained here")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of that one")
    parser.add_argument("--samples", type=int, default=400, help="held-out paragraphs for --adaptive")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = sentencepiece_tokenizer(Path(folder))
    (adaptive if arguments.adaptive else p8)(arguments, tokenizer)


if __name__ == "__main__":
    main()
