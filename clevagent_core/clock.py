"""Time, injected: durations and deadlines from a monotonic clock, windows and what people read from wall time."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio


logger = logging.getLogger("clevagent")


class Timer(Protocol):
    """Something that is done again and again. See :meth:`Clock.repeat`."""

    def wake(self, within_s: float = 0) -> None:
        """Do it sooner: at the latest ``within_s`` seconds from now. Never blocks."""
        ...

    def stop(self) -> None:
        """Do it no more. Safe to call twice, and from the work itself; what has begun already goes on."""
        ...


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

    def repeat(self, work: Callable[[], float | None], first_s: float) -> Timer:
        """Call ``work`` in ``first_s`` seconds, and then again after as many seconds as it answers; ``None`` ends that.

        ``work`` is a bound method and is held weakly; it is quick, does not block, and shares one thread with all others of this
        clock. What it raises is logged, and it is called again a minute later.
        """
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


_AFTER_A_FAULT_S = 60.0


class _SystemTimer:
    """One entry of the thread below."""

    __slots__ = ("__weakref__", "_timers", "due", "is_stopped", "work")

    def __init__(self, timers: _Timers, work: Callable[[], float | None], due: float) -> None:
        self._timers = timers
        # Weakly, so that a watchdog that nobody names any more can go.
        self.work = weakref.WeakMethod(work)
        self.due = due
        self.is_stopped = False

    def wake(self, within_s: float = 0) -> None:
        """See :meth:`Timer.wake`."""
        self._timers.add(self, time.monotonic() + within_s)

    def stop(self) -> None:
        """See :meth:`Timer.stop`."""
        self.is_stopped = True
        self._timers.changed.set()

    def run(self) -> float | None:
        work = self.work()
        if work is None or self.is_stopped:
            return None
        try:
            return work()
        except Exception:  # whose code: ours; a fault in one beat must not end the watch
            logger.exception("A timer of ClevAgent failed; it is tried again in %g s.", _AFTER_A_FAULT_S)
            return _AFTER_A_FAULT_S


class _Timers:
    """One daemon thread that does, at their times, what several timers ask for; it is there as long as there are any."""

    def __init__(self) -> None:
        self._reset()
        _all_timers.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self.changed = ReentrantEvent()
        self._heap: list[tuple[float, int, _SystemTimer]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def add(self, timer: _SystemTimer, due: float) -> None:
        with self._lock:
            if timer.is_stopped or due >= timer.due:
                return
            # The entry of its former time is passed over when it comes up.
            timer.due = due
            heapq.heappush(self._heap, (due, next(self._numbers), timer))
            if self._thread is None:
                self._thread = threading.Thread(target=_work, args=(weakref.ref(self),), name="clevagent-timers", daemon=True)
                with contextlib.suppress(RuntimeError):  # the interpreter is shutting down: nothing is to be watched any more
                    self._thread.start()
        self.changed.set()

    def next(self) -> tuple[_SystemTimer | None, float | None]:
        """Give the timer that is due, or how many seconds there are until the next is; neither where the thread is to end."""
        with self._lock:
            self.changed.clear()
            while self._heap:
                due, _, timer = self._heap[0]
                if timer.is_stopped or timer.due != due or timer.work() is None:
                    heapq.heappop(self._heap)
                    continue
                left = due - time.monotonic()
                if left > 0:
                    return None, left
                heapq.heappop(self._heap)
                timer.due = float("inf")
                return timer, 0
            self._thread = None
            return None, None


_IDLE_S = 5.0
"""How often the thread of timers looks whether its clock is still there."""


def _work(reference: weakref.ref[_Timers]) -> None:
    while True:
        timers = reference()
        if timers is None:
            return
        timer, left = timers.next()
        event = timers.changed
        if left is None:
            return
        if timer is None:
            # Without a hold on them: a watchdog that is dropped takes its thread along.
            del timers
            event.wait(min(left, _IDLE_S))
            continue
        delay = timer.run()
        if delay is not None:
            timers.add(timer, time.monotonic() + delay)
        del timer, timers


_all_timers: weakref.WeakSet[_Timers] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The child has no such thread, and the parent may have held the lock. Whoever is still to be called there asks again.
    for timers in list(_all_timers):
        timers._reset()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


class SystemClock:
    """The machine's clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def __init__(self) -> None:
        """Start no thread until something is to be repeated."""
        self._timers = _Timers()

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

    def repeat(self, work: Callable[[], float | None], first_s: float) -> Timer:
        """See :meth:`Clock.repeat`."""
        timer = _SystemTimer(self._timers, work, float("inf"))
        self._timers.add(timer, time.monotonic() + first_s)
        return timer


def utc(wall: float) -> datetime:
    """Turn wall seconds into an aware ``datetime`` in UTC."""
    return datetime.fromtimestamp(wall, UTC)
