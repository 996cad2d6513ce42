"""The watchdog: owns the plugins, the ledger, and the runs of one agent. Two of them in one process share nothing."""

from __future__ import annotations

import logging
import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from clevagent_core.accounts import record
from clevagent_core.attribution import known_run, run_around_work, run_of_call
from clevagent_core.baselines import Baselines
from clevagent_core.blocks import RunBlock
from clevagent_core.budgets import Budget, check_names
from clevagent_core.calls import Call, LLMCall, Usage
from clevagent_core.clock import Clock, SystemClock
from clevagent_core.control import Control
from clevagent_core.errors import LedgerError, UsageError
from clevagent_core.frames import Frame, Within, frame_of, living
from clevagent_core.idle import IdleBudgets, place
from clevagent_core.incidents import IncidentTeller
from clevagent_core.interrupts import is_interrupt
from clevagent_core.ledger.account import Ledger
from clevagent_core.plugins import Plugins
from clevagent_core.pricing import Rates
from clevagent_core.progress import Steps
from clevagent_core.runs import Run
from clevagent_core.settings import Settings
from clevagent_core.summaries import RunSummary, Tally, Totals, total
from clevagent_core.tickets import Ticket
from clevagent_core.verdicts import Incident

logger = logging.getLogger("clevagent")

_CLIENTS = frozenset({"openai", "anthropic"})
"""What ``auto_cost`` attaches to."""
_RATES = 4096
_RECENT = 100


class Pulse(Protocol):
    """What makes the beats of a watchdog, as far as the core needs it."""

    def flush(self, timeout_s: float) -> int:
        """Deliver the beats that wait, within ``timeout_s`` seconds; return how many are left."""
        ...


