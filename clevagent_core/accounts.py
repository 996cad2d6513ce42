"""Which accounts a call of a run counts against."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from clevagent_core.budgets import GRACEFUL, OUTPUT_TOKENS, TOKENS, UNITS, USD, Amounts, Budget, OnExceed, window_at
from clevagent_core.calls import Call, LLMCall, ToolCall, Usage
from clevagent_core.control import Tighter
from clevagent_core.errors import UsageError
from clevagent_core.idle import limits
from clevagent_core.ledger.account import Account, AccountKey, Hold, Line, Notice, StaleAccount

if TYPE_CHECKING:
    from clevagent_core.runs import Run


class Deadline(NamedTuple):
    """The moment after which no call that a budget covers is sent."""

    at: float
    """In monotonic seconds."""
    budget: Budget
    run: Run
    """The run that it is counted from."""

    def is_news(self, what: str) -> bool:
        """Tell whether ``what`` (close, passed) was not told of it yet, and take note that it is now."""
        told = self.run.state.setdefault(Deadline, set())
        key = self.budget.label, what
        if key in told:
            return False
        told.add(key)
        return True

    def is_let_go(self) -> bool:
        """Tell whether calls may go on all the same, because the user's callable said so, or nothing is to be stopped."""
        return (self.budget.label, "let go") in self.run.state.get(Deadline, ())


class Cover(NamedTuple):
    """The accounts that calls of one shape count against, until a window rolls over."""

    lines: tuple[Line, ...]
    budgets: tuple[Budget, ...]
    """The budget of each line."""
    valid_until: float
    """When the first of the windows ends, in seconds since 1970 (UTC)."""
    units: frozenset[int]
    """The units that enforced lines are in: what must be known of a call before it can pass."""
    clamp_units: tuple[int, ...]
    """The units that depend on the output limit, and are limited."""
    extra: Sequence[Budget]
    """The budgets of the guarded object, kept so that their identity stays theirs."""
    deadlines: tuple[Deadline, ...] = ()
    """The moments after which the call is not sent."""
    remote: object = None
    """The ceilings that were set from outside when the accounts were looked up."""


_USED = 256
"""From how many accounts on a run forgets those whose window is over."""
RESUMABLE_S = 30 * 24 * 3600.0
"""How long the accounts of a run that can be resumed are kept, from when it began; resumed later, it starts from zero."""
_OUTPUT_UNITS = (USD, TOKENS, OUTPUT_TOKENS)


def scopes(run: Run, extra: Sequence[Budget] = ()) -> Iterator[tuple[Budget, Run]]:
    """Every budget in force for a call of ``run``, each with the run that its ``per="run"`` means.

    A nested run counts against its own budgets and against those of every run around it. Budgets of the watchdog and of a
    guarded object mean the outermost run. Where a ceiling was set from outside for a budget, a tighter one stands beside it.
    """
    control = run.watchdog.control
    tightened = set()
    for budget, anchor in _scopes_of_code(run, extra):
        yield budget, anchor
        tighter = control.tighter(budget) if control.budgets else None
        if tighter is not None:
            tightened.add(budget.label)
            yield tighter, anchor
    for budget in control.budgets:
        if budget.label not in tightened:
            yield budget, run.root


def _scopes_of_code(run: Run, extra: Sequence[Budget]) -> Iterator[tuple[Budget, Run]]:
    current: Run | None = run
    while current is not None:
        for budget in current.budgets:
            yield budget, current
        current = current.parent
    for budget in (*run.watchdog.settings.budgets, *extra):
        yield budget, run.root


