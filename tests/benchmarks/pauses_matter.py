"""Pauses change how fast a small model learns: the number of ones among 16 bits, modulo 4, with and without pauses.

python -m tests.benchmarks.pauses_matter --output FOLDER [--seeds 0-4] [--settings NAME,NAME] [--jobs 2] [--steps 300]

Trains each setting with each seed through this project's finetuning (data path, DeepSpeed engine, loss; from initial
weights), exports it, and lets the exported model answer evaluation prompts that were never trained on.
FOLDER/results.jsonl gets a line for each run; the same command goes on where it was stopped. Then FOLDER/report.md and
FOLDER/accuracy.png are written.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import environment

from pause_megatron.tasks.counting import MOD4_OF_16, write_tokenizer

TASK, BITS = "pause_megatron.tasks.counting:MOD4_OF_16", MOD4_OF_16.bits
BATCH = 128
EVALUATED = 2048

# Quantiles of Student's t for a two-sided 95 % interval, by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and its positions behind the prompt. The default is the standard model.

    Attributes:
        what: for the report.
        pauses: M.
        distinct: number of pause vectors, used in turn; 1 is the paper's.
        layers, ffn: of the model; its width is 16, with one attention head.
        location: "append" or "prepend".
        filler: text of the ordinary token that stands in place of `<pause>`.
    """

    what: str
    pauses: int = 0
    distinct: int = 1
    layers: int = 2
    ffn: int = 8
    location: str = "append"
    filler: str | None = None

    @property
    def window(self) -> int:
        """Positions of an example: bits, "=", pauses, the answer (the end of the text behind it is predicted only)."""
        return BITS + 2 + self.pauses


SETTINGS = {
    "standard": Setting(what="no pauses"),
    "pauses-4": Setting(what="4 pauses, distinct vectors", pauses=4, distinct=4),
    "pauses-8": Setting(what="8 pauses, distinct vectors", pauses=8, distinct=8),
    "pauses-16": Setting(what="16 pauses, distinct vectors", pauses=16, distinct=16),
    "shared-8": Setting(what="8 pauses, one vector (the paper's)", pauses=8),
    "filler-8": Setting(what="8 fillers: the ordinary token `=`", pauses=8, filler="="),
    "prepended-8": Setting(
        what="8 pauses before the prompt, distinct vectors", pauses=8, distinct=8, location="prepend"
    ),
    "deeper": Setting(what="control: 4 layers, no pauses", layers=4),
    "wider": Setting(what="control: feed-forward width 40, no pauses", ffn=40),
}


def run_config(setting: Setting, seed: int, steps: int, folder: Path):
    """The resolved configuration of one run."""
    from pause_megatron.config import load

    values = {
        "run.dir": folder / "run",
        "run.seed": seed,
        "task.name": TASK,
        "data.tokenizer": folder / "tokenizer",
        "data.sequence_length": setting.window,
        "data.prefetch": 0,
        "model.preset": "null",
        "model.layers": setting.layers,
        "model.hidden": 16,
        "model.heads": 1,
        "model.ffn": setting.ffn,
        "model.tied": "false",
        "model.init_std": 0.3,
        "model.vocab_multiple": 32,
        "pause.embeddings": setting.distinct,
        "finetune.pauses": setting.pauses,
        "finetune.location": setting.location,
        "finetune.filler": "null" if setting.filler is None else f'"{setting.filler}"',
        "finetune.batching": "padded",
        "train.steps": steps,
        "batch.global_size": BATCH,
        "batch.micro_size": BATCH,
        "optim.lr": 1e-2,
        "optim.min_lr_fraction": 0,
        "optim.warmup_steps": steps // 6,
        "optim.schedule": "wsd",
        "optim.decay_fraction": 0.3,
        "optim.weight_decay": 0.01,
        "optim.beta2": 0.98,
        "engine.precision": "fp32",
        "checkpoint.every": 0,
        "validation.every": 0,
        "log.every": 100,
        "log.tensorboard": "false",
    }
    return load(None, overrides=[f"{key}={value}" for key, value in values.items()])


def train_and_score(setting: Setting, seed: int, steps: int, examples: int = EVALUATED) -> dict[str, float]:
    """One run, from initial weights to answers.

    Returns:
        accuracy: of the answers to the first `examples` evaluation prompts, greedily decoded.
        loss: of the last steps that were logged, nats per target (the answer and the end of the text).
        seconds: wall clock of training and scoring; `cpu` of it this process's.
    """
    from pause_megatron.hf.export import export
    from pause_megatron.inference import load
    from pause_megatron.train.finetune import finetune

    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tokenizer(folder / "tokenizer")
        finetune(run_config(setting, seed, steps, folder))
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        export(folder / "run", folder / "hf")
        generator = load(folder / "hf")  # carries M, the place of the pauses, and the filler
        asked = MOD4_OF_16.examples("eval", None, examples)
        answers = generator.generate([example.prompt for example in asked], max_new_tokens=1).completions
    right = sum(answer.text == example.target for answer, example in zip(answers, asked, strict=True))
    return {
        "accuracy": right / len(asked),
        "loss": json.loads(lines[-1])["loss"],
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu": round(time.process_time() - cpu, 1),
    }


