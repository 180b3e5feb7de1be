"""One run: training from initial weights by the project's finetuning, export, answers of the exported model."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pause_megatron.config import load
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError
from pause_megatron.tasks import Example, load_task

from .declaration import Declaration, Inference, read
from .settings import Plan, attribute, overrides, plan_of

TUNING, FINAL = "tuning", "final"
AT_ONCE = 512


@dataclass(frozen=True)
class Job:
    """A run that is to be made.

    Attributes:
        path: file of the declaration.
        phase: TUNING or FINAL, which differ in seeds and prompts.
        setting, seed, learning_rate: of the run.
    """

    path: str
    phase: str
    setting: str
    seed: int
    learning_rate: float


def one_thread() -> None:
    """A core for each process; called before torch is imported."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def run_config(declaration: Declaration, plan: Plan, seed: int, learning_rate: float, folder: Path) -> ResolvedConfig:
    """The configuration of one run."""
    values = {
        **plan.config,
        "run.dir": str(folder / "run"),
        "run.seed": seed,
        "data.tokenizer": str(folder / "tokenizer"),
        "train.steps": plan.steps,
        "optim.lr": learning_rate,
        "optim.warmup_steps": round(declaration.warmup * plan.steps),
    }
    return load(None, overrides=overrides(values))


def asked(declaration: Declaration, phase: str) -> list[Example]:
    """The evaluation prompts of a phase; no prompt belongs to both."""
    first, last = declaration.tuning.prompts, declaration.tuning.prompts + declaration.prompts
    examples = load_task(declaration.task).examples("eval", None, None)
    if len(examples) < last:
        raise ConfigError(
            f"prompts: expected at most the {len(examples)} of {declaration.task}, got {last} with tuning's"
        )
    return examples[:first] if phase == TUNING else examples[first:last]


def perform(job: Job) -> list[dict[str, Any]]:
    """Trains, exports and asks.

    Returns:
        A line of results for the setting, and in the final phase one for each setting that asks the same model in
        another way. `accuracy` is the fraction of right answers, `loss` of the last step in nats per target.
    """
    from pause_megatron.hf.export import export
    from pause_megatron.inference import load as load_generator
    from pause_megatron.train.finetune import finetune

    declared = read(job.path)
    declaration, plan = declared.content, plan_of(declared.content, job.setting)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        attribute(declaration.tokenizer)(folder / "tokenizer")
        if code := finetune(run_config(declaration, plan, job.seed, job.learning_rate, folder)):
            sys.exit(code)  # asked to stop: a run that is cut short counts for nothing
        last = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        export(folder / "run", folder / "hf")  # compares its logits with the native model's
        generator = load_generator(folder / "hf")  # carries M, the place of the pauses, and the filler
        ways = {job.setting: None}
        if job.phase == FINAL:
            ways |= {n: s.inference for n, s in declaration.settings.items() if s.trained == job.setting}
        examples = asked(declaration, job.phase)
        accuracies = {name: _accuracy(generator, examples, declaration, way) for name, way in ways.items()}
    spent = {"seconds": round(time.perf_counter() - wall, 1), "cpu": round(time.process_time() - cpu, 1)}
    common = {
        "digest": declared.digest,
        "phase": job.phase,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "steps": plan.steps,
        "parameters": plan.parameters,
        "flops": plan.flops,
        "prompts": len(examples),
        "loss": json.loads(last)["loss"],
        "started": started,
    }
    nothing = dict.fromkeys(spent, 0.0)  # the first line has the whole run's
    return [
        {"setting": name, "accuracy": accuracy, **common, **(nothing if ways[name] else spent)}
        for name, accuracy in accuracies.items()
    ]


def _accuracy(generator, examples: list[Example], declaration: Declaration, way: Inference | None) -> float:
    longest = load_task(declaration.task).decoding.max_new_tokens
    pauses, prompting = None, None
    if way is not None:
        # Positions are rotations, which have no largest one: the model may be asked with more than it was trained on.
        generator.model.config.max_position_embeddings += way.pauses
        pauses = way.pauses
        prompting = generator.pause.override(location=way.location, filler=way.filler or "")
    right = 0
    for start in range(0, len(examples), AT_ONCE):
        some = examples[start : start + AT_ONCE]
        prompts = [example.prompt for example in some]
        made = generator.generate(prompts, pauses=pauses, max_new_tokens=longest, prompting=prompting)
        right += sum(
            answer.text.strip() == example.target.strip()
            for answer, example in zip(made.completions, some, strict=True)
        )
    return right / len(examples)
