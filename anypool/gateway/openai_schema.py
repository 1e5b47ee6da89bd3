"""The fields of OpenAI's requests that this server understands, with their types and limits.

msgspec checks types and ranges from these declarations, and `/docs` shows them. Fields that OpenAI has and this server
has not are listed at the end, with the values that change nothing and are therefore accepted.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_CHAT_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5

PositiveInt = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool | None = None
    """Send one more chunk before the end, without choices, with the usage of the whole request."""


class Extension(Struct, kw_only=True, forbid_unknown_fields=True):
    """Anypool's own options."""

    trace: bool | None = None
    """Tell in the last chunk, or in the body, which pools served the request and what every fail-over cost."""


class TextPart(Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message. Only text is understood."""

    type: Literal["text"]
    text: str


class Message(Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class CommonRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    # What engines have and OpenAI has not; the openai SDK sends these from `extra_body`.
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Meta(ge=0)]] | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: str | None = None
    anypool: Extension | None = None


class ChatRequest(CommonRequest, kw_only=True):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_CHAT_LOGPROBS)] | None = None


class CompletionRequest(CommonRequest, kw_only=True):
    """`POST /v1/completions`. prompt: a text, token ids, or a list of either."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None


ANY = object()
"""Accepted with any value, because it asks nothing of the answer."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "user": (ANY,),
    "metadata": (ANY,),
    "safety_identifier": (ANY,),
    "prompt_cache_key": (ANY,),
    "parallel_tool_calls": (ANY,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory",),
}
"""Fields of OpenAI that this server may leave unread, and with which values; null is always one of them."""

CHAT_HARMLESS: dict[str, tuple[Any, ...]] = HARMLESS | {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

COMPLETION_HARMLESS: dict[str, tuple[Any, ...]] = HARMLESS | {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}

MESSAGE_HARMLESS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
}
"""An answer of this server may be sent back as a message: the SDK then includes these fields."""

STREAM_OPTIONS_HARMLESS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
PART_HARMLESS: dict[str, tuple[Any, ...]] = {"prompt_cache_breakpoint": ()}
