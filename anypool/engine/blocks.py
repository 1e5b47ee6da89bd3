"""Who holds which block of the key-value cache.

A block is in one of three places: *referenced* by the block tables of requests, *idle* (unreferenced, but its
contents are a known prefix that the next request may share), or *blank*. Only blank and idle blocks are
handed out; taking an idle one evicts the prefix that was idle longest. A block becomes matchable when its
holder commits it under a prefix hash, which must not happen before its contents are computed.

One thread at a time; every operation is O(1) per block.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

SCRATCH_BLOCK = 0
"""Never handed out: padding rows of a step write here, and unused entries of a block table point here."""


@dataclass(frozen=True)
class BlockEvents:
    """Prefix hashes that became matchable, and that ceased to be, since the last drain: disjoint lists."""

    stored: list[bytes]
    evicted: list[bytes]


class BlockPool:
    """Blocks 1 .. num_blocks - 1 of a cache of `num_blocks` blocks; block 0 is scratch."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}: the cache needs a scratch block and at least one more")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # idle longest first
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    @property
    def capacity(self) -> int:
        """Blocks that requests can hold in all: scratch is not among them."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now: the blank and the idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that some request holds."""
        return self.capacity - self.num_free

    def references(self, block: int) -> int:
        """How many requests hold `block`."""
        return self._references[block]

    def matchable(self) -> list[bytes]:
        """The hash of every prefix block that a request could share now, oldest first."""
        return list(self._block_of)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks holding the longest known prefix of the chain `hashes`. `share` them before `allocate`."""
        blocks = []
        for prefix in hashes:
            block = self._block_of.get(prefix)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_idle(self, block: int) -> bool:
        """True if no request holds `block` but its contents can be shared: that takes from `num_free`."""
        return block in self._idle

    def share(self, block: int) -> None:
        """Take one more reference to a block that `match` found."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def allocate(self) -> int:
        """A block for one holder to write, with one reference. `num_free` must not be zero."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def commit(self, block: int, prefix: bytes) -> int:
        """Make a block that was just computed matchable under `prefix`; return the block to use from now on.

        If two requests computed the same prefix at the same time, the second's block is given back and the
        first's shared in its place: a prefix is held once, and whoever holds a block holds those before it.
        """
        known = self._block_of.get(prefix)
        if known is not None:
            self.share(known)
            self.release([block])
            return known
        self._hash[block] = prefix
        self._block_of[prefix] = block
        if prefix in self._evicted:
            del self._evicted[prefix]
        else:
            self._stored[prefix] = None
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of a sequence's `blocks`, given first to last.

        The last is dropped first, so that it is evicted first: a prefix without its beginning cannot match.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released more often than taken"
            if self._references[block] == 0:
                if self._hash[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def drain_events(self) -> BlockEvents:
        """Net changes of `matchable` since the last call: one stored and evicted in between is in neither."""
        events = BlockEvents(list(self._stored), list(self._evicted))
        self._stored, self._evicted = {}, {}
        return events

    def _forget(self, block: int) -> None:
        prefix = self._hash[block]
        assert prefix is not None
        self._hash[block] = None
        del self._block_of[prefix]
        if prefix in self._stored:
            del self._stored[prefix]
        else:
            self._evicted[prefix] = None
