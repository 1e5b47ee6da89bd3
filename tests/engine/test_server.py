"""The worker as its launcher and the gateway see it: a real process, its standard output, its signals, its HTTP."""

import json
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from anypool.engine.prefix import block_hashes
from tests.engine.tiny_engine import VOCAB, dense_logits, load_runner, write_model
from tests.engine.worker_process import WorkerProcess

CONTEXT = 16368
"""So long that a stream may run for as long as a test takes; and no other worker locks a shape of this width."""
BLOCKS = 1047
FLAGS = (
    *("--name", "tiny", "--max-num-seqs", "2", "--token-budget", "130", "--max-waiting", "2"),
    *("--max-model-len", str(CONTEXT), "--kv-cache-gib", "0.008"),
)
ENDLESS = {"prompt": [5, 6, 7], "max_tokens": 16000, "ignore_eos": True, "temperature": 0}
DRAINING = {
    "error": {"message": "the worker is draining", "type": "overloaded_error", "param": None, "code": "unavailable"}
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return write_model(directory, sliding_window=None, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def running_worker(model):
    with WorkerProcess(model, *FLAGS) as started:
        yield started.ready()
        assert started.process.poll() is None, "a test ended the worker that all share"


@pytest.fixture
def worker(running_worker):
    """A worker that has nothing to do."""
    running_worker.idle()
    return running_worker


# ---- life --------------------------------------------------------------------------------------------------------


def test_what_the_launcher_is_told(running_worker, model):
    told = running_worker.events
    assert told[0] == {"event": "listening", "port": running_worker.port}
    assert told[-1] == {"event": "ready"}
    progress = told[1:-1]
    assert all(event.keys() == {"event", "phase", "done", "total", "detail"} for event in progress)
    assert {event["event"] for event in progress} == {"progress"}
    phases = [event["phase"] for event in progress]
    assert sorted(set(phases), key=phases.index) == ["load", "warmup"]
    for phase in ("load", "warmup"):
        done = [(event["done"], event["total"]) for event in progress if event["phase"] == phase]
        total = done[0][1]
        assert done == [(i, total) for i in range(1, total + 1)]


def test_health(worker, model):
    reply = worker.get("/health")
    health = reply.json()
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert health.pop("uptime_seconds") > 0
    assert health.pop("heartbeat_age_seconds") >= 0
    assert health.pop("kernels").keys() >= {"linear", "rms_norm", "silu_mul", "paged_attention"}
    warm = health.pop("warm_shapes")
    assert warm["done"] == warm["total"] > 0
    assert health == {
        "status": "ready",
        "pid": worker.process.pid,
        "name": "tiny",
        "model": str(model),
        "block_size": 16,
        "max_model_len": CONTEXT,
        "running": 0,
        "waiting": 0,
        "kv_blocks_total": BLOCKS,
        "kv_blocks_used": 0,
    }


# ---- completions -------------------------------------------------------------------------------------------------


def test_a_whole_completion(worker, model):
    before = int(time.time())
    answer = worker.complete(prompt=[9, 8, 7, 6], max_tokens=6, temperature=0, ignore_eos=True)
    assert answer.pop("id").startswith("cmpl-")
    assert before <= answer.pop("created") <= int(time.time())
    timing = answer.pop("anypool")["timing"]
    assert timing.keys() == {"queue_seconds", "prefill_seconds", "decode_seconds"}
    assert all(seconds >= 0 for seconds in timing.values())
    [choice] = answer.pop("choices")
    tokens = choice.pop("token_ids")
    assert choice == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert answer == {
        "object": "text_completion",
        "model": str(model),
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 6,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    scores = dense_logits(load_runner(model, faster=False), [9, 8, 7, 6, *tokens])
    assert tokens == scores[3:-1].argmax(-1).tolist(), "not what the model says"


def test_a_stream_in_its_exact_form(worker, model):
    body = {"prompt": [9, 8, 7, 6], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    tokens = worker.complete(**body)["choices"][0]["token_ids"]
    with worker.stream(**body, anypool={"request_id": "mine"}) as stream:
        assert stream.response.getheader("content-type") == "text/event-stream"
        assert stream.response.getheader("cache-control") == "no-cache"
        *events, done = stream.rest()
    assert done == "[DONE]"
    events = [json.loads(event) for event in events]
    created = events[0]["created"]
    timings = [event.pop("anypool", None) for event in events]
    assert timings[0]["timing"].keys() == {"queue_seconds", "prefill_seconds"}
    assert timings[1:-1] == [None, None]
    assert timings[-1]["timing"].keys() == {"queue_seconds", "prefill_seconds", "decode_seconds"}
    assert timings[-1]["timing"]["prefill_seconds"] == timings[0]["timing"]["prefill_seconds"]
    cached = {"cached_tokens": 0}
    usages = {  # what was cached is told at once, because the worker may not live to say it at the end
        0: {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5, "prompt_tokens_details": cached},
        3: {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8, "prompt_tokens_details": cached},
    }
    assert events == [
        {
            "id": "mine",
            "object": "text_completion",
            "created": created,
            "model": str(model),
            "choices": [
                {
                    "index": 0,
                    "text": "",
                    "token_ids": [token],
                    "logprobs": None,
                    "finish_reason": "length" if i == 3 else None,
                }
            ],
        }
        | ({"usage": usages[i]} if i in usages else {})
        for i, token in enumerate(tokens)
    ]


def test_the_models_list_by_which_a_gateway_joins_the_worker_as_external(worker, model):
    [one] = worker.get("/v1/models").json()["data"]
    assert one["id"] == str(model)
    assert one["max_model_len"] == worker.health()["max_model_len"]


def test_what_a_stream_of_one_token_carries(worker):
    """Its first event is its last: it has usage and the whole timing."""
    with worker.stream(prompt=[1], max_tokens=1) as stream:
        only, done = stream.rest()
    assert done == "[DONE]"
    only = json.loads(only)
    assert only["usage"]["completion_tokens"] == 1
    assert only["anypool"]["timing"].keys() == {"queue_seconds", "prefill_seconds", "decode_seconds"}


def test_a_model_ends_its_stream(worker):
    """The ending token is among the tokens; the model's own ends nothing under ignore_eos, a given one does."""
    body = {"prompt": [3], "max_tokens": 5, "temperature": 0}
    ended = worker.complete(**body, logit_bias={2: 100})["choices"][0]
    assert (ended["token_ids"], ended["finish_reason"]) == ([2], "stop")
    ignored = worker.complete(**body, logit_bias={2: 100}, ignore_eos=True)["choices"][0]
    assert (ignored["token_ids"], ignored["finish_reason"]) == ([2] * 5, "length")
    given = worker.complete(**body, logit_bias={2: 100}, ignore_eos=True, stop_token_ids=[2])["choices"][0]
    assert (given["token_ids"], given["finish_reason"]) == ([2], "stop")


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs(worker, count):
    body = {"prompt": [9, 8, 7], "max_tokens": 3, "temperature": 0.8, "seed": 5, "logprobs": count, "ignore_eos": True}
    logprobs = worker.complete(**body)["choices"][0]["logprobs"]
    assert logprobs.keys() == {"token_logprobs", "top_logprobs"}
    assert len(logprobs["token_logprobs"]) == 3
    assert all(one <= 0 for one in logprobs["token_logprobs"])
    for top in logprobs["top_logprobs"]:
        assert len(top) == count
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
        assert all(0 <= token < VOCAB for token, _ in top)
    with worker.stream(**body) as stream:
        choices = [json.loads(event)["choices"][0] for event in stream.rest()[:-1]]
    assert [one for choice in choices for one in choice["logprobs"]["token_logprobs"]] == logprobs["token_logprobs"]
    assert [one for choice in choices for one in choice["logprobs"]["top_logprobs"]] == logprobs["top_logprobs"]


def test_a_stream_moves_here(worker):
    """What a gateway sends after another worker died: the rest is the same, and usage counts the whole prompt."""
    body = {"temperature": 0.9, "seed": -3, "frequency_penalty": 1.0, "ignore_eos": True}
    whole = worker.complete(**body, prompt=[9, 8, 7], max_tokens=20)["choices"][0]["token_ids"]
    assert whole != worker.complete(**body | {"seed": 4}, prompt=[9, 8, 7], max_tokens=20)["choices"][0]["token_ids"]
    rest = worker.complete(**body, prompt=[9, 8, 7, *whole[:8]], max_tokens=12, anypool={"resumed": 8})
    assert rest["choices"][0]["token_ids"] == whole[8:]
    assert (rest["usage"]["prompt_tokens"], rest["usage"]["completion_tokens"]) == (11, 12)


def test_cached_tokens(worker):
    body = {"prompt": [i % VOCAB for i in range(40)], "max_tokens": 2, "cache_salt": "a conversation"}
    cached = [worker.complete(**body)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached == [0, 32]
    other = worker.complete(**body | {"cache_salt": "somebody else's"})
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# ---- bad input ---------------------------------------------------------------------------------------------------

BAD = [
    (b"", "body", "the body is not valid JSON: Input data was truncated"),
    (b"{", "body", "the body is not valid JSON: Input data was truncated"),
    (b"\xff", "body", "the body is not valid JSON: JSON is malformed: invalid character (byte 0)"),
    (b"[]", "body", "Expected `object`, got `array`"),
    (b"7", "body", "Expected `object`, got `int`"),
    (b"{}", "prompt", "Object missing required field `prompt`"),
    ({"prompt": [1], "promt": 2}, "promt", "Object contains unknown field `promt`"),
    ({"prompt": [1], "anypool": {"x": 2}}, "anypool", "Object contains unknown field `x` - at `$.anypool`"),
    ({"prompt": "text"}, "prompt", "Expected `array`, got `str` - at `$.prompt`"),
    ({"prompt": ["1"]}, "prompt", "Expected `int`, got `str` - at `$.prompt[0]`"),
    ({"prompt": [1, True]}, "prompt", "Expected `int`, got `bool` - at `$.prompt[1]`"),
    ({"prompt": [1], "max_tokens": "5"}, "max_tokens", "Expected `int`, got `str` - at `$.max_tokens`"),
    ({"prompt": [1], "max_tokens": None}, "max_tokens", "Expected `int`, got `null` - at `$.max_tokens`"),
    ({"prompt": [1], "stream": 1}, "stream", "Expected `bool`, got `int` - at `$.stream`"),
    ({"prompt": [1], "logit_bias": {"a": 1}}, "logit_bias", "Expected `int`, got `str` - at `key` in `$.logit_bias`"),
    ({"prompt": [1], "logit_bias": {"1": "a"}}, "logit_bias", "Expected `float`, got `str` - at `$.logit_bias[...]`"),
    (b'{"prompt": [1], "temperature": 1e999}', "temperature", "Number out of range - at `$.temperature`"),
    ({"prompt": []}, "prompt", "prompt is empty: give at least one token"),
    ({"prompt": [1, VOCAB]}, "prompt", f"prompt holds token {VOCAB}: the model's ids are 0 to {VOCAB - 1}"),
    ({"prompt": [-1]}, "prompt", f"prompt holds token -1: the model's ids are 0 to {VOCAB - 1}"),
    ({"prompt": [10**30]}, "prompt", f"prompt holds token {10**30}: the model's ids are 0 to {VOCAB - 1}"),
    ({"prompt": [1], "max_tokens": 0}, "max_tokens", "max_tokens is 0: it must be at least 1"),
    ({"prompt": [1], "max_tokens": -4}, "max_tokens", "max_tokens is -4: it must be at least 1"),
    (
        {"prompt": [1], "temperature": -1},
        "temperature",
        "temperature is -1.0: it must be 0 (greedy) or a positive finite number",
    ),
    ({"prompt": [1], "top_p": 0}, "top_p", "top_p is 0.0: it must be above 0 and at most 1"),
    ({"prompt": [1], "logprobs": 21}, "logprobs", "logprobs is 21: it must be null or between 0 and 20"),
    ({"prompt": [1], "seed": 2**64}, "seed", f"seed is {2**64}: it must be a 64-bit whole number"),
    (
        {"prompt": [1], "stop_token_ids": [VOCAB]},
        "stop_token_ids",
        f"stop_token_ids names token {VOCAB}: the model's ids are 0 to {VOCAB - 1}",
    ),
    (
        {"prompt": [1], "anypool": {"resumed": 1}},
        "resumed",
        "resumed is 1: for a prompt of 1 it must be 0 to 0",
    ),
    (
        {"prompt": [1] * (CONTEXT + 3)},
        "prompt",
        (
            f"the prompt has {CONTEXT + 3} tokens, the context is {CONTEXT} and must also hold the output: "
            "shorten the prompt"
        ),
    ),
    (
        {"prompt": [1] * 52, "max_tokens": CONTEXT - 50},
        "max_tokens",
        (
            f"52 prompt tokens and max_tokens = {CONTEXT - 50} make {CONTEXT + 2}, the context is {CONTEXT}: "
            f"lower max_tokens to {CONTEXT - 52} or shorten the prompt"
        ),
    ),
    (b" " * (16 * 2**20 + 1), "body", "the body is larger than 16777216 bytes"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=[f"{i}-{param}" for i, (_, param, _) in enumerate(BAD)])
def test_bad_input(worker, body, param, message):
    reply = worker.post(body)
    assert reply.json() == {
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    }
    assert reply.status == 400
    assert reply.headers["content-type"] == "application/json"


def test_routes_that_do_not_exist(worker):
    for method, path in (("GET", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/")):
        reply = worker.request(method, path)
        message = f"no route {method} {path}"
        assert reply.status == 404
        assert reply.json() == {
            "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        }


def test_numbers_beyond_what_the_device_holds_do_no_harm(worker):
    body = {"prompt": [1], "max_tokens": 2, "top_k": 10**30, "temperature": 1e300, "repetition_penalty": 1e-300}
    assert len(worker.complete(**body, ignore_eos=True)["choices"][0]["token_ids"]) == 2
    assert worker.health()["status"] == "ready"


def test_an_id_in_use(worker):
    body = ENDLESS | {"anypool": {"request_id": "twice"}}
    with worker.stream(**body) as stream:
        stream.json()
        reply = worker.post(body)
        message = "request_id 'twice' is in use by a request that has not finished"
        assert (reply.status, reply.json()["error"]["message"]) == (400, message)
        assert stream.json()["id"] == "twice", "the refusal must not touch the stream that runs"
    worker.idle()
    assert worker.complete(**body | {"max_tokens": 1})["id"] == "twice"


# ---- load --------------------------------------------------------------------------------------------------------


def test_queue_full(worker):
    """Two run, two wait and are kept alive by comments, the fifth is refused; those that leave make room."""
    with worker.stream(**ENDLESS) as first, worker.stream(**ENDLESS) as second:
        first.json(), second.json()
        with worker.stream(**ENDLESS) as third, worker.stream(**ENDLESS) as fourth:
            worker.wait_until(lambda health: health["waiting"] == 2)
            reply = worker.post({"prompt": [1]})
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert reply.json() == {
                "error": {
                    "message": "2 requests are waiting, the limit is 2",
                    "type": "overloaded_error",
                    "param": None,
                    "code": "unavailable",
                }
            }
            for waiting in (third, fourth):
                assert [waiting.block() for _ in range(3)] == [": alive"] * 3
            health = worker.health()
            assert (health["running"], health["waiting"]) == (2, 2)
            first.close()
            worker.wait_until(lambda health: health["waiting"] < 2)
            assert third.json()["choices"][0]["token_ids"]
    assert worker.idle()["status"] == "ready"


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_blocks(worker, streaming):
    connection = worker.connect()
    connection.request("POST", "/v1/completions", json.dumps(ENDLESS | {"stream": streaming}))
    worker.wait_until(lambda health: health["kv_blocks_used"] > 1)
    connection.close()
    worker.idle()


def test_a_client_that_leaves_the_queue(worker):
    with worker.stream(**ENDLESS), worker.stream(**ENDLESS):
        worker.wait_until(lambda health: health["running"] == 2)
        connection = worker.connect()
        connection.request("POST", "/v1/completions", json.dumps(ENDLESS))
        worker.wait_until(lambda health: health["waiting"] == 1)
        connection.close()
        worker.wait_until(lambda health: health["waiting"] == 0)
        assert worker.health()["running"] == 2


# ---- what others are told ----------------------------------------------------------------------------------------


def test_events(worker):
    """A snapshot, then what each step stored: the chain of hashes that the gateway computes from the same tokens."""
    prompt = [(7 * i) % VOCAB for i in range(70)]
    with worker.stream("/events") as events:
        first = events.json()
        assert first.keys() == {"reset", "stored", "evicted"}
        assert first["reset"] is True
        held = set(first["stored"])
        body = {"prompt": prompt, "max_tokens": 50, "cache_salt": "told", "ignore_eos": True}
        tokens = prompt + worker.complete(**body)["choices"][0]["token_ids"]
        # The last token is drawn and never computed.
        expected = [one.hex() for one in block_hashes(tokens[:-1], "told")]
        assert len(expected) == 7
        told: list[str] = []
        while len(told) < len(expected):
            event = events.json()
            assert event.keys() == {"stored", "evicted"}
            assert event["evicted"] == []
            told += event["stored"]
        assert told == expected
    with worker.stream("/events") as events:
        assert set(events.json()["stored"]) == held | set(expected)


def test_events_of_eviction(worker):
    """Two prompts that together are larger than the cache: the first goes as the second comes."""
    prompts = [[(i * k) % VOCAB for i in range(8600)] for k in (1, 5)]
    hashes = [{one.hex() for one in block_hashes(prompt, "large")} for prompt in prompts]
    with worker.stream("/events") as events:
        known = set(events.json()["stored"])
        evicted: set[str] = set()
        for prompt in prompts:
            worker.complete(prompt=prompt, max_tokens=1, cache_salt="large")
        while not hashes[1] <= known:
            event = events.json()
            assert not set(event["stored"]) & known
            assert set(event["evicted"]) <= known
            known = (known | set(event["stored"])) - set(event["evicted"])
            evicted |= set(event["evicted"])
    assert len(known) <= BLOCKS
    assert evicted & hashes[0]
    with worker.stream("/events") as events:
        assert set(events.json()["stored"]) == known


def test_metrics(worker, model):
    def scrape() -> dict[str, float]:
        reply = worker.get("/metrics")
        assert (reply.status, reply.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        samples = [
            sample for family in text_string_to_metric_families(reply.body.decode()) for sample in family.samples
        ]
        assert all(sample.labels["model_name"] == str(model) and sample.labels["pool"] == "tiny" for sample in samples)
        names = [one.name + one.labels.get("le", "") + one.labels.get("finished_reason", "") for one in samples]
        assert all(name.startswith("anypool:") for name in names)
        return dict(zip(names, (sample.value for sample in samples), strict=True))

    before = scrape()
    body = {"prompt": [i % VOCAB for i in range(40)], "temperature": 0, "cache_salt": "metrics"}
    for _ in range(2):
        worker.complete(**body, max_tokens=5, ignore_eos=True)
    worker.complete(**body, max_tokens=5, logit_bias={2: 100})
    after = scrape()

    def rise(name: str) -> float:
        risen: float = after[f"anypool:{name}"] - before.get(f"anypool:{name}", 0)
        return risen

    assert rise("prompt_tokens_total") == 120
    assert rise("generation_tokens_total") == 11
    assert rise("request_success_totallength") == 2
    assert rise("request_success_totalstop") == 1
    assert rise("prefix_cache_queries_total") == 120
    assert rise("prefix_cache_hits_total") == 64
    assert rise("num_preemptions_total") == 0
    assert rise("engine_steps_total") == 11
    assert rise("engine_step_seconds_total") > 0
    assert rise("inter_token_latency_seconds_count") == 8
    for name in (
        "time_to_first_token_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "e2e_request_latency_seconds",
    ):
        assert rise(f"{name}_count") == 3
        assert rise(f"{name}_bucket+Inf") == 3
        assert rise(f"{name}_sum") > 0
    assert after["anypool:num_requests_running"] == after["anypool:num_requests_waiting"] == 0
    assert after["anypool:kv_cache_usage_perc"] == 0
    with worker.stream(**ENDLESS) as stream:
        stream.json()
        busy = scrape()
        assert busy["anypool:num_requests_running"] == 1
        assert 0 < busy["anypool:kv_cache_usage_perc"] < 1
