"""Every malformed request gets its exact status and error; every harmless field is accepted."""

import asyncio
import json
from typing import Any

import pytest

from anypool.gateway import Settings
from anypool.gateway.errors import ApiError
from anypool.gateway.openai_api import read_chat_request, read_completion_request
from tests.gateway.fake_worker import FakeWorker
from tests.gateway.serving import MODEL, FakeManager, gateway, tokens_of

MESSAGES = [{"role": "user", "content": "hi"}]
JSON_HINT = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The API expects a JSON payload, but what was sent was not valid JSON.)"
)


def read(endpoint: str, body: bytes) -> Any:
    return (read_chat_request if endpoint == "chat" else read_completion_request)(body)


def request(endpoint: str, fields: dict[str, Any]) -> bytes:
    """A good request with some fields changed; a field set to `...` is left out."""
    base = {"messages": MESSAGES} if endpoint == "chat" else {"prompt": "hi"}
    return json.dumps({k: v for k, v in ({"model": MODEL} | base | fields).items() if v is not ...}).encode()


BOTH = ("chat", "completion")

# (endpoints, fields, param, code, message)
REFUSED: list[tuple[tuple[str, ...], dict[str, Any], str | None, str | None, str]] = [
    (BOTH, {"foo": 1}, None, None, "Unrecognized request argument supplied: foo"),
    (BOTH, {"foo": None}, None, None, "Unrecognized request argument supplied: foo"),
    (BOTH, {"foo": 1, "bar": 2}, None, None, "Unrecognized request arguments supplied: foo, bar"),
    (BOTH, {"model": ...}, "model", "missing_required_parameter", "Missing required parameter: 'model'."),
    (("chat",), {"messages": ...}, "messages", "missing_required_parameter", "Missing required parameter: 'messages'."),
    (("completion",), {"prompt": ...}, "prompt", "missing_required_parameter", "Missing required parameter: 'prompt'."),
    (BOTH, {"model": 3}, "model", "invalid_type",
     "Invalid type for 'model': expected a string, but got an integer instead."),
    (BOTH, {"max_tokens": "10"}, "max_tokens", "invalid_type",
     "Invalid type for 'max_tokens': expected an integer, but got a string instead."),
    (BOTH, {"max_tokens": 1.5}, "max_tokens", "invalid_type",
     "Invalid type for 'max_tokens': expected an integer, but got a number instead."),
    (BOTH, {"max_tokens": True}, "max_tokens", "invalid_type",
     "Invalid type for 'max_tokens': expected an integer, but got a boolean instead."),
    (BOTH, {"max_tokens": 0}, "max_tokens", "integer_below_min_value",
     "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead."),
    (BOTH, {"max_tokens": -5}, "max_tokens", "integer_below_min_value",
     "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got -5 instead."),
    (("chat",), {"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value",
     "Invalid 'max_completion_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead."),
    (("completion",), {"max_completion_tokens": 5}, None, None,
     "Unrecognized request argument supplied: max_completion_tokens"),
    (("chat",), {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_parameter_combination",
     "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."),
    (BOTH, {"temperature": 2.5}, "temperature", "decimal_above_max_value",
     "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead."),
    (BOTH, {"temperature": -1}, "temperature", "decimal_below_min_value",
     "Invalid 'temperature': decimal below minimum value. Expected a value >= 0, but got -1 instead."),
    (BOTH, {"temperature": "hot"}, "temperature", "invalid_type",
     "Invalid type for 'temperature': expected a number, but got a string instead."),
    (BOTH, {"top_p": 1.01}, "top_p", "decimal_above_max_value",
     "Invalid 'top_p': decimal above maximum value. Expected a value <= 1, but got 1.01 instead."),
    (BOTH, {"presence_penalty": -3}, "presence_penalty", "decimal_below_min_value",
     "Invalid 'presence_penalty': decimal below minimum value. Expected a value >= -2, but got -3 instead."),
    (BOTH, {"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value",
     "Invalid 'repetition_penalty': decimal below minimum value. Expected a value > 0, but got 0 instead."),
    (BOTH, {"n": 0}, "n", "integer_below_min_value",
     "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead."),
    (BOTH, {"n": 129}, "n", "integer_above_max_value",
     "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead."),
    (BOTH, {"seed": 2**63}, "seed", "integer_out_of_range",
     "Invalid 'seed': expected a 64-bit integer, but got 9223372036854775808 instead."),
    (BOTH, {"logit_bias": {"5": 101}}, "logit_bias[...]", "decimal_above_max_value",
     "Invalid 'logit_bias[...]': decimal above maximum value. Expected a value <= 100."),
    (BOTH, {"logit_bias": [1]}, "logit_bias", "invalid_type",
     "Invalid type for 'logit_bias': expected an object, but got an array instead."),
    (BOTH, {"stop": ["a"] * 5}, "stop", "array_above_max_length",
     ("Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with length 5 "
      "instead.")),
    (BOTH, {"stop": ""}, "stop", "empty_string", "Invalid 'stop': a stop string must not be empty."),
    (BOTH, {"stop": [1]}, "stop[0]", "invalid_type",
     "Invalid type for 'stop[0]': expected a string, but got an integer instead."),
    (BOTH, {"stop": 1}, "stop", "invalid_type",
     "Invalid type for 'stop': expected a string or an array, but got an integer instead."),
    (BOTH, {"stream": "yes"}, "stream", "invalid_type",
     "Invalid type for 'stream': expected a boolean, but got a string instead."),
    (BOTH, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_parameter_combination",
     "The 'stream_options' parameter is only allowed when 'stream' is enabled."),
    (BOTH, {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter",
     "Unknown parameter: 'stream_options.usage'."),
    (BOTH, {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation",
     "unsupported_value",
     "Unsupported value: 'stream_options.include_obfuscation' does not support true on this server. Use false."),
    (("chat",), {"logprobs": 3}, "logprobs", "invalid_type",
     "Invalid type for 'logprobs': expected a boolean, but got an integer instead."),
    (("chat",), {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value",
     "Invalid 'top_logprobs': integer above maximum value. Expected a value <= 20, but got 21 instead."),
    (("chat",), {"top_logprobs": 2}, "top_logprobs", "invalid_parameter_combination",
     "'top_logprobs' is only allowed when 'logprobs' is true."),
    (("completion",), {"logprobs": 6}, "logprobs", "integer_above_max_value",
     "Invalid 'logprobs': integer above maximum value. Expected a value <= 5, but got 6 instead."),
    (("completion",), {"logprobs": True}, "logprobs", "invalid_type",
     "Invalid type for 'logprobs': expected an integer, but got a boolean instead."),
    (("chat",), {"tools": [{"type": "function"}]}, "tools", "unsupported_parameter",
     "Unsupported parameter: 'tools' is not supported by this server yet. Leave it out."),
    (("chat",), {"tool_choice": "auto"}, "tool_choice", "unsupported_value",
     "Unsupported value: 'tool_choice' does not support \"auto\" on this server. Use \"none\"."),
    (("chat",), {"response_format": {"type": "json_schema"}}, "response_format", "unsupported_value",
     ("Unsupported value: 'response_format' does not support {\"type\":\"json_schema\"} on this server. Use "
      "{\"type\":\"text\"}.")),
    (("chat",), {"modalities": ["text", "audio"]}, "modalities", "unsupported_value",
     "Unsupported value: 'modalities' does not support [\"text\",\"audio\"] on this server. Use [\"text\"]."),
    *[(("chat",), {name: {}}, name, "unsupported_parameter",
       f"Unsupported parameter: '{name}' is not supported by this server yet. Leave it out.")
      for name in ("audio", "prediction", "web_search_options", "reasoning_effort", "verbosity", "moderation")],
    (BOTH, {"store": True}, "store", "unsupported_value",
     "Unsupported value: 'store' does not support true on this server. Use false."),
    (BOTH, {"store": 0}, "store", "unsupported_value",
     "Unsupported value: 'store' does not support 0 on this server. Use false."),
    (BOTH, {"service_tier": "flex"}, "service_tier", "unsupported_value",
     "Unsupported value: 'service_tier' does not support \"flex\" on this server. Use \"auto\" or \"default\"."),
    (("completion",), {"echo": True}, "echo", "unsupported_value",
     "Unsupported value: 'echo' does not support true on this server. Use false."),
    (("completion",), {"suffix": "x"}, "suffix", "unsupported_value",
     "Unsupported value: 'suffix' does not support \"x\" on this server. Use \"\"."),
    (("completion",), {"best_of": 3, "n": 2}, "best_of", "unsupported_value",
     "Unsupported value: 'best_of' does not support 3 on this server. Use 1."),
    (("chat",), {"anypool": {"tracing": True}}, "anypool.tracing", "unknown_parameter",
     "Unknown parameter: 'anypool.tracing'."),
    (("chat",), {"messages": []}, "messages", "empty_array",
     "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."),
    (("chat",), {"messages": "hi"}, "messages", "invalid_type",
     "Invalid type for 'messages': expected an array, but got a string instead."),
    (("chat",), {"messages": ["hi"]}, "messages[0]", "invalid_type",
     "Invalid type for 'messages[0]': expected an object, but got a string instead."),
    (("chat",), {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter",
     "Missing required parameter: 'messages[0].content'."),
    (("chat",), {"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter",
     "Missing required parameter: 'messages[0].role'."),
    (("chat",), {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value",
     "Invalid value: 'tool'. Supported values are: 'system', 'developer', 'user', 'assistant'."),
    (("chat",), {"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "unknown_parameter",
     "Unknown parameter: 'messages[0].mood'."),
    (("chat",), {"messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
     "messages[1].tool_calls", "unsupported_parameter",
     "Unsupported parameter: 'messages[1].tool_calls' is not supported by this server yet. Leave it out."),
    (("chat",), {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value", "Invalid value: 'image_url'. Supported values are: 'text'."),
    (("chat",), {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
     "messages[0].content[0].text", "invalid_type",
     "Invalid type for 'messages[0].content[0].text': expected a string, but got an integer instead."),
    (("completion",), {"prompt": 5}, "prompt", "invalid_type",
     "Invalid type for 'prompt': expected a string or an array, but got an integer instead."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "code", "message"),
    [(endpoint, *rest) for endpoints, *rest in REFUSED for endpoint in endpoints],
)
def test_malformed_requests_get_their_exact_error(endpoint, fields, param, code, message):
    with pytest.raises(ApiError) as caught:
        read(endpoint, request(endpoint, fields))
    body = caught.value.body
    assert (caught.value.status, body.type) == (400, "invalid_request_error")
    assert (body.param, body.code, body.message) == (param, code, message)


@pytest.mark.parametrize("endpoint", BOTH)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{'a': 1}", b'{"model": NaN}', b"\xff\xfe", b'{"a":"\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000],
)
def test_what_is_no_json_is_refused(endpoint, body):
    with pytest.raises(ApiError) as caught:
        read(endpoint, body)
    assert (caught.value.status, caught.value.body.message) == (400, JSON_HINT)


@pytest.mark.parametrize(
    ("body", "kind"), [(b"[]", "an array"), (b'"x"', "a string"), (b"null", "null"), (b"1", "an integer")]
)
def test_json_that_is_no_object_is_refused(body, kind):
    with pytest.raises(ApiError) as caught:
        read("chat", body)
    assert caught.value.body.message == f"Invalid body: expected a JSON object, but got {kind} instead."


HARMLESS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (BOTH, {name: None}) for name in ("temperature", "max_tokens", "stop", "n", "seed", "stream", "user", "logit_bias")
] + [
    (BOTH, {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}),
    (BOTH, {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}),
    (BOTH, {"stream": False, "stream_options": None}),
    (BOTH, {"temperature": 1, "top_p": 0, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}),
    (
        BOTH,
        {
            "stop_token_ids": [1],
            "return_token_ids": True,
            "priority": -1,
            "cache_salt": "s",
            "anypool": {"trace": True},
        },
    ),
    (BOTH, {"seed": -(2**63), "n": 128, "stop": ["a", "b", "c", "d"]}),
    (("chat",), {"parallel_tool_calls": True, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
    (("chat",), {"modalities": ["text"], "prompt_cache_key": "k", "logprobs": False}),
    (("chat",), {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]}),
    (
        ("chat",),
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}]},
    ),
    (("completion",), {"best_of": 2, "n": 2, "echo": False, "suffix": None}),
]


@pytest.mark.parametrize(
    ("endpoint", "fields"), [(endpoint, fields) for endpoints, fields in HARMLESS for endpoint in endpoints]
)
def test_harmless_fields_are_accepted(endpoint, fields):
    assert read(endpoint, request(endpoint, fields)).model == MODEL


# ---- what needs the model or the pools

CONTEXT = 64


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("chat/completions", {"model": "gpt-9", "messages": MESSAGES}, 404,
         {"message": "The model `gpt-9` does not exist here. This server serves `tiny`.", "param": "model",
          "code": "model_not_found"}),
        ("completions", {"prompt": list(range(CONTEXT))}, 400,
         {"message": "This model's maximum context length is 64 tokens. However, your prompt resulted in 64 tokens and "
          "at least 1 must be left for the answer. Please reduce the length of the prompt.", "param": "prompt",
          "code": "context_length_exceeded"}),
        ("completions", {"prompt": list(range(60)), "max_tokens": 5}, 400,
         {"message": "This model's maximum context length is 64 tokens. However, you requested 65 tokens (60 in the "
          "prompt, 5 in the completion). Please reduce the length of the prompt or completion.", "param": "prompt",
          "code": "context_length_exceeded"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 100}]}, 400,
         {"message": "This model's maximum context length is 64 tokens. However, your messages resulted in 119 tokens "
          "and at least 1 must be left for the answer. Please reduce the length of the messages.", "param": "messages",
          "code": "context_length_exceeded"}),
        ("chat/completions", {"messages": [*MESSAGES, {"role": "system", "content": ""}]}, 400,
         {"message": "Invalid 'messages': the model's chat template rejects the messages: system must come first",
          "param": "messages", "code": "invalid_value"}),
        ("completions", {"prompt": [5, 9999]}, 400,
         {"message": "Invalid 'prompt': token id 9999 is not one of the model's, 0 to 267.", "param": "prompt",
          "code": "invalid_value"}),
        ("completions", {"prompt": [[5], [-1]]}, 400,
         {"message": "Invalid 'prompt[1]': token id -1 is not one of the model's, 0 to 267.", "param": "prompt[1]",
          "code": "invalid_value"}),
        ("completions", {"prompt": [5, "x"]}, 400,
         {"message": "Invalid type for 'prompt[1]': expected an integer, but got a string instead.",
          "param": "prompt[1]", "code": "invalid_type"}),
        ("completions", {"prompt": []}, 400,
         {"message": "Invalid 'prompt': empty array. Expected an array with minimum length 1, but got an empty array "
          "instead.", "param": "prompt", "code": "empty_array"}),
        ("completions", {"prompt": ["a", "b"], "n": 65}, 400,
         {"message": "Invalid 'n': 2 prompts x 65 choices are more than 128.", "param": "n", "code": "invalid_value"}),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400,
         {"message": "Invalid key in 'logit_bias': x. Keys are token ids from 0 to 267.", "param": "logit_bias",
          "code": "invalid_value"}),
        ("completions", {"prompt": "a", "stop_token_ids": [268]}, 400,
         {"message": "Invalid 'stop_token_ids': token id 268 is not one of the model's, 0 to 267.",
          "param": "stop_token_ids", "code": "invalid_value"}),
        ("completions", b"{", 400, {"message": JSON_HINT, "param": None, "code": None}),
        ("completions", b" " * 5000, 413,
         {"message": "The request body is larger than this server accepts: the limit is 4096 bytes.", "param": None,
          "code": "request_too_large"}),
        ("embeddings", {}, 404,
         {"message": "Invalid URL (POST /v1/embeddings)", "param": None, "code": "unknown_url"}),
        ("models", {}, 405, {"message": "Not allowed: POST /v1/models.", "param": None, "code": "method_not_allowed"}),
    ],
)  # fmt: skip
async def test_the_server_answers_mistakes_and_goes_on(path, body, status, error):
    settings = Settings(max_body_bytes=4096)
    async with FakeWorker(tokens_of(), max_model_len=CONTEXT) as worker, gateway([worker], settings=settings) as client:
        if isinstance(body, dict):
            body = {"model": MODEL, **body}
        got = await client.post(f"/v1/{path}", body)
        assert got == (status, {"error": {"type": "invalid_request_error", **error}})
        assert client.headers["x-request-id"].startswith("req_")
        assert worker.requests == []
        assert (await client.post("/v1/completions", {"model": MODEL, "prompt": "a"}))[0] == 200


async def test_a_body_without_a_length_is_limited_too():
    async def endless():
        for _ in range(100):
            yield b" " * 100

    async with (
        FakeWorker(tokens_of()) as worker,
        gateway([worker], settings=Settings(max_body_bytes=4096)) as client,
        client.session.post(client.base + "/v1/completions", data=endless()) as response,
    ):
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"


async def test_without_a_pool_requests_are_refused_until_one_is_back():
    async with FakeWorker(tokens_of()) as worker:
        manager = FakeManager()
        pool = manager.add("a", None)
        async with gateway([], manager=manager, settings=Settings(retry_after_seconds=3)) as client:
            status, body = await client.post("/v1/completions", {"model": MODEL, "prompt": "a"})
            assert (status, body["error"]["code"], client.headers["retry-after"]) == (503, "no_pool", "3")
            assert (await client.get("/health"))[0] == 503
            pool.update(state="ready", url=worker.url)
            await client.usable(1)
            assert (await client.post("/v1/completions", {"model": MODEL, "prompt": "a"}))[0] == 200
            assert (await client.get("/health"))[0] == 200


async def test_the_smallest_pool_gives_the_context_and_chats_go_to_its_end():
    async with (
        FakeWorker(tokens_of(), max_model_len=80) as a,
        FakeWorker(tokens_of(), max_model_len=64) as b,
        gateway([a, b]) as client,
    ):
        assert (await client.get("/v1/models"))[1]["data"][0]["max_model_len"] == 64
        status, body = await client.post("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES})
        assert status == 200
        assert body["usage"]["total_tokens"] == 64
        assert body["choices"][0]["finish_reason"] == "length"


async def test_models_health_docs_and_metrics():
    async with FakeWorker(tokens_of()) as worker, gateway([worker]) as client:
        assert (await client.get(f"/v1/models/{MODEL}"))[1]["id"] == MODEL
        assert (await client.get("/v1/models/other"))[0] == 404
        health = (await client.get("/health"))[1]
        assert health["status"] == "ready"
        assert health["pools"][0] | {"pid": 0} == {
            "name": "a", "state": "ready", "usable": True, "pid": 0, "url": worker.url, "in_flight": 0, "restarts": 0,
            "cached_blocks": 0,
        }  # fmt: skip
        assert (await client.get("/docs"))[0] == 200
        document = (await client.get("/openapi.json"))[1]
        chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert chat == {"$ref": "#/components/schemas/ChatRequest"}
        assert "messages" in document["components"]["schemas"]["ChatRequest"]["properties"]
        await client.post("/v1/completions", {"model": MODEL, "prompt": "abc", "max_tokens": 5})
        metrics = (await client.get("/metrics"))[1]
        for line in (
            'anypool:prompt_tokens_total{model_name="tiny"} 4.0',
            'anypool:generation_tokens_total{model_name="tiny"} 5.0',
            'anypool:time_to_first_token_seconds_count{model_name="tiny"} 1.0',
            'anypool:request_success_total{finished_reason="length",model_name="tiny"} 1.0',
            'anypool:num_requests_running{model_name="tiny",pool="a"} 0.0',
            'anypool:http_requests_total{model_name="tiny",route="/v1/completions",status="200"} 1.0',
        ):
            assert line in metrics.splitlines()


async def test_an_unexpected_failure_is_an_error_in_openais_shape():
    async with FakeWorker(tokens_of()) as worker, gateway([worker]) as client:

        def broken():
            raise RuntimeError("a bug")

        client.app.router.routes.clear()
        client.app.add_api_route("/v1/completions", broken, methods=["POST"])
        status, body = await client.post("/v1/completions", {})
        assert (status, body["error"]["type"], body["error"]["code"]) == (500, "server_error", "internal_error")
        assert "a bug" not in json.dumps(body)


async def test_requests_are_not_held_up_by_a_long_text():
    """A prompt that takes another thread to encode gives the same answer."""
    async with FakeWorker(tokens_of(), max_model_len=40_000) as worker, gateway([worker]) as client:
        long, short = await asyncio.gather(
            client.post("/v1/completions", {"model": MODEL, "prompt": "a" * 25_000, "max_tokens": 1}),
            client.post("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 1}),
        )
        assert (long[1]["usage"]["prompt_tokens"], short[1]["usage"]["prompt_tokens"]) == (25_001, 2)
