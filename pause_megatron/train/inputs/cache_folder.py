"""The folder of index caches (`data.cache`): rank 0 writes it, and every host must see it."""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from pathlib import Path

import torch.distributed as dist

from pause_megatron.config.schema import ScheduledConfig
from pause_megatron.data.windows.index_cache import cached_indices, choose_folder
from pause_megatron.distributed.collective import broadcast_object, gather_objects
from pause_megatron.errors import ConfigError

log = logging.getLogger(__name__)


def with_cache_folder(config: ScheduledConfig, first_prefix: str) -> ScheduledConfig:
    """Return the configuration with `data.cache` filled in. Every rank calls this.

    Args:
        config: Configuration of the run.
        first_prefix: Prefix of the first corpus. The default cache is beside it, or in the run folder where the
            corpus's folder cannot be written.

    Raises:
        ConfigError: Rank 0 cannot write the folder, or a host does not see what rank 0 wrote; on every rank.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    with contextlib.ExitStack() as closing:
        folder, note, failure, marker = "", None, None, None
        if is_first:
            try:
                folder, note = choose_folder(config.data.cache, first_prefix, Path(config.run.dir) / "cache")
                with contextlib.suppress(OSError):  # a read-only folder of finished caches
                    marker = closing.enter_context(tempfile.NamedTemporaryFile(dir=folder, suffix=".mark")).name
            except ConfigError as error:
                failure = str(error)
        folder, marker, note, failure = broadcast_object((folder, marker, note, failure))
        if failure is not None:
            raise ConfigError(failure)
        visible = marker is None or Path(marker).exists() or bool(cached_indices(Path(folder)))
        blind = [host for host in gather_objects(None if visible else socket.gethostname()) if host is not None]
    if blind:
        raise ConfigError(
            f"data.cache={folder}: expected a folder that all hosts see, because rank 0 builds the index caches for "
            f"all; {', '.join(sorted(set(blind)))} does not see what rank 0 wrote there"
        )
    if note is not None and is_first:
        log.info(note)
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": folder})})
