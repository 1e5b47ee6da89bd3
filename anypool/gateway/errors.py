"""Everything that can go wrong for a client, in OpenAI's error shape.

`{"error": {"message", "type", "param", "code"}}`: `param` names the field, `code` is for programs to switch on.
"""

from collections.abc import Mapping
from typing import Any

import msgspec


class ErrorBody(msgspec.Struct):
    """The inside of OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct):
    """An error response's body, and an error event's data in a stream."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is an error. `retry_after`: seconds, for the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, type, param, code)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after)))

    def encode(self) -> bytes:
        return msgspec.json.encode(ErrorEnvelope(self.body))

    def encode_event(self) -> bytes:
        """The error as a server-sent event, for a stream whose status line is already out."""
        return b"data: " + self.encode() + b"\n\n"


def invalid_json() -> ApiError:
    return ApiError(
        400,
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
        "correctly. The API expects a JSON payload, but what was sent was not valid JSON.)",
    )


def not_an_object(kind: str) -> ApiError:
    return ApiError(400, f"Invalid body: expected a JSON object, but got {kind} instead.", code="invalid_type")


def unrecognized(names: list[str]) -> ApiError:
    plural = "s" if len(names) > 1 else ""
    return ApiError(400, f"Unrecognized request argument{plural} supplied: {', '.join(names)}")


def unknown_parameter(param: str) -> ApiError:
    """A field inside another that nobody knows."""
    return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def missing(param: str) -> ApiError:
    return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def wrong_type(param: str, expected: str, got: str) -> ApiError:
    message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
    return ApiError(400, message, param=param, code="invalid_type")


def invalid_value(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str) -> ApiError:
    message = f"Unsupported parameter: '{param}' is not supported by this server yet. Leave it out."
    return ApiError(400, message, param=param, code="unsupported_parameter")


def unsupported_value(param: str, value: Any, allowed: str) -> ApiError:
    shown = msgspec.json.encode(value).decode()
    message = f"Unsupported value: '{param}' does not support {shown[:80]} on this server. Use {allowed}."
    return ApiError(400, message, param=param, code="unsupported_value")


def context_exceeded(context: int, prompt: int, max_tokens: int | None, param: str) -> ApiError:
    """The prompt, or the prompt with what may be generated, does not fit. Says both numbers."""
    if max_tokens is None or prompt >= context:
        message = (
            f"This model's maximum context length is {context} tokens. However, your {param} resulted in {prompt} "
            f"tokens and at least 1 must be left for the answer. Please reduce the length of the {param}."
        )
    else:
        message = (
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + max_tokens} "
            f"tokens ({prompt} in the {param}, {max_tokens} in the completion). Please reduce the length of the "
            f"{param} or completion."
        )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def model_not_found(model: str, served: str) -> ApiError:
    message = f"The model `{model}` does not exist here. This server serves `{served}`."
    return ApiError(404, message, param="model", code="model_not_found")


def body_too_large(limit: int) -> ApiError:
    message = f"The request body is larger than this server accepts: the limit is {limit} bytes."
    return ApiError(413, message, code="request_too_large", headers={"connection": "close"})


def no_pool(retry_after: float) -> ApiError:
    message = "No pool is ready to serve this model. Please retry later."
    return ApiError(503, message, type="server_error", code="no_pool", retry_after=retry_after)


def queue_full(retry_after: float) -> ApiError:
    message = "The queue of every pool is full. Please retry later."
    return ApiError(503, message, type="server_error", code="queue_full", retry_after=retry_after)


def stream_lost(message: str) -> ApiError:
    """A generation under way that no pool can go on with."""
    return ApiError(503, message, type="server_error", code="no_pool_left", retry_after=1)


def internal() -> ApiError:
    message = "The server had an error while processing your request. Sorry about that!"
    return ApiError(500, message, type="server_error", code="internal_error")
