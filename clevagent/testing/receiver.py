"""A receiver of heartbeats for tests: a small ASGI application that stands for the monitor, and makes trouble on demand."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from clevagent.testing.server import HttpRequest, HttpResponse, HttpServer
from clevagent_core.errors import UsageError

MAX_BODY = 1_000_000
"""Bytes of one request; a larger one is answered with 413."""
MAX_BEATS = 1000
"""Beats of one batch; of a larger one as well."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ReceivedCall(NamedTuple):
    """One request, as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    """With names in lower case."""
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    status: int = 200
    retry_after_s: float | None = None
    delay_s: float = 0
    hang: bool = False
    drop: bool = False
    is_stored: bool = False


class _Answer(NamedTuple):
    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = {}
    trouble: _Trouble = _Trouble()


@dataclass(slots=True)
class _Agent:
    number: int
    status: str = "ok"
    sent_at: float = -math.inf
    """When the newest of its numbered beats was made."""


class HeartbeatReceiver:
    """Takes beats as the wire format says, checks each field, and answers as a monitor does. Keeps everything in memory.

    An ASGI application; and, as a context manager, a server of itself on 127.0.0.1, at :attr:`url`. Safe to use from any thread.

    Args:
        api_key: the only key that is let in; ``None`` lets everybody in.

    Raises:
        UsageError: its address is asked for while it is not served; it is entered twice.

    """

    def __init__(self, *, api_key: str | None = None) -> None:
        """Nothing was received yet."""
        self._api_key = api_key
        self._changed = threading.Condition(threading.RLock())
        self._beats: list[dict[str, Any]] = []
        self._seen: set[tuple[str, int]] = set()
        self._agents: dict[str, _Agent] = {}
        self._requests: list[ReceivedCall] = []
        self._trouble: _Trouble | None = None
        self._troubled = 0
        self._server: HttpServer | None = None
        self.repeats = 0
        """How many beats came that were here already."""
        self.budgets: list[dict[str, Any]] = []
        """The ceilings that each answer carries: fields of ``clevagent.Budget``, with a name."""
        self.commands: list[dict[str, Any]] = []
        """The commands that each answer carries until their result has come: ``{"id", "command", "by", "reason", "run_id"}``."""
        self.results: dict[str, dict[str, Any]] = {}
        """What became of commands, by their id."""

    @property
    def beats(self) -> list[dict[str, Any]]:
        """The beats that were stored, each once, in the order in which they came."""
        with self._changed:
            return list(self._beats)

    @property
    def requests(self) -> list[ReceivedCall]:
        """Every request, those that were answered with trouble included."""
        with self._changed:
            return list(self._requests)

    @property
    def url(self) -> str:
        """Where it is served, without a path."""
        if self._server is None:
            raise UsageError("This receiver has no address, because it is not served. Use it in a `with` block.")
        return f"http://127.0.0.1:{self._server.port}"

    def wait_for(self, count: int, *, timeout_s: float = 10.0) -> bool:
        """Block until ``count`` beats are stored; tell whether they are. ``timeout_s`` is in real seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._beats) >= count, timeout_s)

    def react(
        self,
        *,
        status: int = 200,
        retry_after_s: float | None = None,
        delay_s: float = 0,
        hang: bool = False,
        drop: bool = False,
        stored: bool = False,
        times: int | None = None,
    ) -> None:
        """Make trouble with the next requests.

        Args:
            status: what they are answered with; from 300 on nothing is stored.
            retry_after_s: sent as ``Retry-After``.
            delay_s: seconds before the answer.
            hang: never answer.
            drop: close the connection instead of answering.
            stored: whether what came is kept all the same: it is stored, and nobody gets to know.
            times: how many requests; ``None``: until :meth:`recover`.

        """
        with self._changed:
            self._trouble = _Trouble(
                status=status, retry_after_s=retry_after_s, delay_s=delay_s, hang=hang, drop=drop, is_stored=stored
            )
            self._troubled = -1 if times is None else times

    def recover(self) -> None:
        """Answer as one should again."""
        with self._changed:
            self._trouble = None

    # -- as a server ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Serve on a free port of 127.0.0.1."""
        if self._server is not None:
            raise UsageError("This receiver is served already: it has one address. Make another HeartbeatReceiver.")
        self._server = HttpServer(self._serve)
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop, and close every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _serve(self, request: HttpRequest) -> HttpResponse:
        answer = self._respond(ReceivedCall(request.method, request.path, request.headers, request.body))
        trouble = answer.trouble
        return HttpResponse(
            answer.status,
            [json.dumps(answer.body).encode()],
            headers=answer.headers,
            delay_s=trouble.delay_s,
            hang=trouble.hang,
            drop="before" if trouble.drop else None,
        )

    # -- as an application ------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI says."""
        if scope["type"] != "http":
            raise RuntimeError(f"HeartbeatReceiver speaks HTTP only, and was asked for {scope['type']!r}.")
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._respond(ReceivedCall(scope["method"], scope["path"], headers, bytes(body)))
        if answer.trouble.hang:
            await asyncio.Event().wait()
        if answer.trouble.drop:
            raise ConnectionResetError("the receiver was told to drop this request")
        await asyncio.sleep(answer.trouble.delay_s)
        content = json.dumps(answer.body).encode()
        names = {"content-type": "application/json", "content-length": str(len(content)), **answer.headers}
        pairs = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in names.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})

    # -- what is answered -------------------------------------------------------------------------------------------------

    def _respond(self, call: ReceivedCall) -> _Answer:
        with self._changed:
            self._requests.append(call)
            self._changed.notify_all()
            trouble = self._next_trouble()
            if trouble is None:
                return self._handle(call)
            is_answered = trouble.status < 300 and not trouble.hang and not trouble.drop  # noqa: PLR2004 - success
            wait = {} if trouble.retry_after_s is None else {"Retry-After": f"{trouble.retry_after_s:g}"}
            asked_for = _error(trouble.status, "trouble, as the test asked for")._replace(headers=wait)
            answer = self._handle(call) if is_answered or trouble.is_stored else asked_for
            return (answer if is_answered else asked_for)._replace(trouble=trouble)

    def _next_trouble(self) -> _Trouble | None:
        trouble = self._trouble
        if trouble is not None and self._troubled >= 0:
            self._troubled -= 1
            if self._troubled < 0:
                self._trouble = trouble = None
        return trouble

    def _handle(self, call: ReceivedCall) -> _Answer:
        if self._api_key is not None and call.headers.get("x-api-key") != self._api_key:
            return _error(401, "X-API-Key is missing or wrong")
        for pattern, method, handle in self._routes():
            found = re.fullmatch(pattern, call.path)
            if found is None:
                continue
            if call.method != method:
                return _error(405, f"{call.path} takes {method}")._replace(headers={"Allow": method})
            return handle(call, *found.groups())
        return _error(404, f"there is no {call.path}")

    def _routes(self) -> list[tuple[str, Literal["GET", "POST"], Callable[..., _Answer]]]:
        return [
            ("/api/v1/heartbeat", "POST", self._one),
            ("/api/v1/heartbeat/batch", "POST", self._batch),
            ("/api/v1/status", "GET", self._status),
            ("/api/v1/commands", "GET", self._commands),
            ("/api/v1/commands/([^/]+)/result", "POST", self._result),
        ]

    def _one(self, call: ReceivedCall) -> _Answer:
        beat = _object(call.body)
        if isinstance(beat, _Answer):
            return beat
        wrong = mistake(beat)
        if wrong is not None:
            return _refused(wrong, beat)
        self._store(beat)
        return _Answer(200, self._told(beat))

    def _batch(self, call: ReceivedCall) -> _Answer:
        body = _object(call.body)
        if isinstance(body, _Answer):
            return body
        beats = body.get("heartbeats")
        if not isinstance(beats, list) or not all(isinstance(beat, dict) for beat in beats) or not beats:
            return _error(422, "heartbeats is no list of beats, with one at least; nothing was stored", field="heartbeats")
        if len(beats) > MAX_BEATS:
            return _error(413, f"{len(beats)} beats in one request, and at most {MAX_BEATS} are taken")
        for number, beat in enumerate(beats):
            wrong = mistake(beat)
            if wrong is not None:
                return _refused(wrong, beat, f"heartbeats[{number}].")
        stored = sum([self._store(beat) for beat in beats])
        return _Answer(200, {**self._told(beats[-1]), "accepted": stored, "repeats": len(beats) - stored})

    def _status(self, _: ReceivedCall) -> _Answer:
        return _Answer(200, {"ok": True, "agents": {name: self._about(name) for name in self._agents}})

    def _commands(self, _: ReceivedCall) -> _Answer:
        return _Answer(200, {"ok": True, "commands": self._open_commands()})

    def _result(self, call: ReceivedCall, command_id: str) -> _Answer:
        result = _object(call.body)
        if isinstance(result, _Answer):
            return result
        if all(command.get("id") != command_id for command in self.commands):
            return _error(404, f"there is no command {command_id!r}")
        if result.get("status") not in ("done", "failed"):
            return _refused("status", result)
        self.results[command_id] = result
        return _Answer(200, {"ok": True})

    def _store(self, beat: dict[str, Any]) -> bool:
        agent = self._agents.setdefault(beat["agent"], _Agent(number=len(self._agents) + 1))
        if "boot_id" in beat:
            key = beat["boot_id"], beat["seq"]
            if key in self._seen:
                self.repeats += 1
                return False
            self._seen.add(key)
        # A beat that was kept during an outage comes after newer ones, and says nothing about now.
        sent_at = beat.get("sent_at", agent.sent_at)
        if sent_at >= agent.sent_at:
            agent.status, agent.sent_at = beat.get("status", "ok"), sent_at
        self._beats.append(beat)
        return True

    def _about(self, name: str) -> dict[str, Any]:
        agent = self._agents[name]
        beats = [beat for beat in self._beats if beat["agent"] == name]
        newest = {beat["boot_id"]: beat["totals"] for beat in sorted(filter(_has_number, beats), key=lambda beat: beat["seq"])}
        # Of the numbered ones the totals, which hold what lost beats have said; of others all that they are.
        plain = [beat for beat in beats if not _has_number(beat)]
        return {
            "agent_id": agent.number,
            "status": agent.status,
            "sent_at": agent.sent_at if newest else None,
            "beats": len(beats),
            "tokens": sum(totals["tokens"] for totals in newest.values()) + sum(beat.get("tokens_used") or 0 for beat in plain),
            "cost_usd": sum(totals["cost_usd"] for totals in newest.values()) + sum(beat.get("cost_usd") or 0 for beat in plain),
        }

    def _told(self, beat: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "ok": True,
            "agent_id": self._agents[beat["agent"]].number,
            "status": self._agents[beat["agent"]].status,
            "warning": None,
            "reason": None,
            "budgets": list(self.budgets),
            "commands": self._open_commands(),
        }

    def _open_commands(self) -> list[dict[str, Any]]:
        return [command for command in self.commands if command.get("id") not in self.results]


