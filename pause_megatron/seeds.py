"""Seeds of random generators, derived from an address such as (seed, corpus, split): no generator has a state to save.

A draw is a function of only its address, not of ranks, workers, or the step at which a run was resumed.
"""

from __future__ import annotations

import hashlib


def address_digest(*address: object, size: int) -> bytes:
    """Return the BLAKE2b digest of an address: its parts as text, separated by NUL.

    Args:
        *address: Parts whose text does not contain NUL.
        size: Length of the digest in bytes.
    """
    return hashlib.blake2b("\0".join(map(str, address)).encode(), digest_size=size).digest()


def philox_key(*address: object) -> tuple[int, int]:
    """Return the key of a `numpy.random.Philox` generator: two integers of 64 bits, unsigned."""
    digest = address_digest(*address, size=16)
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def torch_seed(*address: object) -> int:
    """Return a seed for `torch.Generator.manual_seed`: 64 bits, signed."""
    return int.from_bytes(address_digest(*address, size=8), "little", signed=True)


def positive_seed(*address: object) -> int:
    """Return a seed below 2**31, for libraries that take 31 bits."""
    return int.from_bytes(address_digest(*address, size=4), "little") >> 1
