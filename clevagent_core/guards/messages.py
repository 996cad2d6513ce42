"""The incidents that budgets raise, in sentences: what happened with the values, what it means, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from clevagent_core.accounts import Deadline, action_of, stops_run
from clevagent_core.budgets import GRACEFUL, UNITS, USD, Budget
from clevagent_core.calls import Call, LLMCall, Step
from clevagent_core.clock import utc
from clevagent_core.ledger.account import Balance, Notice, Refusal
from clevagent_core.money import format_usd, to_usd
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.guards.repetition import Finding
    from clevagent_core.runs import Run


def _show(balance: Balance) -> Callable[[int], str]:
    if balance.key.unit == USD:
        return format_usd
    unit = UNITS[balance.key.unit].replace("_", " ")
    return lambda amount: f"{amount:,} {unit.removesuffix('s') if amount == 1 else unit}"


def _incident(
    run: Run,
    kind: str,
    message: str,
    action: str,
    balance: Balance,
    needed: int | None,
    details: dict[str, object] | None = None,
) -> Incident:
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
        details=details or {},
    )


def _refused(run: Run, kind: str, message: str, refusal: Refusal, budget: Budget) -> Incident:
    account = refusal.line.account
    details: dict[str, object] = {"reason": refusal.reason}
    if account.key.window:  # a calendar ends it
        details["resets_at"] = account.ends_at
    return _incident(run, kind, message, _graceful(run, budget), refusal.balance, refusal.needed, details)


def _whose(balance: Balance) -> str:
    if balance.key.key == "all":
        return ""
    return f" ({balance.key.key}{', ' + balance.key.window if balance.key.window else ''})"


def _account(balance: Balance, show: Callable[[int], str]) -> str:
    kept = f", of which {show(balance.keep)} is kept for wrap_up()" if balance.keep else ""
    return (
        f"the budget {balance.key.budget!r}{_whose(balance)} has spent {show(balance.spent)} of {show(balance.ceiling)}{kept}, "
        f"and calls in flight hold {show(balance.held)}"
    )


def refusal_incident(run: Run, call: Call, refusal: Refusal, budget: Budget) -> Incident:
    """Say why a call was refused."""
    balance = refusal.balance
    show = _show(balance)
    what = f"model call to {call.model!r}" if isinstance(call, LLMCall) else f"call of the tool {call.tool!r}"
    if refusal.reason == "too_large":
        return _refused(run, "budget", f"A {what} was refused before it was sent. {_too_large(call, refusal)}", refusal, budget)
    could = f"It could cost up to {show(refusal.needed)}"
    if refusal.reason == "latched":
        could = "An earlier call of this run did not fit, which stopped the run"
        could += f"; this one could cost up to {show(refusal.needed)}" if refusal.needed else ""
    if refusal.reason == "busy":
        message = (
            f"A {what} was refused before it was sent. {could}, and {_account(balance, show)}. The room is only held: the same call "
            f"may fit once those are settled. Try again later, make fewer calls at once, or let calls wait longer "
            f"(wait_s is {run.watchdog.settings.wait_s:g} s; on an event loop only guard(model) and `async with` blocks wait)."
        )
        return _refused(run, "busy", message, refusal, budget)
    stops = stops_run(run, budget)
    means = "Everything this budget covers is refused for the rest of this run" if stops else "What does not fit is refused"
    until = f"; it starts from zero when this {budget.per} is over (UTC)" if balance.key.window else ""
    message = (
        f"A {what} was refused before it was sent. {could}, and {_account(balance, show)}. "
        f"{means}{until}. To go on, raise the ceiling with run.top_up(...); "
        "print(run) tells where the money went."
    )
    return _refused(run, "budget", message, refusal, budget)


def _too_large(call: Call, refusal: Refusal) -> str:
    balance = refusal.balance
    show = _show(balance)
    kept = f", of which {show(balance.keep)} is kept for wrap_up()" if balance.keep else ""
    why = ""
    if isinstance(call, LLMCall) and call.opaque:
        why = (
            " (the tokens of an image, a file or a stored prompt are not known before, so the model's whole context window counts)"
        )
    return (
        f"It alone could cost up to {show(refusal.needed)}{why}. That is more than the whole ceiling of the budget "
        f"{balance.key.budget!r}{_whose(balance)}: {show(balance.ceiling)}{kept}. Only this request is refused: nothing else is stopped by it. Send a smaller request, or a "
        "lower output limit; or give the budget a larger ceiling (run.top_up(...) raises it)."
    )


def deadline_incident(run: Run, deadline: Deadline, call: Call | None) -> Incident:
    """Say that a run is past its deadline."""
    budget, watchdog = deadline.budget, run.watchdog
    seconds = budget.seconds or 0.0
    elapsed = watchdog.clock.monotonic() - deadline.run.started_monotonic
    action = "dry_run" if run.dry_run else "warn" if action_of(run, budget) == "warn" else _graceful(run, budget)
    if action in ("dry_run", "warn"):
        what = f"Nothing is stopped, because this {'is a dry run' if run.dry_run else 'budget only warns'}"
    elif call is None:
        what = "It has not come to its end, and the next call that it makes is refused"
    else:
        whose = f"model call to {call.model!r}" if isinstance(call, LLMCall) else f"call of the tool {call.tool!r}"
        what = f"A {whose} was refused before it was sent, and so is every later one of this run"
    return Incident(
        kind="budget",
        message=(
            f"The deadline of the budget {budget.label!r} has passed: its run began {elapsed:,.1f} s ago, and {seconds:,g} s were given. {what}. "
            "Begin another run (with clevagent.run()), or give more time with a larger seconds=."
        ),
        agent=watchdog.settings.agent,
        run_id=run.run_id,
        at=watchdog.clock.wall(),
        action=action,
        budget=budget.label,
        key=deadline.run.run_id,
        unit="seconds",
        spent=round(elapsed, 3),
        held=0.0,
        needed=0.0,
        ceiling=float(seconds),
        details={"reason": "exhausted"} if call is not None else {},
    )


def near_deadline_incident(run: Run, deadline: Deadline) -> Incident:
    """Say that little time is left."""
    incident = deadline_incident(run, deadline, None)
    left = (incident.ceiling or 0) - (incident.spent or 0)
    message = f"The deadline of the budget {deadline.budget.label!r} is close: {left:,.1f} s are left of {incident.ceiling:,g} s. After it, calls are refused."
    return replace(incident, kind="budget_warning", message=message, action="warn", needed=None)


def learning_incident(run: Run, budget: Budget) -> Incident:
    """Say that a ceiling by the baseline does not hold yet."""
    return Incident(
        kind="baseline",
        message=(
            f"The budget {budget.label!r} sets no ceiling yet: what a run of {run.watchdog.settings.agent!r} usually costs is known from the tenth "
            "on. Give it a second budget in US dollars until then; a ledger in a file remembers runs. (Told once.)"
        ),
        agent=run.watchdog.settings.agent,
        run_id=run.run_id,
        at=run.watchdog.clock.wall(),
        budget=budget.label,
    )


def exhausted_incident(run: Run, node: str, refusal: Refusal, budget: Budget) -> Incident:
    """Say why a node was not started: nothing is left of its own ceiling, or it has refused this run."""
    balance = refusal.balance
    message = (
        f"The node {node!r} was not started: {_account(balance, _show(balance))}, so its calls would be refused. To go on, raise the "
        "ceiling with run.top_up(...); print(run) tells where the money went."
    )
    return _refused(run, "budget", message, refusal, budget)


def _graceful(run: Run, budget: Budget) -> str:
    action = action_of(run, budget)
    return action if isinstance(action, str) and action in GRACEFUL else "raise"


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
            "What the provider billed is recorded, and calls that would add to it are refused. A call cost more than could be known before "
            "it was sent: give an output limit, or use clevagent.guard(model), which sends one."
            if notice.enforced
            else "Nothing is stopped, because "
            + ("this is a dry run." if run.dry_run else "this budget only warns (on_exceed='warn').")
        )
    )
    return _incident(run, "overshoot", message, "dry_run" if run.dry_run else "warn", balance, None)


class Mark(NamedTuple):
    """When one call ended, and what the run had cost by then."""

    step: int
    cost_pico: int
    wall: float


def loop_incident(run: Run, finding: Finding, begin: Mark) -> Incident:
    """Say what repeats, how often, since when, and what it has cost since. What was asked and answered is not told."""
    wall = run.watchdog.clock.wall()
    # What a call was charged for lack of its usage may have been corrected since.
    cost = max(0, run.root.cost_pico - begin.cost_pico)
    last = finding.signs[-1]
    kind = _kind(last.what)
    is_model = kind == "model"
    asked = {"model": "asked the same", "node": "run with the same state"}.get(kind, "called with the same arguments")
    how = "failed in the same way" if last.failed else f"gave the same {'answer' if is_model else 'result'}"
    steps = "nodes" if kind == "node" else "calls"
    calls = [_name(sign.what) for sign in finding.signs]
    what = {
        "same call and result": f"the {calls[0]} was {asked} {finding.times} times, and {how}",
        "same failure": f"the {calls[0]} failed {finding.times} times in the same words, whatever it was asked",
        "cycle": f"a round of {finding.period} {steps} ({', '.join(calls)}) came {finding.times} times with the same results",
    }.get(
        finding.rule,
        f"the same {finding.period} {steps} ({', '.join(calls)}) came again and again, about {finding.times} times each, with the same results",
    )
    return Incident(
        kind="loop",
        message=(
            f"The run repeats itself: {what}. That began at {utc(begin.wall):%H:%M:%S} UTC, {wall - begin.wall:.0f} s ago, and has "
            f"cost {format_usd(cost)} since. "
        ),
        agent=run.watchdog.settings.agent,
        run_id=run.run_id,
        at=wall,
        details={
            "rule": finding.rule,
            "period": finding.period,
            "times": finding.times,
            "since": begin.wall,
            "calls": calls,
            "cost_usd": to_usd(cost),
        },
    )


def _kind(what: Any) -> str:
    return str(what[0])  # as the loop guard makes it


def _name(what: Any) -> str:
    return f"{_kind(what)} {what[1]!r}"


def ping_incident(run: Run, ping: Step, times: int, seconds: float) -> Incident:
    """Say that nothing but the same ping was heard."""
    wall = run.watchdog.clock.wall()
    return Incident(
        kind="loop",
        message=(
            f"The run repeats itself: the same ping ({ping.name!r}) came {times} times within {ceil(seconds)} s, with no call between. "
        ),
        agent=run.watchdog.settings.agent,
        run_id=run.run_id,
        at=wall,
        details={
            "rule": "same ping",
            "period": 1,
            "times": times,
            "since": wall - seconds,
            "calls": [f"ping {ping.name!r}"],
            "cost_usd": 0.0,
        },
    )


def as_told(incident: Incident, action: str) -> Incident:
    """Say what was done about a loop, and what to do next."""
    ends = {
        "raise": "Every later call of this run is refused before it is sent, until run.forgive_loops().",
        "dry_run": "Nothing was stopped, because this is a dry run.",
        "warn": (
            "Nothing was stopped, because loops are only warned of: clevagent.init(on_loop='raise') stops them, or "
            "guards=[clevagent.LoopGuard()] of clevagent.run()."
        ),
        "let_go": "It goes on, because the on_loop callable said so.",
    }
    return replace(incident, message=incident.message + ends[action], action="warn" if action == "let_go" else action)
