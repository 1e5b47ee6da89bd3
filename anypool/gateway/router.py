"""Chooses the pool for a prompt: the one where least has to be computed before the answer can start.

The cost of a pool is the prompt tokens it does not hold, plus a charge for every stream it is busy with. Pools that
cost the same are told apart by a hash of the prompt, so equal prompts meet in the same pool even before it reported
their blocks.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from anypool.engine.prefix import BLOCK_SIZE
from anypool.gateway.pool_view import PoolView, PoolViews
from anypool.gateway.request import Prompt

STREAM_COST_TOKENS = 128
"""A stream in flight counts as much as computing so many prompt tokens: its steps share the chip with ours."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome: a pool, or why there is none. `any_usable`: pools are ready but full or to be avoided."""

    pool: PoolView | None
    any_usable: bool


class Router:
    """Stateless apart from what the views hold."""

    def __init__(self, views: PoolViews):
        self._views = views

    def choose(
        self,
        prompt: Prompt,
        *,
        avoid: Collection[tuple[str, int]] = (),
        resumed: bool = False,
        workers_only: bool = False,
    ) -> Choice:
        """Pick a pool.

        avoid: workers (name, incarnation) that just lost or refused this request.
        resumed: the stream has begun, and goes before the limit on streams: better a crowded pool than a lost stream.
        workers_only: the request needs what foreign engines cannot do.
        """
        usable = [view for view in self._views.pools if view.usable and not (workers_only and view.external)]
        open_now = [
            view for view in usable if (view.name, view.incarnation) not in avoid and (resumed or not view.full)
        ]
        for group in _by_preference(open_now):
            if group:
                return Choice(min(group, key=lambda view: _cost(view, prompt)), True)
        return Choice(None, bool(usable))


def _by_preference(views: Sequence[PoolView]) -> list[list[PoolView]]:
    """Serving pools first, then backups; in each those that are not under suspicion first."""
    groups: list[list[PoolView]] = [[], [], [], []]
    for view in views:
        groups[("serve" not in view.pool.roles) * 1 + view.suspect * 2].append(view)
    return groups


def _cost(view: PoolView, prompt: Prompt) -> tuple[int, bytes]:
    held = view.index.matched(prompt.block_hashes) * BLOCK_SIZE
    tokens = len(prompt.token_ids) - held + STREAM_COST_TOKENS * view.in_flight
    return tokens, _tie_break(view.name, prompt)


def _tie_break(name: str, prompt: Prompt) -> bytes:
    """Rendezvous hashing: each prompt has its own order of pools, which does not change when another pool comes."""
    if prompt.block_hashes:
        key = prompt.block_hashes[0]
    else:
        key = b"".join(token.to_bytes(8, "little", signed=True) for token in prompt.token_ids)
    return blake2b(key + name.encode(), digest_size=8).digest()
