"""A step with the default objective against a revision before objectives, and each objective against the default.

python -m tests.benchmarks.objectives [--revision REV] [--layers 4] [--hidden 256] [--vocabulary 8192] [--rounds 9]

Forward and backward of a micro-batch through `collate` and `lm_loss`, fp32, one thread, 2048-token windows with 205
pauses. The revision is checked out in a git worktree. It and this one run in a process each, and take turns (A B A B):
the ratio is that of one round, and its median is printed (target <= 1.01). --of-tree is for those processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEQ, PAUSES = 2048, 205
OBJECTIVES = ("cross_entropy", "anytime", "cyb_anytime", "cyb_variational", "cyb_budget")


def step(arguments: argparse.Namespace, name: str | None) -> Callable[[], None]:
    """Collation, forward and backward of a micro-batch; None: without an objective's code, as in any revision."""
    import torch

    from pause_megatron.config.model_schema import ModelSection
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.data.batches.batch import collate
    from pause_megatron.data.windows.pause import PauseInjector, PausePlan
    from pause_megatron.model import Vocabulary, build_model
    from pause_megatron.train.losses import LossSums

    section = ModelSection(
        preset=None, layers=arguments.layers, hidden=arguments.hidden, heads=arguments.hidden // 64,
        kv_heads=arguments.hidden // 64, ffn=arguments.hidden * 8 // 3 // 16 * 16, tied=True,
    )  # fmt: skip
    vocabulary = Vocabulary(arguments.vocabulary - 1, (arguments.vocabulary - 1,))
    extra, plan = {}, None
    if name is not None:
        from pause_megatron.config.schema import ObjectiveSection
        from pause_megatron.objective import loss_plan

        # The default's terms through the objective's code: a z-loss that weighs nothing.
        keys = {"z_loss": 1e-30} if name == "cross_entropy" else {}
        plan = loss_plan(ObjectiveSection(name=name, **keys))
        extra = {"objective": plan.objective}
    model = build_model(
        section, vocabulary=vocabulary, sequence_length=SEQ, parallel=ParallelSection(), kernels="plain", **extra
    )
    pauses = range(vocabulary.text_size, vocabulary.size)
    injector = PauseInjector(PausePlan(SEQ, PAUSES / SEQ), pauses, "benchmark", "train")
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(0, vocabulary.text_size, (SEQ + 1 - PAUSES,), generator=draw).numpy()
    tokens = torch.from_numpy(injector(text, 0).tokens)
    is_text = tokens[1:] < pauses.start
    sample = {
        "tokens": tokens[:-1],
        "labels": torch.where(is_text, tokens[1:], 0),
        "loss_mask": is_text.float(),
        "position_ids": torch.arange(SEQ),
    }
    planned = {} if plan is None else {"plan": plan}
    sums, scale = LossSums(torch.device("cpu"), **planned), torch.tensor(1.0 / (SEQ - PAUSES))

    def run() -> None:
        batch = collate([sample], sample_ids=[0], pause_ids=pauses, **planned)
        sums.forward(model, batch, scale).backward()
        model.zero_grad(set_to_none=True)

    return run


def serve(arguments: argparse.Namespace) -> None:
    """Take a step for each line of standard input, and print its seconds."""
    import torch

    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    torch.set_num_threads(1)
    with initialize(ParallelSection(), device="cpu"):
        run = step(arguments, None)
        run()
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of a revision, removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def against(revision: str, rounds: int) -> list[float]:
    """Ratios of this tree's step to the revision's, one a round."""
    with worktree(revision) as tree:
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--of-tree", str(place)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for place in (tree, ROOT)
        ]  # fmt: skip

        def seconds(worker: subprocess.Popen[str]) -> float:
            worker.stdin.write("\n")
            worker.stdin.flush()
            return float(worker.stdout.readline())

        for worker in workers:
            while worker.stdout.readline().strip() != "ready":
                if worker.poll() is not None:
                    raise RuntimeError(f"a worker ended with exit code {worker.returncode}")
        ratios = []
        for number in range(rounds):
            first, second = workers if number % 2 == 0 else reversed(workers)
            times = {first: seconds(first), second: seconds(second)}
            ratios.append(times[workers[1]] / times[workers[0]])
        for worker in workers:
            worker.stdin.close()
            worker.wait()
        return ratios


def main() -> None:
    """Print a line for the revision and one for each objective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="git revision to compare the default objective with")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, at least 7")
    parser.add_argument("--of-tree", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = [arguments.of_tree or str(ROOT), str(ROOT / "tests")]
    if arguments.of_tree:
        serve(arguments)
        return
    from benchmarks.timing import compare, environment

    if arguments.revision:
        ratios = against(arguments.revision, arguments.rounds)
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"default objective / {arguments.revision}: {median:.4f} [{low:.4f} .. {high:.4f}] (target <= 1.01)")
    import torch

    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize

    torch.set_num_threads(1)
    with initialize(ParallelSection(), device="cpu"):
        calls = {"default": step(arguments, None), **{name: step(arguments, name) for name in OBJECTIVES}}
        timings = compare(calls, rounds=arguments.rounds)
    for name, timing in timings.items():
        label = "cross_entropy with z_loss" if name == "cross_entropy" else name
        print(f"   {label:26s} {timing}")
    print(
        f"   {arguments.layers} layers, hidden {arguments.hidden}, vocabulary {arguments.vocabulary}, {SEQ} tokens, "
        f"{arguments.rounds} rounds; {environment('torch', 'megatron-core')}"
    )


if __name__ == "__main__":
    main()
