"""Reads OpenAI requests: JSON to a checked structure, or the error that OpenAI itself would give.

Every mistake is a 400 that names the field and what was expected. A field that OpenAI has and this server cannot honour
is refused by name rather than ignored; one that nobody knows is refused as OpenAI refuses it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from anypool.gateway import openai_schema as schema
from anypool.gateway.errors import (
    ApiError,
    invalid_json,
    invalid_value,
    missing,
    not_an_object,
    unknown_parameter,
    unrecognized,
    unsupported,
    unsupported_value,
    wrong_type,
)
from anypool.gateway.openai_schema import ChatRequest, CommonRequest, CompletionRequest

_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_COMPLAINT = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$[^`]*)`)?", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<wanted>[^`]+)`, got `(?P<got>\w+)`")
_RANGE = re.compile(r"Expected `(?P<kind>int|float)` (?P<sign><=|>=|<|>) (?P<limit>\S+)")
_LENGTH = re.compile(r"Expected `array` of length (?P<sign><=|>=) (?P<limit>\d+)")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")
T = TypeVar("T", bound=msgspec.Struct)

_ROLES = ("system", "developer", "user", "assistant")


def read_chat_request(body: bytes) -> ChatRequest:
    """The checked request of `/v1/chat/completions`. Raises ApiError."""
    data = _read_object(body)
    _check_fields(data, ChatRequest, schema.CHAT_HARMLESS)
    _check_stream_options(data)
    messages = data.get("messages")
    if isinstance(messages, list):
        for index, message in enumerate(messages):
            _check_message(message, f"messages[{index}]")
    request = _convert(data, ChatRequest)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid_value(
            "max_tokens",
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            "invalid_parameter_combination",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid_value(
            "top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true.", "invalid_parameter_combination"
        )
    _check_common(request)
    return request


def read_completion_request(body: bytes) -> CompletionRequest:
    """The checked request of `/v1/completions`. Raises ApiError."""
    data = _read_object(body)
    _check_fields(data, CompletionRequest, schema.COMPLETION_HARMLESS, relative={"best_of": data.get("n")})
    _check_stream_options(data)
    request = _convert(data, CompletionRequest)
    _check_common(request)
    return request


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids. Raises ApiError."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid_value(
            "prompt",
            "Invalid 'prompt': empty array. Expected an array with minimum length 1, but got an empty array instead.",
            "empty_array",
        )
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if isinstance(prompt[0], list):
        for index, item in enumerate(prompt):
            _check_token_ids(item, f"prompt[{index}]")
        return list(prompt)
    _check_token_ids(prompt, "prompt")
    return [prompt]


def stops_of(request: CommonRequest) -> tuple[str, ...]:
    """The stop strings."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise invalid_json() from None
    if not isinstance(data, dict):
        raise not_an_object(_kind_of(data))
    return data


def _check_fields(
    data: Mapping[str, Any],
    known: type[msgspec.Struct],
    harmless: Mapping[str, Sequence[Any]],
    *,
    path: str = "",
    relative: Mapping[str, Any] | None = None,
) -> None:
    """Refuse fields nobody knows, and values of known ones that would have to be ignored.

    relative: for a field, one more value that changes nothing because of another field.
    """
    fields = set(known.__struct_fields__)
    unknown = [name for name in data if name not in fields and name not in harmless]
    if unknown and path:
        raise unknown_parameter(f"{path}.{unknown[0]}")
    if unknown:
        raise unrecognized(unknown)
    for name, value in data.items():
        if name in fields or value is None:
            continue
        allowed = harmless[name]
        if allowed and (allowed[0] is schema.ANY or any(_same(value, item) for item in allowed)):
            continue
        if relative is not None and relative.get(name) is not None and _same(value, relative[name]):
            continue
        full = f"{path}.{name}" if path else name
        if not allowed or name in ("tools", "functions", "tool_calls"):
            raise unsupported(full)
        raise unsupported_value(full, value, " or ".join(msgspec.json.encode(item).decode() for item in allowed))


def _same(value: Any, item: Any) -> bool:
    # In Python, and not in JSON, false equals 0 and true equals 1.
    return type(value) is type(item) and bool(value == item)


def _check_stream_options(data: Mapping[str, Any]) -> None:
    options = data.get("stream_options")
    if options is None:
        return
    if data.get("stream") is not True:
        raise invalid_value(
            "stream_options",
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            "invalid_parameter_combination",
        )
    if isinstance(options, dict):
        _check_fields(options, schema.StreamOptions, schema.STREAM_OPTIONS_HARMLESS, path="stream_options")
        options.pop("include_obfuscation", None)


