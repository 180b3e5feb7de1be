"""One folder of index caches for all ranks: rank 0 writes it, and every host must see it."""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from pathlib import Path

import torch.distributed as dist

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.windows.index_cache import cached_indices, choose_folder
from pause_megatron.distributed.collective import broadcast_object, gather_objects
from pause_megatron.errors import ConfigError

log = logging.getLogger(__name__)


def with_cache_folder(config: ResolvedConfig, first_prefix: str) -> ResolvedConfig:
    """Settle data.cache. Every rank calls this.

    Args:
        config: a resolved configuration.
        first_prefix: of the corpora; the default is beside it, or in the run folder where nobody can write there.

    Returns:
        the configuration with the folder filled in.

    Raises:
        ConfigError: rank 0 cannot write it, or a rank does not see what rank 0 wrote; on every rank alike.
    """
    folder = note = refusal = None
    with contextlib.ExitStack() as closing:
        mark = None
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                spare = Path(config.run.dir) / "cache"
                folder, note = choose_folder(config.data.cache, first_prefix, spare)
            except ConfigError as error:
                refusal = str(error)
            with contextlib.suppress(OSError):  # one that is only read
                if folder is not None:
                    mark = closing.enter_context(tempfile.NamedTemporaryFile(dir=folder, suffix=".mark")).name
        folder, mark, note, refusal = broadcast_object((folder, mark, note, refusal))
        if refusal is not None:
            raise ConfigError(refusal)
        sees = mark is None or Path(mark).exists() or bool(cached_indices(Path(folder)))
        blind = [host for host in gather_objects(None if sees else socket.gethostname()) if host is not None]
    if blind:
        raise ConfigError(
            f"data.cache={folder}: expected a folder that all hosts see, because rank 0 builds the index caches for "
            f"all; {', '.join(sorted(set(blind)))} does not see what rank 0 wrote there"
        )
    if note is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        log.info(note)
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": folder})})
