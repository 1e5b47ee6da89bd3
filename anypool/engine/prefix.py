"""Names for prefixes: a chain of hashes over blocks of 16 tokens, rooted in a salt.

The hash of a block names every token from the start of the sequence to the block's end, so two equal hashes
mean that the cached keys and values may be shared. The gateway computes the same chain to find the pool that
holds a prompt, so nothing here may depend on a worker.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

BLOCK_SIZE = 16
"""Tokens in a block of the cache, and in a tile of prompt tokens."""

_PERSON = b"anypool-prefix"
_PACK = struct.Struct(f"<{BLOCK_SIZE}I").pack


def root_hash(salt: str) -> bytes:
    """The chain's start, 16 bytes. Chains of different salts never meet."""
    return blake2b(salt.encode(), digest_size=16, person=_PERSON).digest()


def next_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of the block of exactly 16 `tokens` that follows the block named `parent`."""
    return blake2b(parent + _PACK(*tokens), digest_size=16, person=_PERSON).digest()


def block_hashes(tokens: Sequence[int], salt: str) -> list[bytes]:
    """One hash for each full block of `tokens`, first to last; tokens after the last full block have none.

    Tokens are hashed as little-endian 32-bit unsigned numbers; an id outside that range is an OverflowError.
    """
    packed = np.asarray(tokens, dtype="<u4").tobytes()
    step = 4 * BLOCK_SIZE
    parent, hashes = root_hash(salt), []
    for end in range(step, len(packed) + 1, step):
        parent = blake2b(parent + packed[end - step : end], digest_size=16, person=_PERSON).digest()
        hashes.append(parent)
    return hashes
