"""The losses of the quickstart's recipes, as files.

Changed only by `pytest tests/integration/test_golden.py --update-golden`. Compared exactly on the kind of machine that
wrote them (torch release, instruction set, processor). Other machines add floats in another order, and Adam, which
divides small moments by their own size, makes rounding errors grow. Measured with AVX2 against AVX-512: losses
part by 2e-8 in 8 steps and 3e-6 in 12; gradient norms by 2e-6 in 6 steps, 1e-5 in 8, and 1e-2 at step 10, a spike.
torch 2.15 with megatron-core 0.19.2 gives the same numbers as torch 2.13 with 0.16.1 on one processor.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.ranks import run_on_ranks

from pause_megatron.cli import main

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "losses"
STEPS = 12
FIRST = 6  # steps in which differences of rounding have no time to grow
CLOSE, LATER_CLOSE, LATER_CLOSE_NORM = 2e-5, 1e-4, 5e-2  # relative


def machine() -> dict[str, str]:
    fields = ("vendor_id", "cpu family", "model", "model name", "stepping")
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    processor = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(f"{field} {processor.get(field)}" for field in fields),
    }


@pytest.fixture(scope="module")
def quickstart_corpus(shards: Path) -> str:
    """As launchers/quickstart.sh makes it."""
    source, folder = str(shards / "c4-train.*.json.gz"), shards / "quickstart"
    tokenizer, prefix = str(folder / "tokenizer.model"), str(folder / "english")
    folder.mkdir()
    assert main(["train-tokenizer", "--input", source, "--vocab-size", "4096", "--output", tokenizer]) == 0
    assert main(["prepare", "--input", source, "--tokenizer", tokenizer, "--output", prefix]) == 0
    return prefix


def pretrain(recipe: str, corpus: str, folder: str) -> int:
    return main(
        [
            *("pretrain", "--recipe", recipe, f"data.prefix={corpus}", f"run.dir={folder}", f"train.steps={STEPS}"),
            *("optim.warmup_steps=3", "checkpoint.every=0", "validation.every=6", "validation.samples=16"),
        ]
    )


@pytest.mark.parametrize("recipe", ["tiny-pause", "tiny-std"])
def test_losses_are_those_of_the_golden_file(quickstart_corpus, tmp_path, recipe, request):
    assert run_on_ranks(2, pretrain, recipe, quickstart_corpus, str(tmp_path)) == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "loss_after_pause", "grad_norm", "valid_loss", "valid_loss_without_pauses")
    found = {name: [line[name] for line in lines if name in line] for name in names}
    path = ASSETS / f"{recipe}.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({"machine": machine(), "steps": STEPS, **found}, indent=1) + "\n")
    golden = json.loads(path.read_text())
    for name, values in found.items():
        if golden["machine"] == machine():
            assert values == golden[name], name
        else:
            later = LATER_CLOSE_NORM if name == "grad_norm" else LATER_CLOSE
            first = FIRST if len(values) == STEPS else 0  # validation comes later
            expected = [
                value and pytest.approx(value, rel=CLOSE if at < first else later)
                for at, value in enumerate(golden[name])
            ]
            assert values == expected, name
