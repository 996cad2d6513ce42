"""Reading what an answer used from the body of its HTTP response, while whoever asked for it reads the same body.

That is where every way of reading an answer comes together: whole or streamed, parsed or raw, by an iterator, a helper or a
``with`` block. The response object (of httpx or httpx2) becomes one of a subclass whose ``iter_bytes`` and ``close`` tell the meter.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, cast

from clevagent_core.interrupts import is_interrupt
from clevagent_core.tickets import Ticket
from clevagent_providers.answers import Reader
from clevagent_providers.failures import fail

logger = logging.getLogger("clevagent")

_EVENT_END = re.compile(rb"\r?\n\r?\n|\r\r")
_METERS = "_clevagent_meters"


class Meter:
    """Ends one ticket by what the body of one response tells.

    An answer that is read to its end settles to the usage that it tells. One that is closed, dropped, cancelled or broken off
    before may be billed in full, and is charged its bound.
    """

    def __init__(self, ticket: Ticket, reader: Reader, *, hides_usage: bool) -> None:
        """Meter for ``ticket``; with ``hides_usage``, take the event out that carries only the usage that we asked for."""
        self._ticket = ticket
        self._reader = reader
        self._hides_usage = hides_usage
        self._is_stream: bool | None = None
        """Whether the body is a stream of events; ``None`` until something has come."""
        self._kept = bytearray()
        """What has come and makes no whole event yet; of an answer that is no stream, all of it."""
        self._has_ended = False

    def whole(self, content: bytes) -> None:
        """Take the body of an answer that was read already."""
        self.feed(content)
        self.end()

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of the body; give what the reader of the body may see of it now."""
        self._ticket.touch()
        if self._has_ended and not self._hides_usage:
            return chunk
        if self._is_stream is None:
            said = chunk.lstrip()
            if not said:
                return chunk
            # By its first letter: the type that gateways and servers of one's own tell may be any, and SDKs do not look at it.
            self._is_stream = not said.startswith((b"{", b"["))
        kept = self._kept
        kept += chunk
        if not self._is_stream:
            return chunk
        shown = bytearray()
        start = 0
        # Two line ends may be cut apart by pieces; so it is looked for from the start of what is kept.
        for end in _EVENT_END.finditer(kept):
            event = bytes(kept[start : end.end()])
            start = end.end()
            if not (self._event(event) and self._hides_usage):
                shown += event
        del kept[:start]
        return bytes(shown) if self._hides_usage else chunk

    def rest(self) -> bytes:
        """The body was read to its end: give what is left to see."""
        kept = bytes(self._kept)
        self.end()
        return kept if self._is_stream and self._hides_usage else b""

    def end(self, error: BaseException | None = None) -> None:
        """The body is not read any further."""
        if self._has_ended:
            return
        self._has_ended = True
        reader = self._reader
        try:
            if self._is_stream:
                self._event(bytes(self._kept))
            elif error is None:
                reader.whole(json.loads(self._kept))
        except Exception as failed:  # whose code: a provider's, or ours; what cannot be read is charged its bound
            if is_interrupt(failed):
                self._ticket.charge(failed)
                raise
            logger.debug("The answer of a provider cannot be read.", exc_info=True)
        if reader.is_final:
            self._ticket.settle_by(reader.usage, reader.answer)
        elif error is None:
            self._ticket.charge()
        else:
            # It has begun, so it is billed, whatever it failed with.
            fail(self._ticket, error, sent=True)

    def left(self) -> None:
        """Somebody has stopped reading, and may go on later: charged until then. What is told later still corrects it."""
        if not self._has_ended:
            self._ticket.charge()

    def __del__(self) -> None:
        """Nobody will read the rest."""
        self.end()

    def _event(self, event: bytes) -> bool:
        """Read one event; tell whether it carries nothing but usage."""
        lines = [line[5:].lstrip() for line in event.splitlines() if line.startswith(b"data:")]
        if not lines:
            return False
        data = lines[0] if len(lines) == 1 else b"\n".join(lines)
        if data.startswith(b"[DONE]"):
            self._reader.is_final = True
            self._settle_final()
            return False
        try:
            parsed = json.loads(data)
            is_usage = isinstance(parsed, dict) and self._reader.event(parsed)
        except Exception as error:  # whose code: a provider's, or ours; the user's SDK says what it thinks of it
            if is_interrupt(error):
                raise
            logger.debug("An event of a provider's stream cannot be read.", exc_info=True)
            return False
        if isinstance(parsed, dict) and parsed.get("type") == "message_stop":
            self._settle_final()
        return is_usage

    def _settle_final(self) -> None:
        # At once: some leave a stream open that they have read to its end.
        reader = self._reader
        if reader.is_final and not self._has_ended:
            self._has_ended = True
            self._ticket.settle_by(reader.usage, reader.answer)


