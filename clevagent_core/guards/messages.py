"""The incidents that budgets raise, in sentences: what happened with the values, what it means, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clevagent_core.budgets import UNITS, USD, Budget
from clevagent_core.calls import Call, LLMCall
from clevagent_core.ledger.account import Balance, Notice, Refusal
from clevagent_core.money import format_usd, to_usd
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.runs import Run


def _show(balance: Balance) -> Callable[[int], str]:
    if balance.key.unit == USD:
        return format_usd
    unit = UNITS[balance.key.unit].replace("_", " ")
    return lambda amount: f"{amount:,} {unit}"


def _incident(run: Run, kind: str, message: str, action: str, balance: Balance, needed: int | None) -> Incident:
    scale: Callable[[int], float] = to_usd if balance.key.unit == USD else float
    return Incident(
        kind=kind,
        message=message,
        agent=run.watchdog.settings.agent,
        run_id=run.run_id,
        at=run.watchdog.clock.wall(),
        action=action,
        budget=balance.key.budget,
        key=balance.key.key,
        window=balance.key.window,
        unit=UNITS[balance.key.unit],
        spent=scale(balance.spent),
        held=scale(balance.held),
        needed=None if needed is None else scale(needed),
        ceiling=scale(balance.ceiling),
    )


def _account(balance: Balance, show: Callable[[int], str]) -> str:
    where = f" ({balance.key.key}{', ' + balance.key.window if balance.key.window else ''})" if balance.key.key != "all" else ""
    kept = f", of which {show(balance.keep)} is kept for wrap_up()" if balance.keep else ""
    return (
        f"the budget {balance.key.budget!r}{where} has spent {show(balance.spent)} of {show(balance.ceiling)}{kept}, "
        f"and calls in flight hold {show(balance.held)}"
    )


def refusal_incident(run: Run, call: Call, refusal: Refusal, budget: Budget) -> Incident:
    """Say why a call was refused."""
    balance = refusal.balance
    show = _show(balance)
    what = f"model call to {call.model!r}" if isinstance(call, LLMCall) else f"call of the tool {call.tool!r}"
    could = f"It could cost up to {show(refusal.needed)}" if refusal.needed else "It adds nothing"
    if not refusal.busy and not refusal.first:
        could = "An earlier call did not fit and stopped this budget"
        could += f"; this one could cost up to {show(refusal.needed)}" if refusal.needed else ""
    if refusal.busy:
        message = (
            f"A {what} was refused before it was sent. {could}, and {_account(balance, show)}. The room is only held: the same call "
            f"may fit once those are settled. Try again later, make fewer calls at once, or let calls wait longer "
            f"(wait_s is {run.watchdog.settings.wait_s:g} s; on an event loop only guard(model) and `async with` blocks wait)."
        )
        return _incident(run, "busy", message, "raise", balance, refusal.needed)
    until = {
        "run": "for the rest of this run",
        "thread": "for the rest of this conversation",
        "lifetime": "from now on",
    }.get(budget.per, f"until this {budget.per} is over (UTC)")
    message = (
        f"A {what} was refused before it was sent. {could}, and {_account(balance, show)}. "
        f"Everything this budget covers is refused {until}. To go on, raise the ceiling with run.top_up(...); "
        "print(run) tells where the money went."
    )
    return _incident(run, "budget", message, "raise", balance, refusal.needed)


def notice_incident(run: Run, notice: Notice) -> Incident:
    """Say that an account crossed its warning mark, or its ceiling."""
    balance = notice.balance
    show = _show(balance)
    if notice.kind == "warning":
        message = f"Spending is close to a ceiling: {_account(balance, show)}. Calls that could pass it will be refused."
        return _incident(run, "budget_warning", message, "warn", balance, None)
    over = balance.spent + balance.held - balance.ceiling
    message = (
        f"A ceiling was passed, or will be if calls in flight cost what they may, by {show(max(over, 0))}: "
        f"{_account(balance, show)}. "
        + (
            "What the provider billed is recorded, and every later call is refused. A call cost more than could be known before "
            "it was sent: give an output limit, or use clevagent.guard(model), which sends one."
            if balance.latched
            else "Nothing is stopped, because "
            + ("this is a dry run." if run.dry_run else "this budget only warns (on_exceed='warn').")
        )
    )
    return _incident(run, "overshoot", message, "dry_run" if run.dry_run else "warn", balance, None)
