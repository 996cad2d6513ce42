"""A small HTTP/1.1 server on 127.0.0.1: one daemon thread a connection, kept alive.

``http.server`` spends several times as long on a request's headers, and cannot close the connections it holds; this module
knows only what the SDKs send (a ``Content-Length``, no chunked requests).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Literal, NamedTuple

from clevagent_core.errors import UsageError

_BACKLOG = 1024
_READ_BYTES = 65536
_CLOSE_S = 5.0
"""How long ``close()`` waits for threads that are busy with something else (a script that blocks)."""
_MALFORMED = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HttpRequest(NamedTuple):
    """One request, read whole."""

    method: str
    path: str
    body: bytes
    keep_alive: bool
    headers: Mapping[str, str] = {}
    """With names in lower case."""


class HttpResponse(NamedTuple):
    """What to do about a request."""

    status: int
    parts: Sequence[bytes]
    """The body: one part, or the events of a stream."""
    is_stream: bool = False
    headers: Mapping[str, str] = {}
    delay_s: float = 0
    chunk_delay_s: float = 0
    hang: bool = False
    drop: Literal["before", "middle"] | None = None


class HttpServer:
    """Serves ``handle``, which is called on the connection's thread. Started once, closed once."""

    def __init__(self, handle: Callable[[HttpRequest], HttpResponse]) -> None:
        """Nothing is bound before :meth:`start`."""
        self._handle = handle
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The port; 0 before :meth:`start`."""
        return self._port

    def start(self) -> None:
        """Bind a free port and accept.

        Raises:
            UsageError: started before.

        """
        with self._lock:
            if self._port or self._closing.is_set():
                raise UsageError("This provider was started before: a port is bound once. Make another LoopbackProvider.")
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
            self._port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), name="loopback-provider", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Close the port and every connection, and wait for their threads, at most five seconds. Safe to call twice."""
        self._closing.set()
        if self._acceptor is not None and self._acceptor.is_alive():
            # Closing a socket does not wake the thread that accepts on it; a connection does.
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            self._acceptor.join(_CLOSE_S)
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # its client was faster
                connection.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _CLOSE_S
        for thread in connections.values():
            thread.join(max(0, deadline - time.monotonic()))

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # out of files, or a client that left at once: the next may do better
                    if self._closing.wait(0.01):
                        return
                    continue
                if self._closing.is_set():
                    connection.close()
                    return
                thread = threading.Thread(target=self._serve, args=(connection,), name="loopback-connection", daemon=True)
                with self._lock:
                    self._connections[connection] = thread
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):  # the client went away
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._converse(connection)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _converse(self, connection: socket.socket) -> None:
        buffer = bytearray()
        while not self._closing.is_set():
            try:
                request = _read(connection, buffer)
            except ValueError:
                connection.sendall(_MALFORMED)
                return
            if request is None or not self._answer(connection, self._handle(request)) or not request.keep_alive:
                return

    def _answer(self, connection: socket.socket, response: HttpResponse) -> bool:
        """Play a response; tell whether the connection can be used again."""
        if response.hang:
            while connection.recv(_READ_BYTES):
                pass
            return False
        if response.delay_s and self._closing.wait(response.delay_s):
            return False
        if response.drop == "before":
            return False
        is_whole = response.drop is None
        head = _head(response)
        if not response.is_stream:
            body = b"".join(response.parts)
            connection.sendall(head + (body if is_whole else body[: len(body) // 2]))
            return is_whole
        frames = [b"%x\r\n%b\r\n" % (len(part), part) for part in response.parts]
        frames = [*frames, b"0\r\n\r\n"] if is_whole else frames[: len(frames) // 2]
        if not response.chunk_delay_s:
            connection.sendall(head + b"".join(frames))
            return is_whole
        connection.sendall(head + frames[0])
        for frame in frames[1:]:
            if self._closing.wait(response.chunk_delay_s):
                return False
            connection.sendall(frame)
        return is_whole


def _head(response: HttpResponse) -> bytes:
    status = response.status
    reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    lines = [f"HTTP/1.1 {status} {reason}"]
    if response.is_stream:
        lines.append("content-type: text/event-stream\r\ntransfer-encoding: chunked")
    else:
        lines.append(f"content-type: application/json\r\ncontent-length: {sum(map(len, response.parts))}")
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _read(connection: socket.socket, buffer: bytearray) -> HttpRequest | None:
    """Read one request and leave in ``buffer`` what came after it; ``None`` when the client is done.

    Raises:
        ValueError: this is no HTTP that the server knows.

    """
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        if not (received := connection.recv(_READ_BYTES)):
            return None
        buffer += received
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "transfer-encoding" in headers:
        raise ValueError(first)
    body_end = end + 4 + int(headers.get("content-length", "0"))
    while len(buffer) < body_end:
        if not (received := connection.recv(_READ_BYTES)):
            return None
        buffer += received
    body = bytes(buffer[end + 4 : body_end])
    del buffer[:body_end]
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return HttpRequest(method, target.partition("?")[0], body, keep_alive, headers)
