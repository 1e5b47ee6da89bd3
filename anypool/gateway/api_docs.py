"""The OpenAPI document behind `/docs`: the request bodies come from the msgspec declarations."""

from typing import Any

import msgspec
from fastapi import FastAPI

from anypool.gateway.errors import ErrorEnvelope
from anypool.gateway.openai_output import ChatChoice, CompletionChoice, Envelope
from anypool.gateway.openai_schema import ChatRequest, CompletionRequest

_BODIES = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}


def describe_api(app: FastAPI) -> None:
    """Make `app.openapi` tell the request bodies and errors of the generating routes."""
    original = app.openapi
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(original())
            _complete(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    kinds = (*_BODIES.values(), ErrorEnvelope, Envelope, ChatChoice, CompletionChoice)
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(kinds, references, strict=True))
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
    error = {"content": {"application/json": {"schema": schema_of[ErrorEnvelope]}}}
    for path, kind in _BODIES.items():
        operation = document["paths"][path]["post"]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[kind]}},
        }
        operation["responses"] = {
            "200": {
                "description": "The answer, or server-sent events of it with `stream`.",
                "content": {"application/json": {"schema": schema_of[Envelope]}, "text/event-stream": {"schema": {}}},
            },
            "400": {"description": "The request is wrong; `param` names the field.", **error},
            "404": {"description": "The model is not served here.", **error},
            "413": {"description": "The body is too large.", **error},
            "503": {"description": "No pool, or every queue full; see `retry-after`.", **error},
        }
