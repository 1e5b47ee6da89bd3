"""What each chip is: data files with a source for every number, and what its compiler accepts.

Other rooms use:
- `load_chip(name)`, `chips()`: a `Chip` with its numbers as `Fact`s, None where a number is not known;
- `Target.parse("v5e:2x4")`, `parse_targets`: chips in a topology;
- `target_description(chip)`: what XLA's GPU compilers read instead of asking a GPU;
- `load_prices()`, `prices_of(chip)`: dated prices;
- `parse_chip`, `parse_prices`: the checks, for files from elsewhere;
- `ChipError` and its kinds. This room imports no other.
"""

from anypool.chips.chip import Chip, chip_names, chips, load_chip, parse_chip
from anypool.chips.compiler import Compiler, load_compiler
from anypool.chips.errors import ChipError, ChipFileError, PriceError, TargetError, UnknownChipError, nearest
from anypool.chips.facts import Fact, Source
from anypool.chips.gpu_target import target_description
from anypool.chips.prices import Price, load_prices, parse_prices, prices_of
from anypool.chips.target import Target, parse_targets
from anypool.chips.topology import Topology

__all__ = [
    "Chip",
    "ChipError",
    "ChipFileError",
    "Compiler",
    "Fact",
    "Price",
    "PriceError",
    "Source",
    "Target",
    "TargetError",
    "Topology",
    "UnknownChipError",
    "chip_names",
    "chips",
    "load_chip",
    "load_compiler",
    "load_prices",
    "nearest",
    "parse_chip",
    "parse_prices",
    "parse_targets",
    "prices_of",
    "target_description",
]
