"""Do pauses help a small model? Three tasks, with and without pauses, and controls that get as many FLOPs.

python -m tests.benchmarks.pauses_matter --output FOLDER [--task code] [--seeds 0-4] [--settings NAME,NAME]
    [--steps 600]

code: which of 8 codewords of 16 bits is near (`tasks.codewords`); count-16 and count-24: the number of ones among as
many bits, modulo 4 (`tasks.counting`).

Trains each setting with each seed through this project's finetuning (data path, DeepSpeed engine, loss; from initial
weights), exports it, and lets the exported model answer evaluation prompts that were never trained on.
FOLDER/results.jsonl gets a line for each run; the same command resumes. Then FOLDER/report.md and
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

from pause_megatron.tasks import load_task
from pause_megatron.tasks.synthetic.base import write_tokenizer

TASKS = {
    "code": "pause_megatron.tasks.synthetic.codewords:CODE_OF_16",
    "count-16": "pause_megatron.tasks.synthetic.counting:MOD4_OF_16",
    "count-24": "pause_megatron.tasks.synthetic.counting:MOD4_OF_24",
}
BITS = {"code": 16, "count-16": 16, "count-24": 24}
TITLES = {
    "code": "which of 8 codewords of 16 bits is near",
    "count-16": "number of ones among 16 bits, modulo 4",
    "count-24": "number of ones among 24 bits, modulo 4",
}
CHANCE = {"code": 12.5, "count-16": 25, "count-24": 25}
BATCH = 128
EVALUATED = 2048

# Quantiles of Student's t for a two-sided 95 % interval, by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model and its positions behind the prompt. The default is the standard model.

    Attributes:
        what: for the report.
        task: of TASKS.
        pauses: M.
        distinct: number of pause vectors, used in turn; 1 is the paper's.
        layers, ffn, heads, rope_base: of the model; its width is 16. With the usual base of 10,000 most of 16 features
            hardly turn within 16 bits.
        location: "append" or "prepend".
        filler: text of the ordinary token that stands in place of `<pause>`.
    """

    what: str
    task: str = "code"
    pauses: int = 0
    distinct: int = 1
    layers: int = 2
    ffn: int = 16
    heads: int = 1
    rope_base: float = 30.0
    location: str = "append"
    filler: str | None = None

    @property
    def window(self) -> int:
        """Positions of an example: bits, "=", pauses, the answer (the end of the text behind it is predicted only)."""
        return BITS[self.task] + 2 + self.pauses


def _count(bits: int, **values) -> Setting:
    return Setting(**{"task": f"count-{bits}", "ffn": 8, "rope_base": 1e4, **values})


SETTINGS = {
    "standard": Setting(what="no pauses"),
    "pauses-4": Setting(what="4 pauses, distinct vectors", pauses=4, distinct=4),
    "pauses-8": Setting(what="8 pauses, distinct vectors", pauses=8, distinct=8),
    "pauses-16": Setting(what="16 pauses, distinct vectors", pauses=16, distinct=16),
    "wider": Setting(what="control: feed-forward width 88, no pauses", ffn=88),
    "deeper": Setting(what="control: 5 layers, no pauses", layers=5),
    "heads-4": Setting(what="4 attention heads of width 4, no pauses", heads=4),
    "shared-16": Setting(what="16 pauses, one vector (the paper's)", pauses=16),
    "filler-16": Setting(what="16 fillers: the ordinary token `=`", pauses=16, filler="="),
    "prepended-16": Setting(what="16 distinct pauses before the prompt", pauses=16, distinct=16, location="prepend"),
    "count-standard": _count(16, what="no pauses"),
    "count-pauses-8": _count(16, what="8 pauses, distinct vectors", pauses=8, distinct=8),
    "count-deeper": _count(16, what="control: 4 layers, no pauses", layers=4),
    "count-wider": _count(16, what="control: feed-forward width 40, no pauses", ffn=40),
    "count-24-standard": _count(24, what="no pauses"),
    "count-24-pauses-24": _count(24, what="24 pauses, distinct vectors", pauses=24, distinct=24),
    "count-24-deeper": _count(24, what="control: 6 layers, no pauses", layers=6),
    "count-24-wider": _count(24, what="control: feed-forward width 96, no pauses", ffn=96),
}
BASE = {"code": "standard", "count-16": "count-standard", "count-24": "count-24-standard"}
CONTROLS = {
    "code": ("wider", "deeper", "heads-4"),
    "count-16": ("count-wider", "count-deeper"),
    "count-24": ("count-24-wider", "count-24-deeper"),
}
CURVE = {
    "code": ("standard", "pauses-4", "pauses-8", "pauses-16"),
    "count-16": ("count-standard", "count-pauses-8"),
    "count-24": ("count-24-standard", "count-24-pauses-24"),
}
OTHERS = ("shared-16", "filler-16", "prepended-16")


