"""The promise, through the public door: whatever is called, in whatever order, no ceiling is passed by what was really used."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from clevagent.testing.clock import FakeClock
from clevagent_core.accounts import accounts_of
from clevagent_core.budgets import UNITS, Budget
from clevagent_core.calls import Call, LLMCall, ToolCall, Usage
from clevagent_core.clock import utc
from clevagent_core.errors import BudgetBusy, BudgetExceeded
from clevagent_core.ledger import sqlite
from clevagent_core.ledger.sqlite import SqliteLedger
from clevagent_core.money import to_pico
from clevagent_core.pricing import Price
from clevagent_core.runs import Run
from clevagent_core.summaries import RunSummary
from clevagent_core.tickets import Ticket
from clevagent_core.watchdog import Watchdog

OBSERVERS = ["clevagent_heartbeat.pulse", "clevagent_heartbeat.stall"]
"""What only looks on, at every half minute of the years that pass here."""
PRICES = {
    "m": Price(input=1, output=2, context_window=500),
    "n": Price(input=3, output=15, cache_read="0.3", cache_write="3.75"),
}
RATES = {"m": (1_000_000, 2_000_000, 1_000_000, 1_000_000), "n": (3_000_000, 15_000_000, 300_000, 3_750_000)}
"""The same in pico-USD a token, so that costs are worked out a second time: input, output, cache read, cache write."""
ASSUMED = 40
WINDOW = {"run": "", "thread": "", "lifetime": "", "hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "month": "%Y-%m"}

Key = tuple[str, int, str, str]
"""How the model finds an account: the budget's name, the unit, whose it is, the window."""


@pytest.fixture(autouse=True)
def _hush() -> Iterator[None]:
    logger = logging.getLogger("clevagent")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def pico_cost(model: str, usage: Usage) -> int:
    plain, output, read, write = RATES[model]
    uncached = usage.input_tokens - usage.cache_read_tokens - usage.cache_write_tokens
    return uncached * plain + usage.cache_read_tokens * read + usage.cache_write_tokens * write + usage.output_tokens * output


def in_unit(amount: float, unit: str) -> int:
    return round(amount * 10**12) if unit == "usd" else round(amount)


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "usd": st.integers(50, 4000).map(lambda micro: f"{micro / 10**6:f}"),
        "tokens": st.integers(60, 2000),
        "input_tokens": st.integers(60, 1500),
        "output_tokens": st.integers(20, 900),
        "llm_calls": st.integers(1, 8),
        "tool_calls": st.integers(1, 4),
    },
).filter(bool)


@st.composite
def budgets(draw: st.DrawFn, level: str) -> list[Budget]:
    made = []
    for number in range(draw(st.integers(0, 3))):
        limits: dict[str, Any] = draw(LIMITS)
        if "usd" in limits and draw(st.booleans()):
            limits["keep_usd"] = f"{float(limits['usd']) / draw(st.integers(2, 5)):f}"
        made.append(
            Budget(
                **limits,
                name=f"{level} {number}",
                per=draw(st.sampled_from(["run", "run", "hour", "day", "month", "lifetime", "thread"])),
                by=draw(st.sampled_from([None, None, "tenant"])),
                node=draw(st.sampled_from([None, None, None, "a*"])),
                model=draw(st.sampled_from([None, None, None, "m"])),
                tool=draw(st.sampled_from([None, None, None, None, "search"])),
                on_exceed=draw(st.sampled_from(["raise", "raise", "raise", "warn"])),
            )
        )
    return made


@dataclass(eq=False)
class Conversation:
    """A provider's view of a history: each message has its own number of tokens, and the request a few more."""

    overhead: int
    items: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Sent:
    """One call that was let through, and what the model knows of it."""

    ticket: Ticket
    run: Run
    keys: list[Key]
    bound: tuple[int, ...]
    """What is held on every account; zeros where no budget covers it."""
    most_input: int
    most_output: int
    state: str = "open"
    amounts: tuple[int, ...] = (0,) * 6
    """What it counts with, once it has ended."""
    cost: int = 0


INDEX = st.integers(0, 10**6)
SHARE = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


