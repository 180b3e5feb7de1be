"""P7: `export-hf` against a raw write (target: >= 0.8 of its speed), and its peak memory next to the largest shard.

python -m tests.benchmarks.export [--folder DIR] [--sizes "0.1 G" "0.5 G"] [--rounds 7] [--shard-size 500000000]

For models of 0.1 G and 0.5 G parameters with random weights, and one that is nearly all embedding, in checkpoints of
tensor parallel 2: the weights are streamed into safetensors files and synced, in turn with writing as many bytes out of
one buffer and syncing them. Peak memory is the growth of the resident set (`VmHWM` of /proc) over what the process held
before, file pages included, and must stay below the largest shard + 200 MB. The whole command is measured too: digests
of the checkpoint (three times the weights, as optimizer moments are checked), writing, and the comparison with
transformers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment

SIZES = {
    "0.1 G": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12, "ffn": 2048, "tied": True},
    "0.5 G": {"layers": 24, "hidden": 1280, "heads": 20, "kv_heads": 10, "ffn": 3456, "tied": False},
    "embedding": {
        **{"layers": 1, "hidden": 4096, "heads": 32, "kv_heads": 1, "ffn": 256, "tied": True},
        **{"head_dim": 32, "qk_norm": "head"},
    },
}
VOCABULARY = 32_000
MB = 1e6


class RandomWeights:
    """Stands for a Hugging Face folder: rows drawn when they are asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty(stop - start, *self.shapes[name][1:]).normal_(0.0, 0.02)


def write_checkpoint(folder: Path, sizes: dict) -> None:
    """A checkpoint of tensor parallel 2, with the tokenizer of `mistral-common`."""
    import mistral_common

    from pause_megatron.config.load import dump, resolve
    from pause_megatron.config.model_schema import ModelSection
    from pause_megatron.config.schema import DataSection, ParallelSection, RunConfig
    from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
    from pause_megatron.hf.native_writer import PauseRows, write_native
    from pause_megatron.hf.weights import hf_tensors, native_rows
    from pause_megatron.model import Vocabulary

    config = resolve(
        RunConfig(
            model=ModelSection(preset=None, **sizes),
            data=DataSection(sequence_length=2048),
            parallel=ParallelSection(tensor=2),
        )
    )
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    model = folder / "spm.model"
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", model)
    load_tokenizer(model).save(folder / "tokenizer")
    model.unlink()
    tensors = hf_tensors(config.model, VOCABULARY + 1)
    write_native(
        folder,
        config,
        native_rows(tensors),
        RandomWeights({tensor.name: tensor.shape for tensor in tensors}),
        vocabulary=Vocabulary(VOCABULARY, (VOCABULARY,)),
        pauses=PauseRows((), VOCABULARY, 0),
        corpus="random",
        report=lambda stage, done, total: None,
    )


def raw_write(folder: Path, size: int) -> None:
    """`size` bytes out of one buffer of 16 MB, synced."""
    from pause_megatron.files.durable import sync_file

    buffer = memoryview(bytearray(torch.randint(0, 256, (16 << 20,), dtype=torch.uint8).numpy().tobytes()))
    with open(folder / "raw", "wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(buffer[: min(len(buffer), size - start)])
    sync_file(folder / "raw")
    (folder / "raw").unlink()


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (highest since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> int:
    """Resets `VmHWM`; returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(name: str, folder: Path, rounds: int, shard_size: int, answer) -> None:
    """One model size, in a process of its own."""
    from pause_megatron.files.durable import sync_file
    from pause_megatron.hf.checkpoint import open_checkpoint
    from pause_megatron.hf.export import export, write_weights

    torch.set_num_threads(1)
    started = time.perf_counter()
    checkpoint = open_checkpoint(folder / "checkpoint", lambda stage, done, total: None)
    digests = time.perf_counter() - started
    largest = 0

    def stream(dtype: torch.dtype = torch.float32) -> None:
        nonlocal largest
        out = folder / "out"
        out.mkdir()
        write_weights(checkpoint, out, dtype, shard_size, lambda stage, done, total: None)
        for path in out.iterdir():
            sync_file(path)
        largest = max(path.stat().st_size for path in out.iterdir())
        shutil.rmtree(out)

    stream(torch.bfloat16)  # the libraries are loaded
    before = forget_peak()
    stream()
    peak = resident("VmHWM") - before
    size = sum(entry.bytes for entry in checkpoint.reader.manifest.files.values()) // 3
    timings = compare({"raw": lambda: raw_write(folder, size), "export": stream}, rounds=rounds)
    forget_peak()
    started = time.perf_counter()
    done = export(folder / "checkpoint", folder / "whole", max_shard_size=shard_size)
    whole, whole_peak = time.perf_counter() - started, resident("VmHWM")
    answer.send(
        f"P7 export, {name} parameters: {1 / timings['export'].ratio:.2f} of a raw write's speed "
        f"[{1 / timings['export'].high:.2f} .. {1 / timings['export'].low:.2f}] (target >= 0.8); peak memory "
        f"{peak / MB:,.0f} MB over the process's own, largest shard {largest / MB:,.0f} MB "
        f"(target <= shard + 200 MB)\n"
        f"   {done.bytes / MB:,.0f} MB of fp32 weights, {rounds} rounds; raw "
        f"{size / timings['raw'].seconds / MB:,.0f} MB/s, export {size / timings['export'].seconds / MB:,.0f} MB/s; "
        f"digests of {3 * size / MB:,.0f} MB {digests:.1f} s; whole command {whole:.1f} s, resident at most "
        f"{whole_peak / MB:,.0f} MB (with transformers, one model at a time); largest difference of a logit "
        f"{done.parity.largest_difference:.2g} of {done.parity.tolerance:.2g} allowed"
    )


def main() -> None:
    """Prints two lines a model size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, at least 7")
    parser.add_argument("--shard-size", type=int, default=500_000_000, help="bytes of one safetensors file")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="parameters")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write_checkpoint(Path(folder) / "checkpoint", SIZES[name])
            ours, theirs = context.Pipe()
            process = context.Process(
                target=measure, args=(name, Path(folder), arguments.rounds, arguments.shard_size, theirs)
            )
            process.start()
            theirs.close()
            print(ours.recv(), flush=True)
            process.join()
    print(f"   {environment('torch', 'safetensors', 'transformers')}")


if __name__ == "__main__":
    main()
