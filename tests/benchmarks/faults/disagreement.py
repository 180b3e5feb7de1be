"""R17: two ranks, one of which was given something else. Does the run begin?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.faults.results import Result
from benchmarks.faults.runs import arguments, prepared, run_ours, run_plain, steps_done, wait_for_end
from support.forked_ranks import fork
from support.saving import kill

SECONDS = 20.0
# What differs -> (key and value of this program on rank 1, setting and value of the plain script on rank 1).
DIFFERENCES: dict[str, tuple[tuple[str, Any], tuple[str, Any] | None]] = {
    "learning rate": (("optim__lr", 5e-4), ("lr", 5e-4)),
    "weight decay": (("optim__weight_decay", 0.2), ("weight_decay", 0.2)),
    "clipping": (("optim__clip", 0.1), ("clip", 0.1)),
    "warm-up": (("optim__warmup_steps", 1), ("warmup_steps", 1)),
    "micro-batch": (("batch__micro_size", 1), ("micro_size", 1)),
    "accumulation (global batch)": (("batch__global_size", 16), ("accumulation", 4)),
    "ZeRO stage": (("engine__zero_stage", 2), ("zero_stage", 2)),
    "ZeRO stage 3": (("engine__zero_stage", 3), ("zero_stage", 3)),
    "precision": (("engine__precision", "bf16"), ("bf16", True)),
    "seed of weights and order": (("run__seed", 7), ("seed", 7)),
    "pause rate": (("pause__rate", 0.3), ("pause_rate", 0.3)),
    "seed of the pauses or the data": (("pause__seed", 7), ("data_seed", 7)),
    "sequence length": (("data__sequence_length", 32), ("sequence_length", 32)),
    "number of steps": (("train__steps", 6), ("steps", 6)),
    "steps between saves": (("checkpoint__every", 3), ("save_every", 3)),
    "width of the model": (("model__hidden", 64), ("hidden", 64)),
    "another corpus": (("data__prefix", "other"), ("rows", 900)),
}
TITLE = "R17: rank 1 of two was given another value, 17 of them in turn"


def disagreement(system: str, count: int) -> Result:
    """R17, the first `count` differences."""
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        corpus, other = (_corpus(Path(name, which), size) for which, size in (("one", 300), ("other", 200)))
        for number, (what, (ours, plain)) in enumerate(list(DIFFERENCES.items())[:count]):
            folder, log = Path(name, f"run-{number}"), Path(name, f"log-{number}")
            if system == "deepspeed":
                folder.mkdir()
                words = [{"folder": str(folder)}, {"folder": str(folder), plain[0]: plain[1]}]
                processes = fork(run_plain, (words,), log)
            else:
                value = other if ours[1] == "other" else ours[1]
                words = [arguments(corpus, folder), arguments(corpus, folder, **{ours[0]: value})]
                processes = fork(run_ours, (words,), log)
            ended = wait_for_end(processes, SECONDS)
            codes = [process.exitcode for process in processes]
            kill(processes, [0.0, 0.0])
            outcome = _outcome(ended, codes, steps_done(folder), log.read_text(errors="replace"))
            result.count(TITLE, outcome)
            result.each[what] = outcome
    return result


def _corpus(folder: Path, size: int) -> str:
    folder.mkdir()
    return prepared(folder, size)


def _outcome(ended: bool, codes: list[int | None], steps: int, log: str) -> str:
    if not ended:
        return f"**hangs**: no end after {SECONDS:.0f} s, " + ("some steps were taken" if steps else "before a step")
    if codes == [0, 0]:
        return "**exit 0**, trained to the end"
    if steps:
        return "**some steps were taken**, then an error"
    if "Traceback" in log:
        return "a traceback before the first step"
    return "refused in a sentence before the first step" if all(codes) else "one rank ends well, one does not"
