"""A pool that somebody else runs: watched over real sockets, told to misbehave by the test."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from anypool.pools import FleetError, PoolManager
from anypool.pools.fleet import parse_fleet

FLEET = """
[model]
id = "org/model"
[gateway]
heartbeat_limit_seconds = 0.5
[[pool]]
name = "there"
chip = "ascend-910c"
launcher = "external"
endpoint = "http://127.0.0.1:{port}/v1"
{more}
"""


class Upstream:
    """An OpenAI-compatible server as far as `/v1/models` goes. `mode` is how it answers next."""

    def __init__(self) -> None:
        self.models = ["org/model"]
        self.mode = "ok"
        self.keys: list[str | None] = []
        self.release = threading.Event()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                upstream.keys.append(self.headers.get("authorization"))
                if upstream.mode == "mute":
                    upstream.release.wait()
                status = {"ok": 200, "denied": 401, "broken": 500}.get(upstream.mode, 200)
                body = json.dumps({"data": [{"id": name} for name in upstream.models]}).encode()
                self.send_response(status if self.path == "/v1/models" else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def upstream():
    server = Upstream()
    yield server
    server.close()


def manager_of(upstream: Upstream, more: str = "") -> PoolManager:
    return PoolManager(parse_fleet(FLEET.format(port=upstream.port, more=more)))


async def until(manager: PoolManager, state: str) -> None:
    await manager.wait_until(lambda: manager.pools["there"].state == state)


async def test_it_is_ready_while_it_answers_and_serves_the_model(upstream):
    manager = manager_of(upstream)
    async with manager:
        await until(manager, "ready")
        there = manager.pools["there"]
        assert (there.url, there.pid, there.model) == (f"http://127.0.0.1:{upstream.port}", None, "org/model")
        upstream.mode = "broken"
        await until(manager, "down")
        assert there.last_error == "HTTP 500 from /v1/models"
        upstream.mode = "ok"
        await until(manager, "ready")
    assert there.state == "down"


async def test_silence_for_the_heartbeat_limit_is_down(upstream):
    manager = manager_of(upstream)
    async with manager:
        await until(manager, "ready")
        upstream.mode = "mute"
        await until(manager, "down")
        assert "no answer within" in manager.pools["there"].last_error


async def test_nobody_listening_is_down_and_joins_later(upstream):
    manager = manager_of(upstream)
    upstream.close()
    async with manager:
        await until(manager, "down")
        assert "cannot connect" in manager.pools["there"].last_error


async def test_one_model_under_another_name_is_taken_as_ours(upstream):
    upstream.models = ["/data/model"]
    manager = manager_of(upstream)
    async with manager:
        await until(manager, "ready")
        assert manager.pools["there"].model == "/data/model"


@pytest.mark.parametrize(("models", "more"), [(["x", "y"], ""), (["x"], 'model = "other"'), ([], "")])
async def test_a_server_without_the_model_fails_and_says_what_it_has(upstream, models, more):
    upstream.models = models
    manager = manager_of(upstream, more)
    async with manager:
        await until(manager, "failed")
        wanted = "other" if more else "org/model"
        expected = f"does not serve {wanted!r} but {models}: set the pool's model to one of them"
        assert manager.pools["there"].last_error == expected


async def test_the_key_is_sent_and_a_wrong_one_is_told(upstream, monkeypatch):
    monkeypatch.setenv("UPSTREAM_KEY", "sk-1")
    upstream.mode = "denied"
    manager = manager_of(upstream, 'api_key_env = "UPSTREAM_KEY"')
    async with manager:
        await until(manager, "failed")
        assert "check the key" in manager.pools["there"].last_error
        assert set(upstream.keys) == {"Bearer sk-1"}
        assert "sk-1" not in repr(manager.pools["there"])
        upstream.mode = "ok"
        await until(manager, "ready")


def test_a_missing_key_is_an_error_before_anything_starts(upstream, monkeypatch):
    monkeypatch.delenv("UPSTREAM_KEY", raising=False)
    with pytest.raises(FleetError, match="UPSTREAM_KEY, which is not set"):
        manager_of(upstream, 'api_key_env = "UPSTREAM_KEY"')


async def test_drain_stops_using_it(upstream):
    manager = manager_of(upstream)
    async with manager:
        await until(manager, "ready")
        await manager.drain("there")
        assert manager.pools["there"].state == "down"
