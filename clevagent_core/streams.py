"""A stream belongs to the run in which it was made, wherever and by whomever it is read; until then, that run goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

from clevagent_core.frames import Frame, finish, frame_of, kept, stand_in


def belonging(watchdog: Any, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Make an iterator that belongs to the run of this context; where there is none, it belongs to whoever reads it."""
    frame = frame_of(watchdog)
    return make() if frame is None else Stream(make(), frame)


def abelonging(watchdog: Any, make: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
    """Make an asynchronous iterator that belongs to the run of this context, as ``belonging`` does."""
    frame = frame_of(watchdog)
    return make() if frame is None else AsyncStream(make(), frame)


class _Bound:
    """Where a stream stands, until it is over."""

    __slots__ = ("_before", "_frame", "_let_go")

    def __init__(self, frame: Frame) -> None:
        self._frame = kept(frame)
        self._before: Frame | None = None
        self._let_go: Callable[[], None] = frame.run.lease()

    def __enter__(self) -> None:
        self._before = stand_in(self._frame)

    def __exit__(self, *exception: object) -> None:
        stand_in(self._before)

    def end(self) -> None:
        """It will not be read any further. Sets no context variable: see ``frames.finish``."""
        finish(self._frame)
        self._let_go()


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
        self._bound.end()


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
        """Nobody will: the event loop closes what it has read from."""
        self._bound.end()
