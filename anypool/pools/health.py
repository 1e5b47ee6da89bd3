"""Asking a pool whether it is well, over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Answer:
    """What a probe got: an HTTP status and the JSON object in the body, or why there was no answer (`error`).

    refused: nobody listens there, which is certain at once, unlike a missing answer.
    """

    status: int = 0
    body: dict[str, Any] | None = None
    error: str = ""
    refused: bool = False


async def ask(session: aiohttp.ClientSession, url: str, *, seconds: float, api_key: str | None = None) -> Answer:
    """GET `url`. Never raises for what the other side does or fails to do within `seconds`."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with session.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=seconds)) as response:
            try:
                body = await response.json(content_type=None)
            except ValueError:
                body = None
            return Answer(response.status, body if isinstance(body, dict) else None)
    except TimeoutError:
        return Answer(error=f"no answer within {seconds:g} s")
    except aiohttp.ClientConnectorError as error:
        return Answer(error=f"cannot connect: {error.os_error.strerror or error.os_error}", refused=True)
    except (aiohttp.ClientError, OSError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")


class Patience:
    """How long failures have followed one another, counted from the start of the first failed probe.

    Not from the last success: a laptop that slept has an old last success and healthy workers.
    """

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_seconds = limit_seconds
        self._clock = clock
        self._first_failure: float | None = None

    def started(self) -> float:
        """The time at which a probe starts, to be given back with its outcome."""
        return self._clock()

    def is_over(self, probe_started: float, *, ok: bool) -> bool:
        """Notes a probe's outcome; True when failures have gone on for the limit."""
        if ok:
            self._first_failure = None
            return False
        if self._first_failure is None:
            self._first_failure = probe_started
        return self._clock() - self._first_failure >= self.limit_seconds


async def pause(seconds: float, until: asyncio.Event) -> bool:
    """Waits for `until`, at most `seconds`; whether it is set."""
    try:
        await asyncio.wait_for(until.wait(), seconds)
    except TimeoutError:
        return False
    return True
