"""What training steps really allocate and really send, measured on a CPU, for the comparison with `plan`.

Memory: torch's CPU allocator reports every allocation and release to the profiler, temporaries inside operators and the
backward pass included. The profiler runs from before the model is built, so the running sum is the memory that tensors
hold, and its maximum what a caching allocator without fragmentation would need. (Resident memory would add the
interpreter, libraries and the C library's own caching.)

Communication: every collective goes through an operator of torch's `c10d` namespace, from any caller; a dispatch mode
sees them all, with their tensors and groups.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

TEXT_SIZE = 100
OPERATIONS = {
    "allreduce": "all_reduce",
    "allgather_base": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    "reduce": "reduce",
}
SCALAR_BYTES = 64  # of norms, flags and counts, which are left out


@dataclass(frozen=True)
class Measured:
    """What one rank did.

    Attributes:
        parameters: name -> shape of every parameter of this rank, before DeepSpeed partitions any
        built_bytes: tensors that exist after start-up
        peak_bytes: largest sum of tensors during the steps
        traffic: "operation ranks" -> bytes of the whole tensors in the last step; scalars and groups of one left out
    """

    parameters: dict[str, tuple[int, ...]]
    built_bytes: int
    peak_bytes: int
    traffic: dict[str, int]


def measure(overrides: Sequence[str]) -> Measured:
    """Trains three steps of a configuration on the torch.distributed world that exists, best of fake ranks.

    (Real ranks have threads that let go of tensors when they come round to it.)
    """
    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize

    config = load(overrides=list(overrides))
    gc.collect()
    counter = Collectives()
    with (
        initialize(config.parallel, device="cpu") as context,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording,
    ):
        engine, shapes = new_engine_of(config, context)
        with engine:
            step = _step(config, context, engine)
            with torch.profiler.record_function("built"):
                pass
            step()
            step()
            with counter:
                step()
            with torch.profiler.record_function("end"):
                pass
    built, peak = _memory(recording)
    return Measured(shapes, built, peak, dict(counter.bytes))


def traffic(overrides: Sequence[str]) -> dict[str, int]:
    """The traffic of the second of two steps, as in `Measured`, on the present ranks."""
    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize

    config = load(overrides=list(overrides))
    with initialize(config.parallel, device="cpu") as context:
        engine, _ = new_engine_of(config, context)
        with engine:
            step = _step(config, context, engine)
            step()
            with Collectives() as counter:
                step()
    return dict(counter.bytes)


def engine_bytes(overrides: Sequence[str]) -> int:
    """Bytes that operators of a step move on top of the model's own forward and backward passes, on real tensors."""
    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize
    from support.counting import Counting

    config = load(overrides=list(overrides))
    with initialize(config.parallel, device="cpu") as context:
        bare = _step(config, context, _Bare(_model(config)))
        with Counting(torch.device("cpu")) as alone:
            bare()
        engine, _ = new_engine_of(config, context)
        with engine:
            step = _step(config, context, engine)
            step()
            with Counting(torch.device("cpu")) as together:
                step()
    return together.counts.bytes - alone.counts.bytes


class _Bare:
    """Forward and backward passes as `Engine.train_step` makes them, without DeepSpeed."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def train_step(self, micro_batches: Sequence[Any], forward: Callable[..., Tensor], **_: Any) -> None:
        for micro_batch in micro_batches:
            forward(self._model, micro_batch, 1.0).backward()
            self._model.zero_grad(set_to_none=True)


def new_engine_of(config: Any, context: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The engine of a configuration, and the shapes of its parameters by name."""
    from pause_megatron.model import parameter_groups
    from pause_megatron.train.run import new_engine

    model = _model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    engine = new_engine(config, model, parameter_groups(model, config.optim.weight_decay), context)
    return engine, shapes


def _model(config: Any) -> torch.nn.Module:
    from pause_megatron.model import Vocabulary, build_model
    from pause_megatron.objective import loss_plan

    pause_ids = tuple(range(TEXT_SIZE, TEXT_SIZE + config.pause.embeddings))
    return build_model(
        config.model,
        vocabulary=Vocabulary(TEXT_SIZE, pause_ids),
        sequence_length=config.data.sequence_length,
        parallel=config.parallel,
        softmax=config.pause.softmax,
        precision=config.engine.precision,
        seed=config.run.seed,
        given_positions=config.pause.positions == "shared",
        objective=None if (plan := loss_plan(config.objective)) is None else plan.objective,
    )


def _step(config: Any, context: Any, engine: Any) -> Callable[[], Any]:
    """An optimizer step on random windows, as the training loop takes it."""
    from pause_megatron.objective import loss_plan
    from pause_megatron.train.losses import LossSums

    batches, sums = random_batches(config, context), LossSums(context.device, plan=loss_plan(config.objective))
    targets = int(sum(batch.weight for batch in batches)) * context.dp_size
    return lambda: engine.train_step(batches, sums.forward, lr=1e-3, global_targets=targets)