class Watchdog:
    """Everything that watches one agent. Most programs use the one that ``clevagent.init()`` makes.

    Safe to use from any thread and any event loop.
    """

    pulse: Pulse | None = None
    """What makes the heartbeats, unless its plugin is blocked."""
    aborting: Incident | None = None
    """Why the process is about to be ended (``abort``)."""
    _shutdown_by = float("inf")
    _is_shut_down = _has_started_run = False

    def __init__(self, *, clock: Clock | None = None, **settings: Any) -> None:
        """Resolve the settings, load the plugins, open the ledger.

        Args:
            clock: another clock, for tests.
            settings: the fields of :class:`~clevagent_core.settings.Settings`.

        Raises:
            UsageError: a setting that is unknown or cannot be what it is. PluginError: a plugin given by name is broken.

        """
        self.settings = Settings.resolve(settings)
        self.clock: Clock = clock or SystemClock()
        self.pid = os.getpid()
        self.current = View(self, _current_run)
        """The innermost run of this context, by its ``get()``; for a look, what a call belongs to ``current_run()`` tells."""
        self.tool = View(self, _current_tool)
        """The tool that this context runs, by its ``get()``."""
        self.recent: deque[Incident] = deque(maxlen=_RECENT)
        """The latest incidents, oldest first."""
        self.steps = Steps()
        """How the whole process gets on."""
        self.idle = IdleBudgets()
        """Which names exist, and which budgets have covered a call."""
        self._ended = Tally()
        """What the runs that are over have used."""
        self._roots: dict[Run, None] = {}
        self.control = Control(self)
        """What was asked for from outside."""
        self.plugins = Plugins(block=self.settings.block)
        self._teller = IncidentTeller(self.plugins.incident, self.clock)
        self._lock = threading.RLock()
        self._left: dict[Run, None] = {}
        self.ending: deque[Run] = deque()
        """Runs that are to be ended by whoever comes next."""
        # The runs that raw threads may belong to, each with whether it is a block of the user's.
        self._active: dict[Run, bool] = {}
        self._rates: dict[tuple[str, str | None, str | None], tuple[Rates | None, float]] = {}
        self._next_expiry_check = self.clock.monotonic()
        self._told: set[tuple[str, object]] = set()
        # Calls that were made elsewhere, and that the ledger could not take yet.
        self.unrecorded: deque[tuple[Run, Call, Usage, int | None]] = deque()
        self._attached: set[str] = set()
        self.plugins.load(self.settings.plugins)
        self.ledger: Ledger = self._open_ledger()
        self.baselines = Baselines(self.ledger, self.clock)
        """What is usual for this agent."""
        # Its accounts are this process's own, also in a ledger that others share.
        self.process_run = Run(self, run_id=f"process-{uuid.uuid4().hex[:12]}")
        """What is called outside every run belongs to this one."""
        _watchdogs.add(self)
        self.plugins.configure(self)
        self.plugins.run_started(self.process_run)
        self._attach_as_set()
        if self.settings.api_key is not None and self.settings.endpoint is None:
            logger.warning(
                "ClevAgent was given an api_key and no endpoint, so no heartbeat is sent: what it guards, it guards in this process. Name "
                "the monitor: clevagent.init(endpoint='https://...')."
            )

    def _open_ledger(self) -> Ledger:
        if self.settings.on_loop != "warn" and "clevagent_core.guards.loop" in self.settings.block:
            raise UsageError(
                f"on_loop={self.settings.on_loop!r} is given, but the plugin that finds loops is blocked (clevagent_core.guards.loop), so "
                "none would be stopped. Take it out of block=[...], or leave on_loop out."
            )
        ledger = self.plugins.ledger(self.settings.ledger, self.clock, self.settings.agent)
        if ledger is None:
            blocked = ", ".join(self.settings.block)
            raise UsageError(
                f"ledger={self.settings.ledger!r} is not known to any plugin, so nothing could be counted"
                f"{f' (block leaves out {blocked})' if blocked else ''}. "
                "Use ledger='memory' (the default) or ledger='sqlite:///path', and do not block their plugins; or give the plugin that knows it."
            )
        return ledger

    def _attach_as_set(self) -> None:
        for name in self.settings.attach:
            self.attach(name)
        if self.settings.auto_cost or (self.settings.auto_cost is None and self.settings.api_key is not None):
            self._attach_when_imported({name: module for name, module in self.plugins.attachable().items() if name in _CLIENTS})

    @property
    def is_used(self) -> bool:
        """Whether a run was started or a call was made: what it counted would be lost if it were replaced."""
        return self._has_started_run or self.process_run.is_used

    def attach(self, name: str) -> None:
        """Attach to a whole framework, until ``shutdown``; ``auto``: to each that is imported, now or later.

        Raises:
            UsageError: no plugin can.

        """
        if name in self._attached:
            return
        # At once: what a plugin imports to attach may set off the import hook of "auto" for the same name.
        self._attached.add(name)
        try:
            self._attach(name)
        except BaseException:
            self._attached.discard(name)
            raise

    def _attach(self, name: str) -> None:
        if name == "auto":
            self._attach_when_imported(self.plugins.attachable())
        elif not self.plugins.attach(name, self):
            known = ", ".join(map(repr, ("auto", *sorted(self.plugins.attachable()))))
            raise UsageError(
                f"attach={name!r}: no plugin can attach to that, so nothing of it would be guarded. Known here: {known}. "
                "`clevagent plugins` lists what is loaded."
            )

    def _attach_when_imported(self, modules: Mapping[str, str]) -> None:
        import wrapt  # noqa: PLC0415 - takes as long as half of clevagent, and is only needed here

        for name, module in modules.items():
            # Hooks of imports cannot be taken back: they must not keep a watchdog alive.
            wrapt.register_post_import_hook(partial(_attach_to_imported, weakref.ref(self), name), module)

    # -- runs -------------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        budgets: Sequence[Budget] = (),
        guards: Sequence[object] = (),
        tags: Mapping[str, str] | None = None,
        dry_run: bool = False,
    ) -> RunBlock:
        """Make a block for one piece of work: see ``clevagent.run``."""
        return RunBlock(lambda: self, budgets=budgets, guards=guards, tags=tags, dry_run=dry_run)

    def outside_runs(self) -> Within:
        """Make a block whose calls belong to no run: see ``clevagent.outside_runs``."""
        return Within(lambda: self.process_run)

    def current_run(self, *, tells: bool = True) -> Run:
        """Find the run that a call made here belongs to: see :mod:`clevagent_core.attribution`.

        Where nobody can tell, that is one that refuses every call. ``tells=False`` says that this is no call, of which somebody
        should hear.
        """
        frame = frame_of(self)
        if frame is not None:
            run: Run = frame.run
            return run
        with self._lock:
            active = dict(self._active)
        return run_of_call(self.process_run, active, tells=tells)

    def known_run(self) -> Run | None:
        """Find the run of code that no frame claims, where that is known: see :mod:`clevagent_core.attribution`."""
        return known_run(self.process_run)

    def set_active(self, run: Run, *, is_active: bool) -> None:
        """Tell whether code that nobody has told of a run may belong to this one: that of a generator, only while it is stepped."""
        with self._lock:
            if is_active:
                self._active[run] = True
            else:
                self._active.pop(run, None)

    def enclosing_run(self) -> Run | None:
        """Find the run that a piece of work which begins here (a root invocation, a kickoff) is a part of; ``None`` if of none."""
        frame = frame_of(self)
        if frame is not None:
            run: Run = frame.run
            return run
        with self._lock:
            active = dict(self._active)
        return run_around_work(self.process_run, active)

    def start_run(
        self,
        *,
        budgets: Sequence[Budget] = (),
        tags: Mapping[str, str] | None = None,
        parent: Run | None = None,
        dry_run: bool = False,
        guards: Sequence[object] = (),
        inherited: bool = True,
        run_id: str | None = None,
        resumable: bool = False,
        is_block: bool = False,
    ) -> Run:
        """Begin a run; whoever begins it ends it.

        Args:
            budgets: its own ceilings.
            tags: what it is known by, for ``Budget(by=...)``.
            parent: the run around it.
            dry_run: stop nothing in it.
            guards: plugins for this run, and for those nested in it.
            inherited: whether raw threads belong to it while it is the only one active.
            run_id: the id of a run that goes on; a new one is made when not given.
            is_block: whether work that begins in raw threads belongs to it, too: the user has put it around everything.
            resumable: whether it may go on later, under the same id: its accounts then outlive it, for 30 days.

        Raises:
            UsageError: two budgets with one name; an action nothing can carry out; a tag that is no text; after ``shutdown``.

        """
        if self._is_shut_down:
            raise UsageError("This watchdog was shut down, so nothing would be guarded. Call clevagent.init() again first.")
        check_names(tuple(budgets))
        for name, value in (tags or {}).items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise UsageError(
                    f"tags={{{name!r}: {value!r}}}: names and values of tags are text, by which Budget(by=...) tells accounts apart. Write str({value!r})."
                )
        own = None
        if guards:
            own = Plugins()
            for guard in guards:
                own.register(guard)
        run = Run(self, budgets=budgets, tags=tags, parent=parent, run_id=run_id, dry_run=dry_run, guards=own, resumable=resumable)
        if budgets:
            run.place = place()
        self._has_started_run = True
        if self.ending:
            self.end_waiting()
        with self._lock:
            if parent is None:
                self._roots[run] = None
            if inherited:
                self._active[run] = is_block
        self.plugins.run_started(run)
        return run

    def run_is_left(self, run: Run) -> None:
        """Take note that a run only waits for its streams to be read: code that nobody has told of a run is none of it."""
        with self._lock:
            self._left[run] = None
            self._active.pop(run, None)

    def end_soon(self, run: Run) -> None:
        """End a run before the next one begins, or when holds are looked through: where nothing may be waited for, in a destructor."""
        self.ending.append(run)

    def end_waiting(self) -> None:
        """End the runs that were to be ended soon."""
        while self.ending:
            try:
                run = self.ending.popleft()
            except IndexError:  # another thread has taken it
                return
            run.end()

    def run_is_over(self, run: Run, summary: RunSummary) -> None:
        """Take note that a run has ended, and tell observers."""
        with self._lock:
            self._active.pop(run, None)
            self._left.pop(run, None)
            if self._roots.pop(run, run) is None:
                run.tally.bequeath(self._ended)
        self.plugins.run_ended(run, summary)

    def roots(self) -> list[Run]:
        """The outermost runs that go on, the process's own first."""
        return [self.process_run, *list(self._roots)]

    def totals(self) -> Totals:
        """Add up what the whole process has used since this watchdog began, the runs that go on included."""
        with self._lock:
            return total([self._ended, *(run.tally for run in self.roots())])

    # -- what runs and guards need ----------------------------------------------------------------------------------------

    def rates(self, call: LLMCall) -> Rates | None:
        """Find what a model costs now; remembered until the price changes."""
        key = (call.model, call.provider, call.service_tier)
        found = self._rates.get(key)
        if found is not None and self.clock.wall() < found[1]:
            return found[0]
        rates = self.plugins.price(*key)
        if len(self._rates) >= _RATES:
            self._rates.clear()
        # What nobody knows is asked for again after a minute: a price list may have been updated.
        self._rates[key] = rates, rates.valid_until if rates is not None else self.clock.wall() + 60
        return rates

    def next_expiry(self) -> float:
        """Tell when (monotonic seconds) a hold made now is charged; now and then, charge those whose time is over."""
        now = self.clock.monotonic()
        if now >= self._next_expiry_check:
            self._next_expiry_check = now + self.settings.hold_s / 10
            self.expire(now)
            self.end_waiting()
        return now + self.settings.hold_s

    def expire(self, now: float) -> None:
        """Charge every call that nobody has heard of for ``hold_s`` seconds."""
        for hold in self.ledger.holds():
            if hold.expires_at <= now and isinstance(hold.owner, Ticket):
                hold.owner.charge()
        self.ledger.expire(now)

    def tell(self, incident: Incident) -> None:
        """Tell an incident: in the log now, to observers on another thread. Never blocks, never raises."""
        self.recent.append(incident)
        logger.warning("%s", incident.message, extra={"clevagent_incident": incident})
        self._teller.tell(incident)

    def record_waiting(self) -> None:
        """Record what was logged. What the ledger still cannot take waits, and that is told once; nothing is raised for it."""
        waiting = self.unrecorded
        while waiting:
            try:
                logged = waiting.popleft()
            except IndexError:  # another thread has taken it
                return
            try:
                record(*logged)
            except LedgerError as error:
                waiting.appendleft(logged)
                message = f"What was logged is not recorded yet: {error} It is kept in memory, and recorded before the next call is let through."
                self.tell_once(
                    Incident(
                        kind="ledger", message=message, agent=self.settings.agent, run_id=logged[0].run_id, at=self.clock.wall()
                    ),
                    key="unrecorded",
                )
                return

    def tell_once(self, incident: Incident, *, key: object) -> None:
        """Tell an incident, unless one of its kind was told for ``key`` before."""
        told = incident.kind, key
        if told not in self._told:
            self._told.add(told)
            self.tell(incident)

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait until observers have heard every incident and the monitor every heartbeat, at most ``timeout_s`` (``flush_s``) seconds.

        Tells how many are left.
        """
        deadline = self.clock.monotonic() + (self.settings.flush_s if timeout_s is None else timeout_s)
        left = self._teller.flush(deadline - self.clock.monotonic())
        if self.pulse is not None:
            left += self.pulse.flush(max(0.0, deadline - self.clock.monotonic()))
        return left

    def shutdown(self) -> None:
        """End every run that is still active, detach, tell what is waiting, within ``flush_s`` seconds. Safe to call twice."""
        if self._is_shut_down:
            return
        self._shutdown_by = self.clock.monotonic() + self.settings.flush_s
        self.control.close()
        if self.pid == os.getpid():
            self.end_waiting()
            with self._lock:
                active = [*self._active, *self._left]
            for run in reversed(active):
                run.end(at_once=True)
            self.process_run.end()
            self.record_waiting()
            idle = self.idle.process_ended(self.process_run)
            if idle is not None:
                self.tell(idle)
            if self.unrecorded:
                logger.warning("%d calls that were logged could not be recorded in the ledger, and are lost.", len(self.unrecorded))
        # else forked: the runs are the parent's to end.
        self._is_shut_down = True
        # First, so that what observers and the last heartbeat have to tell is complete.
        self._teller.flush(self.left_to_shut_down())
        self.plugins.unconfigure(self)
        self.ledger.close()
        self._teller.stop(self.left_to_shut_down())

    def left_to_shut_down(self) -> float:
        """How many seconds are left of ``flush_s`` since ``shutdown`` began."""
        return min(self.settings.flush_s, max(0.0, self._shutdown_by - self.clock.monotonic()))

    def abort(self, incident: Incident, status: int) -> None:
        """End the process although some of it is stuck: tell what is waiting until the flush deadline, then leave with ``status``.

        What the ledger holds is charged; ``finally`` blocks and ``atexit`` functions are not run, since they could be stuck, too.
        """
        self.aborting = incident
        # On a thread of its own: what is stuck may hold a lock that is needed.
        last = threading.Thread(target=self.shutdown, name="clevagent-abort", daemon=True)
        last.start()
        last.join(self.settings.flush_s + 1)
        logging.shutdown()
        os._exit(status)

    def _after_fork(self) -> None:
        # Threads of the parent may have held these locks; the child has none of them.
        self._lock = threading.RLock()
        self.unrecorded.clear()  # the parent records it
        self.baselines.after_fork()
        # The root of a run that goes on may have ended.
        for run in {self.process_run, *self._active, *self._roots, *(run.root for run in self._active)}:
            run.after_fork()


_watchdogs: weakref.WeakSet[Watchdog] = weakref.WeakSet()


def _attach_to_imported(reference: weakref.ref[Watchdog], name: str, module: object) -> None:  # noqa: ARG001 - as wrapt calls it
    watchdog = reference()
    if watchdog is None or watchdog._is_shut_down:  # noqa: SLF001 - the same module
        return
    try:
        watchdog.attach(name)
    except Exception as error:  # whose code: ours, inside the user's import; it must not fail for that, but it is told
        if is_interrupt(error):
            raise
        logger.exception("ClevAgent could not attach to %s.", name)
        watchdog.tell(
            Incident(
                kind="attach",
                message=(
                    f"{name} was imported, but ClevAgent could not attach to it ({error}), so its calls go out unchecked. Mend what is "
                    f"told, or guard what is made with it: clevagent.guard(...). init(attach=[{name!r}]) fails instead of going on."
                ),
                agent=watchdog.settings.agent,
                run_id=watchdog.process_run.run_id,
                at=watchdog.clock.wall(),
            )
        )


def _after_fork_in_child() -> None:
    for watchdog in list(_watchdogs):
        watchdog._after_fork()  # noqa: SLF001 - the same module


os.register_at_fork(after_in_child=_after_fork_in_child)


class View:
    """Looks at what stands around this context, where somebody wants to know."""

    __slots__ = ("_look", "_watchdog")

    def __init__(self, watchdog: Watchdog, look: Callable[[Frame], Any]) -> None:
        """Look with ``look``."""
        self._watchdog = weakref.ref(watchdog)
        self._look = look

    def get(self) -> Any:
        """Tell what is there now; ``None`` for nothing."""
        frame = frame_of(self._watchdog())
        return None if frame is None else self._look(frame)


def _current_run(frame: Frame) -> object:
    return frame.run


def _current_tool(frame: Frame) -> str | None:
    tools = living(frame, "tool")
    return tools[-1].name if tools else None
