"""Prefix hashes: the formula, which the gateway and workers of other versions must agree on."""

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.engine.prefix import BLOCK_SIZE, block_hashes, next_hash, root_hash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=5 * BLOCK_SIZE)


def test_golden() -> None:
    """These never change: between versions the gateway would route blindly, and no prefix would be found."""
    assert root_hash("").hex() == "e99c5da97f808d44ae93a2d878957241"
    assert [h.hex() for h in block_hashes(range(40), "tenant")] == [
        "4651906ed6322172963bc69b83a7ed20",
        "468c8e2510cded4f749344790188d507",
    ]


@given(TOKENS, st.text())
def test_formula(tokens: list[int], salt: str) -> None:
    parent = blake2b(salt.encode(), digest_size=16, person=b"anypool-prefix").digest()
    expected = []
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        words = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + BLOCK_SIZE])
        parent = blake2b(parent + words, digest_size=16, person=b"anypool-prefix").digest()
        expected.append(parent)
    assert block_hashes(tokens, salt) == expected


@given(TOKENS, st.text())
def test_block_by_block_is_the_same_chain(tokens: list[int], salt: str) -> None:
    hashes = block_hashes(tokens, salt)
    parents = [root_hash(salt), *hashes]
    for index, parent in enumerate(parents[: len(hashes)]):
        assert next_hash(parent, tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]) == hashes[index]


@given(TOKENS, TOKENS)
def test_equal_hash_means_equal_prefix(one: list[int], other: list[int]) -> None:
    for tokens in (other, one[:BLOCK_SIZE] + other):
        for index, (a, b) in enumerate(zip(block_hashes(one, ""), block_hashes(tokens, ""), strict=False)):
            end = (index + 1) * BLOCK_SIZE
            assert (a == b) == (one[:end] == tokens[:end])


def test_salts_never_meet() -> None:
    tokens = list(range(64))
    assert not set(block_hashes(tokens, "a")) & set(block_hashes(tokens, "b"))


@pytest.mark.parametrize("token", [-1, 2**32])
def test_ids_out_of_range(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([token] * BLOCK_SIZE, "")
