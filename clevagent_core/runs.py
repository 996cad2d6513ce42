"""Runs: check -> reserve -> a ticket for the call, which is settled, released or charged.

A :class:`Run` is one piece of the agent's work. Adapters and the framework-free door ask it for a :class:`Ticket` before each
call; a call without a ticket is not sent. Only this module turns a guard's ``Stop`` into an exception.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clevagent_core.accounts import accounts_of
from clevagent_core.budgets import UNITS, Budget
from clevagent_core.calls import Call, LLMCall, Step, Usage
from clevagent_core.clock import ReentrantEvent
from clevagent_core.errors import BudgetBusy, BudgetExceeded, LedgerError, LoopDetected, RemoteStop, Stopped, UsageError, passing
from clevagent_core.frames import Within, current_task, frame_of, living
from clevagent_core.interrupts import is_interrupt
from clevagent_core.latches import Latches
from clevagent_core.money import to_pico, to_usd
from clevagent_core.plugins import BoundHooks
from clevagent_core.progress import Progress
from clevagent_core.summaries import Remaining, RunSummary, Tally, summarize
from clevagent_core.tickets import Reservation, Ticket, Wait, Work, release_all, release_interrupted
from clevagent_core.verdicts import Incident, Stop, Warn

if TYPE_CHECKING:
    from clevagent_core.ledger.account import Account, AccountKey, Balance, Refusal
    from clevagent_core.plugins import Plugins
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")


_TOLD_BY_GUARDS = frozenset({"budget", "busy", "loop", "remote", "paused"})
_PASSING = frozenset({"busy", "paused"})
"""The refusals that end by themselves: a call that can wait does so."""
_ERRORS: dict[str, type[Stopped]] = {
    "budget": BudgetExceeded,
    "busy": BudgetBusy,
    "loop": LoopDetected,
    "remote": RemoteStop,
    "paused": RemoteStop,
    "run_over": BudgetExceeded,
    "unattributed": BudgetExceeded,
}


class Run:
    """One piece of the agent's work, from start to outcome.

    Made by ``clevagent.run()``; a run made inside another one is nested: what it uses counts against both. Every method is
    safe from any thread.
    """

    def __init__(  # noqa: PLR0915 - what a run is, one line for each
        self,
        watchdog: Watchdog,
        *,
        budgets: Sequence[Budget] = (),
        tags: Mapping[str, str] | None = None,
        parent: Run | None = None,
        run_id: str | None = None,
        dry_run: bool = False,
        guards: Plugins | None = None,
        resumable: bool = False,
    ) -> None:
        """Made by ``Watchdog.start_run``."""
        self.watchdog = watchdog
        self._hooks: tuple[BoundHooks, BoundHooks, BoundHooks] | None = None
        self.guards: BoundHooks | None = parent.guards if parent is not None else None
        """The hooks of the guards of this run and of those around it, beside the watchdog's plugins."""
        if guards is not None:
            self.guards = (self.guards or BoundHooks()) + guards.bound_hooks
        self.parent = parent
        self.root: Run = parent.root if parent is not None else self
        self.run_id = run_id or os.urandom(16).hex()  # a UUID takes a tenth of what beginning and ending a run costs
        self.budgets = tuple(budgets)
        self.tags: dict[str, str] = {**(parent.tags if parent is not None else {}), **(tags or {})}
        self.dry_run: bool = dry_run or watchdog.settings.dry_run or (parent is not None and parent.dry_run)
        if self.budgets or (parent is None and watchdog.settings.budgets):
            _check_enforced(self)
        self.pid = os.getpid()
        self.started_at = watchdog.clock.wall()
        self.started_monotonic = watchdog.clock.monotonic()
        """When it began, in monotonic seconds; deadlines are counted from there."""
        self.ended_at: float | None = None
        self.accounts: dict[AccountKey, Account] = {}
        """The accounts whose window is this run."""
        self.used: dict[AccountKey, Account] = {}
        """Every account that a call of this run, or of one nested in it, counted against."""
        self.latches = Latches()
        """The accounts that have refused a call of this run tree; kept on its root, and once a nested run is over, its own on itself."""
        self.ceilings: dict[str, int | None] = {}
        """The ceilings of this run that depend on the agent's past, in pico-USD by budget; ``None`` where that is not known yet."""
        self.met: set[str] = set()
        """Its own budgets that have covered a call, by name."""
        self.place: object = None
        """Where it was begun, where that is of interest."""
        self.is_asked = False
        """Whether something guarded was asked in it that need not bring a call: a model may answer from a cache."""
        self.sees_tools = False
        """Whether something that sees tool calls is attached in this run tree; kept on its root."""
        self.lent: dict[str, Budget] = {}
        """The budgets of guarded objects and nodes that were called in it, or in one nested in it, by name: they can be topped up."""
        self.resumable = resumable
        """Whether it may go on later under the same id, here or in another process: its accounts outlive it."""
        self.gates: dict[object, Callable[[Run], Stop | None]] = {}
        """What guards that have stopped a whole run tree answer, before work begins that is no call itself; kept on its root."""
        self.finished_nodes = 0
        """How many nodes of graphs the loop guard has seen to their end in this run tree; kept on its root."""
        self.open_work: dict[Ticket | Work, None] = {}
        """What goes on in this run tree: calls that nobody has told yet what became of, nodes and tasks; oldest first; kept on its root."""
        self.stops: list[Incident] = []
        """Why work in it, or in one nested in it, was ended gracefully."""
        self.memo: dict[object, Any] = {}
        """For guards: what they worked out for this run. Emptied when it grows large."""
        self.state: dict[object, Any] = {}
        """For guards: what each has seen of this run, with the guard itself as the key."""
        self.forgiven = 0
        """How often ``forgive_loops`` was called on this run tree; kept on its root."""
        self.progress: Progress = Progress(self.started_monotonic, current_task()) if parent is None else parent.progress
        """How the whole run tree gets on."""
        self.barred: Incident | None = None if parent is None else parent.barred
        """Why every call in it is refused."""
        self._leases: set[object] = set()
        self._is_left = False
        self._handled = id(sys.exception())
        self._tally = Tally()

    # -- calls ------------------------------------------------------------------------------------------------------------

    def open(self, call: Call, extra: Sequence[Budget] = (), *, through: type[BaseException] | None = None) -> Ticket:
        """Check ``call`` and hold what it could cost, or raise. Blocks up to ``wait_s`` while money is merely held.

        On a thread that runs an event loop it never blocks: there it raises ``BudgetBusy`` at once. What is raised is ``through``,
        too, the type that a framework lets pass.

        Raises:
            BudgetExceeded: a budget has no room. BudgetBusy: the room is held by calls in flight. Stopped: another guard.
            UsageError: the call cannot be priced or bounded. LedgerError: the ledger cannot be used.

        """
        answer = self._try(call, extra)
        if isinstance(answer, Ticket):
            return answer
        if answer.incident.kind in _PASSING and not _in_event_loop() and (answer.incident.kind != "busy" or self._others_hold()):
            answer = self._wait(call, extra, answer)
            if isinstance(answer, Ticket):
                return answer
        raise self.refused(answer.incident, through)

    async def aopen(self, call: Call, extra: Sequence[Budget] = (), *, through: type[BaseException] | None = None) -> Ticket:
        """Do what ``open`` does, waiting without blocking the event loop."""
        answer = self._try(call, extra)
        if isinstance(answer, Ticket):
            return answer
        if answer.incident.kind in _PASSING:
            answer = await self._await(call, extra, answer)
            if isinstance(answer, Ticket):
                return answer
        raise self.refused(answer.incident, through)

    def begin(self, name: str, place: tuple[str, ...] | None = None) -> Work:
        """Tell that a piece of work begins which is no call itself, as a node: where it is stuck can be told then. ``finish`` ends it.

        It can be the activity of a frame (``place``: see there).
        """
        work = Work(self, name, place)
        self.root.open_work[work] = None
        return work

    def finish(self, work: Work) -> None:
        """Tell that a piece of work is over, whatever came of it."""
        self.root.open_work.pop(work, None)

    def step(self, step: Step) -> None:
        """Tell a sign of progress."""
        self.tell_step(self.hooks(), step)

    def tell_step(self, hooks: BoundHooks, step: Step) -> None:
        """Tell a sign of progress to hooks that are known already. For tickets."""
        progress, steps = self.progress, self.watchdog.steps
        now = self.watchdog.clock.monotonic()
        steps.moved_at, steps.run_id, steps.count = now, self.root.run_id, next(steps.numbers)
        if now - progress.moved_at > progress.longest_pause_s:  # noqa: PLR1730 - max() would take longer than all the rest
            progress.longest_pause_s = now - progress.moved_at
        progress.moved_at = now
        progress.thread = threading.get_ident()
        if step.kind == "ping":
            progress.pings += 1
        for observer in hooks.step:
            try:
                observer(self, step)
            except Exception as error:  # whose code: a plugin's; observers fail open
                if is_interrupt(error):
                    raise
                logger.exception("An observer of steps failed and was passed over.")

    def hooks(self) -> BoundHooks:
        """The hot hooks in force for this run."""
        hooks, own = self.watchdog.plugins.bound_hooks, self.guards
        if own is None:
            return hooks
        if self._hooks is None or self._hooks[0] is not hooks or self._hooks[1] is not own:
            # Neither changes while calls are made, but for a plugin that is registered late.
            self._hooks = hooks, own, hooks + own
        return self._hooks[2]

    @property
    def is_used(self) -> bool:
        """Whether a call was made, refused or recorded in it."""
        tally = self._tally
        return bool(self.used or self.memo or tally.by_model or tally.by_tool or tally.refusals)

    @property
    def tally(self) -> Tally:
        """What it has used so far."""
        return self._tally

    @property
    def cost_pico(self) -> int:
        """What it has cost so far, in pico-USD; nested runs included, calls in flight not."""
        return self._tally.cost

    def log(self, call: Call, usage: Usage, cost_pico: int | None) -> None:
        """Record a call that was made elsewhere. It is always recorded, even past a ceiling, and never raises ``Stopped``.

        What the ledger cannot take now is kept, and recorded before the next call is let through.
        """
        self.watchdog.unrecorded.append((self, call, usage, cost_pico))
        self.count(call, usage, cost_pico)
        self.watchdog.record_waiting()

    # -- what it has used -------------------------------------------------------------------------------------------------

    def summary(self) -> RunSummary:
        """Tell what the run has used so far, by model, node and tool, and how its budgets stand."""
        ledger = self.watchdog.ledger
        balances = [(account, ledger.balance(account)) for account in list(self.used.values())]
        return summarize(self, self._tally, [(balance, self.is_latched(account, balance)) for account, balance in balances])

    def is_latched(self, account: Account, balance: Balance) -> bool:
        """Check whether a budget has refused the run, and was not topped up since. ``balance`` was just read."""
        return any(run.latches.is_shut(account, balance) for run in self.chain())

    def latch(self, refusal: Refusal) -> None:
        """Refuse, from now on, all that a budget covers in this run tree, as it has refused a call."""
        key = refusal.line.account.key
        over = (run for run in self.chain() if run.ended_at is not None and key in run.accounts)
        next(over, self.root).latches.shut(refusal)

    def remaining(self) -> Remaining:
        """Tell what the tightest budgets that cover the whole run leave it, calls in flight taken off; 0 where one has refused it."""
        left: dict[str, int] = {}
        for budget, account in accounts_of(self):
            if budget.node or budget.tool or budget.model:
                continue
            balance = self.watchdog.ledger.balance(account)
            unit = UNITS[balance.key.unit]
            free = 0 if self.is_latched(account, balance) else balance.free
            left[unit] = min(left.get(unit, free), free)
        usd = left.pop("usd", None)
        return Remaining(usd=None if usd is None else to_usd(usd), **left)

    def top_up(
        self,
        *,
        usd: float | str = 0,
        tokens: int = 0,
        input_tokens: int = 0,
        output_tokens: int = 0,
        llm_calls: int = 0,
        tool_calls: int = 0,
        budget: str | None = None,
        thread_id: str | None = None,
    ) -> None:
        """Raise a ceiling: runs that it has refused go on, and so do calls that wait.

        Args:
            usd: by how many US dollars.
            tokens: by how many tokens (of a ``tokens=`` limit).
            input_tokens: by how many input tokens.
            output_tokens: by how many output tokens.
            llm_calls: by how many model calls.
            tool_calls: by how many tool calls.
            budget: the budget's name. Not needed where only one budget of this run, of those around it, or of an object that was
                guarded with budgets of its own and called in them, has that limit.
            thread_id: the conversation whose ceiling is meant, of a ``per="thread"`` budget.

        Raises:
            UsageError: nothing to add, a negative amount, or no single budget that is meant.

        """
        counts = {
            "tokens": tokens,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "llm_calls": llm_calls,
            "tool_calls": tool_calls,
        }
        amounts = {"usd": to_pico(usd, what="usd"), **counts}
        if any(type(amount) is not int or amount < 0 for amount in amounts.values()) or not any(amounts.values()):
            raise UsageError(
                f"top_up({', '.join(f'{name}={value!r}' for name, value in {'usd': usd, **counts}.items() if value)}) cannot be added: "
                "counts are whole numbers, none is negative, and at least one is above 0. Give what to add, for example run.top_up(usd=1)."
            )
        # All are looked up before any is raised: a mistake in one amount leaves every ceiling as it was.
        found = [(self._account_to_top_up(unit, budget, thread_id), amount) for unit, amount in amounts.items() if amount]
        for account, amount in found:
            self.watchdog.ledger.top_up(account, amount)

    def check(self) -> None:
        """Ask whether the run was stopped, before a piece of work that is no call itself, as a node. Holds nothing.

        Raises:
            Stopped: a guard has stopped the run.

        """
        for gate in (self.watchdog.control.gate, *self.root.gates.values()):
            stop = gate(self)
            if stop is not None:
                raise self.refused(stop.incident)

    def refused(self, incident: Incident, through: type[BaseException] | None = None) -> Stopped:
        """Count a refusal, and make the error that tells it. For adapters that refuse work which is no call itself, as a node.

        It is of the type that the framework around lets pass, too: ``through``, or what the frame of this context tells.
        """
        for run in self.chain():
            run._tally.refuse()  # noqa: SLF001 - a run of the same chain
        kind = _ERRORS.get(incident.kind, Stopped)
        frame = frame_of(self.watchdog)
        if frame is not None:
            through = through or frame.through
            if frame.ending is not None:
                through = _both(through, frame.ending(incident))
        return (kind if through is None else passing(kind, through))(incident)

    def stopped_by(self, incident: Incident) -> None:
        """Note that work in it was ended gracefully. For adapters that do so."""
        for run in self.chain():
            run.stops.append(incident)

    def forgive_loops(self) -> None:
        """Let the run go on after ``LoopDetected``: what has repeated so far is forgotten, in the whole run tree."""
        self.root.forgiven += 1

    def wrap_up(self) -> Within:
        """Let the calls inside use what ``keep_usd`` keeps back, after the stop: a closing answer, an apology, a hand-over."""
        return Within(self, "wrap_up")

    def activate(self) -> Within:
        """Make this the run of what is called inside, in a thread or task that inherited none: ``with``, or ``async with``."""
        return Within(self)

    def barred_by(self, incident: Incident) -> Run:
        """Make a run inside this one that refuses every call, because of ``incident``, which is told once for each kind."""
        run = Run(self.watchdog, parent=self, run_id=self.run_id)
        run.barred = incident
        return run

    def lease(self) -> object:
        """Keep the run from ending before what was made in it is read: a stream. Give what ``end_lease`` takes."""
        lease = object()
        self._leases.add(lease)
        return lease

    def end_lease(self, lease: object, *, soon: bool = False) -> None:
        """It was read, or never will be; ``soon`` where nothing may be waited for, in a destructor."""
        self._leases.discard(lease)
        if self._is_left and not self._leases:
            if soon:
                self.watchdog.end_soon(self)
            else:
                self.end()

    def end(self, *, at_once: bool = False, is_finished: bool = True) -> RunSummary:
        """End the run: what is still held is charged, because it may have been sent. Does nothing the second time.

        It goes on while a stream that was made in it waits to be read, unless ``at_once`` says that nobody will. ``is_finished`` tells
        whether its work has come to its end, unless an exception ends it.
        """
        if self.ended_at is not None:
            return self.summary()
        error = sys.exception()
        is_finished &= not (at_once or self._is_left or (error is not None and id(error) != self._handled))
        self._is_left = True
        if self._leases and not at_once:
            self.watchdog.run_is_left(self)
            return self.summary()
        self.ended_at = self.watchdog.clock.wall()
        for work in list(self.root.open_work):
            if isinstance(work, Ticket) and work.run is self and work.is_held:
                work.charge()
        if self.parent is None:
            # The calls of a nested run that outlives this one are charged when that one ends.
            for work in list(self.open_work):
                if not isinstance(work, Ticket) or work.run is self:
                    self.open_work.pop(work, None)
        if self.pid == os.getpid() and not self.resumable:  # else a copy in a forked child: the run goes on in its parent
            self.watchdog.ledger.forget(list(self.accounts.values()))
        try:
            summary = self.summary()
        except LedgerError:
            # Leaving the block must not hide what the work came to. Whoever asks for the budgets is told then.
            logger.exception("How the budgets of the run %s stand cannot be told.", self.run_id)
            summary = summarize(self, self._tally, [])
        if self.parent is not None:
            self.parent.is_asked |= self.is_asked
            self._take_along()
        if self.pid == os.getpid():
            idle = self.watchdog.idle.ended(self, is_finished=is_finished)
            if idle is not None:
                self.watchdog.tell(idle)
        self.watchdog.run_is_over(self, summary)
        return summary

    def _take_along(self) -> None:
        """Take what is of this run only from those around it: one around many short ones must not keep that of each."""
        for key in list(self.accounts):
            for run in self.chain():
                if run is not self:
                    run.used.pop(key, None)
            found = self.root.latches.pop(key, None)
            if found is not None:
                self.latches[key] = found

    def __str__(self) -> str:
        """Write the summary."""
        return str(self.summary())

    def __repr__(self) -> str:
        """Name the run."""
        return f"<Run {self.run_id} {'ended' if self.ended_at is not None else 'active'}>"

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _try(self, call: Call, extra: Sequence[Budget]) -> Ticket | Stop:
        if self.barred is not None and not self.dry_run:
            self.watchdog.tell_once(self.barred, key=self.barred.kind)
            return Stop(incident=self.barred)
        # hooks(), without the call where the run has no guards of its own.
        hooks = self.watchdog.plugins.bound_hooks if self.guards is None else self.hooks()
        for check, plugin in hooks.before_call:
            try:
                verdict = check(self, call)
            except Exception as error:  # whose code: a guard's; each declares what its own fault means
                if is_interrupt(error):
                    raise
                verdict = self._fault(plugin, error)
            if verdict is not None:
                stop = self._judge(plugin, verdict)
                if stop is not None:
                    return stop
        watchdog = self.watchdog
        rates = watchdog.rates(call) if isinstance(call, LLMCall) else None
        reservations: list[Reservation] = []
        ticket = Ticket(self, call, rates, reservations)
        frame = frame_of(watchdog)
        if frame is not None:
            if frame.lent:
                extra = self._joined(extra, frame.lent)
            if frame.wraps_up:
                ticket.wraps_up = bool(living(frame, "wrap_up"))
        try:
            stop = self._reserve(hooks, ticket, reservations, extra)
            if stop is None:
                self.root.open_work[ticket] = None
                return ticket
            release_all(reservations)
        except BaseException:  # also a signal handler's: nothing was sent, so nothing stays held
            self.root.open_work.pop(ticket, None)
            release_interrupted(reservations)
            self._release_unreturned(ticket)
            raise
        return stop

    def abandon(self, call: Call) -> None:
        """Release ``call``, whose opening was interrupted: by a signal handler, before anybody had its ticket. Nothing was sent."""
        for work in list(self.root.open_work):
            if isinstance(work, Ticket) and work.call is call:
                work.release()

    def _release_unreturned(self, ticket: Ticket) -> None:
        """Release what the ledger holds for a call whose reservation an interrupt kept from being returned."""
        ledger = self.watchdog.ledger
        unreturned = [hold for hold in ledger.holds() if hold.owner is ticket]
        try:
            for hold in unreturned:
                ledger.release(hold)
        except LedgerError:  # what interrupted the call matters more; the hold is charged when its time is over
            logger.exception("What was held for an interrupted call could not be released.")

    def _reserve(self, hooks: BoundHooks, ticket: Ticket, reservations: list[Reservation], extra: Sequence[Budget]) -> Stop | None:
        for reserve, plugin in hooks.reserve:
            try:
                answer = reserve(self, ticket, extra)
                if answer is None:
                    continue
                if not isinstance(answer, (Stop, Warn)):
                    # What is no reservation has no such attribute: a fault of the guard, too.
                    granted = answer.max_output_tokens
                    reservations.append(answer)
                    if granted is not None:
                        ticket.max_output_tokens = granted
                    continue
            except (UsageError, LedgerError) as error:
                if not self.dry_run or isinstance(error, UsageError):
                    raise
                answer = Warn(
                    incident=self._incident("ledger", f"{error} In this dry run the call went on all the same.", "dry_run")
                )
            except Exception as error:  # whose code: a guard's; each declares what its own fault means
                if is_interrupt(error):
                    raise
                answer = self._fault(plugin, error)
            stop = self._judge(plugin, answer)
            if stop is not None:
                return stop
        return None

    def _joined(self, own: Sequence[Budget], lent: tuple[Budget, ...]) -> Sequence[Budget]:
        if not own:
            return lent
        # The same tuple for the same two: what the budget guard remembers of budgets is found by their identity.
        key = "joined", id(own), id(lent)
        found = self.memo.get(key)
        if found is None:
            # Kept with it, so that their identities stay theirs.
            found = self.memo[key] = (*own, *(budget for budget in lent if budget not in own)), own, lent
        joined: Sequence[Budget] = found[0]
        return joined

    def _judge(self, plugin: object, verdict: object) -> Stop | None:
        if not isinstance(verdict, (Stop, Warn)):
            verdict = self._fault(plugin, TypeError(f"it answered {verdict!r}, which is neither None nor Warn nor Stop"))
        if isinstance(verdict, Warn):
            self.watchdog.tell(verdict.incident)
            return None
        if self.dry_run:
            self.watchdog.tell(replace(verdict.incident, action="dry_run"))
            return None
        # These guards tell their own stops, once for each account or loop; they answer the same to every later call.
        if verdict.incident.kind not in _TOLD_BY_GUARDS:
            self.watchdog.tell(verdict.incident)
        return verdict

    def _fault(self, plugin: object, error: Exception) -> Stop | Warn:
        closed = bool(getattr(plugin, "fails_closed", False)) and not self.dry_run
        what = (
            "The call was refused before it was sent, because what this guard cannot check does not go out (fails_closed)."
            if closed
            else "The call went on without it."
        )
        message = (
            f"The guard {type(plugin).__name__} failed: {error!r}. {what} This is a bug of the guard: mend it, or leave it out with "
            "block=[...] (`clevagent plugins` lists the names)."
        )
        incident = replace(self._incident("guard", message, "raise" if closed else "warn"), details={"error": repr(error)})
        logger.error("The guard %s failed.", type(plugin).__name__, exc_info=error)
        return Stop(incident=incident) if closed else Warn(incident=incident)

    def _incident(self, kind: str, message: str, action: str) -> Incident:
        watchdog = self.watchdog
        return Incident(
            kind=kind, message=message, agent=watchdog.settings.agent, run_id=self.run_id, at=watchdog.clock.wall(), action=action
        )

    def _others_hold(self) -> bool:
        """Tell whether anybody else could give money back: a thread that waits for what it holds itself waits in vain."""
        me = threading.get_ident()
        holds = self.watchdog.ledger.holds()
        # None at all: what refused the call has come back meanwhile.
        others = any(not isinstance(hold.owner, Ticket) or hold.owner.thread != me for hold in holds)
        return not holds or others or self.watchdog.ledger.is_held_elsewhere()

    def _wait(self, call: Call, extra: Sequence[Budget], stop: Stop) -> Ticket | Stop:
        clock = self.watchdog.clock
        deadline = clock.monotonic() + self.watchdog.settings.wait_s
        event = ReentrantEvent()
        answer: Ticket | Stop = stop
        with self._listening(event.set):
            while True:
                event.clear()
                answer = self._try(call, extra)
                left = self._patience(answer, deadline)
                if left <= 0:
                    break
                clock.wait(event, left)
        return answer

    async def _await(self, call: Call, extra: Sequence[Budget], stop: Stop) -> Ticket | Stop:
        import asyncio  # noqa: PLC0415 - a third of the time that importing clevagent would take

        clock = self.watchdog.clock
        deadline = clock.monotonic() + self.watchdog.settings.wait_s
        event = asyncio.Event()
        if not _in_event_loop():
            return stop  # on trio, which has no loop of asyncio's to be woken on
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed with the task in it: nobody is left to wake
                loop.call_soon_threadsafe(event.set)

        answer: Ticket | Stop = stop
        with self._listening(wake):
            while True:
                event.clear()
                answer = self._try(call, extra)
                left = self._patience(answer, deadline)
                if left <= 0:
                    break
                await clock.wait_async(event, left)
        return answer

    @contextmanager
    def _listening(self, wake: Callable[[], object]) -> Iterator[None]:
        """Have ``wake`` called whenever what made a call wait may be over. Meanwhile nothing else is expected of the run."""
        ends = [self.watchdog.ledger.changes.subscribe(wake), self.watchdog.control.changes.subscribe(wake)]
        waiting = Wait(self, "wait")
        self.root.open_work[waiting] = None
        try:
            yield
        finally:
            self.progress.moved_at = self.watchdog.clock.monotonic()
            self.finish(waiting)
            for end in ends:
                end()

    def _patience(self, answer: Ticket | Stop, deadline: float) -> float:
        """How many seconds to wait before asking again; 0 or less when the answer stands."""
        kind = None if isinstance(answer, Ticket) else answer.incident.kind
        if kind == "paused":
            # As long as it takes: whoever paused the agent resumes it, or stops it.
            return self.watchdog.settings.interval
        return deadline - self.watchdog.clock.monotonic() if kind == "busy" else 0

    def after_fork(self) -> None:
        """Be usable in a forked child: a thread of the parent may have held the lock, and what is open there ends there."""
        self.open_work.clear()
        self._tally.lock = threading.RLock()

    def chain(self) -> Iterator[Run]:
        """This run and those around it, innermost first."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.parent

    def count(
        self, call: Call, usage: Usage, cost: int | None, *, sign: int = 1, charged: bool = False, clamped: bool = False
    ) -> None:
        """Add a call to what this run and those around it have used, or take it back. For tickets."""
        run: Run | None = self
        while run is not None:
            run._tally.add(call, sign, cost, usage, charged, clamped)  # noqa: SLF001 - a run of the same chain
            run = run.parent

    def _account_to_top_up(self, unit: str, name: str | None, thread_id: str | None) -> Account:
        index = UNITS.index(unit)
        found = [
            (budget, account)
            for budget, account in accounts_of(self, thread_id, lent=True)
            if account.key.unit == index
            and (name is None or budget.label == name)
            and (thread_id is None or budget.per == "thread")
        ]
        own = [account for budget, account in found if budget in self.budgets]
        accounts = own or [account for _, account in found]
        if len(accounts) == 1:
            return accounts[0]
        named = (" per thread" if thread_id is not None else "") + (f" named {name!r}" if name else "")
        if not found:
            raise UsageError(
                f"top_up({unit}=...) found no budget{named} with a limit in {unit}, in this run or around it, so no ceiling was raised. "
                f"Top up the run that has one, or give this one a Budget({unit}=...)."
            )
        names = ", ".join(sorted({repr(budget.label) for budget, _ in found}))
        raise UsageError(
            f"top_up({unit}=...) cannot tell which ceiling to raise, so none was: the budgets{named} with a limit in {unit} are {names}. "
            "Say which with budget=..., or top up the run that has one."
        )


def _both(through: type[BaseException] | None, ending: type[BaseException] | None) -> type[BaseException] | None:
    """Give the type that passes two frameworks, one inside the other."""
    if through is None or ending is None or issubclass(ending, through):
        return ending or through
    found = _combined.get((through, ending))
    if found is None:
        body = {"__module__": through.__module__, "__qualname__": through.__qualname__}
        found = _combined.setdefault((through, ending), type(through.__name__, (through, ending), body))
    return found


_combined: dict[tuple[type[BaseException], type[BaseException]], type[BaseException]] = {}


def _check_enforced(run: Run) -> None:
    if not run.dry_run and not run.hooks().reserve:
        raise UsageError(
            "Budgets are given, but the plugin that enforces them is blocked (clevagent_core.guards.budget), so no ceiling would hold. "
            "Take it out of block=[...], or leave the budgets out."
        )


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None  # noqa: SLF001 - documented; the public one raises
