"""Starting a run on a corpus of C4's size: 364,868,892 documents and 180e9 tokens. Lengths are generated; text is not.

The `.idx` is real. The `.bin` has the right length and no blocks on the disk: a start does not read it. Every part runs
in a process of its own; its peak memory counts Python, torch and megatron-core (line `imports`), and pages of files.

megatron-core 0.16.1 numbers the documents by `np.mgrid`, whose int64 arrays take most of a first start's memory.
`--lean` gives it the same array without them, for a machine that has not 13 GB to spare; the caches are the same bytes.

python -m tests.benchmarks.c4_scale [--documents 364868892] [--folder DIR] [--readers 4] [--rounds 3] [--lean]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from benchmarks.timing import environment
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pause_megatron.config.schema import PauseSection
from pause_megatron.data.corpus.index_file import read_header, write_index
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.records import Counts, FileRecord, TokenizerRecord
from pause_megatron.data.windows.build import DatasetOptions, Datasets, build_datasets
from pause_megatron.files.durable import DigestFile

C4_DOCUMENTS = 364_868_892
MEAN_TOKENS = 493.3
SIGMA = 1.1  # of the logarithm of the length: a median of 270 tokens
WINDOW, RATE, GLOBAL_SIZE = 2048, 0.1, 512
RECIPE_TOKENS = 21e9  # train.tokens of c4-1b-pause
SPLIT = "998,2,0"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class SizedTokenizer:
    """What building the datasets asks of a tokenizer; the ids fit uint16."""

    vocab_size: int = 32_000
    eod: int = 2
    fingerprint: str = "c4-scale"


def generated_lengths(documents: int) -> Iterator[np.ndarray]:
    """Lengths int32 [<= 1 Mi] at a time, log-normal and at least 1, the same at every call."""
    mu = np.float32(np.log(MEAN_TOKENS) - SIGMA**2 / 2)
    rng = np.random.default_rng(1234)
    for start in range(0, documents, _CHUNK):
        normal = rng.standard_normal(min(_CHUNK, documents - start), dtype=np.float32)
        yield np.maximum(np.exp(mu + np.float32(SIGMA) * normal), 1).astype(np.int32)


def write(folder: Path, documents: int) -> None:
    """The `.idx`, a `.bin` of holes, and the manifest that `prepare` would write; the `.bin`'s digest is not read."""
    index = DigestFile(folder / "c4.idx")
    write_index(index, "uint16", documents, lambda: generated_lengths(documents))
    index.publish()
    size = read_header(folder / "c4.idx").bin_bytes
    with open(folder / "c4.bin", "wb") as file:
        file.truncate(size)
    own = SizedTokenizer()
    tokenizer = TokenizerRecord(
        kind="benchmark", fingerprint=own.fingerprint, vocab_size=own.vocab_size, eod=own.eod, pause_id=own.vocab_size
    )
    CorpusManifest(
        tokenizer=tokenizer,
        text_key="text",
        damaged_shards="error",
        dtype="uint16",
        counts=Counts(documents=documents, tokens=size // 2, text_bytes=None, malformed={}),
        places={},
        files={
            "bin": FileRecord(bytes=size, digest="xxh3_128:" + "0" * 32),
            "idx": FileRecord(bytes=index.bytes, digest=index.digest),
        },
        blocks=None,
        sources=[],
        adoption=None,
    ).save(folder / "c4")


def start(folder: Path, samples: int) -> Datasets:
    """What one rank does before its first batch."""
    datasets = build_datasets(
        DatasetOptions(
            [str(folder / "c4")],
            split=SPLIT,
            sequence_length=WINDOW,
            tokenizer=SizedTokenizer(),
            pause=PauseSection(rate=RATE),
            seed=1234,
            train_samples=samples,
            valid_samples=512,
            cache=str(folder / "cache"),
        )
    )
    assert len(datasets.train) >= samples
    return datasets


def number_documents_leanly() -> None:
    """Replaces, in this process, how megatron-core numbers the documents of one epoch."""

    stock = gpt_dataset._build_document_index

    def build(
        documents: np.ndarray, epochs: int, random: np.random.RandomState, separate_final_epoch: bool
    ) -> np.ndarray:
        if epochs > 1:
            return stock(documents, epochs, random, separate_final_epoch)
        index = documents.copy()
        random.shuffle(index)
        return index

    gpt_dataset._build_document_index = build


def samples_of(folder: Path, budget: str) -> int:
    """Windows of a run: as many as one pass holds, or as c4-1b-pause trains on; whole steps."""
    text_tokens = round(WINDOW * (1 - RATE))
    one_pass = int(read_header(folder / "c4.idx").bin_bytes / 2 * 0.99) // text_tokens  # train's share, safely inside
    asked = one_pass if budget == "pass" else min(one_pass // 2, int(RECIPE_TOKENS / WINDOW))
    return asked // GLOBAL_SIZE * GLOBAL_SIZE


def measured(call: Callable[[], object]) -> dict[str, float]:
    """Seconds, and memory in bytes: the peak, and what is left of the process's own (not of files) afterwards."""
    own, read, cpu, clock = _status("RssAnon"), _read_bytes(), time.process_time(), time.perf_counter()
    kept = call()
    result = {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
        "peak": _status("VmHWM"),
        "own_left": _status("RssAnon") - own,
        "disk_read": _read_bytes() - read,
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    }
    del kept
    return result


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def drop_pages(folder: Path) -> None:
    """The page cache forgets these files, as on a node that has not read them."""
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes(folder: Path) -> int:
    """Bytes of the files that are in the page cache: read by anybody since `drop_pages`, read-ahead included."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    total = 0
    for path in _files(folder):
        if path.suffix == ".bin":  # holes
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
            pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=np.uint8)
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            if mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)):
                raise OSError(ctypes.get_errno(), "mincore")
            total += int((pages & 1).sum()) * mmap.PAGESIZE
    return total


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]


def _part(arguments: argparse.Namespace) -> None:
    """One part, in this process: waits for a line, so that readers begin together; prints what was measured."""
    calls = {
        "imports": lambda: None,
        "write": lambda: write(arguments.folder, arguments.documents),
        "open": lambda: IndexedDataset(str(arguments.folder / "c4")),
        "start": lambda: start(arguments.folder, samples_of(arguments.folder, arguments.budget)),
    }
    if arguments.lean:
        number_documents_leanly()
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(measured(calls[arguments.part])), flush=True)


def together(arguments: argparse.Namespace, part: str, budget: str = "pass", processes: int = 1) -> list[dict]:
    """Runs a part in fresh processes that begin at the same moment."""
    command = [sys.executable, "-m", "tests.benchmarks.c4_scale", "--part", part, "--budget", budget]
    command += ["--folder", str(arguments.folder), "--documents", str(arguments.documents)]
    command += ["--lean"] if arguments.lean else []
    # -m finds this module from the repository's root.
    begun = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for _ in range(processes)
    ]
    for process in begun:
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{' '.join(command)} failed")
    for process in begun:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in begun]


def _row(name: str, runs: list[dict], more: str = "") -> None:
    """One line of the table: medians, with the smallest and largest wall time."""
    times = [run["seconds"] for run in runs]
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    spread = f" [{min(times):.2f} .. {max(times):.2f}]" if len(times) > 1 else ""
    print(
        f"| {name} | {median['seconds']:.2f}{spread} | {median['cpu_seconds']:.2f} | {median['peak'] / 1e9:.2f} | "
        f"{median['own_left'] / 1e9:.2f} | {more} |",
        flush=True,
    )


def _later_starts(arguments: argparse.Namespace) -> None:
    """Starts with the caches there: files not in memory, in memory, and several ranks at once."""
    cold, touched = [], []
    for _ in range(arguments.rounds):
        drop_pages(arguments.folder)
        cold += together(arguments, "start")
        touched.append(resident_bytes(arguments.folder) / 1e6)
    read = statistics.median(run["disk_read"] for run in cold) / 1e6
    _row("later start, cold files", cold, f"{read:.2f} MB read, {statistics.median(touched):.2f} MB in page cache")
    _row("later start, warm files", [run for _ in range(arguments.rounds) for run in together(arguments, "start")])
    drop_pages(arguments.folder)
    readers = together(arguments, "start", processes=arguments.readers)
    _row(
        f"{arguments.readers} later starts at once, cold",
        readers,
        f"{resident_bytes(arguments.folder) / 1e6:.2f} MB in page cache",
    )


def _report(arguments: argparse.Namespace, first: bool) -> None:
    versions = environment("numpy", "torch", "megatron-core")
    print(f"{arguments.documents:,} documents; {versions}; load {os.getloadavg()[0]:.0f}")
    print("| part | wall s | cpu s | peak GB | own GB left | |\n|---|---|---|---|---|---|")
    _row("imports", together(arguments, "imports"))
    if first:
        _row("write .idx", together(arguments, "write"), f"{(arguments.folder / 'c4.idx').stat().st_size / 1e9:.2f} GB")
    tokens = read_header(arguments.folder / "c4.idx").bin_bytes // 2
    drop_pages(arguments.folder)
    _row("open IndexedDataset, cold", together(arguments, "open"), f"{tokens:,} tokens")
    if first:
        before = 0
        for budget in ("pass", "recipe"):
            runs = together(arguments, "start", budget)
            size = sum(path.stat().st_size for path in _files(arguments.folder / "cache"))
            samples = samples_of(arguments.folder, budget)
            _row(f"first start, {samples:,} samples", runs, f"{(size - before) / 1e9:.3f} GB of caches")
            before = size
    _later_starts(arguments)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=C4_DOCUMENTS)
    parser.add_argument("--folder", type=Path, help="kept, with corpus and caches; default: a temporary one")
    parser.add_argument(
        "--readers", type=int, default=4, help="processes of the last line; each needs 1.5 GB for a moment"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lean", action="store_true", help="number the documents without np.mgrid; see above")
    parser.add_argument("--part", choices=("imports", "write", "open", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--budget", choices=("pass", "recipe"), default="pass", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        _part(arguments)
        return
    made = arguments.folder is None
    arguments.folder = arguments.folder or Path(tempfile.mkdtemp(prefix="c4-scale-"))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        _report(arguments, first=not (arguments.folder / "c4.idx").exists())
    finally:
        if made:
            shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
