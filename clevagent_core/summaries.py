"""What a run has used: how it is added up, and how it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from clevagent_core.budgets import UNITS, USD
from clevagent_core.calls import Call, ToolCall, Usage
from clevagent_core.clock import utc
from clevagent_core.money import PICO_PER_USD, format_usd, to_usd
from clevagent_core.verdicts import Incident, Unit

if TYPE_CHECKING:
    from clevagent_core.ledger.account import Balance
    from clevagent_core.runs import Run


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
    """Whether it has refused a call of this run, which stops the run until the ceiling is raised. Others may go on."""

    @property
    def overshoot(self) -> float:
        """How much was billed past the ceiling; 0 when it held."""
        return max(0.0, round(self.spent - self.ceiling, 12))  # as exact as a ledger is


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
    stops: Sequence[Incident] = ()
    """Why work in it was ended gracefully (``halt``), with what there was so far; empty when all of it came to its own end."""

    def __str__(self) -> str:
        """Write the summary as a short table."""
        return _table(self)


class Tally:
    """Adds up what a run uses. One lock: additions come from many threads."""

    __slots__ = (
        "by_model", "by_node", "by_tool", "charged", "clamped", "cost", "heir", "lock", "refusals", "tool_calls", "unpriced",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.by_model: dict[str, list[int]] = {}
        self.by_node: dict[str, list[int]] = {}
        self.by_tool: dict[str, list[int]] = {}
        self.cost = self.tool_calls = self.refusals = self.clamped = self.charged = self.unpriced = 0
        self.heir: Tally | None = None
        """What all of this was added to when the run ended; what is corrected later is added there, too."""

    def add(self, call: Call, sign: int, cost: int | None, usage: Usage, charged: bool, clamped: bool) -> None:  # noqa: FBT001 - hot
        """Add a call (``sign`` 1), or take back one that was charged because its real usage came later (``sign`` -1)."""
        input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
        amount = sign * (cost or 0)
        with self.lock:
            if self.heir is not None:
                self.heir.add(call, sign, cost, usage, charged, clamped)
            self.cost += amount
            if charged:
                self.charged += sign
            if clamped:
                self.clamped += sign
            if isinstance(call, ToolCall):
                self.tool_calls += sign
                _add(self.by_tool, call.tool if call.inside is None else f"{call.inside}/{call.tool}", sign, amount, 0, 0)
                return
            if cost is None:
                self.unpriced += sign
            row = self.by_model.get(call.model)
            if row is None:
                row = self.by_model[call.model] = [0, 0, 0, 0]
            # Written out: every model call comes here, once for each run around it.
            row[0] += sign
            row[1] += amount
            row[2] += input_tokens
            row[3] += output_tokens
            if call.node is not None:
                _add(self.by_node, call.node, sign, amount, input_tokens, output_tokens)
            if call.tool is not None:
                _add(self.by_tool, call.tool, 0, amount, input_tokens, output_tokens)

    def refuse(self) -> None:
        """Count a refusal."""
        with self.lock:
            self.refusals += 1
            if self.heir is not None:
                self.heir.refuse()

    def bequeath(self, heir: Tally) -> None:
        """The run is over: add all of it to ``heir``, and what comes later, too."""
        with self.lock, heir.lock:
            self.heir = heir
            heir.cost += self.cost
            heir.tool_calls += self.tool_calls
            heir.refusals += self.refusals
            _merge(heir.by_model, self.by_model)


class Totals(NamedTuple):
    """What a whole process has used."""

    cost_pico: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    llm_calls: int = 0
    tool_calls: int = 0
    refusals: int = 0


def total(tallies: Iterable[Tally]) -> Totals:
    """Add up what runs have used. Takes no lock, so that a forked child can ask, too; numbers that change meanwhile are told later."""
    cost = input_tokens = output_tokens = llm_calls = tool_calls = refusals = 0
    for tally in tallies:
        cost += tally.cost
        tool_calls += tally.tool_calls
        refusals += tally.refusals
        for row in list(tally.by_model.values()):
            llm_calls += row[0]
            input_tokens += row[2]
            output_tokens += row[3]
    return Totals(cost, input_tokens, output_tokens, llm_calls, tool_calls, refusals)


def _merge(table: dict[str, list[int]], other: Mapping[str, Sequence[int]]) -> None:
    for name, row in other.items():
        _add(table, name, *row)


def _add(table: dict[str, list[int]], name: str, count: int, cost: int, input_tokens: int, output_tokens: int) -> None:
    row = table.get(name)
    if row is None:
        row = table.setdefault(name, [0, 0, 0, 0])
    row[0] += count
    row[1] += cost
    row[2] += input_tokens
    row[3] += output_tokens


def summarize(run: Run, tally: Tally, balances: Sequence[tuple[Balance, bool]]) -> RunSummary:
    """Put together what a run has used and how its budgets stand."""
    states = tuple(_state(balance, is_latched) for balance, is_latched in balances)
    with tally.lock:
        return RunSummary(
            run_id=run.run_id,
            agent=run.watchdog.settings.agent,
            started_at=run.started_at,
            ended_at=run.ended_at,
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
            stops=tuple(run.stops),
        )


def _spend(row: list[int]) -> Spend:
    return Spend(calls=row[0], cost_usd=to_usd(row[1]), input_tokens=row[2], output_tokens=row[3])


def _state(balance: Balance, is_latched: bool) -> BudgetState:  # noqa: FBT001 - one fact beside the balance
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
        latched=is_latched,
    )


def _money(usd: float) -> str:
    return format_usd(round(usd * PICO_PER_USD))


def _table(summary: RunSummary) -> str:
    state = "active" if summary.ended_at is None else f"ended after {summary.ended_at - summary.started_at:.1f} s"
    total = summary.total
    lines = [
        f"run {summary.run_id} of {summary.agent!r}, started {utc(summary.started_at):%Y-%m-%d %H:%M:%S} UTC, {state}",
        (
            f"  spent {_money(total.cost_usd)} in {total.calls} model calls "
            f"({total.input_tokens:,} tokens in, {total.output_tokens:,} out) and {summary.tool_calls} tool calls"
        ),
        (
            f"  refused {summary.refusals}, clamped {summary.clamped_calls}, charged at their upper bound "
            f"{summary.calls_charged_at_bound}, without a price {summary.unpriced_calls}"
        ),
    ]
    for title, table in (("model", summary.by_model), ("node", summary.by_node), ("tool", summary.by_tool)):
        lines += [
            f"  {title:<6} {name:<28} {spend.calls:>5} calls  {_money(spend.cost_usd):>14}"
            f"  {spend.input_tokens:>9,} in {spend.output_tokens:>9,} out"
            for name, spend in sorted(table.items(), key=lambda item: -item[1].cost_usd)
        ]
    lines += [f"  ended early: {stop.message}" for stop in summary.stops]
    for budget in summary.budgets:
        show: Callable[[float], str] = _money if budget.unit == "usd" else "{:,.0f}".format
        lines.append(
            f"  budget {budget.budget!r} ({budget.unit}): {show(budget.spent)} of {show(budget.ceiling)} spent, "
            f"{show(budget.held)} held"
            + (f", passed by {show(budget.overshoot)}" if budget.overshoot else "")
            + (", stopped" if budget.latched else "")
        )
    return "\n".join(lines)
