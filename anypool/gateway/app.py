"""The endpoint: routes, what starts and stops with it, and errors in OpenAI's shape."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from msgspec import json
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import anypool
from anypool.gateway.api_docs import describe_api
from anypool.gateway.errors import ApiError, internal, model_not_found, no_pool
from anypool.gateway.generation import Generation
from anypool.gateway.metrics import Metrics
from anypool.gateway.openai_api import read_chat_request, read_completion_request
from anypool.gateway.openai_output import writer_for
from anypool.gateway.pool_view import PoolManager, PoolViews
from anypool.gateway.prepare import Preparer, Tokenizer
from anypool.gateway.relay import Services
from anypool.gateway.request import GenerationRequest
from anypool.gateway.router import Router
from anypool.gateway.settings import Settings
from anypool.gateway.streaming import EventStream, collect, read_body, until_client_leaves
from anypool.gateway.vocabulary import vocabulary_of
from anypool.gateway.worker_client import WorkerClient


def create_app(
    manager: PoolManager, tokenizer: Tokenizer, model_name: str, settings: Settings | None = None
) -> FastAPI:
    """The gateway in front of a manager's pools, as an ASGI application with a lifespan.

    The manager is started and stopped by the caller. Raises UnsupportedDecoderError for a tokenizer whose text cannot
    be streamed exactly.
    """
    gateway = _Gateway(manager, tokenizer, model_name, settings or Settings())
    app = FastAPI(
        title="Anypool",
        version=anypool.__version__,
        description=f"One OpenAI-compatible endpoint over every pool. It serves `{model_name}`.",
        lifespan=gateway.lifespan,
    )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_internal_error)
    route = app.add_api_route
    route("/v1/chat/completions", gateway.chat, methods=["POST"], name="Create a chat completion")
    route("/v1/completions", gateway.completions, methods=["POST"], name="Create a completion")
    route("/v1/models", gateway.models, methods=["GET"], name="List the models")
    route("/v1/models/{model:path}", gateway.model, methods=["GET"], name="Retrieve a model")
    route("/health", gateway.health, methods=["GET"], name="Health of the gateway and its pools")
    route("/metrics", gateway.metrics_page, methods=["GET"], name="Metrics for Prometheus")
    describe_api(app)
    app.add_middleware(_Account, metrics=gateway.metrics)
    return app


class _Gateway:
    """The routes' handlers and what they share."""

    def __init__(self, manager: PoolManager, tokenizer: Tokenizer, model: str, settings: Settings):
        self.metrics = Metrics(model)
        self._model = model
        self._settings = settings
        self._created = int(time.time())
        self._started_at = time.monotonic()
        self._preparer = Preparer(tokenizer, model)
        self._vocabulary = vocabulary_of(tokenizer.to_json())
        self._client = WorkerClient(settings.heartbeat_limit_seconds, settings.recovery_seconds)
        self._views = PoolViews(manager, self._client, settings)
        self._services = Services(self._views, Router(self._views), self._client, self.metrics)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with self._client:
            self._views.start()
            try:
                yield
            finally:
                await self._views.stop()

    async def chat(self, request: Request) -> Response:
        checked = read_chat_request(await read_body(request, self._settings.max_body_bytes))
        self._require_pool()
        return await self._generate(request, await self._preparer.chat(checked, self._views.context_length))

    async def completions(self, request: Request) -> Response:
        checked = read_completion_request(await read_body(request, self._settings.max_body_bytes))
        self._require_pool()
        return await self._generate(request, await self._preparer.completion(checked, self._views.context_length))

    async def models(self) -> Response:
        return _json({"object": "list", "data": [self._model_card()]})

    async def model(self, model: str) -> Response:
        if model != self._model:
            raise model_not_found(model, self._model)
        return _json(self._model_card())

    async def health(self) -> Response:
        """200 while at least one pool serves, else 503."""
        pools = [
            {
                "name": view.name,
                "state": view.pool.state,
                "usable": view.usable,
                "pid": view.pool.pid,
                "url": view.pool.url,
                "in_flight": view.in_flight,
                "restarts": view.pool.restarts,
                "cached_blocks": len(view.index),
            }
            for view in self._views.pools
        ]
        ready = any(view.usable for view in self._views.pools)
        body = {
            "status": "ready" if ready else "no_pool",
            "model": self._model,
            "max_model_len": self._views.context_length,
            "uptime_seconds": time.monotonic() - self._started_at,
            "pools": pools,
        }
        return _json(body, 200 if ready else 503)

    async def metrics_page(self) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _require_pool(self) -> None:
        if not any(view.usable for view in self._views.pools):
            raise no_pool(self._settings.retry_after_seconds)

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "anypool",
            "max_model_len": self._views.context_length,
        }

    async def _generate(self, http: Request, request: GenerationRequest) -> Response:
        generation = Generation(request, self._vocabulary, self._services)
        writer = writer_for(request, self._vocabulary)
        if request.stream:
            admitted = await until_client_leaves(http.receive, generation.__aenter__())
            if admitted is None:
                return Response(status_code=499)
            return EventStream(generation, writer, {"x-anypool-pool": generation.first_pool})
        body = await until_client_leaves(http.receive, collect(generation, writer))
        if body is None:
            return Response(status_code=499)  # nobody is there to read it
        return Response(body, media_type="application/json", headers={"x-anypool-pool": generation.first_pool})


class _Account:
    """Gives every answer an `x-request-id` and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}".encode()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.answered(route, message["status"])
            await send(message)

        await self._app(scope, receive, noting)


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.encode(content), status_code=status, media_type="application/json")


def _error(error: ApiError) -> Response:
    return Response(error.encode(), status_code=error.status, media_type="application/json", headers=error.headers)


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Routes that do not exist, and methods they do not have."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        return _error(ApiError(405, f"Not allowed: {where}.", code="method_not_allowed", headers=error.headers))
    if error.status_code == 404:
        return _error(ApiError(404, f"Invalid URL ({where})", code="unknown_url"))
    return _error(ApiError(error.status_code, str(error.detail), headers=error.headers))


async def _answer_internal_error(_: Request, __: Exception) -> Response:
    return _error(internal())
