"""The budget guard: holds a call's upper bound on every account it counts against, before it is sent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from clevagent_core.accounts import Cover, Deadline, action_of, amounts_of, cover, stops_run, tell_notices
from clevagent_core.budgets import INPUT_TOKENS, TOKENS, USD, Amounts, Budget
from clevagent_core.calls import Call, LLMCall, Path, Usage
from clevagent_core.errors import UsageError
from clevagent_core.guards.messages import deadline_incident, near_deadline_incident, refusal_incident
from clevagent_core.hookspecs import hookimpl
from clevagent_core.interrupts import is_interrupt
from clevagent_core.ledger.account import Hold, Line, Refusal, StaleAccount
from clevagent_core.pricing import Rates, unknown_price_message
from clevagent_core.verdicts import Incident, Stop

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.tickets import Ticket

logger = logging.getLogger("clevagent")

_TOOL_AMOUNTS: Amounts = (0, 0, 0, 0, 0, 1)
_COVERS = 256
"""How many shapes of calls a run remembers the accounts of."""
_is_asking: ContextVar[bool] = ContextVar("clevagent_on_exceed", default=False)
"""Whether an ``on_exceed`` callable is being asked in this context."""
_CLAMP_ATTEMPTS = 16
"""How often a clamped call tries again because others took what it saw free; each time one of the others got on."""


class BudgetReservation:
    """What one call holds. See :class:`~clevagent_core.tickets.Reservation`."""

    __slots__ = ("_hold", "_run", "max_output_tokens")

    def __init__(self, run: Run, hold: Hold, max_output_tokens: int | None) -> None:
        """Made by the guard only."""
        self._run = run
        self._hold = hold
        self.max_output_tokens = max_output_tokens

    def settle(self, usage: Usage | None, cost_pico: int | None) -> int | None:
        """Replace what is held by what the call did cost."""
        if usage is None:
            return self.charge()
        hold = self._hold
        owner: Ticket = hold.owner  # type: ignore[assignment]  # the guard gives its ticket
        notices = self._run.watchdog.ledger.settle(hold, amounts_of(owner.call, usage, cost_pico))
        if notices:
            tell_notices(self._run, notices)
        return None

    def release(self) -> None:
        """Give back what is held."""
        self._run.watchdog.ledger.release(self._hold)

    def charge(self) -> int | None:
        """Spend what is held."""
        notices = self._run.watchdog.ledger.charge(self._hold)
        if notices:
            tell_notices(self._run, notices)
        owner: Ticket = self._hold.owner  # type: ignore[assignment]  # the guard gives its ticket
        return self._hold.amounts[USD] if owner.rates is not None else None


class BudgetGuard:
    """Reserves, for each call, on all budgets that cover it: on all of them or on none."""

    fails_closed = True

    def __init__(self) -> None:
        """Nothing was told yet."""
        self._has_told_assumption = False

    @hookimpl
    def clevagent_reserve(self, run: Run, ticket: Ticket, extra: Sequence[Budget]) -> BudgetReservation | Stop | None:
        """Hold what the call could cost at most."""
        call = ticket.call
        while True:
            found = self._cover(run, call, extra)
            if found.deadlines:
                late = self._late(run, call, found.deadlines)
                if late is not None:
                    return late
            if not found.lines:
                return None
            try:
                if isinstance(call, LLMCall):
                    answer, granted = self._reserve_llm(run, ticket, call, found)
                else:
                    answer, granted = self._reserve(run, ticket, found, _TOOL_AMOUNTS), None
            except StaleAccount:
                run.memo.clear()
                continue
            if isinstance(answer, Hold):
                if answer.notices:
                    tell_notices(run, answer.notices)
                return BudgetReservation(run, answer, granted)
            stop, found_room = self._on_exceed(run, call, found, answer)
            if not found_room:
                return stop

    def _late(self, run: Run, call: Call, deadlines: Sequence[Deadline]) -> Stop | None:
        """Refuse a call that comes after its deadline; warn, once, of one that is close."""
        now = run.watchdog.clock.monotonic()
        for deadline in deadlines:
            budget = deadline.budget
            seconds = budget.seconds or 0.0
            if now < deadline.at:
                if now >= deadline.at - seconds * (1 - budget.warn_at) and deadline.is_news("close"):
                    run.watchdog.tell(near_deadline_incident(run, deadline))
                continue
            if deadline.is_let_go():
                continue
            incident = deadline_incident(run, deadline, call)
            action = action_of(run, budget)
            is_let_go = run.dry_run or action == "warn"
            if deadline.is_news("passed"):
                run.watchdog.tell(incident)
            if callable(action) and not is_let_go and deadline.is_news("asked"):
                is_let_go = self._ask(action, incident) == "warn"
            if is_let_go:
                deadline.is_news("let go")
                continue
            return Stop(incident=incident)
        return None

    def _ask(self, action: Callable[[Incident], object], incident: Incident) -> object:
        if _is_asking.get():
            return None
        token = _is_asking.set(True)
        try:
            return action(incident)
        except Exception as error:  # whose code: the user's callable; a fault in it lets nothing through
            if is_interrupt(error):
                raise
            logger.exception("The on_exceed callable of the budget %r failed; the call stays refused.", incident.budget)
            return None
        finally:
            _is_asking.reset(token)

    def _cover(self, run: Run, call: Call, extra: Sequence[Budget]) -> Cover:
        if isinstance(call, LLMCall) and type(call.node) is not Path:  # as _shape does
            key: tuple[object, ...] = (call.model, call.tool, call.node, call.thread_id, id(extra) if extra else 0)
        else:
            key = _shape(call, extra)
        memo, watchdog = run.memo, run.watchdog
        found: Cover | None = memo.get(key)
        if found is None or watchdog.clock.wall() >= found.valid_until or found.remote is not watchdog.control.budgets:
            if len(memo) >= _COVERS:
                memo.clear()
            found = memo[key] = cover(run, call, extra)
        return found

    def _reserve(self, run: Run, ticket: Ticket, found: Cover, amounts: Amounts) -> Hold | Refusal:
        watchdog = run.watchdog
        around: Run | None = run
        while around is not None:
            if around.latches and (refusal := self._latched(around, ticket, found, amounts)) is not None:
                return refusal
            around = around.parent
        if watchdog.unrecorded:
            watchdog.record_waiting()
        return watchdog.ledger.reserve(
            found.lines,
            amounts,
            expires_at=watchdog.next_expiry(),
            owner=ticket,
            wrap_up=ticket.wraps_up,
        )

    def _latched(self, run: Run, ticket: Ticket, found: Cover, amounts: Amounts) -> Refusal | None:
        """Refuse what a budget covers that has refused a call of ``run`` before, whoever swallowed that."""
        if ticket.wraps_up:
            return None
        for line in found.lines:
            account = line.account
            if line.enforced and account.key in run.latches and not account.closed:
                balance = run.watchdog.ledger.balance(account)
                if run.latches.is_shut(account, balance):
                    return Refusal(line, balance, amounts[line.unit], "latched")
        return None

    def _reserve_llm(self, run: Run, ticket: Ticket, call: LLMCall, found: Cover) -> tuple[Hold | Refusal, int | None]:
        rates = ticket.rates
        settings = run.watchdog.settings
        if rates is None and USD in found.units and settings.unknown_price != "allow":
            raise UsageError(unknown_price_message(call.model))
        tokens = run.watchdog.plugins.bound(call)
        if tokens is None:
            tokens = _window_of(call, rates, found)
        elif call.context_window is not None:
            # Only the caller's: models are offered with larger windows (betas) than the price list knows.
            tokens = min(tokens, call.context_window)
        limit = call.max_output_tokens
        if settings.estimate == "expected":
            # A third of the bytes, a quarter of the limit: what English prose and ordinary answers come to.
            tokens, limit = -(-tokens // 3), None if limit is None else -(-limit // 4)
        if not call.clamp:
            output = self._assumed(run, call) if limit is None else limit
            return self._reserve(run, ticket, found, _amounts(call, rates, tokens, output)), None
        if limit is not None:
            # The usual case: everything that was asked for still fits. If not, less may.
            answer = self._reserve(run, ticket, found, _amounts(call, rates, tokens, limit))
            if isinstance(answer, Hold) or answer.reason == "latched":
                return answer, call.max_output_tokens
        return self._clamp(run, ticket, call, found, rates, tokens)

    def _clamp(
        self, run: Run, ticket: Ticket, call: LLMCall, found: Cover, rates: Rates | None, tokens: int
    ) -> tuple[Hold | Refusal, int | None]:
        asked = call.max_output_tokens
        floor = call.min_output_tokens if asked is None else min(asked, call.min_output_tokens)
        for _ in range(_CLAMP_ATTEMPTS):
            fits = self._fits(run, ticket, call, found, rates, tokens)
            limit = asked
            if limit is None:
                # Nobody asked for a limit: leave room for others, unless little is left for anybody.
                assumed, limit = run.watchdog.settings.assume_output_tokens, call.most_output_tokens
                if fits is not None:
                    # Where nobody knows how much the model can write, a large limit would be refused by its provider.
                    limit = assumed if limit is None else min(limit, max(assumed, fits // 2))
            if limit is None:
                # Nothing that is limited depends on the output.
                return self._reserve(run, ticket, found, _amounts(call, rates, tokens, 0)), None
            if fits is not None:
                limit = min(limit, fits)
            if limit < floor:
                break
            answer = self._reserve(run, ticket, found, _amounts(call, rates, tokens, limit))
            if isinstance(answer, Hold) or answer.reason == "latched":
                # Where nothing limits the output, none is sent that was not asked for.
                return answer, asked if fits is None else limit
        return self._reserve(run, ticket, found, _amounts(call, rates, tokens, floor)), floor

    def _fits(self, run: Run, ticket: Ticket, call: LLMCall, found: Cover, rates: Rates | None, tokens: int) -> int | None:
        """Work out the largest output limit, for each answer, that fits what is free; ``None`` where nothing limits the output."""
        if not found.clamp_units:
            return None
        audio = call.audio or call.opaque
        base = rates.upper_bound(tokens, 0, audio=audio, writes_cache=call.writes_cache) if rates is not None else 0
        per_token = rates.upper_bound(tokens, 1, audio=audio, writes_cache=call.writes_cache) - base if rates is not None else 0
        least: int | None = None
        for line in found.lines:
            if not line.enforced or line.unit not in found.clamp_units:
                continue
            balance = run.watchdog.ledger.balance(line.account)
            free = balance.free
            if ticket.wraps_up:
                free = max(0, balance.ceiling - balance.spent - balance.held)
            if line.unit == USD:
                if not per_token:
                    continue
                fits = (free - base) // per_token
            elif line.unit == TOKENS:
                fits = free - tokens
            else:
                fits = free
            fits = max(0, fits // call.answers)
            least = fits if least is None else min(least, fits)
        return least

    def _assumed(self, run: Run, call: LLMCall) -> int:
        assumed = run.watchdog.settings.assume_output_tokens
        if not self._has_told_assumption:
            self._has_told_assumption = True
            run.watchdog.tell(
                Incident(
                    kind="assumption",
                    message=(
                        f"A call to {call.model!r} has no output limit, and what is attached cannot send one, so {assumed:,} output "
                        "tokens are assumed for it and for every call like it: the ceiling is only as tight as that. Make it strict "
                        "with clevagent.guard(model), which sends a limit that fits, or set max_tokens on the model. "
                        "(Told once. assume_output_tokens= changes the number.)"
                    ),
                    agent=run.watchdog.settings.agent,
                    run_id=run.run_id,
                    at=run.watchdog.clock.wall(),
                )
            )
        return assumed

    def _on_exceed(self, run: Run, call: Call, found: Cover, refusal: Refusal) -> tuple[Stop, bool]:
        """Turn a refusal into the answer; tell whether to try again because the user's callable made room."""
        budget = found.budgets[found.lines.index(refusal.line)]
        incident = refusal_incident(run, call, refusal, budget)
        if refusal.reason == "busy":
            return Stop(incident=incident), False
        if refusal.reason != "latched" and run.watchdog.ledger.is_news(refusal):
            run.watchdog.tell(incident)
        if refusal.reason == "exhausted" and stops_run(run, budget):
            run.latch(refusal)
        action = action_of(run, budget)
        if not callable(action):
            return Stop(incident=incident), False
        if _is_asking.get():
            # The callable makes calls of its own, which do not fit either: it is not asked about those.
            return Stop(incident=incident), False
        ceiling = refusal.balance.ceiling
        token = _is_asking.set(True)
        try:
            wanted = action(incident)
        except Exception as error:  # whose code: as above
            if is_interrupt(error):
                raise
            logger.exception("The on_exceed callable of the budget %r failed; the call stays refused.", budget.label)
            return Stop(incident=replace(incident, details={**incident.details, "error": repr(error)})), False
        finally:
            _is_asking.reset(token)
        if wanted == "warn":
            run.memo.clear()
            key_of = refusal.line.account
            lines = tuple(Line(line.account, line.unit, False) if line.account is key_of else line for line in found.lines)
            self._let_go(run, call, found, lines)
            return Stop(incident=incident), True
        has_more = run.watchdog.ledger.balance(refusal.line.account).ceiling > ceiling
        return Stop(incident=incident), has_more

    def _let_go(self, run: Run, call: Call, found: Cover, lines: tuple[Line, ...]) -> None:
        """Remember that the user let this budget go: its lines are only told from here on, for calls of this shape in this run."""
        key = _shape(call, found.extra)
        units = frozenset(line.unit for line in lines if line.enforced)
        run.memo[key] = found._replace(lines=lines, units=units, clamp_units=tuple(u for u in found.clamp_units if u in units))


