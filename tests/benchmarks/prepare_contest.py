"""The contestants of `tests.benchmarks.prepare`, and what they make of the same text."""

from __future__ import annotations

import gzip
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.megatron_loop import OPENERS, megatron_loop, write_hugging_face
from benchmarks.timing import Timing, compare, environment
from support.prose import documents, json_lines, write_shards

from pause_megatron.data.corpus.records import Counts
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.tokenizer.fast.encoders import GigatokenEncoder
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.data.tokenizer.train import train_tokenizer
from pause_megatron.hf.sentencepiece_model import convert_bpe

BATCH = 512
CORES = 2

# Runs the program in a child and prints the child's peak resident memory in KiB.
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, capture_output=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class Setting:
    """Shards, a tokenizer, and the reference corpus that every contestant must reproduce."""

    def __init__(self, folder: Path, count: int, vocab_size: int) -> None:
        self.folder = folder
        self.texts = list(documents(count))
        self.pattern = write_shards(folder / "shards", self.texts, CORES)
        self.shards = sorted((folder / "shards").iterdir())
        self.tokenizer = train_tokenizer([self.pattern], folder / "tok.model", vocab_size=vocab_size).tokenizer
        self.counts: Counts = prepare([self.pattern], self.tokenizer, folder / "reference").manifest.counts
        self.kept = folder / "reference.tokenizer"
        write_hugging_face(self.kept, convert_bpe((self.kept / "tokenizer.model").read_bytes(), "model")[0])

    def ours(self, encoder: str, workers: int) -> Callable[[], None]:
        """`prepare` with this encoder."""
        output = self.folder / f"ours-{encoder}"
        return lambda: prepare([self.pattern], self.tokenizer, output, workers=workers, encoder=encoder, overwrite=True)

    def loop(self, library: str, workers: int) -> Callable[[], None]:
        """megatron-core's loop over this library."""
        output = self.folder / f"loop-{library.replace(' ', '-')}"
        return lambda: megatron_loop(self.shards, self.kept, library, output, workers)

    def bare(self, open_tokenizer: Callable[[], object]) -> Callable[[], None]:
        """The tokenizer alone, on texts in memory."""

        def run() -> None:
            encode = open_tokenizer()
            for start in range(0, len(self.texts), BATCH):
                encode(self.texts[start : start + BATCH])

        return run

    def bare_hugging_face(self) -> Callable[[list[str]], object]:
        """Hugging Face tokenizers' fastest call."""
        import tokenizers

        model = tokenizers.Tokenizer.from_file(str(self.kept / "tokenizer.json"))
        model.encode_special_tokens = True
        return lambda texts: [item.ids for item in model.encode_batch_fast(texts, add_special_tokens=False)]

    def check(self) -> None:
        """Every corpus that was written has the same bytes."""
        expected = (self.folder / "reference.bin").read_bytes()
        for path in (*self.folder.glob("ours-*.bin"), *self.folder.glob("loop-*.bin")):
            if path.read_bytes() != expected:
                raise SystemExit(f"{path.name} has other ids")

    def show(self, title: str, timings: dict[str, Timing]) -> None:
        """One line a contestant; the first one is the baseline."""
        print(f"{title}; {next(iter(timings.values())).rounds} rounds, rate relative to the first [quartiles]")
        for name, timing in timings.items():
            megabytes = self.counts.text_bytes / timing.seconds / 1e6
            relative = f"{1 / timing.ratio:5.2f} [{1 / timing.high:.2f} .. {1 / timing.low:.2f}]"
            print(
                f"   {name:38s} {megabytes:7.2f} MB/s {self.counts.documents / timing.seconds:8,.0f} docs/s {relative}"
            )


def contest(count: int, rounds: int, vocab_size: int) -> None:
    """Prints the targets' lines, the rates behind them, and the memory.

    Args:
        count: paragraphs of real speeches. rounds: counted. vocab_size: of the tokenizer.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(Path(name), count, vocab_size)
        bare = {
            "bare SentencePiece, whole documents": lambda: _whole(setting.kept),
            "bare SentencePiece, in pieces (ours)": lambda: load_tokenizer(setting.kept).encode_flat,
            "bare Hugging Face tokenizers": setting.bare_hugging_face,
            "bare gigatoken (ours)": lambda: GigatokenEncoder(load_tokenizer(setting.kept)).encode_flat,
        }
        one = {name: setting.bare(open_tokenizer) for name, open_tokenizer in bare.items()}
        one["prepare, library"] = setting.ours("library", 1)
        one["prepare, gigatoken"] = setting.ours("gigatoken", 1)
        one |= {f"megatron-core's loop, {library}": setting.loop(library, 1) for library in OPENERS}
        per_core = compare(one, rounds)
        setting.check()
        two = {f"megatron-core's loop, {library}": setting.loop(library, CORES) for library in OPENERS}
        two["prepare, library"] = setting.ours("library", CORES)
        two["prepare, gigatoken"] = setting.ours("gigatoken", CORES)
        both_cores = compare(two, rounds)
        setting.check()
        memory = {
            (encoder, what): [_peak_mib(setting, encoder, shard, times) for times in (1, 10)]
            for encoder in ("library", "gigatoken")
            for what, shard in (("documents", documents(4000)), ("one document of 3 MB", [_long()]))
        }
    counts, seconds = setting.counts, {name: timing.seconds for name, timing in per_core.items()}
    print(
        f"P6 prepare / bare tokenizer, per core, rates: SentencePiece "
        f"{seconds['bare SentencePiece, in pieces (ours)'] / seconds['prepare, library']:.2f} (target >= 0.9), against "
        f"whole documents {seconds['bare SentencePiece, whole documents'] / seconds['prepare, library']:.2f}, "
        f"gigatoken {seconds['bare gigatoken (ours)'] / seconds['prepare, gigatoken']:.2f}"
    )
    fast = seconds["bare Hugging Face tokenizers"] / seconds["bare gigatoken (ours)"]
    print(f"P6 fast byte-pair path / Hugging Face tokenizers, same ids: {fast:.1f} (target >= 5)")
    print(f"   {environment('sentencepiece', 'tokenizers', 'gigatoken', 'megatron-core', 'numpy')}")
    print(f"   {counts.documents:,} documents, {counts.text_bytes / 1e6:.1f} MB, {counts.tokens:,} tokens")
    setting.show("one core", per_core)
    setting.show(f"{CORES} processes, {CORES} shards", both_cores)
    for (encoder, what), (small, large) in memory.items():
        print(f"   peak resident memory, {encoder}, {what}: {small:.0f} MiB for 1x, {large:.0f} MiB for 10x input")


def _whole(folder: Path) -> Callable[[list[str]], object]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda texts: model.encode(texts, num_threads=1)


def _long() -> str:
    return "\n".join(documents(4000))


def _peak_mib(setting: Setting, encoder: str, texts: list[str], times: int) -> float:
    """Peak resident memory of the program on one shard, written `times` over."""
    shard = setting.folder / "peak.json.gz"
    shard.write_bytes(b"".join(itertools.repeat(gzip.compress(json_lines(texts)), times)))
    program = [sys.executable, "-m", "pause_megatron", "prepare", "--workers", "1", "--input", str(shard)]
    program += ["--tokenizer", str(setting.folder / "tok.model"), "--output", str(setting.folder / "peak")]
    program += ["--encoder", encoder, "--overwrite"]
    result = subprocess.run([sys.executable, "-c", _PEAK, *program], check=True, capture_output=True, text=True)
    return int(result.stdout) / 1024
