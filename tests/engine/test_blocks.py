"""The block pool by itself; tests of the scheduler put it under random load."""

import pytest

from anypool.engine.blocks import BlockPool
from anypool.engine.prefix import block_hashes

CHAIN = block_hashes(range(64), "")  # four blocks
OTHER = block_hashes([0] * 64, "")


def stored(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Blocks of a request that computed the chain `hashes`, referenced once."""
    return [pool.commit(pool.allocate(), prefix) for prefix in hashes]


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_needs_a_block_beside_scratch(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks is {num_blocks}: the cache needs a scratch block"):
        BlockPool(num_blocks)


def test_hands_out_every_block_once_but_scratch() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate() for _ in range(pool.num_free)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_used, pool.capacity) == (0, 4, 4)


def test_uncommitted_blocks_match_nothing_and_leave_nothing() -> None:
    pool = BlockPool(5)
    blocks = [pool.allocate(), pool.allocate()]
    assert pool.match(CHAIN) == []
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.matchable() == []
    assert pool.drain_events().stored == []


def test_released_prefix_is_found_again() -> None:
    pool = BlockPool(5)
    blocks = stored(pool, CHAIN[:3])
    assert pool.match(CHAIN) == blocks  # while it is held
    pool.release(blocks)
    assert (pool.num_free, pool.num_used) == (4, 0)
    assert pool.match(CHAIN) == blocks
    assert pool.match(CHAIN[1:]) == blocks[1:]
    assert pool.match(OTHER) == []
    for block in blocks:
        assert pool.is_idle(block)
        pool.share(block)
        pool.share(block)
        assert not pool.is_idle(block)
    assert [pool.references(block) for block in blocks] == [2, 2, 2]
    pool.release(blocks)
    assert pool.num_used == 3


def test_blank_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(5)
    pool.release(stored(pool, CHAIN[:2]))
    pool.allocate(), pool.allocate()
    assert pool.match(CHAIN[:2]) != []
    pool.allocate()
    assert len(pool.match(CHAIN[:2])) == 1


def test_evicts_the_longest_idle_chain_from_its_end() -> None:
    pool = BlockPool(9)
    one, other = stored(pool, CHAIN), stored(pool, OTHER)
    pool.release(other)
    pool.release(one)
    lengths = []
    while pool.num_free:
        pool.allocate()
        lengths.append((len(pool.match(OTHER)), len(pool.match(CHAIN))))
    assert lengths == [(3, 4), (2, 4), (1, 4), (0, 4), (0, 3), (0, 2), (0, 1), (0, 0)]


def test_use_makes_a_chain_young_again() -> None:
    pool = BlockPool(9)
    one, other = stored(pool, CHAIN), stored(pool, OTHER)
    pool.release(one)
    pool.release(other)
    for block in pool.match(CHAIN):
        pool.share(block)
    pool.release(one)
    assert [pool.allocate() for _ in range(4)] == other[::-1]


def test_prefix_computed_twice_is_held_once() -> None:
    pool = BlockPool(9)
    first = stored(pool, CHAIN)
    assert pool.num_used == 4
    second = stored(pool, CHAIN)
    assert second == first
    assert (pool.num_used, pool.num_free) == (4, 4)
    pool.release(first)
    third = stored(pool, CHAIN)
    pool.release(second)
    assert pool.num_used == 4
    pool.release(third)
    assert stored(pool, CHAIN) == first  # also when the first is idle
    assert (pool.num_used, pool.num_free) == (4, 4)


def test_events_are_net_changes() -> None:
    pool = BlockPool(3)
    pool.release(stored(pool, CHAIN[:2]))
    events = pool.drain_events()
    assert (events.stored, events.evicted) == (CHAIN[:2], [])
    assert pool.drain_events().stored == []
    pool.release(stored(pool, OTHER[:2]))
    events = pool.drain_events()
    assert (events.stored, sorted(events.evicted)) == (OTHER[:2], sorted(CHAIN[:2]))
    pool.release(stored(pool, CHAIN[:2]))
    pool.release(stored(pool, OTHER[:2]))
    events = pool.drain_events()
    assert (events.stored, events.evicted) == ([], [])
    assert sorted(pool.matchable()) == sorted(OTHER[:2])


def test_release_of_a_free_block_is_our_mistake() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError, match="released more often than taken"):
        pool.release([block])