class CeilingsMachine(RuleBasedStateMachine):
    """An agent that does anything, a provider that bills anything up to what the request allows, and a calendar."""

    def __init__(self, ledger: str = "memory") -> None:
        super().__init__()
        self.ledger = ledger

    @initialize(given_budgets=budgets("agent"))
    def begin(self, given_budgets: list[Budget]) -> None:
        self.clock = FakeClock()
        self.watchdog = Watchdog(
            block=OBSERVERS,
            clock=self.clock,
            ledger=self.ledger,
            prices=PRICES,
            budgets=given_budgets,
            wait_s=0,
            hold_s=1e9,
            assume_output_tokens=ASSUMED,
        )
        self.runs: list[Run] = [self.watchdog.process_run]
        self.sent: list[Sent] = []
        self.conversations = [Conversation(overhead=3), Conversation(overhead=16)]
        self.raised: dict[Key, int] = {}
        self.latched: set[tuple[Run, Key]] = set()
        """What has refused which root run, and was not topped up since."""
        self.by_name = {budget.label: budget for budget in given_budgets}
        self.refusals: dict[Run, int] = {}
        self.started = 0

    def teardown(self) -> None:
        if not hasattr(self, "watchdog"):
            return
        for sent in self.sent:
            # What was opened on a run after its end is nobody's to charge but the caller's.
            if sent.state == "open" and sent.run.ended_at is not None:
                sent.ticket.charge()
                self._charged(sent)
        for run in self.runs:
            self._end(run)
        self.watchdog.shutdown()
        assert self.watchdog.ledger.holds() == []
        self.everything_is_as_predicted()

    # -- the model --------------------------------------------------------------------------------------------------------

    def _keys(self, run: Run, call: Call, only: Budget | None = None) -> list[Key]:
        """Every account that a call counts against, found without the code under test."""
        found: dict[Key, None] = {}
        anchors: list[tuple[Budget, Run]] = []
        current: Run | None = run
        while current is not None:
            anchors += [(budget, current) for budget in current.budgets]
            current = current.parent
        anchors += [(budget, run.root) for budget in self.watchdog.settings.budgets]
        for budget, anchor in anchors:
            model = call.model if isinstance(call, LLMCall) else None
            is_covered = (
                (budget.node is None or (call.node or "").startswith("a"))
                and budget.model in {None, model}
                and budget.tool in {None, call.tool}
            )
            if only is not None and (budget is not only):
                continue
            if not is_covered and only is None:
                continue
            whose = {"run": anchor.run_id, "thread": call.thread_id or run.tags.get("thread_id") or anchor.run_id}.get(budget.per)
            tag = f"tenant={run.tags.get('tenant', '')}" if budget.by else None
            name = " ".join(filter(None, (whose, tag))) or "all"
            window = utc(self.clock.wall()).strftime(WINDOW[budget.per])
            for unit in (unit for unit in UNITS if getattr(budget, unit) is not None):
                key = (budget.label, UNITS.index(unit), name, window)
                found[key] = None
        return list(found)

    def _keep(self, key: Key) -> int:
        return to_pico(self.by_name[key[0]].keep_usd, what="keep_usd") if UNITS[key[1]] == "usd" else 0

    def _is_enforced(self, key: Key) -> bool:
        return self.by_name[key[0]].on_exceed == "raise"

    def _balance(self, key: Key) -> tuple[int, int, int]:
        """Spent, held and ceiling, from what was sent."""
        mine = [sent for sent in self.sent if key in sent.keys]
        spent = sum(sent.amounts[key[1]] for sent in mine if sent.state in {"settled", "charged"})
        held = sum(sent.bound[key[1]] for sent in mine if sent.state == "open")
        limit: Any = getattr(self.by_name[key[0]], UNITS[key[1]])
        ceiling = to_pico(limit, what="usd") if UNITS[key[1]] == "usd" else limit
        return spent, held, ceiling + self.raised.get(key, 0)

    # -- runs and time ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.runs) < 8)
    @rule(
        data=st.data(),
        around=INDEX,
        is_nested=st.booleans(),
        tags=st.sampled_from([{}, {"tenant": "x"}, {"tenant": "y"}, {"tenant": "x", "thread_id": "t"}]),
    )
    def start_run(self, data: st.DataObject, around: int, tags: dict[str, str], *, is_nested: bool) -> None:
        self.started += 1
        parents = [run for run in self.runs if run.ended_at is None]
        parent = parents[around % len(parents)] if is_nested and parents else None
        given_budgets = data.draw(budgets(f"run {self.started}"))
        self.by_name |= {budget.label: budget for budget in given_budgets}
        self.runs.append(self.watchdog.start_run(budgets=given_budgets, tags=tags, parent=parent))

    @precondition(lambda self: len(self.runs) > 1)
    @rule(index=INDEX)
    def end_run(self, index: int) -> None:
        self._end(self.runs[1 + index % (len(self.runs) - 1)])

    def _end(self, run: Run) -> None:
        """What is in flight is charged, and nothing of the run is held any more."""
        was_over = run.ended_at is not None
        run.end()
        if not was_over:
            for sent in self.sent:
                # Where no budget covers a call nothing is held, and its usage may still come in.
                if sent.run is run and sent.state == "open" and sent.keys:
                    self._charged(sent)
            assert not [hold for hold in self.watchdog.ledger.holds() if hold.owner.run is run]  # type: ignore[attr-defined]

    @rule(
        later=st.sampled_from(
            [timedelta(seconds=1), timedelta(minutes=59), timedelta(hours=1), timedelta(hours=23), timedelta(days=20)]
        )
    )
    def time_passes(self, later: timedelta) -> None:
        self.clock.advance(later.total_seconds())

    @rule(index=INDEX, amount=st.integers(1, 500))
    def top_up(self, index: int, amount: int) -> None:
        run = self.runs[index % len(self.runs)]
        for budget in run.budgets:
            for unit in ("usd", "tokens", "llm_calls", "tool_calls"):
                if getattr(budget, unit) is None:
                    continue
                value: Any = f"{amount / 10**6:f}" if unit == "usd" else amount
                run.top_up(**{unit: value}, budget=budget.label)
                key = next(key for key in self._keys(run, ToolCall(tool=""), only=budget) if UNITS[key[1]] == unit)
                self.raised[key] = self.raised.get(key, 0) + (amount * 10**6 if unit == "usd" else amount)
                self.latched = {(root, other) for root, other in self.latched if other != key}
                return

    # -- calls ------------------------------------------------------------------------------------------------------------

    @rule(
        where=INDEX,
        talk=st.integers(0, 1),
        said=st.integers(0, 60),
        real=SHARE,
        goes_on=st.booleans(),
        model=st.sampled_from(["m", "n"]),
        limit=st.sampled_from([None, 1, 20, 100, 400]),
        floor=st.sampled_from([1, 10, 50]),
        clamp=st.booleans(),
        answers=st.sampled_from([1, 1, 2, 3]),
        opaque=st.sampled_from([False, False, False, True]),
        node=st.sampled_from([None, "a1", "b"]),
        tool=st.sampled_from([None, None, "search"]),
        thread_id=st.sampled_from([None, "t", "u"]),
        wrap_up=st.sampled_from([False, False, False, True]),
    )
    def call_model(
        self,
        where: int,
        talk: int,
        said: int,
        real: float,
        model: str,
        limit: int | None,
        floor: int,
        answers: int,
        node: str | None,
        tool: str | None,
        thread_id: str | None,
        *,
        goes_on: bool,
        clamp: bool,
        opaque: bool,
        wrap_up: bool,
    ) -> None:
        conversation = self.conversations[talk]
        if conversation.items and not goes_on:
            conversation.items, conversation.tokens = conversation.items[:1], conversation.tokens[:1]
        text = f"{len(self.sent)} {'x' * said}"
        items = [*conversation.items, text]
        tokens = [*conversation.tokens, round(real * (len(text) + 8))]
        call = LLMCall(
            model=model,
            input=items,
            max_output_tokens=limit,
            min_output_tokens=floor,
            clamp=clamp,
            answers=answers,
            opaque=opaque,
            context_window=300 if opaque else None,
            node=node,
            tool=tool,
            thread_id=thread_id,
        )
        run = self.runs[where % len(self.runs)]
        sent = self._open(run, call, wrap_up=wrap_up)
        if sent is None:
            return
        granted = sent.ticket.max_output_tokens
        sent.most_input = 300 if opaque else conversation.overhead + sum(tokens)
        # A provider keeps to the limit that it is sent. Where none can be sent, the assumption is all there is.
        sent.most_output = answers * (granted if granted is not None else ASSUMED)
        if not opaque:
            conversation.items, conversation.tokens = items, tokens
        if clamp and granted is not None:
            assert granted >= (floor if limit is None else min(limit, floor))
        if limit is not None:
            assert granted is not None
            assert granted <= limit
            assert clamp or granted == limit
            assert sent.ticket.is_clamped == (granted < limit)

    @rule(
        where=INDEX,
        tool=st.sampled_from(["search", "write"]),
        node=st.sampled_from([None, "a1", "b"]),
        wrap_up=st.sampled_from([False, False, False, True]),
    )
    def call_tool(self, where: int, tool: str, node: str | None, *, wrap_up: bool) -> None:
        self._open(self.runs[where % len(self.runs)], ToolCall(tool=tool, node=node), wrap_up=wrap_up)

    def _open(self, run: Run, call: Call, *, wrap_up: bool) -> Sent | None:
        keys = self._keys(run, call)
        try:
            if wrap_up:
                with run.wrap_up():
                    ticket = run.open(call)
            else:
                ticket = run.open(call)
        except BudgetExceeded as error:
            self._refused(run, keys, error, wrap_up=wrap_up)
            return None
        enforced = [key for key in keys if self._is_enforced(key)]
        assert wrap_up or not self.latched.intersection((run.root, key) for key in enforced)
        held = [hold for hold in self.watchdog.ledger.holds() if hold.owner is ticket]
        bound = tuple(held[0].amounts) if held else (0,) * 6
        assert len(held) == (1 if keys else 0)
        sent = Sent(ticket, run, keys, bound, 0, 0)
        self.sent.append(sent)
        for key in enforced:
            spent, held_now, ceiling = self._balance(key)
            if bound[key[1]]:
                assert spent + held_now <= ceiling - (0 if wrap_up else self._keep(key))
        return sent

    def _refused(self, run: Run, keys: list[Key], error: BudgetExceeded, *, wrap_up: bool) -> None:
        """Only for want of room, or after such a refusal; and only by a budget that covers the call and does more than warn."""
        incident = error.incident
        unit: Any = incident.unit
        key: Any = (incident.budget, UNITS.index(unit), incident.key, incident.window)
        assert key in keys
        assert self._is_enforced(key)
        spent, held, ceiling = self._balance(key)
        room = ceiling - (0 if wrap_up else self._keep(key))
        assert in_unit(error.spent, unit) == spent
        assert in_unit(error.held, unit) == held
        needed = in_unit(error.needed, unit)
        if (run.root, key) in self.latched and not wrap_up:
            assert error.reason == "latched"
        elif isinstance(error, BudgetBusy):
            assert error.reason == "busy"
            assert spent + needed <= room < spent + held + needed
        else:
            assert spent + needed > room
            assert error.reason == ("too_large" if spent < room < needed else "exhausted")
            # The process is no run: there, only a ceiling of its own goes on refusing.
            if error.reason == "exhausted" and (run.root is not self.runs[0] or self.by_name[key[0]].per == "run"):
                self.latched.add((run.root, key))
        current: Run | None = run
        while current is not None:
            self.refusals[current] = self.refusals.get(current, 0) + 1
            current = current.parent

    # -- what becomes of calls --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.sent)
    @rule(index=INDEX, input_share=SHARE, output_share=SHARE, read=SHARE, write=SHARE)
    def settle(self, index: int, input_share: float, output_share: float, read: float, write: float) -> None:
        """Also late, after it was charged; a second time, or after a release, it counts for nothing."""
        sent = self.sent[index % len(self.sent)]
        call = sent.ticket.call
        if isinstance(call, ToolCall):
            sent.ticket.settle()
            if sent.state in {"open", "charged"}:
                sent.state, sent.amounts = "settled", (0, 0, 0, 0, 0, 1)
            return
        # A history has the tokens it has; what nobody can count from its text may have any number.
        tokens = round(input_share * sent.most_input) if call.opaque else sent.most_input
        cache_read = round(read * tokens)
        usage = Usage(
            input_tokens=tokens,
            output_tokens=round(output_share * sent.most_output),
            cache_read_tokens=cache_read,
            cache_write_tokens=round(write * (tokens - cache_read)),
        )
        sent.ticket.settle(usage)
        if sent.state in {"open", "charged"}:
            sent.cost = pico_cost(call.model, usage)
            sent.state = "settled"
            both = usage.input_tokens + usage.output_tokens
            sent.amounts = (sent.cost, both, usage.input_tokens, usage.output_tokens, 1, 0)
            if sent.keys and not (call.max_output_tokens is None and call.clamp):
                assert all(used <= bound for used, bound in zip(sent.amounts, sent.bound, strict=True))

    @precondition(lambda self: self.sent)
    @rule(index=INDEX, how=st.sampled_from(["release", "fail", "charge", "fail sent", "settle without usage"]))
    def end_call(self, index: int, how: str) -> None:
        sent = self.sent[index % len(self.sent)]
        error = ConnectionError("lost")
        if how == "release":
            sent.ticket.release()
        elif how == "charge":
            sent.ticket.charge()
        elif how == "settle without usage":
            if isinstance(sent.ticket.call, ToolCall):
                return
            sent.ticket.settle()
        else:
            sent.ticket.fail(error, sent=how == "fail sent")
        if sent.state != "open":
            return
        if how in {"release", "fail"}:
            sent.state = "released"
        else:
            self._charged(sent)

    def _charged(self, sent: Sent) -> None:
        sent.state, sent.amounts, sent.cost = "charged", sent.bound, sent.bound[0]
        call = sent.ticket.call
        if not sent.keys and isinstance(call, LLMCall):
            # No budget covers it, so nothing was held: what it is recorded with is at least what it can have cost.
            others = [other for other in self.sent if other is not sent and other.state in {"settled", "charged"}]
            sent.cost = sent.run.cost_pico - sum(other.cost for other in others if sent.run in set(chain(other.run)))
            assert sent.cost >= pico_cost(call.model, Usage(input_tokens=sent.most_input, output_tokens=sent.most_output))

    # -- what always holds ------------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_as_predicted(self) -> None:
        for run in self.runs:
            summary = run.summary()
            self._check_totals(run, summary)
            for state in summary.budgets:
                key = (state.budget, UNITS.index(state.unit), state.key, state.window)
                spent, held, ceiling = self._balance(key)
                assert in_unit(state.spent, state.unit) == spent
                assert in_unit(state.held, state.unit) == held
                assert in_unit(state.ceiling, state.unit) == ceiling
                assert state.latched == ((run.root, key) in self.latched)
                if self._is_enforced(key):
                    assert spent + held <= ceiling
                    assert state.overshoot == 0

    def _check_totals(self, run: Run, summary: RunSummary) -> None:
        """What it used itself, and what runs nested in it used."""
        mine = [sent for sent in self.sent if run in set(chain(sent.run)) and sent.state in {"settled", "charged"}]
        model_calls = [sent for sent in mine if isinstance(sent.ticket.call, LLMCall)]
        used = [sent for sent in model_calls if sent.state == "settled"]
        total = summary.total
        assert total.calls == len(model_calls)
        assert in_unit(total.cost_usd, "usd") == sum(sent.cost for sent in model_calls)
        assert total.input_tokens == sum(sent.amounts[2] for sent in used)
        assert total.output_tokens == sum(sent.amounts[3] for sent in used)
        assert summary.tool_calls == len(mine) - len(model_calls)
        assert summary.calls_charged_at_bound == sum(sent.state == "charged" for sent in mine)
        assert summary.clamped_calls == sum(sent.ticket.is_clamped for sent in mine)
        assert summary.refusals == self.refusals.get(run, 0)
        assert sum(spend.calls for spend in summary.by_model.values()) == total.calls
        assert sum(in_unit(spend.cost_usd, "usd") for spend in summary.by_model.values()) == in_unit(total.cost_usd, "usd")


