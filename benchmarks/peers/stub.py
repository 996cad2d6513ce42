"""A collector on this machine for peers that report to a service of their own: takes everything at once, and keeps no record but a count.

It runs beside the process that is measured, never inside it.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Self

_BATCHES = {
    "use_multipart_endpoint": True,
    "size_limit": 100,
    "size_limit_bytes": 20_971_520,
    "scale_up_qsize_trigger": 200,
    "scale_up_nthreads_limit": 16,
    "scale_down_nempty_trigger": 4,
}
_INFO = json.dumps({"version": "0", "batch_ingest_config": _BATCHES, "instance_flags": {"zstd_compression_enabled": True}}).encode()
"""What LangSmith's client asks a service for before it sends. It takes batches, of the sizes that the client itself falls back to, and
knows compression: what the client expects of an up-to-date service."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer(200, _INFO)

    def do_POST(self) -> None:
        size = self._skip_body()
        self.server.note(size)
        # An empty message is what OpenTelemetry's protocol calls success; LangSmith's service says 202.
        self._answer(200 if "otel" in self.path else 202, b"")

    def _skip_body(self) -> int:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return len(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        size = 0
        while chunk := int(self.rfile.readline().split(b";")[0], 16):
            size += len(self.rfile.read(chunk))
            self.rfile.readline()
        self.rfile.readline()
        return size

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._lock = Lock()
        self.requests = 0
        self.received_bytes = 0

    def note(self, size: int) -> None:
        with self._lock:
            self.requests += 1
            self.received_bytes += size


class Collector:
    """Serves for as long as its ``with`` block lasts."""

    def __init__(self) -> None:
        self._server = _Server()

    @property
    def url(self) -> str:
        """Where to send."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def received(self) -> tuple[int, int]:
        """How many requests carried something, and how many bytes."""
        return self._server.requests, self._server.received_bytes

    def __enter__(self) -> Self:
        """Start."""
        Thread(target=self._server.serve_forever, name="collector", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
