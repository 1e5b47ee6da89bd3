"""Which blocks of the prefix cache a pool holds, kept up to date by its worker's block events (`GET /events`)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import aiohttp
import msgspec

from anypool.gateway.worker_client import WorkerClient, auth_headers

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.25
_LONGEST_RETRY_SECONDS = 5.0


class _BlockEvent(msgspec.Struct):
    reset: bool = False
    stored: list[str] = []
    evicted: list[str] = []


class PrefixIndex:
    """The block hashes of one pool. Empty while nothing is known: routing then goes by load alone."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._hashes)

    def clear(self) -> None:
        self._hashes = set()

    def apply(self, data: bytes) -> None:
        """Take in one event. Raises msgspec.DecodeError, ValueError for what is no block event."""
        event = _DECODER.decode(data)
        if event.reset:
            self.clear()
        self._hashes.difference_update(map(bytes.fromhex, event.evicted))
        self._hashes.update(map(bytes.fromhex, event.stored))

    def matched(self, hashes: Sequence[bytes]) -> int:
        """How many blocks from the start of a prompt the pool holds."""
        for count, block in enumerate(hashes):
            if block not in self._hashes:
                return count
        return len(hashes)

    async def follow(self, client: WorkerClient, url: str, api_key: str | None) -> None:
        """Keep up with a worker until cancelled; connects again, ever more slowly, when the connection ends."""
        delay = _FIRST_RETRY_SECONDS
        while True:
            try:
                async for data in _events(client, url, api_key):
                    self.apply(data)
                    delay = _FIRST_RETRY_SECONDS
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError, msgspec.DecodeError) as error:
                log.info("block events of %s ended: %s", url, error or type(error).__name__)
            finally:
                # What happens from now on is not seen, so what is known may be wrong.
                self.clear()
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LONGEST_RETRY_SECONDS)


_DECODER = msgspec.json.Decoder(_BlockEvent)


async def _events(client: WorkerClient, url: str, api_key: str | None) -> AsyncIterator[bytes]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
    async with client.session.get(f"{url}/events", headers=auth_headers(api_key), timeout=timeout) as response:
        response.raise_for_status()
        rest = b""
        async for chunk in response.content.iter_any():
            *complete, rest = (rest + chunk).split(b"\n\n")
            for block in complete:
                for line in block.split(b"\n"):
                    if line.startswith(b"data:"):
                        yield line[5:].strip()
