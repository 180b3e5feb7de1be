"""The same 20 losses and gradient norms in two environments: other releases of torch, megatron-core, DeepSpeed.

Run it in each, then compare the files:

    python -m tests.benchmarks.version_losses --output old.json
    python -m tests.benchmarks.version_losses --output new.json
    python -m tests.benchmarks.version_losses --compare old.json new.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import environment

from pause_megatron.cli import main as pause_megatron

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
# tensor-parallel size and sequence parallelism; each with ZeRO 0 to 3 on two ranks
LAYOUTS = [(1, False), (2, False), (2, True)]


def measure() -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms of every layout and ZeRO stage, by name."""
    from support.ranks import close_pools, run_on_ranks

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
    from test_topologies import metrics, train

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = english(folder)
        for tensor, sequence in LAYOUTS:
            for stage in range(4):
                name = f"TP {tensor}{' SP' if sequence else ''}, ZeRO {stage}"
                run = Path(folder) / name.replace(" ", "").replace(",", "-")
                micro = 4 // (2 // tensor) if stage % 2 else 2  # accumulation too
                assert run_on_ranks(2, train, corpus, str(run), stage, micro, tensor, sequence, []) == [0, 0]
                lines = metrics(run)
                found[name] = {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm")}
                print(f"{name}: loss {found[name]['loss'][-1]:.6f} nats after {len(found[name]['loss'])} steps")
        close_pools()
    return found


def english(folder: str) -> str:
    """Prefix of a corpus of real English, the same bytes everywhere."""
    script = Path(__file__).resolve().parents[2] / "launchers" / "english_shards.py"
    subprocess.run([sys.executable, script, "--output", folder, "--shards", "8"], check=True, capture_output=True)
    shard, tokenizer, prefix = f"{folder}/c4-train.00000-of-00008.json.gz", f"{folder}/tok.model", f"{folder}/english"
    for verb in (
        ["train-tokenizer", "--input", shard, "--vocab-size", "1000", "--output", tokenizer],
        ["prepare", "--input", shard, "--tokenizer", tokenizer, "--output", prefix],
    ):
        assert pause_megatron(verb) == 0
    return prefix


def compare(one: dict, two: dict) -> float:
    """Print the largest relative difference for every layout and stage; return the largest of all."""
    worst = 0.0
    print(f"{one['environment']}\nagainst {two['environment']}")
    for name, lists in one["lists"].items():
        gaps = {
            key: max(abs(a - b) / abs(a) for a, b in zip(values, two["lists"][name][key], strict=True))
            for key, values in lists.items()
        }
        worst = max(worst, *gaps.values())
        print(f"{name:16} " + ", ".join(f"{key} {gap:.1e}" for key, gap in gaps.items()))
    print(f"largest relative difference {worst:.1e} over {len(one['lists'])} topologies")
    return worst


def main() -> None:
    """Measure, or compare two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--output", type=Path, help="JSON file to write")
    choice.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two such files")
    arguments = parser.parse_args()
    if arguments.compare:
        compare(*(json.loads(path.read_text()) for path in arguments.compare))
        return
    found = {"environment": environment(*PACKAGES), "lists": measure()}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
