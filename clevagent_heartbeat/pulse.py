"""The pulse: when a heartbeat is made, and what it is made of.

Two levels in one message. *Liveness*: a beat every ``interval`` seconds, from a thread of its own, so that it comes as long as the process
lives, however stuck the work is. *Progress*: how long ago the last step was, told in every beat; it comes from the work itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clevagent_core.calls import Step
from clevagent_core.clock import Timer
from clevagent_core.hookspecs import hookimpl
from clevagent_core.verdicts import Incident
from clevagent_wire.beats import INCIDENT_FIELDS, Amounts, Beat, BeatKind

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.watchdog import Watchdog
    from clevagent_heartbeat.crashes import Crashes
    from clevagent_heartbeat.sender import Sender
    from clevagent_heartbeat.spool import Spool

logger = logging.getLogger("clevagent")

_INCIDENTS = 100
"""How many incidents wait for the next beat; of more, the oldest are left out."""
_SOON_S = 1.0
"""How long after something worth telling the next beat comes at the latest: a storm of it is one beat a second."""
_META_BYTES = 10_000
_NAME = 200
"""How many characters of a name are sent."""
_MOST = 2**53
"""The largest whole number that every reader of JSON knows exactly; what is larger was not meant."""
_FEW = 50
_PLAIN = frozenset({str, int, bool, type(None)})
"""What JSON can say as it is. Not floats: there is no NaN in JSON."""
_PING_FIELDS = ("message", "iteration_count", "memory_mb")


class Pulse:
    """Makes the beats of one watchdog, hands them to observers, and to the sender where a monitor is named."""

    def __init__(self) -> None:
        """Make no beat yet."""
        self._watchdog: Watchdog
        self._sender: Sender | None = None
        self._spool: Spool | None = None
        self._crashes: Crashes | None = None
        self._reset()
        _pulses.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self.boot_id = uuid.uuid4().hex
        """Which process this is."""
        self._timer: Timer | None = None
        self._seq = 0
        self._loops = 0
        self._forked_at = -math.inf
        self._ping: tuple[str, Mapping[str, Any]] | None = None
        """The status of the latest ping since the beat before, and what else it told."""
        self._status = "ok"
        """The status that the beat before was made with, or that the next one is already asked for."""
        self._iteration: int | None = None
        self._incidents: deque[Incident] = deque(maxlen=_INCIDENTS)
        self._told = Amounts()
        self._before = Amounts()
        """What a parent had used when this process was forked from it."""
        self._is_over = False

    # -- hooks ------------------------------------------------------------------------------------------------------------

    @hookimpl
    def clevagent_configure(self, watchdog: Watchdog) -> None:
        """Begin to beat at once where somebody listens; else with the first step."""
        self._watchdog = watchdog
        watchdog.pulse = self
        if watchdog.settings.endpoint is not None:
            self._connect(watchdog.settings.endpoint)
            self._start(first_s=0)

    @hookimpl
    def clevagent_step(self, run: Run, step: Step) -> None:  # noqa: ARG002 - hot hooks take all arguments
        """Take note of what a ping tells; begin to beat."""
        if step.kind == "ping":
            # Written down now: what it told may change, and is not ours to keep.
            self._ping = str(step.name)[:_NAME] or "ok", _plain(step.detail) if step.detail else step.detail
            if step.name != self._status:
                self._status = step.name
                self.soon()
        if self._timer is None:
            self._start(first_s=self._watchdog.settings.interval)

    @hookimpl
    def clevagent_incident(self, incident: Incident) -> None:
        """Keep it for the next beat, which comes soon."""
        if incident.kind == "loop":
            self._loops += 1
        self._incidents.append(incident)
        self.soon()

    @hookimpl
    def clevagent_unconfigure(self, watchdog: Watchdog) -> None:
        """Make the last beat, and send what waits until the flush deadline."""
        if self._crashes is not None:
            self._crashes.uninstall()
        if self._timer is not None:
            self._timer.stop()
        if self._timer is not None or watchdog.aborting is not None:
            self._make("stall" if watchdog.aborting is not None else "shutdown")
        self._is_over = True
        if self._sender is not None:
            self._sender.stop(watchdog.left_to_shut_down())

    # -- beats ------------------------------------------------------------------------------------------------------------

    def beat(self) -> float:
        """Make a beat, and answer in how many seconds the next one is made. On the thread of the watchdog's timers."""
        self._make("liveness")
        return self._watchdog.settings.interval

    def soon(self) -> None:
        """Have a beat made within a second. Never blocks."""
        if self._timer is not None:
            self._timer.wake(_SOON_S)

    def flush(self, timeout_s: float) -> int:
        """Make a beat of what there is, and wait until all are delivered, at most ``timeout_s`` seconds; tell how many are left."""
        if self._sender is None:
            return 0
        self._make("liveness")
        return self._sender.flush(timeout_s)

    def _make(self, kind: BeatKind, status: str | None = None) -> None:
        with self._lock:
            if self._is_over:
                return
            beat = self._assemble(kind, status)
            if self._sender is not None:
                self._sender.send(beat.to_wire())
        self._watchdog.plugins.beat(beat)

    def _assemble(self, kind: BeatKind, status: str | None) -> Beat:
        watchdog = self._watchdog
        clock, settings, moved_at = watchdog.clock, watchdog.settings, watchdog.steps.moved_at
        if moved_at is not None and moved_at <= self._forked_at:
            moved_at = None
        totals = self._totals()
        amounts = totals.since(self._told)
        self._told += amounts
        self._seq += 1
        ping, self._ping = self._ping, None
        said: Mapping[str, Any] = ping[1] if ping is not None else {}
        incidents = [self._incidents.popleft() for _ in range(len(self._incidents))]
        iteration = said.get("iteration_count")
        if type(iteration) is int and abs(iteration) <= _MOST:
            self._iteration = iteration
        said_status = ping[0] if ping is not None else "ok"
        if status is None:
            status = "shutdown" if kind == "shutdown" else "warning" if incidents and said_status == "ok" else said_status
        self._status = said_status
        memory: Any = said.get("memory_mb")
        return Beat(
            agent=settings.agent[:_NAME],
            boot_id=self.boot_id,
            seq=self._seq,
            sent_at=clock.wall(),
            kind=kind,
            status=status,
            message=str(said.get("message", ""))[:_META_BYTES],
            run_id=None if moved_at is None else (watchdog.steps.run_id or "")[:_NAME] or None,
            progress_age_s=None if moved_at is None else round(max(0.0, clock.monotonic() - moved_at), 3),
            interval_s=settings.interval,
            amounts=amounts,
            totals=totals,
            dropped=self._sender.dropped if self._sender is not None else 0,
            iteration_count=self._iteration,
            memory_mb=float(memory) if type(memory) in (int, float) and 0 <= memory <= _MOST else _resident_mb(),
            incidents=[_told(incident, with_errors="exception_messages" in settings.capture) for incident in incidents],
            meta={name: value for name, value in said.items() if name not in _PING_FIELDS},
            host=_host(),
            pid=os.getpid(),
        )

    def _totals(self) -> Amounts:
        return Amounts(**self._watchdog.totals()._asdict(), steps=self._watchdog.steps.count, loops=self._loops).since(self._before)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _start(self, *, first_s: float) -> None:
        with self._lock:
            if self._timer is None and not self._is_over:
                self._timer = self._watchdog.clock.repeat(self.beat, first_s)
                if self._sender is not None:
                    self._sender.start()
                self._end_with_child()

    def _end_with_child(self) -> None:
        """See to it that a child of ``multiprocessing`` makes its last beat, too: a forked one ends without ``atexit``."""
        processes, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
        if processes is not None and util is not None and processes.parent_process() is not None:
            util.Finalize(self, _end, (weakref.ref(self),), exitpriority=0)

    def _connect(self, endpoint: str) -> None:
        from clevagent_heartbeat.crashes import Crashes  # noqa: PLC0415 - only where a monitor is named
        from clevagent_heartbeat.sender import Sender  # noqa: PLC0415 - as above
        from clevagent_heartbeat.spool import Spool  # noqa: PLC0415 - as above

        watchdog = self._watchdog
        settings = watchdog.settings
        if settings.spool != "off":
            path = settings.spool or _spool_path(settings.agent, endpoint)
            self._spool = Spool(path, boot_id=self.boot_id, clock=watchdog.clock)
        self._sender = Sender(
            endpoint=endpoint, api_key=settings.api_key, clock=watchdog.clock, spool=self._spool, on_answer=self._on_answer
        )
        self._crashes = Crashes(self._crashed)
        self._crashes.install()

    def _on_answer(self, answer: Mapping[str, Any]) -> None:
        if self._sender is not None:
            self._watchdog.control.apply(answer, self._sender.report)

    def _crashed(self, where: str, error: BaseException) -> None:
        """Tell of an exception that nobody caught."""
        from clevagent_heartbeat.stacks import from_exception  # noqa: PLC0415 - only where something has crashed

        watchdog = self._watchdog
        stack = from_exception(error)
        text = f": {_text_of(error)}" if "exception_messages" in watchdog.settings.capture else ""
        self._incidents.append(
            Incident(
                kind="crash",
                message=f"{type(error).__qualname__}{text} was caught by nobody in the {where}, at {stack.where}.",
                agent=watchdog.settings.agent,
                run_id=watchdog.current_run(tells=False).run_id,
                at=watchdog.clock.wall(),
                details={
                    "type": f"{type(error).__module__}.{type(error).__qualname__}",
                    "where": where,
                    "at": stack.where,
                    "stack": stack.lines(),
                    "causes": list(stack.causes),
                },
            )
        )
        self._make("crash", "error")

    def after_fork(self) -> None:
        """Be another process: a forked child has its own id, numbers and totals, and beats from its first step."""
        self._reset()
        if not hasattr(self, "_watchdog"):
            return  # its watchdog could not be made
        self._before = self._totals()
        self._forked_at = self._watchdog.clock.monotonic()
        if self._spool is not None:
            self._spool.after_fork(self.boot_id)
        if self._sender is not None:
            self._sender.after_fork()


