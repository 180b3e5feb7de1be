"""P6: `prepare` (gz in, .bin/.idx out) against the bare tokenizer on the same text, per core. Targets: >= 0.9 of its
rate, and resident memory flat from 1x to 10x input.

python -m tests.benchmarks.prepare [--documents 12000] [--rounds 7] [--vocab-size 8192]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment
from prose import documents, json_lines, write_shards

from pause_megatron.data.prepare import prepare
from pause_megatron.data.tokenizer import Tokenizer
from pause_megatron.data.train_tokenizer import train_tokenizer

TARGET = 0.9
BATCH = 256

# Runs the program in a child and prints the child's peak resident memory in KiB.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main() -> None:
    """Prints the target's line, the absolute rates, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12_000, help="paragraphs of real speeches")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, at least 7")
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    texts = documents(arguments.documents)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_shards(folder / "shards", texts, 1)
        tokenizer = train_tokenizer([shards], folder / "tok.model", vocab_size=arguments.vocab_size).tokenizer

        timings = compare(
            {
                "prepare": lambda: prepare([shards], tokenizer, folder / "c", workers=1, overwrite=True),
                "bare tokenizer": lambda: _bare(tokenizer, texts),
            },
            rounds=arguments.rounds,
        )
        counts = prepare([shards], tokenizer, folder / "c").manifest.counts
        small, large = (_peak_mib(folder, times) for times in (1, 10))
    bare = timings["bare tokenizer"]
    spread = f"{bare.ratio:.2f} [{bare.low:.2f} .. {bare.high:.2f}]"
    print(
        f"P6 rate of prepare / bare tokenizer: {spread} (target >= {TARGET}), "
        f"{bare.rounds} rounds of {counts.documents:,} documents; {environment('sentencepiece', 'numpy')}"
    )
    for what, timing in timings.items():
        print(
            f"   {what:16s} {counts.documents / timing.seconds:8,.0f} documents/s "
            f"{counts.text_bytes / timing.seconds / 1e6:6.2f} MB/s {counts.tokens / timing.seconds:10,.0f} tokens/s"
        )
    print(f"   peak resident memory: {small:.0f} MiB for 1x, {large:.0f} MiB for 10x input")


def _bare(tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    for start in range(0, len(texts), BATCH):
        tokenizer.encode_batch(texts[start : start + BATCH])


def _peak_mib(folder: Path, times: int) -> float:
    """Peak resident memory of the program on one shard, written `times` over."""
    shard = folder / f"peak-{times}.json.gz"
    block = gzip.compress(json_lines(documents(4000)))
    shard.write_bytes(b"".join(itertools.repeat(block, times)))
    program = [sys.executable, "-m", "pause_megatron", "prepare", "--workers", "1", "--input", str(shard)]
    program += ["--tokenizer", str(folder / "tok.model"), "--output", str(folder / f"peak-{times}")]
    result = subprocess.run([sys.executable, "-c", _PEAK, *program], check=True, capture_output=True, text=True)
    return int(result.stdout) / 1024


if __name__ == "__main__":
    main()
