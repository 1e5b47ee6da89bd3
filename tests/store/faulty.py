"""A connection to the S3 server that can be told to fail: it stands between obstore and moto on loopback."""

from __future__ import annotations

import http.client
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.store.conftest import BUCKET


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose path has `part` in it.

    status: answered with this instead of being passed on; None: passed on, and the connection cut before the answer.
    """

    method: str
    part: str
    times: int = 1
    status: int | None = None


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may hang up: that is what is tested."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class FaultyServer:
    """Passes requests on to moto, but for `faults`. `seen` holds "METHOD path" of every request."""

    def __init__(self, host: str, port: int) -> None:
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                fault = server._next_fault(self.command, self.path)
                if fault is not None and fault.status is not None:
                    self._answer(fault.status, {}, b"")
                    return
                connection = http.client.HTTPConnection(host, port)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                if fault is not None:
                    self.close_connection = True
                    return
                self._answer(answer.status, dict(answer.headers), data)

            def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                self.send_response_only(status)
                length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
                dropped = ("content-length", "connection", "transfer-encoding")
                for name, value in headers.items():
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def _next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.seen.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
            return None

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def faulty_server(host: str, port: int) -> Iterator[FaultyServer]:
    server = FaultyServer(host, port)
    try:
        yield server
    finally:
        server.close()


def unfinished_uploads(host: str, port: int) -> int:
    """How many multipart uploads the bucket holds that were neither completed nor aborted."""
    connection = http.client.HTTPConnection(host, port)
    connection.request("GET", f"/{BUCKET}?uploads")
    text = connection.getresponse().read().decode()
    assert "ListMultipartUploadsResult" in text
    return text.count("<Upload>")