def _told(incident: Incident, *, with_errors: bool = False) -> Mapping[str, object]:
    if not with_errors and "error" in incident.details:
        # What somebody's exception says may quote prompts and answers: its type is told instead.
        error = str(incident.details["error"])
        kind = error.partition("(")[0]
        text = incident.message.replace(error, kind)
        incident = replace(incident, message=text, details={**incident.details, "error": kind})
    return {name: getattr(incident, name) for name in INCIDENT_FIELDS[:-1]} | {"details": _plain(incident.details)}


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failed:  # whose code: the user's exception, which cannot say what it is
        return f"(its text cannot be written: {type(failed).__name__})"


def _plain(given: Mapping[str, object]) -> Mapping[str, object]:
    """Make a mapping of what JSON can say; what it cannot is told as text, and what is too much is left out."""
    if all(type(value) in _PLAIN and type(name) is str for name, value in given.items()) and len(given) <= _FEW:
        return {name: value[:_META_BYTES] if type(value) is str else value for name, value in given.items()}
    try:
        text = json.dumps({str(name): value for name, value in given.items()}, default=str)
    except Exception as error:  # whose code: the user's objects, written as text
        return {"left_out": f"it cannot be written as JSON: {type(error).__name__}"}
    if len(text) > _META_BYTES:
        return {"left_out": f"it is {len(text)} characters long, and at most {_META_BYTES} are sent"}
    plain: Mapping[str, object] = json.loads(text, parse_constant=str)
    return plain