def tap(response: Any, meters: Sequence[Meter]) -> None:
    """Let ``meters`` see the body of ``response`` when it is read; at once, if it has been."""
    if response.is_closed:
        for meter in meters:
            meter.whole(response.content)
        return
    kind: Any = type(response)
    response.__class__ = _tapped(kind)
    setattr(response, _METERS, tuple(meters))


@functools.cache
def _tapped(base: type[Any]) -> type[Any]:
    """Make the subclass for one class of responses."""

    def iter_bytes(self: Any, chunk_size: int | None = None) -> Iterator[bytes]:
        meters = _meters(self)
        try:
            for chunk in base.iter_bytes(self, chunk_size):
                yield from _feed(meters, chunk)
        except BaseException as error:
            _end(meters, error)
            raise
        rest = _rest(meters)
        if rest:
            yield rest

    async def aiter_bytes(self: Any, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        meters = _meters(self)
        try:
            async for chunk in base.aiter_bytes(self, chunk_size):
                for shown in _feed(meters, chunk):
                    yield shown
        except BaseException as error:
            _end(meters, error)
            raise
        rest = _rest(meters)
        if rest:
            yield rest

    def close(self: Any) -> None:
        try:
            base.close(self)
        finally:
            _end(_meters(self))

    async def aclose(self: Any) -> None:
        try:
            await base.aclose(self)
        finally:
            _end(_meters(self))

    def reduce_ex(self: Any, protocol: object) -> tuple[Any, ...]:  # noqa: ARG001 - as pickle asks
        # Pickled as what it was: nobody could import the subclass.
        state = {name: value for name, value in self.__getstate__().items() if name != _METERS}
        return _blank, (base,), state

    body = {"iter_bytes": iter_bytes, "aiter_bytes": aiter_bytes, "close": close, "aclose": aclose, "__reduce_ex__": reduce_ex}
    return _subclass(base, body)


def _subclass(base: type[Any], body: dict[str, Any]) -> type[Any]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, **body})


def tap_iterators(stream: Any) -> Any:
    """Let the meters of a stream of the SDK's know when an iterator over it is closed, while the stream itself lives on; give it."""
    response = getattr(stream, "response", None)
    if _METERS in getattr(response, "__dict__", ()) and (hasattr(stream, "__iter__") or hasattr(stream, "__aiter__")):
        kind: Any = type(stream)
        stream.__class__ = _tapped_stream(kind)
    return stream


@functools.cache
def _tapped_stream(base: type[Any]) -> type[Any]:
    """Make the subclass for one class of streams."""

    def iterate(self: Any) -> Iterator[Any]:
        try:
            yield from base.__iter__(self)
        except GeneratorExit:
            _left(self)
            raise

    async def aiterate(self: Any) -> AsyncIterator[Any]:
        try:
            async for item in base.__aiter__(self):
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            _left(self)
            raise

    return _subclass(base, {"__iter__": iterate} if hasattr(base, "__iter__") else {"__aiter__": aiterate})


def _left(stream: Any) -> None:
    for meter in _meters(stream.response):
        meter.left()


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)


def _meters(response: Any) -> tuple[Meter, ...]:
    return cast("tuple[Meter, ...]", response.__dict__.get(_METERS, ()))


def _feed(meters: tuple[Meter, ...], chunk: bytes) -> tuple[bytes, ...]:
    """Return what is left to see of a chunk; nothing, rather than an empty one."""
    for meter in meters:
        chunk = meter.feed(chunk)
    return (chunk,) if chunk else ()


def _rest(meters: tuple[Meter, ...]) -> bytes:
    rest = b""
    for meter in meters:
        rest = (meter.feed(rest) if rest else b"") + meter.rest()
    return rest


def _end(meters: tuple[Meter, ...], error: BaseException | None = None) -> None:
    for meter in meters:
        meter.end(error)
