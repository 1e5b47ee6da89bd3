"""The shapes a pool compiles: a step of any size runs in the smallest one that holds it.

A step is D decode rows of one token and P tiles of 16 prompt tokens. Few shapes compile quickly and pad much, many do
the opposite; these double, so that less than half of a step's tiles is padding, and less than half of the rows of a
step that has only those. Beside tiles, which cost 16 times as much, decode rows come in three numbers.
"""

from dataclasses import dataclass

from anypool.ops.paged_attention import BLOCK


@dataclass(frozen=True, order=True)
class Shape:
    """Sizes of a step: decode rows, tiles of 16 tokens, columns of the block tables, and tokens that may be sampled."""

    decode: int
    tiles: int
    blocks: int
    samples: int

    @property
    def rows(self) -> int:
        return self.decode + self.tiles

    @property
    def tokens(self) -> int:
        return self.decode + BLOCK * self.tiles

    def __str__(self) -> str:
        return f"{self.decode}+{self.tiles}x{BLOCK} tokens, {self.blocks * BLOCK} context"


def doublings(largest: int, smallest: int = 1) -> tuple[int, ...]:
    """smallest, twice that, ... up to and including `largest`."""
    sizes = []
    size = min(smallest, largest)
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


@dataclass(frozen=True)
class ShapeSet:
    """Every shape of a pool.

    decode: row counts of steps without prompt tokens. mixed: decode rows beside tiles. tiles: tile counts.
    blocks: widths of the block table; one where the attention kernel reads only the live context.
    """

    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    tiles: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def make(cls, max_num_seqs: int, token_budget: int, max_model_len: int, bounded_by_table: bool) -> "ShapeSet":
        """The shapes for a pool's limits; `token_budget` and `max_model_len` in tokens."""
        blocks = -(-max_model_len // BLOCK)
        return cls(
            decode=doublings(max_num_seqs),
            mixed=tuple(sorted({0, min(4, max_num_seqs), max_num_seqs})),
            tiles=doublings(max(1, token_budget // BLOCK)),
            blocks=tuple(sorted({min(16, blocks), min(64, blocks), blocks})) if bounded_by_table else (blocks,),
        )

    def all(self) -> list[Shape]:
        """Every shape, the smallest and most used first."""
        plain = [self._shape(decode, 0, blocks) for decode in self.decode for blocks in self.blocks]
        filling = [
            self._shape(decode, tiles, blocks)
            for tiles in self.tiles
            for decode in self.mixed
            for blocks in self.blocks
        ]
        return plain + filling

    def fit(self, decode: int, tiles: int, blocks: int) -> Shape:
        """The smallest shape that holds a step. The scheduler keeps steps within the largest."""
        rows = self.decode if tiles == 0 else self.mixed
        return self._shape(
            next(size for size in rows if size >= decode),
            next(size for size in self.tiles if size >= tiles) if tiles else 0,
            next(size for size in self.blocks if size >= blocks),
        )

    def _shape(self, decode: int, tiles: int, blocks: int) -> Shape:
        """A row samples at most once, and there are no more sequences in a step than in the largest decode step."""
        rows = min(decode + tiles, self.decode[-1])
        return Shape(decode, tiles, blocks, next(size for size in self.decode if size >= rows))