def cover(run: Run, call: Call, extra: Sequence[Budget] = ()) -> Cover:
    """Find, and open where needed, the accounts that ``call`` counts against.

    Raises:
        UsageError: an account is in use with another ceiling, or belongs to the process that this one was forked from.

    """
    lines: dict[int, tuple[Line, Budget]] = {}
    deadlines: list[Deadline] = []
    valid_until = math.inf
    remote = run.watchdog.control.budgets  # before they are looked at: what is set meanwhile is looked up by the next call
    if extra:
        for current in run.chain():
            current.lent.update({budget.label: budget for budget in extra})
    if isinstance(call, LLMCall) and call.tools:
        run.watchdog.idle.learn_tools(call)
    for budget, anchor in scopes(run, extra):
        if not budget.covers(call):
            continue
        # A call of no model is none: a node asks what is left to it.
        if limits(budget, call) and (isinstance(call, ToolCall) or call.model):
            anchor.met.add(budget.label)
        enforced = action_of(run, budget) != "warn" and not run.dry_run
        if budget.seconds is not None:
            deadlines.append(Deadline(anchor.started_monotonic + budget.seconds, budget, anchor))
        for unit, ceiling in _limits(anchor, budget):
            account = _open(run, anchor, budget, unit, ceiling, call.thread_id, is_enforced=enforced)
            if isinstance(budget, Tighter):
                _carry_over(run, anchor, budget, unit, account, call.thread_id)
            known = lines.get(id(account))
            # Of two budgets that share an account, one that only warns does not let go of what the other one enforces.
            if known is None or (enforced and not known[0].enforced):
                lines[id(account)] = Line(account, unit, enforced), budget
            valid_until = min(valid_until, account.ends_at)
    found = tuple(line for line, _ in lines.values())
    budgets = tuple(budget for _, budget in lines.values())
    enforced_units = frozenset(line.unit for line in found if line.enforced)
    clamped = tuple(unit for unit in _OUTPUT_UNITS if unit in enforced_units)
    return Cover(found, budgets, valid_until, enforced_units, clamped, extra, tuple(deadlines), remote)


def deadlines_of(run: Run) -> list[Deadline]:
    """Every deadline in force for ``run``, whatever its filters."""
    return [
        Deadline(anchor.started_monotonic + budget.seconds, budget, anchor)
        for budget, anchor in scopes(run)
        if budget.seconds is not None
    ]


def _limits(anchor: Run, budget: Budget) -> tuple[tuple[int, int], ...]:
    """The limits of a budget, with the one that depends on the agent's past: as it was when the run first needed it."""
    multiple = budget.baseline_multiple
    if multiple is None:
        return budget.limits()
    if budget.label not in anchor.ceilings:
        anchor.ceilings[budget.label] = _usual(anchor, budget, multiple)
    ceiling = anchor.ceilings[budget.label]
    return budget.limits() if ceiling is None else ((USD, ceiling), *budget.limits())


def _usual(anchor: Run, budget: Budget, multiple: float) -> int | None:
    from clevagent_core.guards.messages import learning_incident  # noqa: PLC0415 - messages need this module
    from clevagent_core.guards.spike import RUN_FLOOR  # noqa: PLC0415 - only where a budget asks for it

    usual = anchor.watchdog.baselines.of("run_cost")
    if usual is None:
        anchor.watchdog.tell_once(learning_incident(anchor, budget), key=budget.label)
        return None
    return usual.limit(multiple, RUN_FLOOR)


def action_of(run: Run, budget: Budget) -> OnExceed:
    """What happens at a ceiling: what ``init(on_cost_exceeded=...)`` says, else what the budget says."""
    ruling = run.watchdog.settings.on_cost_exceeded
    if ruling is None or (ruling == "raise" and budget.on_exceed in tuple(GRACEFUL)):
        return budget.on_exceed  # to end gracefully is a way of stopping
    return ruling


def stops_run(run: Run, budget: Budget) -> bool:
    """Tell whether a refusal by ``budget`` stops all that it covers in the run tree of ``run``."""
    # The process is no piece of work that could be over: there only a ceiling of its own stops what follows.
    return budget.per == "run" or run.root is not run.watchdog.process_run


def accounts_of(run: Run, thread_id: str | None = None, *, lent: bool = False) -> list[tuple[Budget, Account]]:
    """Every account of the budgets in force for ``run``, whatever their filters.

    Args:
        run: the run.
        thread_id: whose conversation ``per="thread"`` means; else a tag of the run must name it.
        lent: with the budgets of guarded objects and nodes that were called in it.

    """
    found: dict[int, tuple[Budget, Account]] = {}
    for budget, anchor in scopes(run, tuple(run.lent.values()) if lent else ()):
        for unit, ceiling in _limits(anchor, budget):
            account = _open(run, anchor, budget, unit, ceiling, thread_id)
            found.setdefault(id(account), (budget, account))
    return list(found.values())


def record(run: Run, call: LLMCall | ToolCall, usage: Usage, cost_pico: int | None) -> None:
    """Put a call that was made elsewhere into every account it counts against, ceilings or not."""
    ledger = run.watchdog.ledger
    while True:
        found = cover(run, call)
        if not found.lines:
            return
        lines = [line._replace(enforced=False) for line in found.lines]
        try:
            hold = ledger.reserve(lines, (0, 0, 0, 0, 0, 0), expires_at=math.inf, owner=None)
            break
        except StaleAccount:
            continue
    # Enforced again when it is spent: what is past the ceiling is told as that.
    hold.lines = found.lines  # type: ignore[union-attr]  # lines that are not enforced are never refused
    notices = ledger.settle(hold, amounts_of(call, usage, cost_pico))  # type: ignore[arg-type]  # as above
    tell_notices(run, [*(hold.notices or ()), *notices])  # type: ignore[union-attr]  # as above