def random_batches(config: Any, context: Any) -> list[Any]:
    """This rank's micro-batches of a step: random windows with the configuration's number of pauses."""
    from pause_megatron.config.batching import batch_plan
    from pause_megatron.data.batches.batch import MicroBatch
    from pause_megatron.objective import loss_plan

    plan = batch_plan(config, context.world_size)
    if loss_plan(config.objective) is not None:
        return [_with_runs(config, plan, context.dp_rank * plan.accumulation + n) for n in range(plan.accumulation)]
    micro, length = plan.micro_size, plan.sequence_length
    generator = torch.Generator().manual_seed(context.dp_rank)
    batches = []
    for _ in range(plan.accumulation):
        tokens = torch.randint(0, TEXT_SIZE, (micro, length), generator=generator)
        rows = micro * (length - plan.pauses)
        batches.append(
            MicroBatch(
                tokens=tokens,
                position_ids=torch.arange(length).expand(micro, length).contiguous(),
                target_rows=torch.randperm(micro * length, generator=generator)[:rows].sort().values,
                targets=torch.randint(0, TEXT_SIZE, (rows,), generator=generator),
                after_pause=torch.zeros(rows, dtype=torch.bool),
                sample_ids=torch.arange(micro),
                pause_tokens=micro * plan.pauses,
                segments=_segments(config, micro, length),
            )
        )
    return batches


def _with_runs(config: Any, plan: Any, number: int) -> Any:
    """A micro-batch of windows with runs of pauses, for an objective."""
    from pause_megatron.data.batches.batch import collate
    from pause_megatron.objective import loss_plan

    length, generator = plan.sequence_length, torch.Generator().manual_seed(number)
    samples = []
    for _ in range(plan.micro_size):
        tokens = torch.randint(0, TEXT_SIZE, (length + 1,), generator=generator)
        tokens[torch.randperm(length - 1, generator=generator)[: plan.pauses] + 1] = TEXT_SIZE  # the last is text
        is_text = tokens[1:] < TEXT_SIZE
        samples.append(
            {
                "tokens": tokens[:-1],
                "labels": torch.where(is_text, tokens[1:], 0),
                "loss_mask": is_text.float(),
                "position_ids": torch.arange(length),
            }
        )
    pause_ids = range(TEXT_SIZE, TEXT_SIZE + config.pause.embeddings)
    return collate(samples, sample_ids=range(len(samples)), pause_ids=pause_ids, plan=loss_plan(config.objective))


def _segments(config: Any, micro: int, length: int) -> Tensor | None:
    """int32 [micro, length], two texts to a window, where texts of a window do not see each other; else None."""
    packed = config.task.name is not None and config.finetune.batching == "packed"
    if not packed and not config.data.intra_document_masking:
        return None
    return (torch.arange(length, dtype=torch.int32) * 2 // length).expand(micro, length).contiguous()


class Collectives(TorchDispatchMode):
    """Sums the bytes of collectives while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::").strip("_"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        size = max((t.numel() * t.element_size() for argument in args for t in _tensors(argument)), default=0)
        if group.size() > 1 and size > SCALAR_BYTES:
            self.bytes[f"{OPERATIONS.get(name, name)} {group.size()}"] += size


def _is_group(value: Any) -> bool:
    return "ProcessGroup" in str(value._type())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _memory(recording: profile) -> tuple[int, int]:
    """Bytes of all tensors at the mark "built", and their maximum from there until the mark "end".

    Releases of what an earlier recording allocated are reported too; they do not count.
    """
    pending = list(recording.profiler.kineto_results.experimental_event_tree())
    allocations, marks = [], {}
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            allocations.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name in ("built", "end"):
            marks[event.name] = event.start_time_ns
    sizes: dict[int, int] = {}
    held = built = peak = 0
    for when, pointer, size in sorted(allocations, key=lambda a: a[0]):
        if when > marks["end"]:
            break
        if size > 0:
            sizes[pointer] = size
            held += size
        else:
            held -= sizes.pop(pointer, 0)
        if when <= marks["built"]:
            built = peak = held
        peak = max(peak, held)
    return built, peak


def _on_fake_ranks(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case on the first of `ranks` fake ranks: collectives go through, send nothing, and take their time off."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pause_megatron.model import build

    # The start-up check of sequence parallelism compares a sum over ranks, which fake ranks do not make.
    build.check_gradient_sums = lambda *_: None
    results = []
    for case in cases:
        ranks = case["ranks"]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        overrides = case["overrides"]
        results.append(engine_bytes(overrides) if case.get("bytes") else asdict(measure(overrides)))
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    answers = _on_fake_ranks(json.loads(sys.argv[1]))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)