def run_config(setting: Setting, seed: int, steps: int, folder: Path):
    """The resolved configuration of one run."""
    from pause_megatron.config import load

    values = {
        "run.dir": folder / "run",
        "run.seed": seed,
        "task.name": TASKS[setting.task],
        "data.tokenizer": folder / "tokenizer",
        "data.sequence_length": setting.window,
        "data.prefetch": 0,
        "model.preset": "null",
        "model.layers": setting.layers,
        "model.hidden": 16,
        "model.heads": setting.heads,
        "model.rope_base": setting.rope_base,
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
        if code := finetune(run_config(setting, seed, steps, folder)):
            sys.exit(code)  # asked to stop: a run that is cut short counts for nothing
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        export(folder / "run", folder / "hf")
        generator = load(folder / "hf")  # carries M, the place of the pauses, and the filler
        asked = load_task(TASKS[setting.task]).examples("eval", None, examples)
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
        base = flops(SETTINGS[BASE[setting.task]])[1]
        each = " ".join(f"{value:.1f}" for value in values)
        lines.append(
            f"| {name} | {setting.what} | {size:,} | {cost / base:.2f} | {mean:.1f} | {mean - half:.1f} .. "
            f"{mean + half:.1f} | {len(values)} | {each} |"
        )
    cpu, wall = (sum(r[key] for r in results) for key in ("cpu", "seconds"))
    lines += ["", f"{len(results)} runs, {cpu / 60:.1f} CPU minutes, {wall / 60:.1f} minutes of wall clock in them."]
    machine = environment("torch", "megatron-core", "deepspeed", "transformers")
    return "\n".join([*lines, "", f"`{command}`", "", machine, ""])


def draw(results: list[dict], task: str, output: Path) -> None:
    """Accuracy against M with 95 % intervals; the controls without pauses as horizontal bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    of = {name: [100 * r["accuracy"] for r in results if r["setting"] == name] for name in SETTINGS}
    figure, axes = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for number, name in enumerate(CONTROLS[task], start=1):
        if of[name]:
            mean, half = interval(of[name])
            axes.axhline(mean, color=f"C{number}", label=SETTINGS[name].what)
            axes.axhspan(mean - half, mean + half, color=f"C{number}", alpha=0.12)
    lines = [("standard model + M pauses", CURVE[task]), *((SETTINGS[name].what, (name,)) for name in OTHERS)]
    for number, (label, names) in enumerate(lines):
        names = [name for name in names if of[name] and SETTINGS[name].task == task]
        if names:
            means, halves = zip(*(interval(of[name]) for name in names), strict=True)
            places = [SETTINGS[name].pauses + 0.2 * number for name in names]  # side by side
            color = f"C{number + 2}" if number else "C0"
            axes.errorbar(places, means, yerr=halves, color=color, fmt="o-", capsize=4, label=label)
    axes.axhline(CHANCE[task], color="grey", linestyle=":", label="chance")
    axes.set(xlabel="M, positions added to the prompt", ylabel="accuracy %, mean and 95 % interval over seeds")
    axes.set(title=TITLES[task], ylim=(0, 105))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _work(cell: tuple[str, int, int]) -> dict:
    name, seed, steps = cell
    return {"setting": name, "seed": seed, "steps": steps, **train_and_score(SETTINGS[name], seed, steps)}


def _settings_of(task: str) -> list[str]:
    return [name for name, setting in SETTINGS.items() if setting.task == task]


def _one_thread() -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", default="0-4", help="FIRST-LAST")
    parser.add_argument("--task", default="code", choices=sorted(TASKS))
    parser.add_argument("--settings", help="default: all of the task")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=2, help="processes, a core each")
    arguments = parser.parse_args()
    names = arguments.settings.split(",") if arguments.settings else _settings_of(arguments.task)
    first, last = map(int, arguments.seeds.split("-"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(r["setting"], r["seed"], r["steps"]) for r in results}
    cells = [
        (name, seed, arguments.steps)
        for seed in range(first, last + 1)
        for name in names
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
    draw(results, arguments.task, arguments.output / "accuracy.png")
    print(f"wrote {arguments.output}/report.md and accuracy.png")


if __name__ == "__main__":
    main()
