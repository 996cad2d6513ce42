"""Time, injected: durations and deadlines from a monotonic clock, windows and what people read from wall time."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio


class Clock(Protocol):
    """Where every time and every wait in ClevAgent comes from. Safe to use from any thread."""

    def monotonic(self) -> float:
        """Seconds that only ever grow; for durations and deadlines."""
        ...

    def wall(self) -> float:
        """Seconds since 1970 (UTC); for windows, prices and what people read."""
        ...

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Wait until ``event`` is set or the time is over; tell whether it is set. Blocks the thread."""
        ...

    async def wait_async(self, event: asyncio.Event, timeout_s: float) -> bool:
        """Wait until ``event`` is set or the time is over; tell whether it is set. Never blocks the event loop."""
        ...


class ReentrantEvent(threading.Event):
    """An event that its own thread may set while it waits for it.

    The garbage collector can close an abandoned stream at any allocation, also inside ``Event.wait``; the stream's call is then
    settled there, and sets the event. That is why every lock of the kernel is reentrant, too.
    """

    def __init__(self) -> None:
        """Start unset."""
        super().__init__()
        self._cond = threading.Condition(threading.RLock())


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """See :meth:`Clock.wait`."""
        return event.wait(timeout_s)

    async def wait_async(self, event: asyncio.Event, timeout_s: float) -> bool:
        """See :meth:`Clock.wait_async`."""
        import asyncio  # noqa: PLC0415 - a third of the time that importing clevagent would take

        try:
            async with asyncio.timeout(timeout_s):
                return await event.wait()
        except TimeoutError:
            return event.is_set()


def utc(wall: float) -> datetime:
    """Turn wall seconds into an aware ``datetime`` in UTC."""
    return datetime.fromtimestamp(wall, UTC)
