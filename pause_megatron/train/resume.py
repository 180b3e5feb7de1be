"""Going on: which checkpoint, and whether it is of this run."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pause_megatron.checkpoint import CheckpointReader, Store, restore_engine, restore_weights
from pause_megatron.config.identity import deciding_keys
from pause_megatron.config.load import load
from pause_megatron.config.schema import RunConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.engine import Engine
from pause_megatron.errors import CheckpointError
from pause_megatron.model import PauseGPTModel
from pause_megatron.train.loop import Progress


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from, and how far it had come."""

    reader: CheckpointReader
    progress: Progress

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return self.reader.folder

    def weights_into(self, model: PauseGPTModel) -> None:
        """Copies this rank's weights into a fresh model, before DeepSpeed sees it."""
        restore_weights(model, self.reader)

    def state_into(self, engine: Engine) -> None:
        """Copies masters, moments and step."""
        restore_engine(engine, self.reader)


def find_resume(store: Store, config: RunConfig, corpus: str, context: ParallelContext) -> Resumed | None:
    """The newest complete checkpoint of this run, or None for a run that begins. Every rank calls this.

    Raises:
        CheckpointError: every checkpoint is damaged, or it is of another configuration, corpus or tensor-parallel size.
    """
    found = store.newest_complete()
    if found is None:
        return None
    folder, manifest, complaints = found
    differences = config_differences(load(folder / "config.yaml"), config)
    if manifest.corpus != corpus:
        differences.append(f"corpus: {manifest.corpus} in the checkpoint, {corpus} in this run")
    if manifest.tensor_parallel != context.tp_size:
        differences.append(
            f"parallel.tensor: {manifest.tensor_parallel} in the checkpoint, {context.tp_size} in this run "
            "(data-parallel size and ZeRO stage may change, the tensor-parallel size may not)"
        )
    if differences:
        raise CheckpointError(
            f"{folder}: a checkpoint of another configuration. Give back its values, or another run.dir:\n  "
            + "\n  ".join(differences)
        )
    if context.rank == 0:
        for complaint in complaints:
            print(f"damaged, passed over: {complaint}", file=sys.stderr)
        print(
            f"resuming after step {manifest.step} from {folder} (written with tensor-parallel "
            f"{manifest.tensor_parallel}, data-parallel {manifest.data_parallel}, ZeRO {manifest.zero_stage})",
            file=sys.stderr,
        )
    return Resumed(CheckpointReader(folder, context.tp_rank), Progress(**manifest.progress))


def progress_record(progress: Progress) -> dict[str, int]:
    """What a checkpoint keeps of the progress."""
    return asdict(progress)


def config_differences(before: RunConfig, now: RunConfig) -> list[str]:
    """The keys that decide the losses and differ, one line each."""
    old, new = deciding_keys(before), deciding_keys(now)
    return [f"{key}: {old[key]!r} in the checkpoint, {new[key]!r} in this run" for key in new if old[key] != new[key]]
