"""A ledger under many threads at once, and in a process that was forked at the worst moment."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clevagent.testing.clock import FakeClock
from clevagent_core import runs, tickets
from clevagent_core.budgets import Amounts, Budget
from clevagent_core.calls import LLMCall, ToolCall, Usage
from clevagent_core.errors import BudgetExceeded, UsageError
from clevagent_core.ledger.account import Account, AccountKey, Hold, Ledger, Line, Refusal, StaleAccount
from clevagent_core.ledger.memory import MemoryLedger
from clevagent_core.ledger.sqlite import SqliteLedger
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog


def _make_sqlite() -> Ledger:
    _folders.append(Path(tempfile.mkdtemp(prefix="clevagent-ledger-")))
    return SqliteLedger(_folders[-1] / "ledger.db", FakeClock())


_folders: list[Path] = []


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    while _folders:
        shutil.rmtree(_folders.pop())


LEDGERS: dict[str, Callable[[], Ledger]] = {"memory": MemoryLedger, "sqlite": _make_sqlite}
SLOW_IN_A_FILE = [
    pytest.param(make, id=name, marks=[pytest.mark.slow] if name == "sqlite" else []) for name, make in LEDGERS.items()
]
THREADS = 8
ROUNDS = 1000
PRICES = {"m": Price(input=1, output=2)}


@pytest.fixture(autouse=True)
def _switch_threads_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def open_accounts(ledger: Ledger, count: int, ceiling: int) -> list[Account]:
    return [
        ledger.open(
            AccountKey(f"budget {number}", number % 6, "all", ""), ceiling=ceiling, keep=0, warn_mark=ceiling, ends_at=math.inf
        )
        for number in range(count)
    ]


def at_once(work: Callable[[int], None], watch: Callable[[], None] | None = None) -> None:
    """Do ``work`` on every thread from the same moment on, and ``watch`` over and over beside it; raise what they raised."""
    barrier = threading.Barrier(THREADS + 1)
    done = threading.Event()
    errors: list[BaseException] = []

    def worker(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    def watcher() -> None:
        barrier.wait()
        try:
            while watch is not None and not done.is_set():
                watch()
        except BaseException as error:
            errors.append(error)

    watching = threading.Thread(target=watcher)
    working = [threading.Thread(target=worker, args=(number,)) for number in range(THREADS)]
    for thread in (watching, *working):
        thread.start()
    for thread in working:
        thread.join(60)
    done.set()
    watching.join(60)
    assert not any(thread.is_alive() for thread in (watching, *working))
    if errors:
        raise errors[0]


def end_somehow(ledger: Ledger, hold: Hold, chance: random.Random) -> Amounts | None:
    """Release, charge or settle a hold, and try to end it again; tell what it was charged in the end."""
    used: Any = tuple(chance.randint(0, amount) for amount in hold.amounts)
    way = chance.randrange(5)
    if way == 0:
        ledger.release(hold)
        return None
    if way == 1:
        ledger.charge(hold)
        return hold.amounts
    if way == 2:
        ledger.charge(hold)
        ledger.settle(hold, used)
        return used
    ledger.settle(hold, used)
    ledger.settle(hold, hold.amounts)
    ledger.release(hold)
    ledger.charge(hold)
    return used


@pytest.mark.slow
@pytest.mark.parametrize("make_ledger", SLOW_IN_A_FILE)
def test_no_ceiling_is_passed_at_any_moment_by_many_threads(make_ledger: Callable[[], Ledger]) -> None:
    """Each thread reserves on some of the same accounts, in an order of its own, and ends its holds in every way."""
    ledger = make_ledger()
    accounts = open_accounts(ledger, 6, ceiling=400)
    ended: list[list[tuple[Hold, Amounts | None]]] = [[] for _ in range(THREADS)]
    topped_up = [[0] * len(accounts) for _ in range(THREADS)]
    samples = 0

    def watch() -> None:
        nonlocal samples
        for account in accounts:
            balance = ledger.balance(account)
            samples += 1
            assert balance.held >= 0
            assert balance.spent >= 0
            assert balance.spent + balance.held <= balance.ceiling

    def work(number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - the same each time
        mine: list[tuple[Hold, Amounts | None]] = []
        for _ in range(ROUNDS):
            chosen = chance.sample(accounts, chance.randint(1, 4))
            lines = [Line(account, account.key.unit, enforced=True) for account in chosen]
            amounts: Any = tuple(chance.randint(0, 30) for _ in range(6))
            answer = ledger.reserve(lines, amounts, expires_at=math.inf, owner=number)
            if isinstance(answer, Refusal):
                if answer.reason != "busy" and chance.random() < 0.3:
                    amount = chance.randint(1, 60)
                    ledger.top_up(answer.line.account, amount)
                    topped_up[number][accounts.index(answer.line.account)] += amount
                continue
            mine.append((answer, end_somehow(ledger, answer, chance)))
        ended[number] = mine

    at_once(work, watch)
    assert samples
    assert ledger.holds() == []
    for position, account in enumerate(accounts):
        balance = ledger.balance(account)
        assert balance.held == 0
        assert balance.ceiling == 400 + sum(row[position] for row in topped_up)
        assert balance.spent == sum(
            used[line.unit]
            for mine in ended
            for hold, used in mine
            if used is not None
            for line in hold.lines
            if line.account is account
        )


@pytest.mark.parametrize("make_ledger", LEDGERS.values(), ids=LEDGERS)
def test_one_hold_ended_by_many_threads_counts_once(make_ledger: Callable[[], Ledger]) -> None:
    ledger = make_ledger()
    accounts = open_accounts(ledger, 6, ceiling=10**9)
    lines = [Line(account, account.key.unit, enforced=True) for account in accounts]
    holds = [ledger.reserve(lines, (9,) * 6, expires_at=1, owner=None) for _ in range(60)]

    def work(number: int) -> None:
        for hold in holds:
            assert isinstance(hold, Hold)
            if number % 4 == 0:
                ledger.charge(hold)
            elif number % 4 == 1:
                ledger.expire(1)
            else:
                ledger.settle(hold, (4,) * 6)

    at_once(work)
    assert ledger.holds() == []
    assert [(ledger.balance(account).held, ledger.balance(account).spent) for account in accounts] == [(0, 4 * 60)] * 6


@pytest.mark.slow
@pytest.mark.parametrize("make_ledger", SLOW_IN_A_FILE)
def test_a_reservation_never_lands_on_an_account_that_was_taken_out(make_ledger: Callable[[], Ledger]) -> None:
    """Accounts without spending are taken out all the time: whoever holds money on one has it found again."""
    ledger = make_ledger()
    if isinstance(ledger, MemoryLedger):
        ledger._evict_at = 0
    key = AccountKey("budget", 0, "all", "")
    spent = [0] * THREADS

    def work(number: int) -> None:
        for round_number in range(ROUNDS):
            while True:
                account = ledger.open(key, ceiling=10**9, keep=0, warn_mark=10**9, ends_at=math.inf)
                try:
                    hold = ledger.reserve([Line(account, 0, enforced=True)], (1, 0, 0, 0, 0, 0), expires_at=math.inf, owner=None)
                    break
                except StaleAccount:
                    continue
            assert isinstance(hold, Hold)
            if round_number < ROUNDS - 1:
                ledger.release(hold)
            else:
                ledger.charge(hold)
                spent[number] += 1
            if isinstance(ledger, MemoryLedger):
                ledger._evict_at = 0
            ledger.evict(0)

    at_once(work)
    account = ledger.open(key, ceiling=10**9, keep=0, warn_mark=10**9, ends_at=math.inf)
    assert ledger.balance(account).spent == sum(spent) == THREADS


@pytest.mark.slow
def test_threads_of_one_run_stay_below_its_ceilings_and_the_summary_adds_up() -> None:
    """Through the public door: charged calls are settled late by other threads while a top-up raises the ceiling."""
    watchdog = Watchdog(clock=FakeClock(), prices=PRICES, budgets=[Budget(usd="0.003", per="day")], wait_s=0)
    real: list[int] = [0] * THREADS
    with watchdog.run(budgets=[Budget(tokens=2000, llm_calls=400)]) as run:

        def watch() -> None:
            for state in run.summary().budgets:
                # US dollars are floats here: whole pico-USD again.
                assert round((state.spent + state.held) * 10**12) <= round(state.ceiling * 10**12)

        def work(number: int) -> None:
            chance = random.Random(number)  # noqa: S311 - the same each time
            with run.activate():
                for round_number in range(60):
                    try:
                        ticket = run.open(LLMCall(model="m", input=[f"{number}"], max_output_tokens=chance.randint(1, 80)))
                    except BudgetExceeded:
                        if round_number == 30:
                            run.top_up(tokens=100)
                        continue
                    way = chance.randrange(4)
                    if way == 0:
                        ticket.release()
                        continue
                    usage = Usage(
                        input_tokens=chance.randint(1, 10), output_tokens=chance.randint(0, ticket.max_output_tokens or 0)
                    )
                    if way == 1:
                        ticket.charge()
                    ticket.settle(usage)
                    real[number] += usage.input_tokens + usage.output_tokens

        at_once(work, watch)
    summary = run.summary()
    assert summary.total.input_tokens + summary.total.output_tokens == sum(real)
    assert {state.unit: state.spent for state in summary.budgets}["tokens"] == sum(real)
    assert {state.held for state in summary.budgets} == {0}
    assert (summary.overshoot_usd, summary.calls_charged_at_bound, summary.unpriced_calls) == (0, 0, 0)
    watchdog.shutdown()


def test_usage_that_comes_in_while_the_call_is_being_charged_is_counted_once() -> None:
    """Between charging the ledger and noting it in the summary, as when a run ends while a worker still settles."""
    watchdog = Watchdog(clock=FakeClock(auto_advance=True), prices=PRICES)
    with watchdog.run(budgets=[Budget(usd=1)]) as run:
        ticket = run.open(LLMCall(model="m", input=["hello"], max_output_tokens=1000))
        unsubscribe = watchdog.ledger.changes.subscribe(lambda: ticket.settle(Usage(input_tokens=10, output_tokens=20)))
        ticket.charge()
        unsubscribe()
        summary = run.summary()
    assert (summary.total.calls, summary.total.cost_usd) == (1, 50e-6)
    assert (summary.calls_charged_at_bound, summary.unpriced_calls) == (0, 0)
    assert summary.budgets[0].spent == 50e-6
    watchdog.shutdown()


# -- forks ----------------------------------------------------------------------------------------------------------------


def in_forked_child(work: Callable[[], object], *, locks: tuple[Any, ...] = ()) -> object:
    """Fork while another thread holds ``locks``; tell what ``work`` returned in the child, or raise when it hangs."""
    held, finished = threading.Event(), threading.Event()

    def hold_locks() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            finished.wait(60)

    def child(pipe: Any) -> None:
        try:
            answer: object = work()
        except BaseException as error:
            answer = error
        pipe.send(answer)

    holder = threading.Thread(target=hold_locks)
    holder.start()
    held.wait(60)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs,))
    try:
        process.start()
        theirs.close()
        if not ours.poll(20):
            process.kill()
            raise TimeoutError("the child hangs")
        return ours.recv()
    finally:
        finished.set()
        holder.join(60)
        process.join(60)
        process.close()
        ours.close()


def all_locks(watchdog: Watchdog, *active: runs.Run) -> tuple[Any, ...]:
    ledger: Any = watchdog.ledger
    tallies = [run._tally.lock for run in (watchdog.process_run, *active)]
    bounds: Any = watchdog.plugins._manager.get_plugin("clevagent_core.bounds")
    return (
        ledger._lock,
        ledger.changes._lock,
        watchdog._lock,
        watchdog._teller._lock,
        bounds._lock,
        tickets._ticket_lock,
        *tallies,
    )


forks = pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")


def call(run: runs.Run) -> None:
    run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10)).settle(Usage(input_tokens=5, output_tokens=5))


@pytest.mark.slow
@forks
@needs_fork
def test_a_forked_child_is_refused_what_its_parent_counts_in_memory() -> None:
    """With every lock held at that moment: the child neither hangs nor spends, and is told the way out."""
    watchdog = Watchdog(clock=FakeClock(auto_advance=True), prices=PRICES, budgets=[Budget(usd=1, per="day")])
    call(watchdog.process_run)

    def work() -> object:
        try:
            call(watchdog.process_run)
        except UsageError as error:
            first = str(error)
        try:
            # A run of its own still counts against the day.
            with watchdog.run(budgets=[Budget(usd=1)]) as run:
                call(run)
        except UsageError as error:
            return first, str(error)
        return None

    answer = in_forked_child(work, locks=all_locks(watchdog))
    assert isinstance(answer, tuple)
    for message in answer:
        assert "forked" in message
        assert "the call was refused" in message
        assert "clevagent.init(...)" in message
    call(watchdog.process_run)
    assert watchdog.process_run.summary().total.calls == 2
    watchdog.shutdown()


@forks
@needs_fork
def test_a_run_that_a_forked_child_opens_has_its_own_ceiling() -> None:
    watchdog = Watchdog(clock=FakeClock(auto_advance=True), prices=PRICES)
    outer = watchdog.start_run()

    def work() -> object:
        with watchdog.run(budgets=[Budget(llm_calls=2)]) as run:
            call(run)
            call(run)
            try:
                call(run)
            except BudgetExceeded:
                return run.summary().total.calls, run.summary().budgets[0].spent
        return None

    assert in_forked_child(work, locks=all_locks(watchdog, outer)) == (2, 2)
    watchdog.shutdown()


@forks
@needs_fork
def test_a_run_of_the_parent_is_refused_in_a_forked_child() -> None:
    watchdog = Watchdog(clock=FakeClock(auto_advance=True), prices=PRICES)
    with watchdog.run(budgets=[Budget(llm_calls=5), Budget(tool_calls=5)]) as run:
        call(run)
        open_here, released_there = run.open(ToolCall(tool="t")), run.open(ToolCall(tool="t"))

        def work() -> object:
            # What was begun before the fork is the parent's to count; telling it here neither fails nor hangs.
            open_here.settle()
            released_there.release()
            try:
                call(run)
            except UsageError as error:
                return str(error)
            return None

        assert "forked" in str(in_forked_child(work, locks=all_locks(watchdog, run)))
        assert open_here.is_open
        assert released_there.is_open
        open_here.settle()
        released_there.release()
        call(run)
        assert [(state.unit, state.spent) for state in run.summary().budgets] == [("llm_calls", 2), ("tool_calls", 1)]
    watchdog.shutdown()


@pytest.mark.slow
@forks
@needs_fork
def test_a_forked_child_charges_no_call_of_its_parent(tmp_path) -> None:
    """Also where the run goes on in the parent, and the one around it has ended there."""
    watchdog = Watchdog(clock=FakeClock(auto_advance=True), prices=PRICES, ledger=str(tmp_path / "ledger.db"))
    outer = watchdog.start_run(budgets=[Budget(tokens=100, per="day")])
    inner = watchdog.start_run(parent=outer)
    ticket = inner.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
    outer.end()

    def work() -> object:
        inner.end()
        return inner.summary().calls_charged_at_bound

    assert in_forked_child(work, locks=()) == 0
    ticket.settle(Usage(input_tokens=5, output_tokens=5))
    assert inner.summary().total.input_tokens == 5
    watchdog.shutdown()


@forks
@needs_fork
def test_a_forked_child_without_budgets_goes_on() -> None:
    watchdog = Watchdog(clock=FakeClock(auto_advance=True), prices=PRICES)
    call(watchdog.process_run)

    def work() -> object:
        call(watchdog.process_run)
        return watchdog.process_run.summary().total.calls

    assert in_forked_child(work, locks=all_locks(watchdog)) == 2
    watchdog.shutdown()
