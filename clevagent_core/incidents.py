"""Tells observers of incidents, off the caller's thread: bounded, never blocking, and safe after a fork."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

from clevagent_core.clock import Clock, ReentrantEvent
from clevagent_core.verdicts import Incident

logger = logging.getLogger("clevagent")

_END_S = 1.0
_QUEUE = 1000
"""How many incidents may wait; the oldest is dropped, and counted, when one more comes."""


class IncidentTeller:
    """A queue and one daemon thread, which is started by the first incident."""

    def __init__(self, deliver: Callable[[Incident], None], clock: Clock) -> None:
        """Deliver by ``deliver``, which may block but does not raise."""
        self._deliver = deliver
        self._clock = clock
        self._lock: threading.RLock
        self._queue: deque[Incident]
        self._wake: threading.Event
        self._idle: threading.Event
        self._thread: threading.Thread | None
        self._stopping: bool
        self.dropped: int
        """How many incidents did not fit the queue."""
        self._reset()
        _tellers.add(self)

    def tell(self, incident: Incident) -> None:
        """Queue an incident. Never blocks for longer than a lock is held for an append."""
        with self._lock:
            if self._stopping:
                return
            if len(self._queue) >= _QUEUE:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append(incident)
            self._idle.clear()
            self._wake.set()
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="clevagent-incidents", daemon=True)
                thread.start()
                self._thread = thread  # not before: a signal handler may raise in start()

    def flush(self, timeout_s: float) -> int:
        """Wait until everything is told, at most ``timeout_s`` seconds; tell how many are left."""
        if self._thread is None:
            return 0
        self._clock.wait(self._idle, timeout_s)
        with self._lock:
            return len(self._queue)

    def stop(self, timeout_s: float) -> None:
        """Tell what is waiting, for at most ``timeout_s`` seconds, and end the thread. What is lost is logged."""
        left = self.flush(timeout_s)
        with self._lock:
            self._stopping = True
            self._wake.set()
            thread = self._thread
        if not left and thread is not None and thread is not threading.current_thread():
            # It has nothing more to do, and lets go of the watchdog when it ends.
            thread.join(_END_S)
        if left or self.dropped:
            logger.warning(
                "%d incidents were not told: %d were still waiting after %g s, %d did not fit the queue.",
                left + self.dropped,
                left,
                timeout_s,
                self.dropped,
            )

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._queue = deque()
        self._wake = ReentrantEvent()
        self._idle = ReentrantEvent()
        self._idle.set()
        self._thread = None
        self._stopping = False
        self.dropped = 0

    def _work(self) -> None:
        while True:
            self._wake.wait()
            while True:
                with self._lock:
                    if not self._queue:
                        self._wake.clear()
                        self._idle.set()
                        if self._stopping:
                            return
                        break
                    incident = self._queue.popleft()
                self._deliver(incident)


_tellers: weakref.WeakSet[IncidentTeller] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The child has no thread of ours, the parent may have held the lock, and what waited is the parent's to tell.
    for teller in list(_tellers):
        teller._reset()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)
