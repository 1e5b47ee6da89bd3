"""The worker API's bodies: tokens in, tokens out. Workers know no text (design: the gateway owns it)."""

import time
from typing import Any

import msgspec

from anypool.engine.engine import Update
from anypool.engine.request import Request, RequestError, SamplingParams


class Extension(msgspec.Struct, forbid_unknown_fields=True):
    """What Anypool adds to the OpenAI form."""

    resumed: int = 0
    request_id: str | None = None


class CompletionBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /v1/completions. Defaults are OpenAI's; see SamplingParams for meanings."""

    prompt: list[int]
    model: str | None = None
    max_tokens: int = 16
    stream: bool = False
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    cache_salt: str = ""
    priority: int = 0
    return_token_ids: bool = True
    anypool: Extension = msgspec.field(default_factory=Extension)

    def to_request(self, request_id: str) -> Request:
        """The engine's request. Raises RequestError naming the field that is out of range."""
        params = SamplingParams(**{name: getattr(self, name) for name in SamplingParams.__struct_fields__})
        return Request(
            id=request_id,
            prompt=self.prompt,
            params=params,
            cache_salt=self.cache_salt,
            priority=self.priority,
            resumed=self.anypool.resumed,
        )


_decode = msgspec.json.Decoder(CompletionBody).decode
_encode = msgspec.json.Encoder().encode


def parse(body: bytes) -> CompletionBody:
    """Raises RequestError for JSON that is not a request."""
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        raise RequestError(_field(str(error)), str(error)) from error
    except msgspec.DecodeError as error:
        raise RequestError("body", f"the body is not valid JSON: {error}") from error


def _field(message: str) -> str:
    """The field a msgspec message speaks of: `... - at `$.prompt[3]`` or `... field `x``; else the whole body."""
    quoted = message.split("`")
    path = next((part for part in reversed(quoted) if part.startswith("$.")), None)
    if path is not None:
        return path[2:].split("[")[0].split(".")[0]
    return quoted[1] if " field " in quoted[0] else "body"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error shape."""
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


class StreamWriter:
    """Events of one stream."""

    def __init__(self, request: Request, model: str) -> None:
        self.request = request
        self._base = {
            "id": request.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._first = True

    def event(self, update: Update) -> bytes:
        """The server-sent event for one step's tokens; the first and the last also carry usage and timing."""
        body: dict[str, Any] = {**self._base, "choices": [choice(update)]}
        if update.finish_reason is not None:
            body["usage"] = usage(self.request, self.request.num_output)
            body["anypool"] = {"timing": timing(self.request, ended=True)}
        elif self._first:  # what was cached is told at once: the worker may not live to say it at the end
            body["usage"] = usage(self.request, len(update.token_ids))
            body["anypool"] = {"timing": timing(self.request, ended=False)}
        self._first = False
        return b"data: " + _encode(body) + b"\n\n"

    def whole(self, updates: list[Update]) -> bytes:
        """The body of a request that does not stream."""
        joined = Update(
            self.request,
            [token for update in updates for token in update.token_ids],
            None if updates[0].logprobs is None else [one for update in updates for one in update.logprobs or ()],
            updates[-1].finish_reason,
        )
        return _encode(
            {
                **self._base,
                "choices": [choice(joined)],
                "usage": usage(self.request, self.request.num_output),
                "anypool": {"timing": timing(self.request, ended=True)},
            }
        )


def choice(update: Update) -> dict[str, Any]:
    """One choice in OpenAI's form, with token ids in place of text."""
    logprobs = None
    if update.logprobs is not None:
        logprobs = {
            "token_logprobs": [one.logprob for one in update.logprobs],
            "top_logprobs": [one.top for one in update.logprobs],
        }
    return {
        "index": 0,
        "text": "",
        "token_ids": update.token_ids,
        "logprobs": logprobs,
        "finish_reason": update.finish_reason,
    }


def usage(request: Request, completion_tokens: int) -> dict[str, Any]:
    """Tokens of a request: the whole prompt, resumed ones included, and those generated here and told so far."""
    return {
        "prompt_tokens": request.num_prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": request.num_prompt + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
    }


def timing(request: Request, ended: bool) -> dict[str, float]:
    """Seconds a request waited, prefilled and decoded.

    ended: this goes out with the last tokens. (The engine may be done with a request whose first are only being sent.)
    """
    scheduled = request.scheduled_at or request.arrival
    first = request.first_token_at or scheduled
    spent = {"queue_seconds": scheduled - request.arrival, "prefill_seconds": first - scheduled}
    if ended and request.finished_at is not None:
        spent["decode_seconds"] = request.finished_at - first
    return spent
