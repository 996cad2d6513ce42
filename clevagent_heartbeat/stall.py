"""The stall guard: notices that a run no longer moves, and tells the line where it is stuck.

A process that hangs looks healthy to every check that asks it. What shows is that no *step* comes: no call ends, no node or task,
no ``ping()``. A run is watched from its start to its end. What is called outside of every run is watched while a call is open, and
where the program pings: then it is expected to go on pinging. A process that waits for work is not stalled.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from clevagent_core.accounts import deadlines_of
from clevagent_core.calls import LLMCall
from clevagent_core.clock import Timer
from clevagent_core.guards.messages import deadline_incident
from clevagent_core.hookspecs import hookimpl
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.settings import OnStall
    from clevagent_core.summaries import RunSummary
    from clevagent_core.tickets import Ticket, Work
    from clevagent_core.watchdog import Watchdog
    from clevagent_heartbeat.stacks import Stack
    from clevagent_wire.beats import Beat

logger = logging.getLogger("clevagent")

EXIT_STATUS = 75
"""With which ``on_stall="exit"`` ends the process: EX_TEMPFAIL of sysexits.h, a failure that another try may mend."""
MODEL_TIMEOUT_S = 600.0
"""What a model call may take whose timeout nobody knows: the default of OpenAI's and Anthropic's SDKs."""
_RHYTHM = 3
"""A program that pings outside of every run is stalled after so many times its longest pause, if that is more than ``stall_after``."""
_LATE_S = 5.0
"""A look that comes so many seconds late says that the whole process stood still (stopped, paused, starved): nothing could move."""
_TOLD = 100


class StallGuard:
    """Watches the run trees of one watchdog. One look costs a few microseconds a run, on the thread of the watchdog's timers."""

    def __init__(self) -> None:
        """Watch nothing until something runs."""
        self._watchdog: Watchdog
        self._on_stall: OnStall = "warn"
        self._allowed: Mapping[str, float] = {}
        self._default_s = 120.0
        self._mine: deque[Incident] = deque(maxlen=_TOLD)
        self._reset()
        _guards.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._timer: Timer | None = None
        self._forked_at = -math.inf
        """When (monotonic seconds) this process was forked from its parent: what has not moved since goes on there."""
        self._look_at = math.inf
        """When (monotonic seconds) the next look is due."""
        self._resumed_at = -math.inf
        """When (monotonic seconds) the process last went on, after it stood still as a whole."""
        self._told: dict[Run, float] = {}
        """The run trees that were told to stand still, each with when it had moved last."""

    # -- hooks ------------------------------------------------------------------------------------------------------------

    @hookimpl
    def clevagent_configure(self, watchdog: Watchdog) -> None:
        """Take what the settings say."""
        self._watchdog = watchdog
        self._on_stall = watchdog.settings.on_stall
        given = watchdog.settings.stall_after
        self._allowed = dict(given) if isinstance(given, Mapping) else {"*": given}
        self._default_s = self._allowed.get("*", self._default_s)

    @hookimpl
    def clevagent_run_started(self, run: Run) -> None:
        """Begin to look (the process's own run starts with the watchdog), and look again when a deadline of the run has passed."""
        if self._timer is None:
            self._start()
        if run.parent is None and self._timer is not None:
            for deadline in deadlines_of(run):
                self._timer.wake(max(0.0, deadline.at - self._watchdog.clock.monotonic()))

    @hookimpl
    def clevagent_beat(self, beat: Beat) -> None:  # noqa: ARG002 - as specified
        """Begin to look in a forked child, too: it beats from its first step on."""
        if self._timer is None:
            self._start()

    @hookimpl
    def clevagent_run_ended(self, run: Run, summary: RunSummary) -> None:  # noqa: ARG002 - as specified
        """Let go of it."""
        self._told.pop(run, None)

    @hookimpl
    def clevagent_incident(self, incident: Incident) -> None:
        """Ask the user's callable, on the thread that may block."""
        if callable(self._on_stall) and any(mine is incident for mine in self._mine):
            self._on_stall(incident)

    @hookimpl
    def clevagent_unconfigure(self) -> None:
        """Watch nothing any more."""
        if self._timer is not None:
            self._timer.stop()
        self._told.clear()

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._timer is None:
                self._look_at = self._watchdog.clock.monotonic() + self._shortest_s()
                self._timer = self._watchdog.clock.repeat(self.look, self._shortest_s())

    def _shortest_s(self) -> float:
        return min([self._default_s, *self._allowed.values()])

    def look(self) -> float:
        """Tell of every run that does not move; answer in how many seconds to look again."""
        now = self._watchdog.clock.monotonic()
        if now - self._look_at > _LATE_S:
            self._resumed_at = now
        # Nothing that begins later can be stalled before then.
        soonest = now + self._shortest_s()
        for run in self._watchdog.roots():
            due = self._due(run)
            if due > now:
                soonest = min(soonest, due)
            elif self._told.get(run) != run.progress.moved_at:
                self._told[run] = run.progress.moved_at
                self._tell(run, now)
            soonest = min(soonest, self._next_deadline(run, now))
        self._look_at = max(soonest, now + 0.001)
        return self._look_at - now

    def _next_deadline(self, run: Run, now: float) -> float:
        """Tell of a deadline that has passed while nothing was called; give when (monotonic seconds) the next one does."""
        next_at = math.inf
        for deadline in deadlines_of(run):
            if now < deadline.at:
                next_at = min(next_at, deadline.at)
            elif deadline.is_news("passed"):
                self._watchdog.tell(deadline_incident(run, deadline, None))
        return next_at

    def _due(self, run: Run) -> float:
        """When (monotonic seconds) a run tree is stalled, unless it moves."""
        progress = run.progress
        if progress.moved_at <= self._forked_at:
            return math.inf  # it goes on in the parent
        work = list(run.open_work)
        moved_at = max([progress.moved_at, self._resumed_at, *(item.moved_at for item in work)])
        if work:
            return moved_at + max(self._allowance(item) for item in work)
        if run is not self._watchdog.process_run:
            return moved_at + self._default_s
        # Outside of every run nobody can tell work from waiting for it; but who has pinged goes on pinging.
        return moved_at + max(self._default_s, _RHYTHM * progress.longest_pause_s) if progress.pings > 1 else math.inf

    def _allowance(self, item: Ticket | Work) -> float:
        named = [seconds for pattern, seconds in self._allowed.items() if pattern != "*" and fnmatchcase(item.name, pattern)]
        asked = getattr(item, "call", None)
        timeout_s = item.timeout_s
        if timeout_s is None and isinstance(asked, LLMCall):
            timeout_s = MODEL_TIMEOUT_S
        return max(max(named, default=self._default_s), timeout_s or 0)

    def _tell(self, run: Run, now: float) -> None:
        watchdog = self._watchdog
        exits = self._on_stall == "exit"
        action = "warn" if not exits else "dry_run" if run.dry_run else "exit"
        incident = self._incident(run, now, action)
        self._mine.append(incident)
        watchdog.tell(incident)
        if action == "exit":
            watchdog.abort(incident, EXIT_STATUS)

    def _incident(self, run: Run, now: float, action: str) -> Incident:
        watchdog = self._watchdog
        work = max(list(run.open_work), key=lambda item: item.moved_at, default=None)
        stack = _stack(run.progress.task, run.progress.thread) if work is None else _stack(work.task, work.thread)
        since = now - max(run.progress.moved_at, self._resumed_at, work.moved_at if work is not None else 0)
        what = f" in {work.name!r}" if work is not None else ""
        where = f"It is blocked in {stack.where}." if stack is not None else "Its thread has ended without a word."
        ends = {
            "exit": f"The process is ended with status {EXIT_STATUS}, so that a supervisor starts it again.",
            "dry_run": "Nothing was done, because this is a dry run.",
        }
        next_ = ends.get(action) or (
            "If that is as long as it takes, say so: clevagent.init(stall_after={'*': 120, 'name of the node or tool': 900}), or "
            "clevagent.ping() on the way. on_stall='exit' ends the process for a supervisor to start it again."
        )
        return Incident(
            kind="stall",
            message=f"Nothing has moved{what} for {since:.0f} s: no call, node or task was finished, and no ping came. {where} {next_}",
            agent=watchdog.settings.agent,
            run_id=run.run_id,
            at=watchdog.clock.wall(),
            action=action,
            details={
                "seconds": round(since, 3),
                "in": None if work is None else work.name,
                "where": None if stack is None else stack.where,
                "stack": [] if stack is None else stack.lines(),
            },
        )


def _stack(reference: weakref.ref[Any] | None, thread: int) -> Stack | None:
    from clevagent_heartbeat.stacks import task_stack, thread_stack  # noqa: PLC0415 - only where something is stuck

    task = reference() if reference is not None else None
    return (task_stack(task) if task is not None else None) or thread_stack(thread)


_guards: weakref.WeakSet[StallGuard] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # What ran in the parent goes on there; the child is watched from its own first step.
    for guard in list(_guards):
        guard._reset()  # noqa: SLF001 - the same module
        if hasattr(guard, "_watchdog"):  # else its watchdog could not be made
            guard._forked_at = guard._watchdog.clock.monotonic()  # noqa: SLF001 - as above


os.register_at_fork(after_in_child=_after_fork_in_child)


def plugin() -> StallGuard:
    """Make the built-in plugin of this module."""
    return StallGuard()