def _shape(call: Call, extra: Sequence[Budget]) -> tuple[object, ...]:
    """Tell what decides which accounts a call counts against."""
    node: object = call.node
    if type(node) is Path:
        node = node.parts  # not its text: a name may have slashes, too
    if isinstance(call, LLMCall):
        return (call.model, call.tool, node, call.thread_id, id(extra) if extra else 0)
    return (None, call.tool, node, call.thread_id, id(extra) if extra else 0, call.inside)


def _amounts(call: LLMCall, rates: Rates | None, tokens: int, output_limit: int) -> Amounts:
    # n answers share one prompt, which OpenAI bills once.
    answers = call.answers
    output = output_limit * answers
    audio = call.audio or call.opaque
    cost = rates.upper_bound(tokens, output, audio=audio, writes_cache=call.writes_cache) if rates is not None else 0
    return (cost, tokens + output, tokens, output, 1, 0)


def _window_of(call: LLMCall, rates: Rates | None, found: Cover) -> int:
    """Return what a call reads at most whose text cannot bound its input: its context window, each time the model reads it.

    Raises:
        UsageError: the window is not known, and a budget depends on it.

    """
    window = call.context_window or (rates.context_window if rates is not None else None)
    # Where no price is known, and that is allowed, it costs nothing.
    depends = {USD, TOKENS, INPUT_TOKENS} if rates is not None else {TOKENS, INPUT_TOKENS}
    if window is None and found.units & depends:
        raise UsageError(
            f"The call to {call.model!r} sends something whose tokens cannot be bounded from its text (an image, a file, a "
            "stored prompt), and the model's context window is not known, so it could not be priced against its budget "
            f"and was refused. Give the window: clevagent.init(prices={{{call.model!r}: clevagent.Price(input=..., output=..., "
            "context_window=...)})."
        )
    return (window or 0) * call.rounds


def plugin() -> BudgetGuard:
    """Make the built-in plugin of this module."""
    return BudgetGuard()
