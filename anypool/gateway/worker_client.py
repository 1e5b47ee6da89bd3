"""Speaks the worker API over HTTP: one request, its server-sent events, and every way in which it can be lost."""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
import msgspec

from anypool.gateway.errors import ApiError
from anypool.gateway.text import TokenBatch

LossReason = Literal["closed", "stalled", "error"]

# Shorter than the 5 s after which uvicorn closes an idle connection: a connection that the worker is just closing
# would look like a dead worker.
_KEEPALIVE_SECONDS = 2.0


class WorkerLost(Exception):
    """The worker died, stalled or failed; the generation can go on elsewhere."""

    def __init__(self, reason: LossReason, detail: str):
        super().__init__(detail)
        self.reason: LossReason = reason


class WorkerBusy(Exception):
    """The worker takes no request now: queue full, draining or not ready. `retry_after` in seconds, if it said so."""

    def __init__(self, retry_after: float | None):
        super().__init__("the worker takes no request now")
        self.retry_after = retry_after


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float] = []
    top_logprobs: list[list[tuple[int, float]]] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _PromptDetails | None = None


class Timing(msgspec.Struct):
    """How long the worker took, by its own clock."""

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0


class _Extension(msgspec.Struct):
    timing: Timing | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    anypool: _Extension | None = None
    error: dict[str, Any] | None = None


@dataclass(slots=True)
class WorkerEvents:
    """What one read brought. `cached_tokens` and `timing` are None where no event told them."""

    batches: list[TokenBatch] = field(default_factory=list)
    cached_tokens: int | None = None
    timing: Timing | None = None
    finished: bool = False


class WorkerStream:
    """An admitted request. Reads must not run at the same time; `close` cancels the request at the worker."""

    def __init__(self, response: aiohttp.ClientResponse):
        self._response = response
        self._decoder = msgspec.json.Decoder(_Event)
        self._rest = b""
        self._failure: WorkerLost | None = None

    async def read(self) -> WorkerEvents:
        """Wait for bytes and return the events they complete, perhaps none. Raises WorkerLost."""
        if self._failure is not None:
            raise self._failure
        try:
            data = await self._response.content.readany()
        except TimeoutError as error:
            raise WorkerLost("stalled", "the worker sent nothing within the heartbeat limit") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLost("closed", f"the connection to the worker broke: {error}") from error
        if not data:
            raise WorkerLost("closed", "the worker closed the connection in mid-stream")
        return self._parse(data)

    def _parse(self, data: bytes) -> WorkerEvents:
        *complete, self._rest = (self._rest + data).split(b"\n\n")
        found = WorkerEvents()
        try:
            for block in complete:
                for line in block.split(b"\n"):
                    if line.startswith(b"data:"):
                        self._take(line[5:].strip(), found)
        except WorkerLost as loss:
            # Tokens that came before the failure count; the next read reports it.
            if not found.batches:
                raise
            self._failure = loss
        return found

    def _take(self, data: bytes, found: WorkerEvents) -> None:
        if found.finished or data == b"[DONE]":
            return
        try:
            event = self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise WorkerLost("error", f"the worker sent an event that cannot be read: {error}") from error
        if event.error is not None:
            raise WorkerLost("error", f"the worker failed: {event.error.get('message')}")
        if event.usage is not None and event.usage.prompt_tokens_details is not None:
            found.cached_tokens = event.usage.prompt_tokens_details.cached_tokens
        if event.anypool is not None and event.anypool.timing is not None:
            found.timing = event.anypool.timing
        for choice in event.choices:
            if choice.token_ids is None and choice.finish_reason is None:
                raise WorkerLost("error", "the engine sends no token ids")
            if choice.finish_reason not in (None, "stop", "length"):
                raise WorkerLost("error", f"the worker ended the request itself: {choice.finish_reason}")
            batch = TokenBatch(choice.token_ids or [], finish_reason=choice.finish_reason)
            if choice.logprobs is not None:
                batch.logprobs = choice.logprobs.token_logprobs
                batch.top_logprobs = choice.logprobs.top_logprobs
            found.batches.append(batch)
            found.finished = found.finished or choice.finish_reason is not None

    def close(self) -> None:
        """Let go of the connection, also under a pending read, which then raises WorkerLost("closed").

        In mid-stream this cancels the request at the worker; after the end the connection is kept for another request.
        """
        self._response.close()


class WorkerClient:
    """Connections to all workers. An async context manager."""

    def __init__(self, heartbeat_limit_seconds: float, silence_limit_seconds: float):
        """silence_limit_seconds: for engines that send no heartbeat."""
        self._limits = {False: heartbeat_limit_seconds, True: silence_limit_seconds}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use `async with`"
        return self._session

    async def open(self, url: str, body: dict[str, Any], *, external: bool, api_key: str | None) -> WorkerStream:
        """Send a request; returns when the worker admitted it. Raises WorkerLost, WorkerBusy, ApiError (refused)."""
        limit = self._limits[external]
        try:
            response = await self.session.post(
                f"{url}/v1/completions",
                data=msgspec.json.encode(body),
                headers=auth_headers(api_key) | {"content-type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=limit, sock_read=limit),
            )
        except TimeoutError as error:
            raise WorkerLost("stalled", "the worker did not answer within the heartbeat limit") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLost("closed", f"no connection to the worker: {error}") from error
        if response.status == 200:
            return WorkerStream(response)
        try:
            await _refuse(response)
        finally:
            response.release()
        raise AssertionError("unreachable")


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


async def _refuse(response: aiohttp.ClientResponse) -> None:
    """Raise what a status other than 200 means."""
    if response.status in (429, 503):
        raise WorkerBusy(_seconds(response.headers.get("retry-after")))
    try:
        error = msgspec.json.decode(await response.read())["error"]
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (TimeoutError, aiohttp.ClientError, OSError) as failure:
        raise WorkerLost("closed", "the worker closed the connection in an answer") from failure
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        message, param, code = f"the worker answered {response.status}", None, None
    if response.status in (400, 413, 422):
        raise ApiError(400, message, param=param, code=code)
    raise WorkerLost("error", f"the worker answered {response.status}: {message}")


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