def _check_message(message: Any, path: str) -> None:
    """What msgspec would report less clearly; it checks the rest."""
    if not isinstance(message, dict):
        return
    _check_fields(message, schema.Message, schema.MESSAGE_HARMLESS, path=path)
    for name in schema.MESSAGE_HARMLESS:
        message.pop(name, None)
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role not in _ROLES:
        raise _not_supported_value(f"{path}.role", role, _ROLES)
    if not isinstance(content, list):
        return
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            continue
        kind = part.get("type")
        if isinstance(kind, str) and kind != "text":
            raise _not_supported_value(f"{path}.content[{index}].type", kind, ("text",))
        _check_fields(part, schema.TextPart, schema.PART_HARMLESS, path=f"{path}.content[{index}]")
        for name in schema.PART_HARMLESS:
            part.pop(name, None)


def _not_supported_value(param: str, value: str, allowed: Sequence[str]) -> ApiError:
    supported = ", ".join(f"'{item}'" for item in allowed)
    return invalid_value(param, f"Invalid value: '{value[:80]}'. Supported values are: {supported}.")


def _convert(data: dict[str, Any], kind: type[T]) -> T:
    known = {name: value for name, value in data.items() if name in kind.__struct_fields__}
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise _translated(str(error), known) from None


def _translated(complaint: str, data: Mapping[str, Any]) -> ApiError:
    """msgspec's complaint in OpenAI's words."""
    parts = _COMPLAINT.fullmatch(complaint)
    assert parts is not None
    what, path = parts["what"], (parts["path"] or "$").removeprefix("$").removeprefix(".")
    if match := _MISSING.fullmatch(what):
        return missing(f"{path}.{match['name']}" if path else match["name"])
    if match := _UNKNOWN.fullmatch(what):
        return unknown_parameter(f"{path}.{match['name']}")
    if match := _TYPE.fullmatch(what):
        wanted = [_KINDS[kind] for kind in match["wanted"].split(" | ") if kind != "null"]
        got = _KINDS[match["got"]]
        return wrong_type(path, " or ".join(wanted), got)
    if match := _RANGE.fullmatch(what):
        return _out_of_range(path, match, _value_at(data, path))
    if match := _LENGTH.fullmatch(what):
        return invalid_value(
            path,
            f"Invalid '{path}': empty array. Expected an array with minimum length {match['limit']}, "
            "but got an empty array instead.",
            "empty_array",
        )
    return invalid_value(path or "body", f"Invalid value for '{path or 'body'}': {what}.")


def _out_of_range(path: str, match: re.Match[str], value: Any) -> ApiError:
    kind = "integer" if match["kind"] == "int" else "decimal"
    below = match["sign"].startswith(">")
    limit = match["limit"].removesuffix(".0")
    got = "" if value is None else f", but got {value} instead"
    return invalid_value(
        path,
        f"Invalid '{path}': {kind} {'below minimum' if below else 'above maximum'} value. "
        f"Expected a value {match['sign']} {limit}{got}.",
        f"{kind}_{'below_min' if below else 'above_max'}_value",
    )


def _value_at(data: Mapping[str, Any], path: str) -> Any:
    """The value that a complaint is about; None where the path does not tell (an entry of an object)."""
    value: Any = data
    for name, index in re.findall(r"(\w+)|\[(\d+|\.\.\.)\]", path):
        if index == "...":
            return None
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _check_common(request: CommonRequest) -> None:
    stops = stops_of(request)
    if len(stops) > schema.MAX_STOPS:
        raise invalid_value(
            "stop",
            f"Invalid 'stop': array too long. Expected an array with maximum length {schema.MAX_STOPS}, but got an "
            f"array with length {len(stops)} instead.",
            "array_above_max_length",
        )
    if "" in stops:
        raise invalid_value("stop", "Invalid 'stop': a stop string must not be empty.", "empty_string")
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise invalid_value(
            "seed",
            f"Invalid 'seed': expected a 64-bit integer, but got {request.seed} instead.",
            "integer_out_of_range",
        )


def _check_token_ids(value: Any, path: str) -> None:
    if not isinstance(value, list):
        raise wrong_type(path, "an array of token ids", _kind_of(value))
    for index, item in enumerate(value):
        if type(item) is not int:
            raise wrong_type(f"{path}[{index}]", "an integer", _kind_of(item))


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "bool", int: "int", float: "float", str: "str", list: "array", dict: "object"}
    return _KINDS[names[type(value)]]
