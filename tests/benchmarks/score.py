"""`pause-megatron score` against a bare forward pass of the same model, and its memory on corpora of two sizes.

The bare pass reads full windows and keeps the logits of the whole batch. Scoring reads documents of their own lengths,
with padding and overlap, and reduces the logits to a value a token.

python -m tests.benchmarks.score [--rounds 7] [--vocabulary 32000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from benchmarks.timing import compare, environment
from support.prose import documents, small_tokenizer, write_shards
from support.tiny_llama import write_folder

from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.records import FileRecord, SideRecord
from pause_megatron.data.prepare.run import prepare
from pause_megatron.score.plan import Parts, SidePlan, UnitConfig
from pause_megatron.score.unit_scorer import UnitScorer
from pause_megatron.score.windows import CorpusReader, batches_of, document_offsets, units_of

CONTEXT, BATCH_TOKENS, UNIT_TOKENS = 256, 2048, 1 << 12
REPEATS = 10
PEAK = """
import resource, sys
from pause_megatron.cli import main
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    """Prints the ratio, the rates and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, at least 7")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="rows of the LM head")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = small_tokenizer(folder)
        texts = documents(400)
        for corpus, repeats in (("small", 1), ("large", REPEATS)):
            prepare([write_shards(folder / f"{corpus}-s", texts * repeats, 1)], tokenizer, folder / corpus, workers=1)
        _speed(folder, arguments.vocabulary, arguments.rounds)
        _memory(folder)


def _speed(folder: Path, vocabulary: int, rounds: int) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    write_folder(folder / "model")
    _grow(folder / "model", vocabulary, sizes)
    manifest = CorpusManifest.load(folder / "small")
    record = {"file": FileRecord(bytes=0, digest=""), "bin": "", "idx": "", "context": CONTEXT, "compute": "fp32"}
    side = SideRecord(**record, dtype="float32", kind="loss", start=2, batch_tokens=BATCH_TOKENS)
    plan = SidePlan(side=side, device="cpu", unit_tokens=UNIT_TOKENS)
    reader = CorpusReader(
        str(folder / "small"), manifest.dtype, 2, CONTEXT, BATCH_TOKENS, vocabulary=vocabulary, pauses=range(600, 601)
    )
    config = UnitConfig(folder / "units", str(folder / "model"), ("cpu",), reader.pauses, plan, reader)
    scorer = UnitScorer(config, "cpu")
    Parts(config.folder, plan).open(overwrite=True)
    unit = next(units_of(document_offsets(folder / "small", manifest.counts.documents), CONTEXT, UNIT_TOKENS))
    ids = np.fromfile(folder / "small.bin", dtype=manifest.dtype)[: len(unit) // CONTEXT * CONTEXT].astype(np.int64)
    rows = torch.from_numpy(ids).view(-1, CONTEXT).split(BATCH_TOKENS // CONTEXT)

    @torch.inference_mode()
    def bare() -> None:
        for batch in rows:
            scorer.model(input_ids=batch, use_cache=False)

    found = compare({"bare": bare, "score": lambda: scorer.score(unit, lambda count: True)}, rounds=rounds)
    per_token = ids.size / len(unit)
    score = found["score"]
    print(
        f"time a token of score / of a bare forward pass: {score.ratio * per_token:.2f} "
        f"[{score.low * per_token:.2f} .. {score.high * per_token:.2f}], {rounds} rounds of {len(unit):,} tokens, "
        f"vocabulary {vocabulary:,}, 4 layers of 256; {environment('torch', 'transformers')}"
    )
    read = sum(len(batch) * len(batch[0]) for batch in batches_of(unit.windows(CONTEXT), BATCH_TOKENS))
    print(
        f"   tokens read, with overlap and padding, / tokens scored: {read / len(unit):.2f} at a context of {CONTEXT}"
    )
    print(f"   bare  {ids.size / found['bare'].seconds:9,.0f} tokens/s")
    print(f"   score {len(unit) / score.seconds:9,.0f} tokens/s")


def _grow(folder: Path, vocabulary: int, sizes: dict[str, int]) -> None:
    """Replaces the weights of a folder by those of a larger model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), vocab_size=vocabulary, head_dim=64, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))


def _memory(folder: Path) -> None:
    write_folder(folder / "tiny")
    peaks = {}
    for corpus in ("small", "large"):
        words = ["score", str(folder / corpus), "--model", str(folder / "tiny"), "--processes", "1"]
        words += ["--context", str(CONTEXT), "--batch-tokens", str(BATCH_TOKENS), "--name", "peak"]
        done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True)
        peaks[corpus] = int(done.stdout.rpartition(" ")[2])
    shown = ", ".join(f"{peak / 1e6:,.0f} MB" for peak in peaks.values())
    print(f"   peak memory at 1 and {REPEATS} times the tokens: {shown}")


if __name__ == "__main__":
    main()