def amounts_of(call: Call, usage: Usage, cost_pico: int | None) -> Amounts:
    """What a finished call adds to each unit."""
    if isinstance(call, ToolCall):
        return (0, 0, 0, 0, 0, 1)
    return (cost_pico or 0, usage.input_tokens + usage.output_tokens, usage.input_tokens, usage.output_tokens, 1, 0)


def tell_notices(run: Run, notices: Sequence[Notice]) -> None:
    """Tell observers what happened to accounts: a warning mark was crossed, or a ceiling."""
    from clevagent_core.guards.messages import notice_incident  # noqa: PLC0415 - off the hot path, and messages need this module

    for notice in notices:
        run.watchdog.tell(notice_incident(run, notice))


def _open(
    run: Run, anchor: Run, budget: Budget, unit: int, ceiling: int, thread_id: str | None, *, is_enforced: bool = True
) -> Account:
    watchdog = run.watchdog
    window = window_at(budget.per, watchdog.clock.wall())
    key = AccountKey(budget.label, unit, budget.key(run_id=anchor.run_id, thread_id=thread_id, tags=run.tags), window.label)
    is_own = budget.per == "run"
    account = anchor.accounts.get(key) if is_own else None
    # What can be resumed has an end all the same, or abandoned work would fill the ledger.
    ends_at = anchor.started_at + RESUMABLE_S if is_own and anchor.resumable else window.ends_at
    if account is None or account.closed:
        if is_enforced:
            _refuse_after_fork(anchor.pid if is_own else watchdog.pid, watchdog.ledger.survives_fork, budget)
        watchdog.ledger.evict(watchdog.clock.wall())
        account = watchdog.ledger.open(
            key,
            ceiling=ceiling,
            keep=budget.keep if unit == USD else 0,
            warn_mark=budget.warn_mark(ceiling),
            ends_at=ends_at,
            # In a forked child the run is its parent's, and goes on when the child has ended; one that is resumed goes on elsewhere.
            is_of_run=is_own and anchor.pid == os.getpid() and not anchor.resumable,
        )
        if is_own:
            anchor.accounts[key] = account
    now = watchdog.clock.wall()
    for current in run.chain():
        if len(current.used) > _USED:
            # Windows that are over, in a run that outlives many of them.
            for old in [key for key, other in current.used.items() if other.ends_at <= now and not other.held]:
                del current.used[old]
        current.used[key] = account
        if is_own and current is anchor and anchor.ended_at is not None:
            break  # those around it have told what it came to
    return account


def _carry_over(run: Run, anchor: Run, budget: Tighter, unit: int, account: Account, thread_id: str | None) -> None:
    """Begin the account of a ceiling from outside with what the budget that it tightens has spent and holds."""
    ledger = run.watchdog.ledger
    code = dict(_limits(anchor, budget.of)).get(unit)
    if code is None or account.key in run.watchdog.control.carried:
        return
    run.watchdog.control.carried.add(account.key)
    before = ledger.balance(_open(run, anchor, budget.of, unit, code, thread_id))
    now = ledger.balance(account)
    if now.spent or now.held:
        return  # another process that shares the ledger has done it
    amounts = [0] * len(UNITS)
    amounts[unit] = before.spent + before.held
    hold = ledger.reserve([Line(account, unit, enforced=False)], (0, 0, 0, 0, 0, 0), expires_at=math.inf, owner=None)
    if isinstance(hold, Hold):
        hold.lines = [Line(account, unit, enforced=True)]
        tell_notices(run, ledger.settle(hold, cast("Amounts", tuple(amounts))))


def _refuse_after_fork(pid: int, survives_fork: bool, budget: Budget) -> None:  # noqa: FBT001 - one fact about the ledger
    if survives_fork or pid == os.getpid():
        return
    raise UsageError(
        f"This process was forked from one whose budget {budget.label!r} is kept in memory: the two cannot see each other's "
        "spending, so the ceiling could be passed and the call was refused. Give the child a ceiling of its own: call "
        "clevagent.shutdown() and clevagent.init(...) in it, or start it with the 'spawn' method. For one ceiling over several "
        "processes, keep the accounts in a file: clevagent.init(ledger='sqlite:///ledger.db')."
    )
