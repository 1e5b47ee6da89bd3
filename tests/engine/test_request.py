"""What a request may ask for, and the message when it may not."""

import math
from typing import Any

import msgspec
import pytest

from anypool.engine.request import Request, RequestError, SamplingParams

NAN = math.nan

GOOD: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e9, "top_p": 1.0, "min_p": 0.0, "top_k": 0},
    {"top_p": 1e-9, "min_p": 1.0, "top_k": 10**9},
    {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"seed": 2**64 - 1},
    {"seed": -(2**63)},
    {"logprobs": 0},
    {"logprobs": 20},
    {"logit_bias": {0: -100.0, 99: 100.0}, "stop_token_ids": (0, 99)},
]

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0: it must be at least 1"),
    ({"max_tokens": -5}, "max_tokens", "max_tokens is -5: it must be at least 1"),
    ({"temperature": -0.1}, "temperature", "temperature is -0.1: it must be 0 (greedy) or a positive"),
    ({"temperature": math.inf}, "temperature", "temperature is inf"),
    ({"temperature": NAN}, "temperature", "temperature is nan"),
    ({"top_k": -1}, "top_k", "top_k is -1: it must be 0 (off) or a positive whole number"),
    ({"top_p": 0.0}, "top_p", "top_p is 0.0: it must be above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p", "top_p is 1.01"),
    ({"top_p": NAN}, "top_p", "top_p is nan"),
    ({"min_p": -0.01}, "min_p", "min_p is -0.01: it must be between 0 and 1"),
    ({"min_p": 1.5}, "min_p", "min_p is 1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "repetition_penalty is 0.0: it must be a positive"),
    ({"repetition_penalty": math.inf}, "repetition_penalty", "repetition_penalty is inf"),
    ({"presence_penalty": 2.1}, "presence_penalty", "presence_penalty is 2.1: it must be between -2 and 2"),
    (
        {"frequency_penalty": -3.0},
        "frequency_penalty",
        "frequency_penalty is -3.0: it must be between -2 and 2",
    ),
    ({"frequency_penalty": NAN}, "frequency_penalty", "frequency_penalty is nan"),
    ({"seed": 2**64}, "seed", "it must be a 64-bit whole number"),
    ({"seed": -(2**63) - 1}, "seed", "it must be a 64-bit whole number"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21: it must be null or between 0 and 20"),
    ({"logprobs": -1}, "logprobs", "logprobs is -1"),
    ({"logit_bias": {7: 101.0}}, "logit_bias", "logit_bias[7] is 101.0: it must be between -100 and 100"),
    ({"logit_bias": {7: NAN}}, "logit_bias", "logit_bias[7] is nan"),
]


@pytest.mark.parametrize("fields", GOOD)
def test_good_params(fields: dict[str, Any]) -> None:
    params = SamplingParams(**({"max_tokens": 1} | fields))
    params.check_vocabulary(100)
    for name, value in fields.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize(("fields", "param", "message"), BAD)
def test_bad_params(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**({"max_tokens": 1} | fields))
    assert caught.value.param == param
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {100: 1.0}}, "logit_bias names token 100: the model's ids are 0 to 99"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias names token -1: the model's ids are 0 to 99"),
        ({"stop_token_ids": (5, 400)}, "stop_token_ids names token 400: the model's ids are 0 to 99"),
    ],
)
def test_ids_outside_the_vocabulary(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=1, **fields).check_vocabulary(100)
    assert str(caught.value) == message


def test_params_from_json() -> None:
    body = b'{"max_tokens": 5, "logit_bias": {"17": -3}, "seed": 18446744073709551615, "stop_token_ids": [2]}'
    params = msgspec.json.decode(body, type=SamplingParams)
    expected = SamplingParams(max_tokens=5, logit_bias={17: -3.0}, seed=2**64 - 1, stop_token_ids=(2,))
    assert params == expected


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"max_tokens": "5"}',
        b'{"max_tokens": true}',
        b'{"max_tokens": 5, "topp": 1}',
        b'{"max_tokens": 0}',
    ],
)
def test_bad_params_from_json(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=SamplingParams)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "prompt is empty: give at least one token"),
        ({"resumed": 3}, "resumed", "resumed is 3: for a prompt of 3 it must be 0 to 2"),
        ({"resumed": -1}, "resumed", "resumed is -1: for a prompt of 3 it must be 0 to 2"),
    ],
)
def test_bad_requests(fields: dict[str, Any], param: str, message: str) -> None:
    given: dict[str, Any] = {"id": "a", "prompt": [1, 2, 3], "params": SamplingParams(max_tokens=1)}
    with pytest.raises(RequestError) as caught:
        Request(**(given | fields))
    assert (caught.value.param, str(caught.value)) == (param, message)


def test_counts() -> None:
    request = Request("a", [1, 2, 3, 4], SamplingParams(max_tokens=5), resumed=1)
    request.token_ids += [5, 6]
    assert (request.num_tokens, request.num_prompt, request.num_output) == (6, 4, 2)
    assert request.output_token_ids == [5, 6]
    assert request.token_ids[request.output_start :] == [4, 5, 6]