def chain(run: Run) -> Iterator[Run]:
    current: Run | None = run
    while current is not None:
        yield current
        current = current.parent


def _check_ceilings(examples: int, make_ledger: Callable[[], str]) -> None:
    run_state_machine_as_test(
        lambda: CeilingsMachine(make_ledger()),
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("examples", [20, pytest.param(150, marks=pytest.mark.slow)])
def test_no_ceiling_is_passed_whatever_an_agent_does(examples: int) -> None:
    _check_ceilings(examples, lambda: "memory")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # making a failing example small takes Hypothesis five minutes, and without it the failure tells nothing
@pytest.mark.parametrize("examples", [100, 400])
def test_no_ceiling_is_passed_in_a_file_whatever_an_agent_does(
    examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example has a file of its own: what it spends is not the next one's."""
    # None is taken out: a summary tells an idle account as it was when it was, and a run that goes on an hour after its end
    # begins at zero.
    monkeypatch.setattr(SqliteLedger, "kept_s", 1e12)
    monkeypatch.setattr(sqlite, "_KEPT_S", 1e12)
    number = count()
    _check_ceilings(examples, lambda: str(tmp_path / f"ledger-{next(number)}.db"))


# -- one promise at a time ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def watch(clock: FakeClock, *given_budgets: Budget, **given: Any) -> Watchdog:
    return Watchdog(clock=clock, prices=PRICES, budgets=given_budgets, **{"wait_s": 0, **given})


def ask(limit: int | None = 10, **given: Any) -> LLMCall:
    return LLMCall(model="m", input=["hello"], max_output_tokens=limit, **given)


USED = Usage(input_tokens=5, output_tokens=5)


async def somebody_waits(clock: FakeClock) -> None:
    for _ in range(1000):
        if clock.waiting:
            return
        await asyncio.sleep(0)
    raise AssertionError("nobody waits")


def spent_by_unit(summary: RunSummary) -> dict[str, tuple[float, float]]:
    return {state.unit: (state.spent, state.held) for state in summary.budgets}


def test_what_a_nested_run_uses_counts_for_it_and_for_those_around_it(clock: FakeClock) -> None:
    watchdog = watch(clock)
    with watchdog.run(budgets=[Budget(llm_calls=3)]) as outer:
        with watchdog.run(budgets=[Budget(llm_calls=2)]) as inner:
            for _ in range(2):
                inner.open(ask()).settle(USED)
            with pytest.raises(BudgetExceeded, match="2 llm_calls per run"):
                inner.open(ask())
        outer.open(ask()).settle(USED)
        with watchdog.run(budgets=[Budget(llm_calls=2)]) as inner, pytest.raises(BudgetExceeded, match="3 llm_calls per run"):
            inner.open(ask())
    assert (outer.summary().total.calls, outer.summary().refusals) == (3, 2)
    watchdog.shutdown()


def test_one_tenant_at_its_ceiling_stops_no_other(clock: FakeClock) -> None:
    watchdog = watch(clock, Budget(llm_calls=1, per="day", by="tenant"))
    for tenant in ("a", "b"):
        with watchdog.run(tags={"tenant": tenant}) as run:
            run.open(ask()).settle(USED)
            with pytest.raises(BudgetExceeded):
                run.open(ask())
    with watchdog.run(tags={"tenant": "a"}) as run, pytest.raises(BudgetExceeded):
        run.open(ask())
    watchdog.shutdown()


def test_a_new_window_has_room_again_exactly_when_it_begins(clock: FakeClock) -> None:
    """A call that is still in flight then counts for the window it was opened in."""
    watchdog = watch(clock, Budget(llm_calls=1, per="day"), hold_s=10**6)
    run = watchdog.process_run
    in_flight = run.open(ask())
    clock.advance(24 * 3600 - 1)
    with pytest.raises(BudgetBusy):
        run.open(ask())
    in_flight.release()
    in_flight = run.open(ask())
    clock.advance(1)
    today = run.open(ask())
    in_flight.settle(USED)
    today.settle(USED)
    with pytest.raises(BudgetExceeded):
        run.open(ask())
    assert [(state.window, state.spent) for state in run.summary().budgets] == [("2026-01-01", 1), ("2026-01-02", 1)]
    watchdog.shutdown()


def test_what_is_kept_is_for_the_wrap_up_only(clock: FakeClock) -> None:
    """Also where nothing was refused before it: wrapping up stops nobody else."""
    watchdog = watch(clock)
    with watchdog.run(budgets=[Budget(usd="0.0002", keep_usd="0.0001")]) as run:
        with run.wrap_up():
            early = run.open(ask(limit=50))
        assert not run.summary().budgets[0].latched
        early.release()
        run.open(ask(limit=20)).settle(Usage(input_tokens=20, output_tokens=20))
        with pytest.raises(BudgetExceeded):
            run.open(ask(limit=20))
        with pytest.raises(BudgetExceeded):
            run.open(ask(limit=1))
        with run.wrap_up():
            run.open(ask(limit=20)).settle(Usage(input_tokens=20, output_tokens=20))
            clamped = run.open(ask(limit=400, clamp=True, min_output_tokens=1))
            # $0.00008 is left: 20 tokens in, as the provider counted them before, and 30 out.
            assert clamped.max_output_tokens == 30
            clamped.release()
            with pytest.raises(BudgetExceeded):
                run.open(ask(limit=400))
        assert spent_by_unit(run.summary()) == {"usd": (120e-6, 0)}
    watchdog.shutdown()


def test_a_budget_that_only_warns_refuses_nothing_and_tells_once(clock: FakeClock) -> None:
    watchdog = watch(clock)
    with watchdog.run(budgets=[Budget(llm_calls=1, on_exceed="warn")]) as run:
        for _ in range(4):
            run.open(ask()).settle(USED)
    assert [(state.spent, state.latched) for state in run.summary().budgets] == [(4, False)]
    assert [incident.kind for incident in watchdog.recent] == ["budget_warning", "overshoot"]
    watchdog.shutdown()


def test_a_budget_that_only_warns_does_not_let_go_of_an_account_that_another_one_enforces(clock: FakeClock) -> None:
    """Both have the same name, which is made from limits and scope, so they share an account."""
    watchdog = watch(clock, Budget(llm_calls=2, per="day"))
    with watchdog.run(budgets=[Budget(llm_calls=2, per="day", on_exceed="warn")]) as run:
        run.open(ask()).settle(USED)
        run.open(ask()).settle(USED)
        with pytest.raises(BudgetExceeded):
            run.open(ask())
    watchdog.shutdown()


def test_a_released_call_leaves_no_trace(clock: FakeClock) -> None:
    watchdog = watch(clock)
    with watchdog.run(budgets=[Budget(usd=1, tokens=1000, llm_calls=5, output_tokens=100)]) as run:
        before = run.remaining()
        first = run.summary()
        run.open(ask()).release()
        run.open(ask()).fail(ConnectionError("refused"), sent=False)
        assert run.remaining() == before
        assert run.summary() == first
    watchdog.shutdown()


def test_usage_that_comes_late_corrects_what_was_charged(clock: FakeClock) -> None:
    """In the ledger and in the summaries of every run around; even after the run has ended. A second time it does nothing."""
    watchdog = watch(clock, Budget(tokens=100_000, per="day"))
    with watchdog.run() as outer:
        with watchdog.run(budgets=[Budget(usd=1)]) as run:
            ticket = run.open(ask())
        summary = run.summary()
        bound = summary.total.cost_usd
        assert (summary.calls_charged_at_bound, summary.total.calls) == (1, 1)
        assert spent_by_unit(summary)["usd"] == (bound, 0)
        assert bound > 15e-6
        ticket.settle(USED)
        ticket.settle(Usage(input_tokens=10**6))
        ticket.charge()
        for summary in (run.summary(), outer.summary()):
            assert (summary.calls_charged_at_bound, summary.total.calls, summary.total.cost_usd) == (0, 1, 15e-6)
            assert summary.total.output_tokens == 5
            assert spent_by_unit(summary)["tokens"] == (10, 0)
        assert spent_by_unit(run.summary())["usd"] == (15e-6, 0)
    watchdog.shutdown()


def test_usage_past_the_bound_is_recorded_told_and_stops_the_next_call(clock: FakeClock) -> None:
    watchdog = watch(clock)
    with watchdog.run(budgets=[Budget(usd="0.0001")]) as run:
        run.open(ask()).settle(Usage(input_tokens=500))
        assert run.summary().overshoot_usd == pytest.approx(400e-6)
        assert [incident.kind for incident in watchdog.recent] == ["budget_warning", "overshoot"]
        with pytest.raises(BudgetExceeded):
            run.open(ask(limit=1))
    watchdog.shutdown()


@pytest.mark.parametrize("limit", [5000, None])
@pytest.mark.parametrize("answers", [1, 3])
def test_a_clamped_call_gets_what_is_left_and_does_not_stop_the_next(clock: FakeClock, limit: int | None, answers: int) -> None:
    watchdog = watch(clock, assume_output_tokens=5000)
    with watchdog.run(budgets=[Budget(output_tokens=1000)]) as run:
        first = run.open(ask(limit, clamp=True, answers=answers))
        assert first.max_output_tokens == 1000 // answers
        with pytest.raises(BudgetBusy):
            run.open(ask(limit, clamp=True))
        first.settle(Usage(output_tokens=700))
        second = run.open(ask(limit, clamp=True))
        assert second.max_output_tokens == 300
        second.settle(Usage(output_tokens=45))
        with pytest.raises(BudgetExceeded):
            run.open(ask(limit, clamp=True))
        assert run.summary().refusals == 2
    watchdog.shutdown()


def test_a_call_that_nobody_hears_of_again_is_charged_when_its_time_is_over(clock: FakeClock) -> None:
    watchdog = watch(clock, hold_s=60)
    with watchdog.run(budgets=[Budget(llm_calls=2)]) as run:
        run.open(ask())
        clock.advance(59)
        run.open(ask()).release()
        clock.advance(1)
        watchdog.expire(clock.monotonic())
        assert spent_by_unit(run.summary()) == {"llm_calls": (1, 0)}
        assert run.summary().calls_charged_at_bound == 1
    watchdog.shutdown()


@pytest.mark.slow
def test_runs_that_spent_nothing_yet_go_on_when_accounts_are_taken_out(clock: FakeClock) -> None:
    """With more than a thousand open runs, accounts without spending are taken out; their runs find them again."""
    watchdog = watch(clock)
    many = [watchdog.start_run(budgets=[Budget(llm_calls=1, usd=1)]) for _ in range(1100)]
    for run in many:
        run.remaining()
    for run in (many[0], many[-1]):
        run.log(ToolCall(tool="t"), Usage(), None)
        run.open(ask()).settle(USED)
        with pytest.raises(BudgetExceeded):
            run.open(ask())
    untouched = many[1]
    untouched.top_up(llm_calls=1)
    for _ in range(2):
        untouched.open(ask()).settle(USED)
    assert {account.ceiling for _, account in accounts_of(untouched)} == {2, 10**12}
    watchdog.shutdown()


# -- waiting --------------------------------------------------------------------------------------------------------------


def test_a_busy_task_goes_on_when_another_one_settles(clock: FakeClock) -> None:
    watchdog = watch(clock, wait_s=30)

    async def main() -> list[str]:
        order = []
        with watchdog.run(budgets=[Budget(output_tokens=15)]) as run:
            first = await run.aopen(ask())

            async def second() -> None:
                ticket = await run.aopen(ask())
                order.append("opened")
                ticket.settle(USED)

            task = asyncio.create_task(second())
            await somebody_waits(clock)
            order.append("settled")
            first.settle(USED)
            await task
            assert spent_by_unit(run.summary()) == {"output_tokens": (10, 0)}
            assert run.summary().refusals == 0
        return order

    assert asyncio.run(main()) == ["settled", "opened"]
    assert clock.monotonic() == 0
    watchdog.shutdown()


def test_a_busy_task_gives_up_after_wait_s_and_nothing_latches(clock: FakeClock) -> None:
    watchdog = watch(clock, wait_s=30)

    async def main() -> None:
        with watchdog.run(budgets=[Budget(output_tokens=15)]) as run:
            first = await run.aopen(ask())
            task = asyncio.create_task(run.aopen(ask()))
            await somebody_waits(clock)
            clock.advance(29.5)
            # Something comes back, but not enough: the wait goes on, and its end stays where it was.
            (await run.aopen(ask(limit=1))).release()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not task.done()
            clock.advance(0.5)
            with pytest.raises(BudgetBusy) as caught:
                await task
            assert (caught.value.held, caught.value.needed, caught.value.ceiling) == (10, 10, 15)
            assert not run.summary().budgets[0].latched
            first.settle(USED)
            (await run.aopen(ask())).settle(USED)

    asyncio.run(main())
    assert clock.monotonic() == 30
    watchdog.shutdown()


def test_a_busy_task_that_finds_the_ceiling_reached_is_told_so_at_once(clock: FakeClock) -> None:
    watchdog = watch(clock, wait_s=30)

    async def main() -> None:
        with watchdog.run(budgets=[Budget(output_tokens=15)]) as run:
            first = await run.aopen(ask())
            task = asyncio.create_task(run.aopen(ask()))
            await somebody_waits(clock)
            first.settle(Usage(output_tokens=10))
            with pytest.raises(BudgetExceeded) as caught:
                await task
            assert not isinstance(caught.value, BudgetBusy)

    asyncio.run(main())
    assert clock.monotonic() == 0
    watchdog.shutdown()


def test_a_cancelled_wait_holds_nothing_and_listens_to_nothing(clock: FakeClock) -> None:
    watchdog = watch(clock, wait_s=30)

    async def main() -> None:
        with watchdog.run(budgets=[Budget(output_tokens=15)]) as run:
            first = await run.aopen(ask())
            task = asyncio.create_task(run.aopen(ask()))
            await somebody_waits(clock)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            first.release()
            assert watchdog.ledger.holds() == []
            changes: Any = watchdog.ledger.changes
            assert changes._listeners == ()

    asyncio.run(main())
    watchdog.shutdown()


def test_on_an_event_loop_a_call_that_cannot_wait_is_told_at_once_that_it_is_busy(clock: FakeClock) -> None:
    watchdog = watch(clock, wait_s=30)

    async def main() -> None:
        with watchdog.run(budgets=[Budget(llm_calls=1)]) as run:
            run.open(ask())
            with pytest.raises(BudgetBusy):
                run.open(ask())

    asyncio.run(main())
    assert clock.monotonic() == 0
    watchdog.shutdown()


def test_a_busy_thread_goes_on_when_another_one_settles(clock: FakeClock) -> None:
    watchdog = watch(clock, wait_s=30)
    with watchdog.run(budgets=[Budget(llm_calls=2), Budget(output_tokens=15)]) as run:
        first = run.open(ask())
        opened = threading.Event()

        def second() -> None:
            run.open(ask()).settle(USED)
            opened.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert clock.wait_for_waiters()
        assert not opened.is_set()
        first.settle(USED)
        thread.join(30)
        assert opened.is_set()
        assert spent_by_unit(run.summary()) == {"llm_calls": (2, 0), "output_tokens": (10, 0)}
    watchdog.shutdown()