def flops(setting: Setting) -> tuple[int, int]:
    """(parameters, training FLOPs of one example)."""
    from pause_megatron.config.presets import flops_per_token, parameters

    config = run_config(setting, 0, 60, Path("unused"))
    vocabulary = 13 + setting.distinct
    per_token = flops_per_token(config.model, vocabulary, setting.window)
    return parameters(config.model, vocabulary), per_token * setting.window


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval over seeds."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def report(results: list[dict], command: str) -> str:
    """The table, a row for each setting."""
    base = flops(SETTINGS["standard"])[1]
    lines = [
        "| setting | what | parameters | FLOPs of an example | accuracy % | 95 % interval | seeds | each seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in SETTINGS.items():
        mine = sorted((r for r in results if r["setting"] == name), key=lambda r: r["seed"])
        if not mine:
            continue
        values = [100 * r["accuracy"] for r in mine]
        mean, half = interval(values)
        size, cost = flops(setting)
        each = " ".join(f"{value:.1f}" for value in values)
        lines.append(
            f"| {name} | {setting.what} | {size:,} | {cost / base:.2f} | {mean:.1f} | {mean - half:.1f} .. "
            f"{mean + half:.1f} | {len(values)} | {each} |"
        )
    cpu, wall = (sum(r[key] for r in results) for key in ("cpu", "seconds"))
    lines += ["", f"{len(results)} runs, {cpu / 60:.1f} CPU minutes, {wall / 60:.1f} minutes of wall clock in them."]
    machine = environment("torch", "megatron-core", "deepspeed", "transformers")
    return "\n".join([*lines, "", f"`{command}`", "", machine, ""])


def draw(results: list[dict], output: Path) -> None:
    """Accuracy against M with 95 % intervals; the controls without pauses as horizontal bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    of = {name: [100 * r["accuracy"] for r in results if r["setting"] == name] for name in SETTINGS}
    figure, axes = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for number, name in enumerate(("deeper", "wider")):
        if of[name]:
            mean, half = interval(of[name])
            axes.axhline(mean, color=f"C{number + 1}", label=SETTINGS[name].what)
            axes.axhspan(mean - half, min(mean + half, 100), color=f"C{number + 1}", alpha=0.12)
    curve = [name for name in ("standard", "pauses-4", "pauses-8", "pauses-16") if of[name]]
    kinds = {"standard model + M pauses": (curve, "C0", "o-")}
    for number, name in enumerate(("shared-8", "filler-8", "prepended-8")):
        kinds[SETTINGS[name].what] = ([name] if of[name] else [], f"C{number + 3}", "s^v"[number])
    for label, (names, color, style) in kinds.items():
        if names:
            means, halves = zip(*(interval(of[name]) for name in names), strict=True)
            shift = 0.25 * list(kinds).index(label)  # side by side
            places = [SETTINGS[name].pauses + shift for name in names]
            axes.errorbar(places, means, yerr=halves, color=color, fmt=style, capsize=4, label=label)
    axes.axhline(100 / MOD4_OF_16.modulus, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="M, positions added to the prompt", ylabel="accuracy %, mean and 95 % interval over seeds")
    axes.set(title=f"ones among {BITS} bits, modulo {MOD4_OF_16.modulus}", ylim=(0, 105))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _work(cell: tuple[str, int, int]) -> dict:
    name, seed, steps = cell
    return {"setting": name, "seed": seed, "steps": steps, **train_and_score(SETTINGS[name], seed, steps)}


def _one_thread() -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", default="0-4", help="FIRST-LAST")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="processes, a core each")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(r["setting"], r["seed"], r["steps"]) for r in results}
    cells = [
        (name, seed, arguments.steps)
        for seed in range(first, last + 1)
        for name in arguments.settings.split(",")
        if (name, seed, arguments.steps) not in done
    ]
    _one_thread()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, _one_thread) as pool:
        for result in pool.imap_unordered(_work, cells):
            results.append(result)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    command = f"python -m tests.benchmarks.pauses_matter {' '.join(sys.argv[1:])}"
    (arguments.output / "report.md").write_text(report(results, command), encoding="utf-8")
    draw(results, arguments.output / "accuracy.png")
    print(f"wrote {arguments.output}/report.md and accuracy.png")


if __name__ == "__main__":
    main()
