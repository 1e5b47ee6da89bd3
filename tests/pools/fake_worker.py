"""A worker without a model: the launcher's protocol and the health page, and faults on demand.

Faults come over HTTP, so that a test decides when: POST /stuck (the engine stops), /mute (health hangs),
/silence (closes standard output but lives on), /finish (the last stream ends), /print.
"""

import argparse
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from anypool.pools import guard

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
parser.add_argument("--busy", action="store_true", help="has a stream that /finish ends")
arguments, _ = parser.parse_known_args()

finished = threading.Event()
never = threading.Event()
state: dict[str, Any] = {"status": "starting", "age": 0.0, "mute": False, "terms": 0}
lock = threading.Lock()


def say(event: str, **fields: object) -> None:
    with lock:
        print(json.dumps({"event": event, **fields}), flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if state["mute"]:
            never.wait()
        status = 200 if state["status"] == "ready" else 503
        body = json.dumps({"status": state["status"], "heartbeat_age_seconds": state["age"]}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        match self.path:
            case "/stuck":
                state["age"] = 1e6
            case "/mute":
                state["mute"] = True
            case "/silence":
                os.close(1)
            case "/print":
                print("hello from a library", flush=True)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
        if self.path == "/finish":
            finished.set()

    def log_message(self, *_: object) -> None:
        pass


def on_term() -> None:
    state["terms"] += 1
    print(f"sigterm {state['terms']}", file=sys.stderr, flush=True)
    if arguments.fault == "ignores-term":
        return
    if not arguments.busy or state["terms"] > 1:
        os._exit(0)
    state["status"] = "draining"
    threading.Thread(target=lambda: (finished.wait(), os._exit(0))).start()


# Waited for, not handled: a handler set just before the main thread sleeps would run only when it wakes up.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
guard.die_with_parent()
if arguments.fault == "user-error":
    say("error", message="model 'nope' is not known; did you mean 'smollm2-135m-instruct'?")
    sys.exit(2)
if arguments.fault == "crash":
    print("RuntimeError: out of everything", file=sys.stderr, flush=True)
    sys.exit(1)

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
say("listening", port=server.server_address[1])
say("progress", phase="load", done=1, total=2, detail="layer 1")
if arguments.fault == "never-ready":
    print("still compiling", file=sys.stderr, flush=True)
else:
    state["status"] = "ready"
    say("ready")
while True:
    signal.sigwait({signal.SIGTERM})
    on_term()