def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def _resident_mb() -> float | None:
    """Read how much memory the process has resident, in megabytes (2^20 bytes); ``None`` where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - pathlib is not needed for anything else here
            pages = int(file.read().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except (OSError, ValueError, AttributeError):  # no /proc here: the most it ever had tells something, too
        return _peak_mb()


def _peak_mb() -> float | None:
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _end(reference: weakref.ref[Pulse]) -> None:
    pulse = reference()
    if pulse is not None:
        pulse.clevagent_unconfigure(pulse._watchdog)  # noqa: SLF001 - the same module


def _spool_path(agent: str, endpoint: str) -> str:
    """One file for each agent and monitor, where programs of a user keep their state."""
    home = os.path.expanduser("~")  # noqa: PTH111 - pathlib raises where there is no home
    state = os.environ.get("XDG_STATE_HOME") or (
        os.path.join(home, ".local", "state") if home != "~" else tempfile.gettempdir()  # noqa: PTH118 - as above
    )
    name = re.sub(r"[^\w.-]", "_", agent)[:64] + "-" + hashlib.sha256(f"{agent} {endpoint}".encode()).hexdigest()[:8]
    return os.path.join(state, "clevagent", f"{name}.spool")  # noqa: PTH118 - as above


_pulses: weakref.WeakSet[Pulse] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pulse in list(_pulses):
        pulse.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


def plugin() -> Pulse:
    """Make the built-in plugin of this module."""
    return Pulse()
