"""A stream belongs to the run in which it was made, wherever and by whomever it is read; until then, that run goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

from clevagent_core.frames import Frame, Standing, finish, frame_of, kept


def belonging(watchdog: Any, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Make an iterator that belongs to the run of this context; where there is none, it belongs to whoever reads it."""
    frame = frame_of(watchdog)
    return make() if frame is None else Stream(make(), frame)


def abelonging(watchdog: Any, make: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
    """Make an asynchronous iterator that belongs to the run of this context, as ``belonging`` does."""
    frame, items = frame_of(watchdog), make()
    # Some give what has to be awaited first (LangChain's events, version 3): they begin at once.
    return items if frame is None or not hasattr(items, "__anext__") else AsyncStream(items, frame)


class _Bound(Standing):
    """Where a stream stands, until it is over."""

    __slots__ = ("_lease",)

    def __init__(self, frame: Frame) -> None:
        super().__init__(kept(frame))
        self._lease: object = frame.run.lease()

    def end(self) -> None:
        """It will not be read any further."""
        finish(self.frame)
        self.frame.run.end_lease(self._lease)

    def drop(self) -> None:
        """Nobody holds it any more."""
        finish(self.frame)
        self.frame.run.end_lease(self._lease, soon=True)


class Stream(Iterator[Any]):
    """An iterator whose steps stand where it was made. It is read by one thread at a time, as every generator."""

    def __init__(self, items: Iterator[Any], frame: Frame) -> None:
        """Read ``items``."""
        self._items = items
        self._bound = _Bound(frame)

    def __iter__(self) -> Self:
        """Read it."""
        return self

    def __next__(self) -> Any:
        """Read on."""
        try:
            with self._bound:
                return next(self._items)
        except BaseException:  # the end is one, too
            self._bound.end()
            raise

    def close(self) -> None:
        """Read no further."""
        close = getattr(self._items, "close", None)
        try:
            if close is not None:
                with self._bound:
                    close()
        finally:
            self._bound.end()

    def __del__(self) -> None:
        """Nobody will read on: what it reads is closed by going away itself."""
        _drop(self)


class AsyncStream(AsyncIterator[Any]):
    """An asynchronous iterator whose steps stand where it was made."""

    def __init__(self, items: AsyncIterator[Any], frame: Frame) -> None:
        """Read ``items``."""
        self._items = items
        self._bound = _Bound(frame)

    def __aiter__(self) -> Self:
        """Read it."""
        return self

    async def __anext__(self) -> Any:
        """Read on."""
        try:
            with self._bound:
                return await anext(self._items)
        except BaseException:  # the end is one, too
            self._bound.end()
            raise

    async def aclose(self) -> None:
        """Read no further."""
        aclose = getattr(self._items, "aclose", None)
        try:
            if aclose is not None:
                with self._bound:
                    await aclose()
        finally:
            self._bound.end()

    def __del__(self) -> None:
        """Nobody will read on: the event loop closes what it has read from."""
        _drop(self)


def _drop(stream: Stream | AsyncStream) -> None:
    # Perhaps by the garbage collector, which must wait for nobody; and perhaps it was never made (a signal handler has raised).
    bound: _Bound | None = stream.__dict__.get("_bound")
    if bound is not None:
        bound.drop()
