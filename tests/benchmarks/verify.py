"""The full check of a corpus (`pause-megatron verify`) against reading its files, and opening one at two sizes.

Files are in the page cache, so this is what the check itself costs; a disk is slower than either.

python -m tests.benchmarks.verify [--megabytes 512] [--rounds 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from benchmarks.timing import compare, environment
from support.prose import documents, small_tokenizer, write_shards

from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.index_file import write_index
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.records import BLOCK_BYTES, BlockRecord, FileRecord
from pause_megatron.data.corpus.verify import damage_of
from pause_megatron.data.prepare.run import prepare
from pause_megatron.files.digest import BlockDigests
from pause_megatron.files.durable import DigestFile

DOCUMENT_TOKENS = 500
OPENINGS = 20


def main() -> None:
    """Prints the ratio, the rates, and what opening costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the .bin")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, at least 7")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare([write_shards(folder / "s", documents(50), 1)], small_tokenizer(folder), folder / "small", workers=1)
        _enlarge(folder / "small", folder / "large", arguments.megabytes)
        corpus = open_corpus(folder / "large")
        size = sum(record.bytes for record in corpus.manifest.files.values())
        timings = compare(
            {"read": lambda: _read(folder / "large"), "verify": lambda: damage_of(corpus)}, rounds=arguments.rounds
        )
        opening = compare(
            {
                what: lambda what=what: [open_corpus(folder / what) for _ in range(OPENINGS)]
                for what in ("small", "large")
            },
            rounds=arguments.rounds,
        )
    verify, large = timings["verify"], opening["large"]
    print(
        f"R10 time of verify / reading the files: {verify.ratio:.2f} [{verify.low:.2f} .. {verify.high:.2f}], "
        f"{verify.rounds} rounds of {size / 1e6:,.0f} MB; {environment('xxhash', 'numpy')}"
    )
    for what, timing in timings.items():
        print(f"   {what:7s} {size / timing.seconds / 1e9:6.2f} GB/s")
    print(
        f"   open    {corpus.manifest.counts.documents:,} documents / 50 documents: {large.ratio:.2f} "
        f"[{large.low:.2f} .. {large.high:.2f}], {large.seconds / OPENINGS * 1e3:.2f} ms"
    )


def _enlarge(small: Path, large: Path, megabytes: int) -> None:
    """A corpus of random ids with the small one's tokenizer."""
    rng = np.random.default_rng(0)
    count = megabytes * 1_000_000 // (2 * DOCUMENT_TOKENS)
    bin_file, idx_file = DigestFile(Path(f"{large}.bin")), DigestFile(Path(f"{large}.idx"))
    blocks = BlockDigests(BLOCK_BYTES)
    for _ in range(count // 1000):
        ids = rng.integers(3, 600, 1000 * DOCUMENT_TOKENS, dtype=np.uint16).tobytes()
        bin_file.write(ids)
        blocks.update(ids)
    documents = count // 1000 * 1000
    write_index(idx_file, "uint16", documents, lambda: [np.full(documents, DOCUMENT_TOKENS, dtype=np.int32)])
    for file in (bin_file, idx_file):
        file.publish()
    manifest = CorpusManifest.load(small)
    counts = manifest.counts.model_copy(update={"documents": documents, "tokens": documents * DOCUMENT_TOKENS})
    records = {"bin": bin_file, "idx": idx_file}
    manifest.model_copy(
        update={
            "counts": counts,
            "files": {key: FileRecord(bytes=file.bytes, digest=file.digest) for key, file in records.items()},
            "blocks": BlockRecord(bytes=BLOCK_BYTES, digests=blocks.digests),
        }
    ).save(large)
    Path(f"{large}.tokenizer").symlink_to(f"{small}.tokenizer")


def _read(prefix: Path) -> None:
    buffer = memoryview(bytearray(4 << 20))
    for name in ("bin", "idx"):
        with open(f"{prefix}.{name}", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
