"""Pools: the fleet file, and the workers of each pool: started, watched, started again, drained and stopped.

Other rooms use `load_fleet` and its dataclasses, `PoolManager`, `PoolState` and `Backoff`, and, in a worker,
`anypool.pools.guard.die_with_parent`.
"""

from typing import TYPE_CHECKING, Any

from anypool.pools.fleet import EngineSettings, Fleet, GatewaySettings, ModelSpec, PoolSpec, load_fleet
from anypool.pools.state import PoolState, Progress, State
from anypool.pools.tables import FleetError

if TYPE_CHECKING:
    from anypool.pools.local import Backoff
    from anypool.pools.supervisor import PoolManager

__all__ = [
    "Backoff",
    "EngineSettings",
    "Fleet",
    "FleetError",
    "GatewaySettings",
    "ModelSpec",
    "PoolManager",
    "PoolSpec",
    "PoolState",
    "Progress",
    "State",
    "load_fleet",
]


def __getattr__(name: str) -> Any:
    # A worker imports the guard first, and must not wait for an HTTP client to be imported.
    if name in ("Backoff", "PoolManager"):
        from anypool.pools import supervisor

        return getattr(supervisor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
