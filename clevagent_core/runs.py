"""Runs and tickets: check -> reserve -> the call -> settle, release or charge.

A :class:`Run` is one piece of the agent's work. Adapters and the framework-free door ask it for a :class:`Ticket` before each
call; a call without a ticket is not sent. Only this module turns a guard's ``Stop`` into an exception.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from clevagent_core.accounts import accounts_of, record
from clevagent_core.budgets import UNITS, USD, Budget
from clevagent_core.calls import Call, LLMCall, Step, ToolCall, Usage
from clevagent_core.clock import utc
from clevagent_core.errors import BudgetBusy, BudgetExceeded, Stopped, UsageError
from clevagent_core.money import PICO_PER_USD, format_usd, to_pico, to_usd
from clevagent_core.plugins import BoundHooks
from clevagent_core.verdicts import Incident, Stop, Unit, Warn

if TYPE_CHECKING:
    from clevagent_core.ledger.account import Account, AccountKey, Balance
    from clevagent_core.plugins import Plugins
    from clevagent_core.pricing import Rates
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")

_NO_USAGE = Usage()


class Reservation(Protocol):
    """What a guard holds for one call. Exactly one of its methods ends it; ``settle`` may also correct an earlier ``charge``."""

    max_output_tokens: int | None
    """The output limit that was reserved for, where the caller clamps; else ``None``."""

    def settle(self, usage: Usage | None, cost_pico: int | None) -> int | None:
        """The call ended. Without usage it costs its upper bound; returns that bound in pico-USD where it is known."""
        ...

    def release(self) -> None:
        """The call was not sent."""
        ...

    def charge(self) -> int | None:
        """The call may have been sent, and nobody can tell what it cost: it costs its upper bound, which is returned."""
        ...


class Outcome(NamedTuple):
    """What became of a call."""

    status: Literal["settled", "released", "charged"]
    """``settled`` to its usage, ``released`` because it was not sent, ``charged`` its upper bound because it may have been."""
    usage: Usage | None
    """What the provider reported, where it did."""
    cost_pico: int | None
    """What it cost in pico-USD; ``None`` where no price is known."""
    error: BaseException | None = None
    """Why it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What one model, node or tool, or a whole run, has used."""

    calls: int = 0
    cost_usd: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetState:
    """One account of one budget, in the limit's own unit (US dollars for ``usd``)."""

    budget: str
    unit: Unit
    key: str
    window: str
    ceiling: float
    spent: float
    held: float
    latched: bool

    @property
    def overshoot(self) -> float:
        """How much was billed past the ceiling; 0 when it held."""
        return max(0.0, self.spent - self.ceiling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """What the tightest budgets of a run leave; ``None`` where nothing limits."""

    usd: float | None = None
    tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    llm_calls: int | None = None
    tool_calls: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run has used, nested runs included. ``print`` it."""

    run_id: str
    agent: str
    started_at: float
    """Seconds since 1970 (UTC)."""
    ended_at: float | None
    total: Spend
    """Model calls; their cost includes what is charged at its upper bound, and what ``log_cost`` told."""
    tool_calls: int
    refusals: int
    """Calls that a guard refused, each repetition counted."""
    clamped_calls: int
    """Model calls whose output limit was lowered to what was left."""
    calls_charged_at_bound: int
    """Calls that may have been sent and whose usage nobody told."""
    unpriced_calls: int
    """Model calls whose model has no known price: they count 0 US dollars."""
    by_model: Mapping[str, Spend] = field(default_factory=dict)
    by_node: Mapping[str, Spend] = field(default_factory=dict)
    by_tool: Mapping[str, Spend] = field(default_factory=dict)
    """For each tool its own calls, and what model calls inside it cost."""
    budgets: Sequence[BudgetState] = ()
    held_usd: float = 0.0
    """What calls in flight hold of the tightest budget in US dollars."""
    overshoot_usd: float = 0.0
    """The largest amount by which a budget was passed; 0 when every ceiling held."""

    def __str__(self) -> str:
        """Write the summary as a short table."""
        return _table(self)


class _Tally:
    """Adds up what a run uses. One lock: additions come from many threads."""

    __slots__ = ("by_model", "by_node", "by_tool", "charged", "clamped", "lock", "refusals", "tool_calls", "unpriced")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_model: dict[str, list[int]] = {}
        self.by_node: dict[str, list[int]] = {}
        self.by_tool: dict[str, list[int]] = {}
        self.tool_calls = self.refusals = self.clamped = self.charged = self.unpriced = 0

    def add(self, call: Call, sign: int, cost: int | None, usage: Usage, charged: bool, clamped: bool) -> None:  # noqa: FBT001 - hot
        """Add a call (``sign`` 1), or take back one that was charged because its real usage came later (``sign`` -1)."""
        input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
        amount = sign * (cost or 0)
        with self.lock:
            if charged:
                self.charged += sign
            if clamped:
                self.clamped += sign
            if isinstance(call, ToolCall):
                self.tool_calls += sign
                _add(self.by_tool, call.tool, sign, amount, 0, 0)
                return
            if cost is None and not charged:
                self.unpriced += sign
            _add(self.by_model, call.model, sign, amount, input_tokens, output_tokens)
            if call.node is not None:
                _add(self.by_node, call.node, sign, amount, input_tokens, output_tokens)
            if call.tool is not None:
                _add(self.by_tool, call.tool, 0, amount, input_tokens, output_tokens)


class Ticket:
    """The permission to make one call, and the duty to tell what became of it.

    Safe from any thread, and idempotent: the first of ``settle``, ``release``, ``fail`` and ``charge`` counts; only a later
    ``settle`` still corrects a call that was charged because nothing had been heard of it.
    """

    __slots__ = ("_charged_cost", "_is_charge_counted", "_reservations", "_status", "call", "max_output_tokens", "rates", "run")

    def __init__(self, run: Run, call: Call, rates: Rates | None, reservations: list[Reservation]) -> None:
        """Made by ``Run.open`` only."""
        self.run = run
        self.call = call
        self.rates = rates
        self.max_output_tokens: int | None = call.max_output_tokens if isinstance(call, LLMCall) else None
        """The output limit to send with the request: what was asked for, or what is left of it."""
        self._reservations = reservations
        self._status: Literal["open", "settled", "released", "charged"] = "open"
        self._charged_cost: int | None = None
        self._is_charge_counted = False

    @property
    def is_open(self) -> bool:
        """Whether nobody has told yet what became of the call."""
        return self._status == "open"

    @property
    def is_clamped(self) -> bool:
        """Whether the output limit was lowered to what is left."""
        call = self.call
        if not isinstance(call, LLMCall) or call.max_output_tokens is None or self.max_output_tokens is None:
            return False
        return self.max_output_tokens < call.max_output_tokens

    def settle(self, usage: Usage | None = None, *, error: BaseException | None = None) -> None:
        """Tell that the call ended. Without ``usage`` it costs its upper bound."""
        call = self.call
        if usage is None:
            if isinstance(call, LLMCall):
                self.charge(error)
                return
            usage = _NO_USAGE
        if not self._end("settled"):
            return
        rates = self.rates
        cost = rates.cost(usage) if rates is not None else None
        for reservation in self._reservations:
            try:
                reservation.settle(usage, cost)
            except Exception:  # whose code: a guard's; the next one still gets its money back
                logger.exception("A reservation failed to settle and was passed over.")
        run = self.run
        run._count(call, usage, cost, clamped=self.is_clamped)  # noqa: SLF001 - a ticket is a part of its run
        outcome = Outcome("settled", usage, cost, error)
        hooks = run.hooks()
        for observer in hooks.call_settled:
            try:
                observer(run, call, outcome)
            except Exception:  # whose code: a plugin's; observers fail open
                logger.exception("An observer of settled calls failed and was passed over.")
        if hooks.step:
            run.step(Step(kind="llm_call", name=call.model) if isinstance(call, LLMCall) else Step(kind="tool_call", name=call.tool))

    def release(self, error: BaseException | None = None) -> None:
        """Tell that the call was not sent, or was refused by the provider unbilled: what it held is given back."""
        if not self._end("released"):
            return
        _release(self._reservations)
        self._tell_failed(Outcome("released", None, 0, error))

    def charge(self, error: BaseException | None = None) -> None:
        """Tell that the call may have been sent and that its usage is unknown: it costs its upper bound."""
        if not self._end("charged"):
            return
        bounds: list[int | None] = []
        for reservation in self._reservations:
            try:
                bounds.append(reservation.charge())
            except Exception:  # whose code: a guard's; the next one is still charged
                logger.exception("A reservation failed to charge and was passed over.")
        cost = max((bound for bound in bounds if bound is not None), default=None)
        with _ticket_lock:
            # Its usage may have come in while it was being charged.
            if self._status != "charged":
                return
            self._charged_cost = cost
            self._is_charge_counted = True
        self.run._count(self.call, _NO_USAGE, cost, charged=True, clamped=self.is_clamped)  # noqa: SLF001 - a part of its run
        self._tell_failed(Outcome("charged", None, cost, error))

    def fail(self, error: BaseException, *, sent: bool) -> None:
        """Tell that the call failed: ``release`` unless it may have been sent and billed, else ``charge``."""
        if sent:
            self.charge(error)
        else:
            self.release(error)

    def _end(self, status: Literal["settled", "released", "charged"]) -> bool:
        with _ticket_lock:
            before = self._status
            if before != "open" and not (before == "charged" and status == "settled"):
                return False
            self._status = status
            was_counted, self._is_charge_counted = self._is_charge_counted, False
        if was_counted:
            run = self.run
            run._count(self.call, _NO_USAGE, self._charged_cost, sign=-1, charged=True, clamped=self.is_clamped)  # noqa: SLF001 - a part of its run
        return True

    def _tell_failed(self, outcome: Outcome) -> None:
        for observer in self.run.hooks().call_failed:
            try:
                observer(self.run, self.call, outcome)
            except Exception:  # whose code: a plugin's; observers fail open
                logger.exception("An observer of failed calls failed and was passed over.")


_ticket_lock = threading.Lock()
"""Guards a few instructions of every ticket; a lock for each would cost more than waiting for this one."""


def _after_fork_in_child() -> None:
    global _ticket_lock  # noqa: PLW0603 - the parent may have held it
    _ticket_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Run:
    """One piece of the agent's work, from start to outcome.

    Made by ``clevagent.run()``; a run made inside another one is nested: what it uses counts against both. Every method is
    safe from any thread.
    """

    def __init__(
        self,
        watchdog: Watchdog,
        *,
        budgets: Sequence[Budget] = (),
        tags: Mapping[str, str] | None = None,
        parent: Run | None = None,
        run_id: str | None = None,
        dry_run: bool = False,
        guards: Plugins | None = None,
    ) -> None:
        """Made by ``Watchdog.start_run``."""
        self.watchdog = watchdog
        self.guards: BoundHooks | None = parent.guards if parent is not None else None
        """The hooks of the guards of this run and of those around it, beside the watchdog's plugins."""
        if guards is not None:
            self.guards = (self.guards or BoundHooks()) + guards.bound_hooks
        self.parent = parent
        self.root: Run = parent.root if parent is not None else self
        self.run_id = run_id or uuid.uuid4().hex
        self.budgets = tuple(budgets)
        self.tags: dict[str, str] = {**(parent.tags if parent is not None else {}), **(tags or {})}
        self.dry_run: bool = dry_run or watchdog.settings.dry_run or (parent is not None and parent.dry_run)
        self.pid = os.getpid()
        self.started_at = watchdog.clock.wall()
        self.ended_at: float | None = None
        self.accounts: dict[AccountKey, Account] = {}
        """The accounts whose window is this run."""
        self.used: dict[AccountKey, Account] = {}
        """Every account that a call of this run, or of one nested in it, counted against."""
        self.memo: dict[object, Any] = {}
        """For guards: what they worked out for this run. Emptied when it grows large."""
        self._tally = _Tally()

    # -- calls ------------------------------------------------------------------------------------------------------------

    def open(self, call: Call, extra: Sequence[Budget] = ()) -> Ticket:
        """Check ``call`` and hold what it could cost, or raise. Blocks up to ``wait_s`` while money is merely held.

        On a thread that runs an event loop it never blocks: there it raises ``BudgetBusy`` at once.

        Raises:
            BudgetExceeded: a budget has no room. BudgetBusy: the room is held by calls in flight. Stopped: another guard.
            UsageError: the call cannot be priced or bounded, or the ledger cannot be used.

        """
        answer = self._try(call, extra)
        if isinstance(answer, Ticket):
            return answer
        if answer.incident.kind == "busy" and not _in_event_loop():
            answer = self._wait(call, extra, answer)
            if isinstance(answer, Ticket):
                return answer
        raise self._refused(answer)

    async def aopen(self, call: Call, extra: Sequence[Budget] = ()) -> Ticket:
        """Do what ``open`` does, waiting without blocking the event loop."""
        answer = self._try(call, extra)
        if isinstance(answer, Ticket):
            return answer
        if answer.incident.kind == "busy":
            answer = await self._await(call, extra, answer)
            if isinstance(answer, Ticket):
                return answer
        raise self._refused(answer)

    def step(self, step: Step) -> None:
        """Tell a sign of progress."""
        for observer in self.hooks().step:
            try:
                observer(self, step)
            except Exception:  # whose code: a plugin's; observers fail open
                logger.exception("An observer of steps failed and was passed over.")

    def hooks(self) -> BoundHooks:
        """The hot hooks in force for this run."""
        hooks = self.watchdog.plugins.bound_hooks
        return hooks if self.guards is None else hooks + self.guards

    @property
    def is_used(self) -> bool:
        """Whether a call was made, refused or recorded in it."""
        tally = self._tally
        return bool(self.used or self.memo or tally.by_model or tally.by_tool or tally.refusals)

    def log(self, call: Call, usage: Usage, cost_pico: int | None) -> None:
        """Record a call that was made elsewhere. It is always recorded, even past a ceiling, and never raises ``Stopped``."""
        record(self, call, usage, cost_pico)
        self._count(call, usage, cost_pico)

    # -- what it has used -------------------------------------------------------------------------------------------------

    def summary(self) -> RunSummary:
        """Tell what the run has used so far, by model, node and tool, and how its budgets stand."""
        tally = self._tally
        ledger = self.watchdog.ledger
        states = tuple(_state(ledger.balance(account)) for account in list(self.used.values()))
        with tally.lock:
            return RunSummary(
                run_id=self.run_id,
                agent=self.watchdog.settings.agent,
                started_at=self.started_at,
                ended_at=self.ended_at,
                total=_spend([sum(column) for column in zip(*tally.by_model.values(), strict=True)] or [0, 0, 0, 0]),
                tool_calls=tally.tool_calls,
                refusals=tally.refusals,
                clamped_calls=tally.clamped,
                calls_charged_at_bound=tally.charged,
                unpriced_calls=tally.unpriced,
                by_model={name: _spend(row) for name, row in tally.by_model.items()},
                by_node={name: _spend(row) for name, row in tally.by_node.items()},
                by_tool={name: _spend(row) for name, row in tally.by_tool.items()},
                budgets=states,
                held_usd=max((state.held for state in states if state.unit == "usd"), default=0.0),
                overshoot_usd=max((state.overshoot for state in states if state.unit == "usd"), default=0.0),
            )

    def remaining(self) -> Remaining:
        """Tell what the tightest budgets that cover the whole run leave, calls in flight taken off."""
        left: dict[str, int] = {}
        for budget, account in accounts_of(self):
            if budget.node or budget.tool or budget.model:
                continue
            balance = self.watchdog.ledger.balance(account)
            unit = UNITS[balance.key.unit]
            left[unit] = min(left.get(unit, balance.free), balance.free)
        usd = left.pop("usd", None)
        return Remaining(usd=None if usd is None else to_usd(usd), **left)

    def top_up(
        self, *, usd: float | str = 0, tokens: int = 0, llm_calls: int = 0, tool_calls: int = 0, budget: str | None = None
    ) -> None:
        """Raise a ceiling and open its latch; calls that wait go on.

        Args:
            usd: by how many US dollars.
            tokens: by how many tokens (of a ``tokens=`` limit).
            llm_calls: by how many model calls.
            tool_calls: by how many tool calls.
            budget: the budget's name. Not needed where only one budget of this run, or of those around it, has that limit.

        Raises:
            UsageError: nothing to add, a negative amount, or no single budget that is meant.

        """
        amounts = {"usd": to_pico(usd, what="usd"), "tokens": tokens, "llm_calls": llm_calls, "tool_calls": tool_calls}
        if any(type(amount) is not int or amount < 0 for amount in amounts.values()) or not any(amounts.values()):
            raise UsageError(
                f"top_up(usd={usd!r}, tokens={tokens!r}, llm_calls={llm_calls!r}, tool_calls={tool_calls!r}) adds nothing: give at "
                "least one positive amount, for example run.top_up(usd=1)."
            )
        # All are looked up before any is raised: a mistake in one amount leaves every ceiling as it was.
        found = [(self._account_to_top_up(unit, budget), amount) for unit, amount in amounts.items() if amount]
        for account, amount in found:
            self.watchdog.ledger.top_up(account, amount)

    @contextmanager
    def wrap_up(self) -> Iterator[None]:
        """Let the calls inside use what ``keep_usd`` keeps back, after the stop: a closing answer, an apology, a hand-over."""
        token = self.watchdog.wrapping_up.set(True)
        try:
            yield
        finally:
            self.watchdog.wrapping_up.reset(token)

    @contextmanager
    def activate(self) -> Iterator[Run]:
        """Make this the current run of a thread of your own: a raw thread does not inherit the ``with`` block it was started in."""
        token = self.watchdog.current.set(self)
        try:
            yield self
        finally:
            self.watchdog.current.reset(token)

    def end(self) -> RunSummary:
        """End the run: what is still held is charged, because it may have been sent. Does nothing the second time."""
        if self.ended_at is not None:
            return self.summary()
        self.ended_at = self.watchdog.clock.wall()
        for hold in self.watchdog.ledger.holds():
            ticket = hold.owner
            if isinstance(ticket, Ticket) and ticket.run is self:
                ticket.charge()
        self.watchdog.ledger.forget(list(self.accounts.values()))
        summary = self.summary()
        self.watchdog.run_is_over(self, summary)
        return summary

    def __str__(self) -> str:
        """Write the summary."""
        return str(self.summary())

    def __repr__(self) -> str:
        """Name the run."""
        return f"<Run {self.run_id} {'ended' if self.ended_at is not None else 'active'}>"

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _try(self, call: Call, extra: Sequence[Budget]) -> Ticket | Stop:
        hooks = self.hooks()
        for check, plugin in hooks.before_call:
            try:
                verdict = check(self, call)
            except Exception as error:  # whose code: a guard's; each declares what its own fault means
                verdict = self._fault(plugin, error)
            if verdict is not None:
                stop = self._judge(plugin, verdict)
                if stop is not None:
                    return stop
        rates = self.watchdog.rates(call) if isinstance(call, LLMCall) else None
        reservations: list[Reservation] = []
        ticket = Ticket(self, call, rates, reservations)
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
            except UsageError:
                _release(reservations)
                raise
            except Exception as error:  # whose code: a guard's; each declares what its own fault means
                answer = self._fault(plugin, error)
            stop = self._judge(plugin, answer)
            if stop is not None:
                _release(reservations)
                return stop
        return ticket

    def _judge(self, plugin: object, verdict: object) -> Stop | None:
        if not isinstance(verdict, (Stop, Warn)):
            verdict = self._fault(plugin, TypeError(f"it answered {verdict!r}, which is neither None nor Warn nor Stop"))
        if isinstance(verdict, Warn):
            self.watchdog.tell(verdict.incident)
            return None
        if self.dry_run:
            self.watchdog.tell(replace(verdict.incident, action="dry_run"))
            return None
        return verdict

    def _fault(self, plugin: object, error: Exception) -> Stop | Warn:
        closed = bool(getattr(plugin, "fails_closed", False)) and not self.dry_run
        incident = Incident(
            kind="guard",
            message=(
                f"The guard {type(plugin).__name__} failed: {error!r}. "
                + (
                    "The call was refused before it was sent, because what this guard cannot check does not go out (fails_closed). "
                    if closed
                    else "The call went on without it. "
                )
                + "This is a bug of the guard: mend it, or leave it out with block=[...] (`clevagent plugins` lists the names)."
            ),
            agent=self.watchdog.settings.agent,
            run_id=self.run_id,
            at=self.watchdog.clock.wall(),
            action="raise" if closed else "warn",
        )
        logger.error("The guard %s failed.", type(plugin).__name__, exc_info=error)
        if not closed:
            return Warn(incident=incident)
        self.watchdog.tell(incident)
        return Stop(incident=incident)

    def _refused(self, stop: Stop) -> Stopped:
        for run in self._chain():
            with run._tally.lock:  # noqa: SLF001 - a run of the same chain
                run._tally.refusals += 1  # noqa: SLF001 - a run of the same chain
        kind = stop.incident.kind
        return {"budget": BudgetExceeded, "busy": BudgetBusy}.get(kind, Stopped)(stop.incident)

    def _wait(self, call: Call, extra: Sequence[Budget], stop: Stop) -> Ticket | Stop:
        clock = self.watchdog.clock
        deadline = clock.monotonic() + self.watchdog.settings.wait_s
        event = threading.Event()
        unsubscribe = self.watchdog.ledger.changes.subscribe(event.set)
        answer: Ticket | Stop = stop
        try:
            while isinstance(answer, Stop) and answer.incident.kind == "busy":
                event.clear()
                answer = self._try(call, extra)
                left = deadline - clock.monotonic()
                if isinstance(answer, Ticket) or answer.incident.kind != "busy" or left <= 0:
                    break
                clock.wait(event, left)
        finally:
            unsubscribe()
        return answer

    async def _await(self, call: Call, extra: Sequence[Budget], stop: Stop) -> Ticket | Stop:
        import asyncio  # noqa: PLC0415 - a third of the time that importing clevagent would take

        clock = self.watchdog.clock
        deadline = clock.monotonic() + self.watchdog.settings.wait_s
        event = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed with the task in it: nobody is left to wake
                loop.call_soon_threadsafe(event.set)

        unsubscribe = self.watchdog.ledger.changes.subscribe(wake)
        answer: Ticket | Stop = stop
        try:
            while isinstance(answer, Stop) and answer.incident.kind == "busy":
                event.clear()
                answer = self._try(call, extra)
                left = deadline - clock.monotonic()
                if isinstance(answer, Ticket) or answer.incident.kind != "busy" or left <= 0:
                    break
                await clock.wait_async(event, left)
        finally:
            unsubscribe()
        return answer

    def after_fork(self) -> None:
        """Be usable in a forked child: a thread of the parent may have held the lock."""
        self._tally.lock = threading.Lock()

    def _chain(self) -> Iterator[Run]:
        run: Run | None = self
        while run is not None:
            yield run
            run = run.parent

    def _count(
        self, call: Call, usage: Usage, cost: int | None, *, sign: int = 1, charged: bool = False, clamped: bool = False
    ) -> None:
        run: Run | None = self
        while run is not None:
            run._tally.add(call, sign, cost, usage, charged, clamped)
            run = run.parent

    def _account_to_top_up(self, unit: str, name: str | None) -> Account:
        index = UNITS.index(unit)
        found = [
            (budget, account)
            for budget, account in accounts_of(self)
            if account.key.unit == index and (name is None or budget.label == name)
        ]
        own = [account for budget, account in found if budget in self.budgets]
        accounts = own or [account for _, account in found]
        if len(accounts) == 1:
            return accounts[0]
        names = ", ".join(sorted({repr(budget.label) for budget, _ in found})) or "none"
        raise UsageError(
            f"top_up({unit}=...) cannot tell which ceiling to raise: the budgets with a limit in {unit}"
            f"{f' named {name!r}' if name else ''} are {names}. Say which with budget=..., or top up the run that has one."
        )


def _add(table: dict[str, list[int]], name: str, count: int, cost: int, input_tokens: int, output_tokens: int) -> None:
    row = table.get(name)
    if row is None:
        row = table[name] = [0, 0, 0, 0]
    row[0] += count
    row[1] += cost
    row[2] += input_tokens
    row[3] += output_tokens


def _release(reservations: list[Reservation]) -> None:
    for reservation in reservations:
        try:
            reservation.release()
        except Exception:  # whose code: a guard's; the next one is still released
            logger.exception("A reservation failed to be released and was passed over.")


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None  # noqa: SLF001 - documented; the public one raises


def _spend(row: list[int]) -> Spend:
    return Spend(calls=row[0], cost_usd=to_usd(row[1]), input_tokens=row[2], output_tokens=row[3])


def _state(balance: Balance) -> BudgetState:
    key = balance.key
    scale: Callable[[int], float] = to_usd if key.unit == USD else float
    return BudgetState(
        budget=key.budget,
        unit=UNITS[key.unit],
        key=key.key,
        window=key.window,
        ceiling=scale(balance.ceiling),
        spent=scale(balance.spent),
        held=scale(balance.held),
        latched=balance.latched,
    )


def _money(usd: float) -> str:
    return format_usd(round(usd * PICO_PER_USD))


def _table(summary: RunSummary) -> str:
    state = "active" if summary.ended_at is None else f"ended after {summary.ended_at - summary.started_at:.1f} s"
    total = summary.total
    lines = [
        f"run {summary.run_id} of {summary.agent!r}, started {utc(summary.started_at):%Y-%m-%d %H:%M:%S} UTC, {state}",
        f"  spent {_money(total.cost_usd)} in {total.calls} model calls "
        f"({total.input_tokens:,} tokens in, {total.output_tokens:,} out) and {summary.tool_calls} tool calls",
        f"  refused {summary.refusals}, clamped {summary.clamped_calls}, charged at their upper bound "
        f"{summary.calls_charged_at_bound}, without a price {summary.unpriced_calls}",
    ]
    for title, table in (("model", summary.by_model), ("node", summary.by_node), ("tool", summary.by_tool)):
        lines += [
            f"  {title:<6} {name:<28} {spend.calls:>5} calls  {_money(spend.cost_usd):>14}"
            f"  {spend.input_tokens:>9,} in {spend.output_tokens:>9,} out"
            for name, spend in sorted(table.items(), key=lambda item: -item[1].cost_usd)
        ]
    for budget in summary.budgets:
        show: Callable[[float], str] = _money if budget.unit == "usd" else "{:,.0f}".format
        lines.append(
            f"  budget {budget.budget!r} ({budget.unit}): {show(budget.spent)} of {show(budget.ceiling)} spent, "
            f"{show(budget.held)} held"
            + (f", passed by {show(budget.overshoot)}" if budget.overshoot else "")
            + (", stopped" if budget.latched else "")
        )
    return "\n".join(lines)

