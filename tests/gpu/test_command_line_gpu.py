"""The program as a user calls it: text to corpus, a run, a Hugging Face folder that computes the same, then words."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from small_runs import DEVICE, keys, program
from wheels import ROOT

# On a GPU the sizes and the precision of the real recipes' kernels; a CPU has neither time nor bf16.
MODEL = (
    ["model.layers=4", "model.hidden=512", "model.heads=8", "engine.precision=bf16", "data.sequence_length=512"]
    if DEVICE == "cuda"
    else []
)


def test_from_text_to_words(tmp_path, figures):
    shards, corpus, run, model = (tmp_path / name for name in ("shards", "english", "run", "model"))
    script = ROOT / "launchers" / "english_shards.py"
    subprocess.run([sys.executable, script, "--output", shards, "--shards", "8"], check=True)
    shard, tokenizer = str(shards / "c4-train.00000-of-00008.json.gz"), str(tmp_path / "tokenizer.model")
    for verb, *arguments in (
        ("train-tokenizer", "--input", shard, "--vocab-size", "1000", "--output", tokenizer),
        ("prepare", "--input", shard, "--tokenizer", tokenizer, "--output", str(corpus)),
        ("verify", str(corpus)),
        ("pretrain", "--recipe", "tiny-pause", *keys(str(corpus), run, "train.steps=12", *MODEL)),
        ("export-hf", str(run), str(model)),
    ):
        done = program(verb, *arguments)
        assert done.returncode == 0, f"{verb}: {done.stderr[-3000:]}"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 12 and steps[-1]["loss"] < steps[0]["loss"] and all(line["applied"] for line in steps)
    # export-hf refuses a folder whose logits are not the native model's.
    gap = re.search(r"largest difference from the native model (\S+) \(allowed (\S+)\)", done.stdout)
    figures(losses=[line["loss"] for line in steps], export=gap[0])
    figures.line(f"command line: exported: {gap[0]}")
    prompt = "The people of the United States"
    done = program(
        "generate", "--model", str(model), "--prompt", prompt, "--pauses", "4", "--max-new-tokens", "16", seconds=100
    )
    assert done.returncode == 0 and prompt in done.stdout, done.stderr[-3000:]
    assert "4 pauses, 16 new tokens" in done.stdout + done.stderr
    figures(generated=done.stdout)
    figures.line(
        f"command line: loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f} in 12 steps; exported, prompted"
    )
