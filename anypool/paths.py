"""Where Anypool keeps what it can make again: converted models, compiled kernels and programs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder for Anypool: $ANYPOOL_CACHE, else $XDG_CACHE_HOME/anypool, else ~/.cache/anypool."""
    if named := os.environ.get("ANYPOOL_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anypool"
