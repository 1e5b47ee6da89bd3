"""A worker's start and its end: signals, drains, what a user can mend, and who it waits for."""

import fcntl
import json
import shutil
import signal
import socket

import pytest

from anypool.engine import server
from anypool.engine.prefix import block_hashes
from anypool.paths import cache_dir
from tests.engine.test_server import CONTEXT, DRAINING, ENDLESS, FLAGS
from tests.engine.tiny_engine import write_model
from tests.engine.worker_process import WorkerProcess


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return write_model(directory, sliding_window=None, max_position_embeddings=CONTEXT)


def test_a_start_that_another_worker_holds_up(model):
    """Workers that start together share the compiling: this one waits for a shape that another has locked."""
    blocks = CONTEXT // 16
    folder = cache_dir() / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"1-0-{blocks}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with WorkerProcess(model, *FLAGS) as worker:
            worker.listening()
            while (event := worker.wait_for("progress"))["done"] != event["total"] - 1 or event["phase"] == "load":
                pass
            reply = worker.get("/health")
            assert (reply.status, reply.json()["status"]) == (503, "starting")
            assert reply.json()["warm_shapes"] == {"done": event["done"], "total": event["total"]}
            reply = worker.post({"prompt": [1]})
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert reply.json()["error"]["message"] == "the worker is starting"
            assert worker.get("/metrics").status == 200
            with worker.stream("/events") as events:
                assert events.json() == {"reset": True, "stored": [], "evicted": []}
                fcntl.flock(lock, fcntl.LOCK_UN)
                worker.wait_for("ready")
                assert worker.get("/health").status == 200
                done = worker.complete(prompt=list(range(20)), max_tokens=1)
                hashes = block_hashes([*range(20), *done["choices"][0]["token_ids"]], "")
                assert events.json()["stored"] == [one.hex() for one in hashes]
            # It has nothing to do, so draining ends it.
            assert worker.post(b"", "/drain").body == b"{}"
            assert worker.wait() == 0


def test_told_to_stop_while_it_compiles(model, tmp_path):
    """With nothing compiled yet, so that the signal finds it inside XLA."""
    (tmp_path / "kernels").symlink_to(cache_dir() / "kernels")
    with WorkerProcess(model, *FLAGS, cache=tmp_path) as worker:
        worker.listening()
        while worker.wait_for("progress")["done"] < 3:
            pass
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "ready" not in {event["event"] for event in worker.events}


def test_draining(model):
    """Nothing new is taken, what runs finishes, then the process ends."""
    with WorkerProcess(model, *FLAGS) as worker:
        worker.ready()
        with worker.stream(**ENDLESS | {"max_tokens": 1500}) as stream, worker.stream("/events") as events:
            events.json()
            tokens = stream.json()["choices"][0]["token_ids"]
            worker.signal(signal.SIGTERM)
            worker.wait_until(lambda health: health["status"] == "draining")
            assert worker.get("/health").status == 503
            reply = worker.post({"prompt": [1]})
            assert (reply.status, reply.headers["retry-after"], reply.json()) == (503, "1", DRAINING)
            *more, last, done = stream.rest()
            for event in (*more, last):
                tokens += json.loads(event)["choices"][0]["token_ids"]
            assert done == "[DONE]"
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
            assert len(tokens) == 1500
            events.rest()
        assert worker.wait() == 0


def test_a_second_signal_ends_it_at_once(model):
    """Drained by request and then by a signal, it goes on; the next signal cuts its stream off, and so moves it."""
    with WorkerProcess(model, *FLAGS) as worker:
        worker.ready()
        with worker.stream(**ENDLESS) as stream:
            stream.json()
            assert worker.post(b"", "/drain").status == 200
            worker.signal(signal.SIGTERM)
            assert worker.health()["status"] == "draining"
            for _ in range(50):
                assert stream.json()["choices"][0]["token_ids"]
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert "[DONE]" not in stream.until_cut_off()


def test_end_of_standard_input_ends_it_at_once(model):
    with WorkerProcess(model, *FLAGS) as worker:
        worker.ready()
        with worker.stream(**ENDLESS) as stream:
            stream.json()
            worker.hang_up()
            assert worker.wait() == 1


def test_what_a_user_can_mend_ends_with_code_2(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (WorkerProcess(tmp_path / "nowhere"), "nowhere", ["listening", "error"]),
            (
                WorkerProcess(model, "--port", port),
                f"cannot listen on 127.0.0.1:{port}: Address already in use",
                ["error"],
            ),
        ]
        for worker, wanted, told in cases:
            with worker:
                assert worker.wait() == 2
            assert [event["event"] for event in worker.events] == told
            error = worker.events[-1]
            assert error.keys() == {"event", "message"}
            assert wanted in error["message"]
            assert wanted in "".join(worker.errors), "the log does not say it"
            assert "Traceback" not in "".join(worker.errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 40000}, f"max_model_len is 40000: the model's context is {CONTEXT} tokens at most"),
        (
            {"kv_cache_gib": 0.001},
            "a cache of 1073741 bytes holds 2080 tokens, fewer than max_model_len 8192",
        ),
        ({"max_num_seqs": 64, "token_budget": 32}, "token_budget is 32: with max_num_seqs = 64 it must be at least 80"),
        ({"max_waiting": 0}, "max_waiting is 0: it must be at least 1"),
    ],
)
def test_limits_are_refused_before_anything_is_loaded(model, monkeypatch, options, message):
    monkeypatch.setattr("anypool.engine.runner.Checkpoint", None)
    worker = server.Worker(server.WorkerOptions(str(model), **options))
    with pytest.raises(ValueError, match=message):
        worker._make_engine()


def test_damaged_weights_are_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        server.Worker(server.WorkerOptions(str(weights.parent)))._make_engine()
