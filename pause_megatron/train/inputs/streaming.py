"""A run on data.source: one reader a machine, and its place in every checkpoint.

Every machine reads the whole stream and keeps what its ranks ask for, so that sample n is the same text whatever the
number of ranks and machines.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pause_megatron.config.schema import ScheduledConfig
from pause_megatron.data.stream.documents import open_documents
from pause_megatron.data.stream.server import WindowClient, WindowServer
from pause_megatron.data.stream.windows import StreamDataset, StreamPosition, TextWindows
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.dataset import PauseTokenizer
from pause_megatron.data.windows.pause import PauseInjector, PausePlan
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.errors import CheckpointError, DataError, PauseMegatronError

log = logging.getLogger(__name__)

FILE = "stream.json"
_NAME = "stream"
"""What the pauses of a stream are keyed by, where those of a corpus are by its name."""


class Stream:
    """The training windows of a run on data.source. Every rank makes one.

    Args:
        config: resolved.
        tokenizer: of data.tokenizer.
        context: this rank's place.
        checkpoint: folder to go on from, or None.

    Raises:
        DataError: the source cannot be opened; on every rank.
        CheckpointError: a checkpoint without the place in the stream.
    """

    def __init__(
        self, config: ScheduledConfig, tokenizer: Tokenizer, context: ParallelContext, checkpoint: Path | None
    ) -> None:
        pause, size = config.pause, config.batch.global_size
        plan = PausePlan(config.data.sequence_length, pause.rate, pause.window, pause.placement, pause.seed)
        self._rank, self._size = context.rank, size
        self._server: WindowServer | None = None
        machines = gather_objects(_machine())
        leader = machines.index(machines[context.rank])
        outcome: tuple[str | None, str | None] = (None, None)
        if context.rank == leader:
            try:
                place = None if checkpoint is None else _read_place(checkpoint)
                stream = TextWindows(partial(open_documents, config.data), tokenizer, plan.text_length, place)
                # A checkpoint is of a step that has been taken, while the loaders have asked for steps to come.
                remember = (config.data.prefetch + 3) * size
                self._server = WindowServer(stream, machines.count(machines[leader]), remember)
                outcome = (self._server.address, None)
            except PauseMegatronError as error:
                outcome = (None, str(error))
        outcomes = gather_objects(outcome)
        for _, error in outcomes:
            if error is not None:
                self.close()
                raise DataError(error)
        windows = self._server or WindowClient(outcomes[leader][0])
        self._windows = windows
        pause_ids = PauseTokenizer(tokenizer, pause.embeddings).pause_ids
        injector = PauseInjector(plan, pause_ids, _NAME, "train")
        self.dataset = StreamDataset(
            windows,
            injector,
            config.train.steps * size,
            eod=tokenizer.eod,
            intra_document_masking=config.data.intra_document_masking,
            eod_mask_loss=config.data.eod_mask_loss,
        )

    def files(self, step: int) -> Mapping[str, bytes]:
        """What a checkpoint after so many steps keeps; rank 0 knows it."""
        if self._server is None:
            return {}
        return {FILE: json.dumps(vars(self._server.position(step * self._size)), indent=1).encode()}

    def close(self) -> None:
        """Stop reading, or asking."""
        if self._server is not None:
            self._server.close()
            if self._rank == 0 and (left_out := self._server.malformed).total:
                log.warning(f"data.source: {left_out.total:,} lines left out:\n{left_out.describe()}")
        elif hasattr(self, "_windows"):
            self._windows.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_place(checkpoint: Path) -> StreamPosition:
    try:
        return StreamPosition(**json.loads((checkpoint / FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / FILE}: expected the place in data.source to go on from: {error}"
        ) from None


def _machine() -> str:
    """Tells machines apart, those with one name and containers on one machine too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
