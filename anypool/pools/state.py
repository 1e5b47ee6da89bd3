"""What is known about a pool right now: written by its watcher, read by the gateway and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["starting", "ready", "draining", "down", "failed"]


@dataclass(frozen=True)
class Progress:
    """How far a starting worker is: `done` of `total` units of `phase` (download, load or warmup)."""

    phase: str
    done: int
    total: int
    detail: str = ""


@dataclass
class PoolState:
    """One pool as it is now. Only its watcher changes it, through `update`, which tells every listener.

    state: `starting` until it can serve, `ready`, `draining` (finishes what it has, takes nothing new),
    `down` (gone, will be tried again), `failed` (will not come back without a person: see `last_error`).
    url: base address without `/v1`, None while there is none. pid: of a local worker.
    model: the name an external pool wants in a request's `model` field; "" means the fleet's.
    """

    name: str
    launcher: str
    chip: str
    roles: tuple[str, ...] = ("serve",)
    max_concurrency: int | None = None
    state: State = "starting"
    url: str | None = None
    pid: int | None = None
    model: str = ""
    api_key: str | None = field(default=None, repr=False)
    progress: Progress | None = None
    restarts: int = 0
    last_error: str | None = None
    listeners: list[Callable[[PoolState], None]] = field(default_factory=list, repr=False)

    def update(self, **changes: Any) -> None:
        """Sets fields and, if anything is different now, calls the listeners before it returns."""
        different = {name: value for name, value in changes.items() if getattr(self, name) != value}
        for name, value in different.items():
            setattr(self, name, value)
        if different:
            for listener in list(self.listeners):
                listener(self)
