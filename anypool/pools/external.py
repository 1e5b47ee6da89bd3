"""The `external` launcher: a pool is any OpenAI-compatible server somebody else started. We only watch it."""

from __future__ import annotations

import asyncio
import logging

import aiohttp

from anypool.pools.fleet import PoolSpec
from anypool.pools.health import Answer, Patience, ask, pause
from anypool.pools.state import PoolState

log = logging.getLogger("anypool.pools")

_PROBE, _PAUSE, _PATIENCE = 0.4, 0.1, 0.8  # Parts of the heartbeat limit, as for local workers.


class ExternalPool:
    """Asks an endpoint for its models again and again; it is ready while it answers and serves the model.

    `/v1/models` is asked because every such server has it, it needs the key, and it says what is served.
    """

    def __init__(
        self,
        state: PoolState,
        spec: PoolSpec,
        fleet_model: str,
        *,
        session: aiohttp.ClientSession,
        heartbeat_limit_seconds: float,
    ) -> None:
        self.state = state
        self._wanted = spec.model or fleet_model
        self._named = bool(spec.model)
        self._session = session
        self._limit_seconds = heartbeat_limit_seconds
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Watches until `stop`."""
        limit = self._limit_seconds
        patience = Patience(_PATIENCE * limit)
        url = f"{self.state.url}/v1/models"
        while not self._stopping.is_set():
            started = patience.started()
            answer = await ask(self._session, url, seconds=_PROBE * limit, api_key=self.state.api_key)
            if self._stopping.is_set():
                break
            over = patience.is_over(started, ok=answer.status == 200)
            self._judge(answer, over)
            await pause(_PAUSE * limit if self.state.state == "ready" else _PAUSE * limit * 2, self._stopping)

    async def stop(self, grace_seconds: float) -> None:
        """Stops using the endpoint; what runs there is not ours to end."""
        self.kill()

    def kill(self) -> None:
        """As `stop`."""
        self._stopping.set()
        self.state.update(state="down")

    def _judge(self, answer: Answer, over: bool) -> None:
        before = self.state.state
        if answer.status in (401, 403):
            error = f"HTTP {answer.status} from /v1/models: check the key in the variable that api_key_env names"
            self.state.update(state="failed", last_error=error)
        elif answer.status == 200:
            self._judge_models(answer)
        elif before != "ready" or over or answer.refused:
            error = answer.error or f"HTTP {answer.status} from /v1/models"
            self.state.update(state="down", last_error=error)
        if self.state.state != before:
            if self.state.state == "ready":
                log.info("ready pool=%s url=%s model=%s", self.state.name, self.state.url, self.state.model)
            else:
                log.warning("%s pool=%s error=%r", self.state.state, self.state.name, self.state.last_error)

    def _judge_models(self, answer: Answer) -> None:
        listed = (answer.body or {}).get("data")
        names = [entry.get("id") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        if self._wanted in names:
            self.state.update(state="ready", model=self._wanted)
        elif len(names) == 1 and isinstance(names[0], str) and not self._named:
            # One model under another name: vLLM serves a path under that path unless told a name.
            self.state.update(state="ready", model=names[0])
        else:
            error = f"does not serve {self._wanted!r} but {names}: set the pool's model to one of them"
            self.state.update(state="failed", last_error=error)
