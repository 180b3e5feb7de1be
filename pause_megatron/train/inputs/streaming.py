"""A run on `data.source`: one reader per host, and its position in the source in every checkpoint.

Each host reads the whole stream and keeps the windows that its ranks ask for, so that sample n is the same text for
every number of ranks and hosts.
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
from pause_megatron.data.windows.token_texts import token_texts
from pause_megatron.distributed import ParallelContext
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.errors import CheckpointError, DataError, PauseMegatronError

log = logging.getLogger(__name__)

POSITION_FILE = "stream.json"
_CORPUS = "stream"
"""The name by which the pauses of a stream are drawn, as those of a corpus are by its name."""


class Stream:
    """The training windows of a run on `data.source`, as one rank reads them. Made by `open_stream`.

    Args:
        dataset: See Attributes.
        windows: This host's reader (on its first rank), or a connection to it.
        rank: Rank of this process.
        global_size: Windows per step over all ranks.

    Attributes:
        dataset: Windows with pauses, by sample number.
    """

    def __init__(
        self, dataset: StreamDataset, windows: WindowServer | WindowClient, rank: int, global_size: int
    ) -> None:
        self.dataset = dataset
        self._windows, self._rank, self._global_size = windows, rank, global_size

    def files(self, step: int) -> Mapping[str, bytes]:
        """Return the files that a checkpoint of this step keeps, by name; empty where this rank is not the reader.

        Args:
            step: Steps that the run has taken.
        """
        if not isinstance(self._windows, WindowServer):
            return {}
        position = self._windows.position(step * self._global_size)
        return {POSITION_FILE: json.dumps(vars(position), indent=1).encode()}

    def close(self) -> None:
        """Stop the reader, or close the connection to it; rank 0 logs the malformed lines that were skipped."""
        self._windows.close()
        if self._rank == 0 and isinstance(self._windows, WindowServer):
            skipped = self._windows.malformed
            if skipped.total:
                log.warning(f"data.source: {skipped.total:,} lines left out:\n{skipped.describe()}")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_stream(
    config: ScheduledConfig, tokenizer: Tokenizer, context: ParallelContext, checkpoint: Path | None
) -> Stream:
    """Start this host's reader on its first rank, and connect its other ranks to it. Every rank calls this.

    Args:
        config: Configuration of the run.
        tokenizer: Tokenizer of `data.tokenizer`.
        context: Process groups of this rank.
        checkpoint: Folder of the checkpoint that the run resumes from; None: read from the beginning.

    Raises:
        DataError: The source cannot be opened, or the checkpoint holds no position in it; on every rank.
    """
    pause, size = config.pause, config.batch.global_size
    plan = PausePlan.of(pause, config.data.sequence_length)
    hosts = gather_objects(_host_id())
    reader_rank = hosts.index(hosts[context.rank])
    server: WindowServer | None = None
    address, failure = "", ""
    if context.rank == reader_rank:
        try:
            position = None if checkpoint is None else _saved_position(checkpoint)
            windows = TextWindows(partial(open_documents, config.data), tokenizer, plan.text_length, position)
            # A checkpoint is of a step that has been taken, while the loaders have asked for later steps.
            remember = (config.data.prefetch + 3) * size
            server = WindowServer(windows, hosts.count(hosts[reader_rank]), remember)
            address = server.address
        except PauseMegatronError as error:
            failure = str(error)
    opened = gather_objects((address, failure))
    if failures := [failure for _, failure in opened if failure]:
        if server is not None:
            server.close()
        raise DataError(failures[0])
    source = server or WindowClient(opened[reader_rank][0])
    dataset = StreamDataset(
        source,
        PauseInjector(
            plan, PauseTokenizer(tokenizer, pause.embeddings).pause_ids, _CORPUS, "train", token_texts(tokenizer)
        ),
        config.train.steps * size,
        eod=tokenizer.eod,
        intra_document_masking=config.data.intra_document_masking,
        eod_mask_loss=config.data.eod_mask_loss,
        shared_positions=config.pause.positions == "shared",
    )
    return Stream(dataset, source, context.rank, size)


def _saved_position(checkpoint: Path) -> StreamPosition:
    path = checkpoint / POSITION_FILE
    try:
        return StreamPosition(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected the position in data.source to resume from, got {error}") from None


def _host_id() -> str:
    """Return a name that differs between hosts, also between hosts of one hostname and containers on one host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
