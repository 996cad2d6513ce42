"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from clevagent_core.errors import UsageError

_START = datetime(2026, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NANO = 10**9
_NEVER_NS = 1 << 80
_AT_ONCE = 200

_POLL_S = 0.001
"""How often a blocked thread looks whether the clock was moved: an event can be waited for together with nothing else."""


@dataclass(eq=False, slots=True)
class _Sleeper:
    """One task that waits in an event loop."""

    deadline_ns: float
    loop: asyncio.AbstractEventLoop
    limit: asyncio.Timeout
    is_over: bool = False

    def wake(self) -> None:
        """End the wait, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed with the task in it: nobody is left to wake
            self.loop.call_soon_threadsafe(self._expire)

    def _expire(self) -> None:
        if not self.is_over:
            self.limit.reschedule(self.loop.time())


class _FakeTimer:
    """Something that is done whenever the clock is moved past its time."""

    def __init__(self, clock: FakeClock, work: Callable[[], float | None], due_ns: int) -> None:
        self._clock = clock
        self.work: Callable[[], float | None] | None = work
        self.due_ns = due_ns

    def wake(self, within_s: float = 0) -> None:
        """See :meth:`clevagent_core.clock.Timer.wake`: with 0, when the clock is moved next, even by nothing."""
        self.due_ns = min(self.due_ns, self._clock._monotonic_ns + round(within_s * _NANO))  # noqa: SLF001 - the same module

    def stop(self) -> None:
        """See :meth:`clevagent_core.clock.Timer.stop`."""
        self.work = None


def _with_work(timers: list[_FakeTimer]) -> list[_FakeTimer]:
    return [timer for timer in timers if timer.work is not None]


class FakeClock:
    """A :class:`~clevagent_core.clock.Clock` for tests: time passes only when the test says so.

    Monotonic time begins at 0. Both times are kept in whole nanoseconds, so ten times ``advance(0.1)`` is exactly one
    second. Safe to use from any thread, and from several event loops.

    Args:
        start: the wall time to begin at; aware.
        auto_advance: a wait moves the clock to its own deadline instead of waiting for :meth:`advance`, so code with waits
            in it runs through on one thread and takes no time.

    Raises:
        UsageError: ``start`` is naive.

    """

    def __init__(self, start: datetime = _START, *, auto_advance: bool = False) -> None:
        """Stand at ``start``."""
        self._changed = threading.Condition()
        self._monotonic_ns = 0
        self._end_ns = 0
        """Where monotonic time will be once every :meth:`advance` that has begun is done."""
        self._advancing = threading.local()
        self._wall_ns = _wall_ns(start, what="FakeClock(start=...)")
        self._auto_advance = auto_advance
        self._blocked = 0
        self._sleepers: list[_Sleeper] = []
        self._timers: list[_FakeTimer] = []

    def monotonic(self) -> float:
        """Seconds that :meth:`advance` has added since the clock was made."""
        return self._monotonic_ns / _NANO

    def wall(self) -> float:
        """Seconds since 1970 (UTC)."""
        return self._wall_ns / _NANO

    def advance(self, seconds: float) -> None:
        """Let time pass: both times grow by ``seconds``, and every wait whose deadline is reached ends.

        What is to be repeated (:meth:`repeat`) is done on the way, on this thread, each at its own time; two hundred times in one
        go at most, and then once more at the end, so that a month takes no minutes.

        Raises:
            UsageError: ``seconds`` is negative or not finite.

        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise UsageError(
                f"advance({seconds!r}) would not move time forward: monotonic time only grows, by a finite number of "
                "seconds. Give a number of at least 0; to change only the wall time, also backwards, use set()."
            )
        is_nested = getattr(self._advancing, "is_here", False)
        with self._changed:
            # Of several threads each adds its time to what the others have begun; what is done on the way may advance, too.
            start_ns = self._monotonic_ns if is_nested else max(self._monotonic_ns, self._end_ns)
            end_ns = start_ns + round(seconds * _NANO)
            self._end_ns = max(self._end_ns, end_ns)
        self._advancing.is_here = True
        try:
            self._work_until(end_ns)
            self._pass_until(end_ns)
        except BaseException:  # whose code: the work's; time stands where it failed
            self._end_ns = self._monotonic_ns
            raise
        finally:
            self._advancing.is_here = is_nested

    def _work_until(self, end_ns: int) -> None:
        done: dict[_FakeTimer, int] = {}
        while (timer := self._next_timer(end_ns)) is not None:
            self._pass_until(timer.due_ns)
            work, timer.due_ns = timer.work, _NEVER_NS
            delay = work() if work is not None else None
            if delay is None:
                continue
            timer.wake(delay)
            done[timer] = times = done.get(timer, 0) + 1
            if times == _AT_ONCE:
                timer.due_ns = max(timer.due_ns, end_ns)

    def repeat(self, work: Callable[[], float | None], first_s: float) -> _FakeTimer:
        """See :meth:`clevagent_core.clock.Clock.repeat`: it is done by :meth:`advance`, on the thread that calls it."""
        timer = _FakeTimer(self, work, self._monotonic_ns + round(first_s * _NANO))
        with self._changed:
            self._timers.append(timer)
        return timer

    def _next_timer(self, end_ns: int) -> _FakeTimer | None:
        with self._changed:
            self._timers = _with_work(self._timers)
            timers = list(self._timers)
        due = [timer for timer in timers if timer.due_ns <= end_ns]
        return min(due, key=lambda timer: timer.due_ns, default=None)

    def set(self, wall: datetime) -> None:
        """Jump to another wall time, as when a machine's clock is corrected. Monotonic time and waits stay as they are.

        Raises:
            UsageError: ``wall`` is naive.

        """
        wall_ns = _wall_ns(wall, what="set(wall)")
        with self._changed:
            self._wall_ns = wall_ns

    @property
    def waiting(self) -> int:
        """How many waits are blocked now."""
        with self._changed:
            return self._blocked + len(self._sleepers)

    def wait_for_waiters(self, count: int = 1, *, timeout_s: float = 5.0) -> bool:
        """Block until ``count`` waits are blocked, so that an ``advance()`` is not missed; tell whether they are.

        ``timeout_s`` is in real seconds. Not for use in the event loop whose waits are counted.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._blocked + len(self._sleepers) >= count, timeout_s)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Block until ``event`` is set or the clock was moved to ``timeout_s`` seconds from now; tell whether it is set.

        Real time plays no part: a deadline is reached by :meth:`advance` (or at once with ``auto_advance``).
        """
        if event.is_set() or timeout_s <= 0:
            return event.is_set()
        with self._changed:
            deadline_ns = self._deadline_ns(timeout_s)
            if self._jumps_to(deadline_ns):
                return event.is_set()
            self._blocked += 1
            self._changed.notify_all()
        try:
            while True:
                if self._monotonic_ns >= deadline_ns or event.wait(_POLL_S):
                    break
            return event.is_set()
        finally:
            with self._changed:
                self._blocked -= 1

    async def wait_async(self, event: asyncio.Event, timeout_s: float) -> bool:
        """As :meth:`wait`, without blocking the event loop. The clock may be moved from any thread.

        With ``auto_advance`` other tasks get one turn, so that a loop of waits starves nobody.
        """
        if event.is_set() or timeout_s <= 0:
            return event.is_set()
        try:
            async with asyncio.timeout(None) as limit:
                sleeper = self._begin_sleep(limit, timeout_s)
                if sleeper is None:
                    await asyncio.sleep(0)
                    return event.is_set()
                try:
                    return await event.wait()
                finally:
                    self._end_sleep(sleeper)
        except TimeoutError:
            return event.is_set()

    def _begin_sleep(self, limit: asyncio.Timeout, timeout_s: float) -> _Sleeper | None:
        with self._changed:
            deadline_ns = self._deadline_ns(timeout_s)
            if self._jumps_to(deadline_ns):
                return None
            sleeper = _Sleeper(deadline_ns, asyncio.get_running_loop(), limit)
            self._sleepers.append(sleeper)
            self._changed.notify_all()
            return sleeper

    def _end_sleep(self, sleeper: _Sleeper) -> None:
        sleeper.is_over = True
        with self._changed:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)

    def _deadline_ns(self, timeout_s: float) -> float:
        return self._monotonic_ns + round(timeout_s * _NANO) if math.isfinite(timeout_s) else math.inf

    def _jumps_to(self, deadline_ns: float) -> bool:
        """Move to a deadline if that is this clock's way; a wait without one can only end by its event."""
        if not self._auto_advance or deadline_ns == math.inf:
            return False
        self._pass_until(int(deadline_ns))
        return True

    def _pass_until(self, monotonic_ns: int) -> None:
        with self._changed:
            passed_ns = max(0, monotonic_ns - self._monotonic_ns)
            self._monotonic_ns += passed_ns
            self._wall_ns += passed_ns
            for sleeper in list(self._sleepers):
                self._wake_if_due(sleeper)

    def _wake_if_due(self, sleeper: _Sleeper) -> None:
        if sleeper.deadline_ns <= self._monotonic_ns:
            self._sleepers.remove(sleeper)
            sleeper.wake()


def _wall_ns(wall: datetime, *, what: str) -> int:
    if wall.utcoffset() is None:
        raise UsageError(
            f"{what} got {wall!r}, which has no time zone, so it could be any of a day's moments. "
            "Give an aware datetime, for example datetime(2026, 1, 1, tzinfo=UTC)."
        )
    return (wall - _EPOCH) // timedelta(microseconds=1) * 1000