def _error(status: int, message: str, *, field: str | None = None) -> _Answer:
    return _Answer(status, {"ok": False, "error": message} | ({} if field is None else {"field": field}))


def _refused(name: str, given: Mapping[str, Any], where: str = "") -> _Answer:
    said = (
        f"{where}{name}={given[name]!r:.100} is not what the wire format allows" if name in given else f"{where}{name} is missing"
    )
    return _error(422, f"{said}; nothing was stored", field=name)


def _has_number(beat: Mapping[str, Any]) -> bool:
    return "boot_id" in beat


def _no_json(constant: str) -> None:
    raise ValueError(constant)


def _object(body: bytes) -> dict[str, Any] | _Answer:
    if len(body) > MAX_BODY:
        return _error(413, f"{len(body)} bytes, and at most {MAX_BODY} are taken")
    try:
        found = json.loads(body, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return _error(400, "the body is no JSON")
    return found if isinstance(found, dict) else _error(422, "the body is no object")


# -- what a beat may say --------------------------------------------------------------------------------------------------

Check = Callable[[Any], bool]

_MOST = 2**63 - 1
"""What every database can keep."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200  # noqa: PLR2004 - what a page can show


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MOST


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_TOTALS: Mapping[str, Check] = {
    "tokens": _is_count,
    "input_tokens": _is_count,
    "output_tokens": _is_count,
    "cost_usd": _is_amount,
    "llm_calls": _is_count,
    "tool_calls": _is_count,
    "steps": _is_count,
    "loops": _is_count,
    "refusals": _is_count,
}


def _are_totals(value: Any) -> bool:
    return isinstance(value, dict) and all(name in value and check(value[name]) for name, check in _TOTALS.items())


def _are_incidents(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and _is_name(item.get("kind")) and _is_text(item.get("message")) for item in value
    )


_FIELDS: Mapping[str, Check] = {
    "agent": _is_name,
    "status": _is_name,
    "message": _or_none(_is_text),
    "tokens_used": _or_none(_is_count),
    "cost_usd": _or_none(_is_amount),
    "tool_calls": _or_none(_is_count),
    "llm_calls": _is_count,
    "steps": _is_count,
    "loops": _is_count,
    "refusals": _is_count,
    "iteration_count": _or_none(lambda value: type(value) is int and abs(value) <= _MOST),
    "memory_mb": _or_none(_is_amount),
    "meta": _or_none(lambda value: isinstance(value, dict)),
    "run_id": _or_none(_is_name),
    "boot_id": _is_name,
    "seq": lambda value: _is_count(value) and value >= 1,
    "sent_at": _is_amount,
    "kind": lambda value: value in ("liveness", "crash", "stall", "shutdown"),
    "progress_age_s": _or_none(_is_amount),
    "interval_s": lambda value: _is_amount(value) and value > 0,
    "totals": _are_totals,
    "dropped": _is_count,
    "incidents": _are_incidents,
    "host": _is_text,
    "pid": _is_count,
}
_NUMBERED = ("boot_id", "seq", "sent_at", "totals")
"""What a beat has that is numbered. Another client's may have no number: each of those counts, and none is a repeat."""


def mistake(beat: Mapping[str, Any]) -> str | None:
    """Name the field of a beat that is wrong or missing; ``None`` for one that is right. Fields of others' are let pass."""
    required = ("agent", *(_NUMBERED if "boot_id" in beat or "seq" in beat else ()))
    for name in required:
        if name not in beat:
            return str(name)
    for name, check in _FIELDS.items():
        if name in beat and not check(beat[name]):
            return str(name)
    return None
