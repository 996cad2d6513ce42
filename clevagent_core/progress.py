"""Signs of progress: how many there were, and when and where the last one was."""

from __future__ import annotations

import threading
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    import weakref


class Progress:
    """How one run tree gets on. Written without a lock, at every step of any thread: what is read may be a step old."""

    __slots__ = ("longest_pause_s", "moved_at", "pings", "task", "thread")

    def __init__(self, now: float, task: weakref.ref[asyncio.Task[Any]] | None) -> None:
        """Begin at ``now`` (monotonic seconds), in ``task``."""
        self.moved_at = now
        """When the last step was, or it began, in monotonic seconds."""
        self.thread = threading.get_ident()
        """The thread in which that was."""
        self.task = task
        """The asyncio task in which it began, held weakly."""
        self.pings = 0
        self.longest_pause_s = 0.0
        """The longest time between two steps."""


class Steps:
    """How a whole process gets on. Written and read like ``Progress``."""

    __slots__ = ("count", "moved_at", "numbers", "run_id")

    def __init__(self) -> None:
        """Nothing has moved yet."""
        self.numbers = count(1)
        """Numbers the steps: the one thing that threads can count by without a lock."""
        self.count = 0
        """How many there were."""
        self.moved_at: float | None = None
        """When the last one was, in monotonic seconds."""
        self.run_id: str | None = None
        """In which run that was: the outermost one around it."""
