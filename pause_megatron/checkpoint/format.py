"""The checkpoint format: schema version, metadata keys, file names and tensor names. No other module spells them.

Names that are needed without torch (`manifest.json`, `latest`, `step-XXXXXXXX`) are in `pause_megatron.run_folder`.
"""

from __future__ import annotations

from typing import NamedTuple

from pause_megatron.engine.state import ADAM_STATE, MASTER
from pause_megatron.run_folder import MANIFEST

__all__ = [
    "ADAM_STATE",
    "CONFIG",
    "DIGEST_KEY",
    "FORMAT",
    "FORMAT_KEY",
    "MANIFEST",
    "MASTER",
    "SECOND_MOMENT",
    "TOKENIZER",
    "UNSIGNED_VERSION",
    "VERSION",
    "VERSION_KEY",
    "TensorName",
    "is_state_file",
    "state_file",
]

FORMAT = "pause-megatron-checkpoint"
VERSION = 3
"""Schema version that is written. There was no version 2: one flipped bit would have made a 3 of it. (A newer version
is an error; a damaged checkpoint is passed over.)"""
UNSIGNED_VERSION = 1
"""The schema version whose manifest has no digest of its own. It is still read."""

FORMAT_KEY, VERSION_KEY, DIGEST_KEY = "format", "version", "manifest_digest"
"""Metadata keys of the manifest, beside the fields of `checkpoint.manifest.Manifest`."""

CONFIG, TOKENIZER = "config.yaml", "tokenizer"
"""The resolved configuration, and the folder of the tokenizer's files."""

SECOND_MOMENT = ADAM_STATE[2]
"""The member of `ADAM_STATE` that is never negative."""

_SUFFIX = ".safetensors"


class TensorName(NamedTuple):
    """Name of a tensor in a state file: `KEY|PARAMETER|START`. The tensor is 1-D and fp32.

    Attributes:
        key: One of `ADAM_STATE`.
        parameter: Native parameter name.
        start: First element, within the flattened shard of the parameter.
    """

    key: str
    parameter: str
    start: int

    def __str__(self) -> str:
        return f"{self.key}|{self.parameter}|{self.start}"

    @classmethod
    def parse(cls, text: str) -> TensorName | None:
        """Parse the name of a tensor.

        Returns:
            None where the text has another form.
        """
        key, _, rest = text.partition("|")
        parameter, _, start = rest.rpartition("|")
        return cls(key, parameter, int(start)) if key and parameter and start.isdecimal() else None


def state_file(tp_rank: int, tp_size: int, dp_rank: int, dp_size: int) -> str:
    """Return the name of the state file that one rank writes.

    Args:
        tp_rank: Tensor-parallel rank.
        tp_size: Tensor-parallel size.
        dp_rank: Data-parallel rank.
        dp_size: Data-parallel size.
    """
    return f"state-tp{tp_rank:02d}-of-{tp_size:02d}-dp{dp_rank:04d}-of-{dp_size:04d}{_SUFFIX}"


def is_state_file(name: str) -> bool:
    """Return whether a file of this name, relative to the checkpoint, holds optimizer state."""
    return name.endswith(_SUFFIX) and "/" not in name
