"""A transaction on a ledger's file that something comes into: the garbage collector, a signal, an exception from outside."""

from __future__ import annotations

import ast
import gc
import os
import random
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from clevagent.testing import FakeClock
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.errors import LedgerError
from clevagent_core.ledger import database, sqlite
from clevagent_core.ledger.account import AccountKey, Hold, Line, Refusal
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog

FILES = {database.__file__, sqlite.__file__}
PRICES = {"m": Price(input=1, output=2)}


def _cleaning() -> Iterator[tuple[str, int]]:
    """The lines that take back, or let go of something. Python looks for signals when it calls a function, not at each line."""
    for file in FILES:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.With):
                yield file, node.lineno  # run again when the block is left, to let go of its lock
            if isinstance(node, ast.Try):
                yield file, node.lineno  # nothing is called there, and no handler covers it
                for part in (*node.finalbody, *(line for handler in node.handlers for line in (handler, *handler.body))):
                    yield from ((file, number) for number in range(part.lineno, (part.end_lineno or 0) + 1))


CLEANING = frozenset(_cleaning())

HANDLES_NO_ROUNDS = sys.version_info >= (3, 12)
"""What a trace function raises at the end of a loop's round is not handled by the block that the loop stands in.

Where a loop stands on one line, its rounds are traced as the same line again. CPython 3.12 and later look for the handler of what is
raised there at an address that they have just set to NULL (``INSTRUMENTED_JUMP``), and find none. A signal finds it: see
``test_back_edges.py``. So a trace function cannot stand for a signal there.
"""


class Interrupted(BaseException):
    """As KeyboardInterrupt, told apart from the tester's own."""


def _interrupt() -> None:
    raise Interrupted


@contextmanager
def at_line(number: int, work: Callable[[], None]) -> Iterator[list[str]]:
    """Do ``work`` at the ``number``-th line of the ledger that is run. Gives what was run, to know when all were."""
    lines: list[str] = []
    is_at_it = False
    passed_over = CLEANING if work is _interrupt else frozenset()
    passes_over_rounds = work is _interrupt and HANDLES_NO_ROUNDS
    latest: dict[int, int] = {}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal is_at_it
        if frame.f_code.co_filename not in FILES:
            return None
        is_round = event == "line" and latest.get(id(frame)) == frame.f_lineno
        latest[id(frame)] = frame.f_lineno if event == "line" else 0
        if passes_over_rounds and is_round:
            return trace
        if event == "line" and not is_at_it and (frame.f_code.co_filename, frame.f_lineno) not in passed_over:
            lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(lines) == number:
                is_at_it = True
                try:
                    work()
                finally:
                    is_at_it = False
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def statements_of(here: Any) -> list[str]:
    seen: list[str] = []
    here.ledger._database._connection.set_trace_callback(seen.append)
    return seen


# -- how much is done -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 500])
def test_a_call_takes_nine_statements_however_many_accounts_there_are(others: int, open_here) -> None:
    here = open_here()
    for number in range(others):
        here.open(AccountKey(f"other {number}", 0, "all", ""))
    accounts = [here.open(AccountKey(f"b{number}", unit, "all", ""), 10**6) for number, unit in enumerate((0, 1, 4))]
    here.pay(here.hold(1, *accounts), 1)
    seen = statements_of(here)
    hold = here.hold(2, *accounts)
    assert [statement.split()[0] for statement in seen] == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]
    assert seen[0] == "BEGIN IMMEDIATE"
    del seen[:]
    here.pay(hold, 1)
    assert [statement.split()[0] for statement in seen] == ["BEGIN", "DELETE", "UPDATE", "SELECT", "COMMIT"]


def test_a_transaction_has_its_turn_from_before_it_begins_until_after_it_ended(open_here, monkeypatch) -> None:
    """SQLite's own waiting starves some of several busy processes; the kernel's queue does not."""
    here = open_here()
    seen = statements_of(here)
    flock = database.fcntl.flock

    def record(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        seen.append({database.fcntl.LOCK_EX: "lock", database.fcntl.LOCK_UN: "unlock"}[operation])

    hold = here.hold(1)
    del seen[:]
    monkeypatch.setattr(database.fcntl, "flock", record)
    here.pay(hold, 1)
    assert [statement.split()[0] for statement in seen] == ["lock", "BEGIN", "DELETE", "UPDATE", "SELECT", "COMMIT", "unlock"]


def test_no_statement_of_a_call_looks_through_a_table(open_here) -> None:
    here = open_here()
    accounts = [here.open(AccountKey(f"b{number}", 0, "all", ""), 10**6) for number in range(3)]
    seen = statements_of(here)
    here.pay(here.hold(2, *accounts), 1)
    for statement in seen:
        if statement.split()[0] in {"UPDATE", "DELETE", "SELECT"}:
            plan = here.rows(f"EXPLAIN QUERY PLAN {statement}")
            assert all(row[3].startswith("SEARCH") for row in plan), (statement, plan)


def test_what_is_opened_again_is_not_looked_up_in_the_file(open_here) -> None:
    here = open_here()
    seen = statements_of(here)
    assert here.open(AccountKey("b", 0, "all", "")) is here.account
    assert here.ledger.evict(here.clock.wall()) == 0
    assert seen == []


# -- the garbage collector ------------------------------------------------------------------------------------------------

ENDINGS: dict[str, tuple[Callable[[Any, Hold], object], int]] = {
    "settle": (lambda here, hold: here.pay(hold, 3), 3),
    "release": (lambda here, hold: here.ledger.release(hold), 0),
    "charge": (lambda here, hold: here.ledger.charge(hold), 10),
}


def everything(here: Any) -> int:
    """Each kind of transaction once; gives what it spent."""
    account = here.open(AccountKey("later", 0, "all", ""), 10**9)
    settled, charged, released = (here.hold(20, account, here.account) for _ in range(3))
    here.pay(settled, 5)
    here.ledger.charge(charged)
    here.pay(charged, 6)
    here.ledger.release(released)
    here.take(10**9)
    here.ledger.top_up(here.account, 1)
    here.ledger.balance(account)
    here.ledger.forget([account])
    return 11


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_call_that_is_ended_by_the_collector_at_any_line_is_neither_lost_nor_counted_twice(ending: str, open_here) -> None:
    end, cost = ENDINGS[ending]
    number = 0
    lines: list[str] = [""] * 99
    while number <= len(lines):
        number += 7 if number % 3 else 4
        here = open_here(ceiling=10_000_000)
        before = here.state()[0]
        hold = here.hold(10)
        with at_line(number, lambda here=here, hold=hold: end(here, hold)) as lines:
            spent = everything(here)
        if number > len(lines):
            end(here, hold)
        assert here.state() == (before + spent + cost, 0), lines[number - 1 : number]
        assert here.rows("SELECT count(*) FROM hold") == [(0,)]
        assert not here.ledger._closing
        here.ledger.close()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_call_that_is_ended_in_the_middle_of_a_transaction_is_ended_with_it_not_with_the_next(ending: str, open_here) -> None:
    """The next one may be long in coming, and others wait for the money."""
    end, cost = ENDINGS[ending]
    here = open_here()
    hold = here.hold(10)
    told: list[object] = []
    here.ledger.changes.subscribe(lambda: told.append(1))
    with here.ledger._database.transaction():
        end(here, hold)
        assert here.state() == (0, 10)
    assert here.state() == (cost, 0)
    assert told


@pytest.mark.slow
def test_a_balance_that_is_read_in_the_middle_of_a_transaction_disturbs_nothing(open_here) -> None:
    number, lines = 0, [""] * 99
    while number <= len(lines):
        number += 5
        here = open_here(ceiling=10_000_000)
        before = here.state()[0]
        with at_line(number, here.state) as lines:
            spent = everything(here)
        assert here.state() == (before + spent, 0)
        assert not here.account.closed
        here.ledger.close()


@pytest.mark.slow
def test_a_run_that_the_collector_ends_in_the_middle_of_a_transaction_is_over(path) -> None:
    """A generator with a run in it, dropped half way: it is closed wherever the collector finds it."""
    number, lines = 0, [""] * 99
    while number <= len(lines):
        number += 3
        watchdog = Watchdog(clock=FakeClock(), ledger=str(path), prices=PRICES, budgets=[Budget(tokens=10**9, per="day", name="b")])
        runs: list[Any] = []

        def agent(watchdog: Watchdog = watchdog, runs: list[Any] = runs) -> Iterator[None]:
            with watchdog.run(budgets=[Budget(llm_calls=5, name="own")]) as run:
                runs.append(run)
                run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
                yield

        generator = agent()
        next(generator)
        outer = watchdog.process_run
        with at_line(number, generator.close) as lines:
            outer.open(LLMCall(model="m", input=["hello"], max_output_tokens=10)).settle(Usage(input_tokens=1, output_tokens=1))
        generator.close()
        assert runs[0].ended_at is not None, lines[number - 1 : number]
        assert runs[0] not in watchdog._active
        assert watchdog.ledger.holds() == []
        assert watchdog.ledger._database.read("SELECT count(*) FROM account WHERE budget = 'own' AND over_at IS NULL") == [(0,)], (
            lines[number - 1 : number]
        )
        watchdog.shutdown()


class Cycle:
    """Settles a hold when the collector finds it."""

    def __init__(self, here: Any, hold: Hold) -> None:
        self.me, self.here, self.hold = self, here, hold

    def __del__(self) -> None:
        self.here.pay(self.hold, 1)


@pytest.mark.slow
def test_holds_that_the_real_collector_settles_while_threads_are_at_work_are_all_counted(open_here) -> None:
    here = open_here(ceiling=10**9)
    before = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    try:

        def work() -> None:
            for _ in range(400):
                Cycle(here, here.hold(5))
                here.pay(here.hold(5), 1)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        gc.set_threshold(*before)
    event = threading.Event()
    for _ in range(10_000):
        gc.collect()
        # The collector may be at work on the thread that makes checkpoints, and then does nothing here.
        if here.state()[1] == 0:
            break
        event.wait(0.001)
    assert here.state() == (3 * 400 * 2, 0)


# -- exceptions from outside ----------------------------------------------------------------------------------------------


def after(here: Any, known: list[Hold], lines: list[str]) -> None:
    """Whatever was interrupted: the file is whole, the lock is free, and nothing that was spent is forgotten."""
    answers: list[Any] = []

    def another_thread() -> None:
        try:
            hold = here.hold(10)
            here.pay(hold, 2)
            answers.append(here.state())
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=another_thread, daemon=True)
    thread.start()
    thread.join(10)
    assert answers, f"the lock was not let go: {lines[-1:]}"
    assert isinstance(answers[0], tuple), (answers, lines[-1:])
    assert not here.ledger._database.is_inside
    shell = sqlite3.connect(here.ledger._database.path, timeout=0, isolation_level=None)
    shell.execute("BEGIN EXCLUSIVE")
    shell.execute("ROLLBACK")
    shell.close()
    held = sum(hold.amounts[0] for hold in known if hold.state == "open")
    rows = here.rows("SELECT coalesce(sum(usd), 0) FROM hold")[0][0]
    assert here.state()[1] == rows >= held


@pytest.mark.slow
def test_an_exception_at_any_line_of_a_settlement_neither_loses_nor_doubles_it(open_here) -> None:
    """Interrupted before it was noted, the call stays held, which is safe; else it is spent once."""
    number, lines = 0, [""] * 99
    counted = 0
    while number <= len(lines):
        number += 1
        here = open_here(ceiling=10_000_000)
        before = here.state()[0]
        hold = here.hold(10)
        with at_line(number, _interrupt) as lines:
            with suppress(Interrupted):
                here.pay(hold, 4)
        after(here, [], lines)
        spent, held = here.state()
        assert (spent - before - 2, held) in {(4, 0), (0, 10)}, lines[-1]
        counted += spent - before == 6
        here.pay(hold, 4)
        here.ledger.close()
        spent = open_here(ceiling=10_000_000).state()[0]
        assert spent - before - 2 in {4, 10}, lines[-1]
    assert counted > number / 2


@pytest.mark.slow
def test_an_exception_at_any_line_of_a_correction_neither_loses_nor_doubles_it(open_here) -> None:
    number, lines = 0, [""] * 99
    while number <= len(lines):
        number += 1
        here = open_here(ceiling=10_000_000)
        before = here.state()[0]
        hold = here.hold(10)
        here.ledger.charge(hold)
        with at_line(number, _interrupt) as lines:
            with suppress(Interrupted):
                here.pay(hold, 4)
        after(here, [], lines)
        assert here.state()[0] - before - 2 in {4, 10}, lines[-1]
        here.ledger.close()


@pytest.mark.slow
def test_an_exception_at_any_line_of_a_reservation_holds_all_or_nothing(open_here) -> None:
    number, lines = 0, [""] * 99
    while number <= len(lines):
        number += 1
        here = open_here(ceiling=10_000_000)
        other = here.open(AccountKey("other", 1, "all", ""), 10_000_000)
        before = here.state()[0]
        with at_line(number, _interrupt) as lines:
            try:
                hold: Any = here.hold(10, here.account, other)
            except Interrupted:
                hold = None
        after(here, [hold] if hold else [], lines)
        assert here.ledger.balance(other).held == here.state()[1] in {0, 10}
        here.ledger.close()
        # What nobody got is charged as a call in flight is: it is never lost.
        assert open_here(ceiling=10_000_000).state()[0] - before - 2 in {0, 10}


@pytest.mark.slow
def test_exceptions_at_random_lines_of_everything_leave_the_ledger_usable(open_here) -> None:
    chance = random.Random(5)  # noqa: S311 - the same each time
    for _ in range(60):
        here = open_here(ceiling=10_000_000)
        with at_line(chance.randint(1, 400), _interrupt) as lines:
            with suppress(Interrupted):
                everything(here)
        after(here, [], lines)
        here.ledger.close()
        assert here.rows("SELECT count(*) FROM hold") == [(0,)]


# -- signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_handler_that_shuts_down_in_the_middle_of_a_transaction_is_obeyed_at_its_end(path) -> None:
    number, lines = 0, [""] * 99
    while number <= len(lines):
        number += 2
        watchdog = Watchdog(clock=FakeClock(), ledger=str(path), prices=PRICES, budgets=[Budget(tokens=10**9, per="day", name="b")])
        held = watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
        old = signal.signal(signal.SIGUSR1, lambda *_, watchdog=watchdog: watchdog.shutdown())
        try:
            with at_line(number, lambda: os.kill(os.getpid(), signal.SIGUSR1)) as lines:
                ticket = watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
            ticket.settle(Usage(input_tokens=1, output_tokens=1))
        finally:
            signal.signal(signal.SIGUSR1, old)
        watchdog.shutdown()
        assert not held.is_open
        watchdog.ledger.close()
        ledger: Any = watchdog.ledger
        assert ledger._database.read("SELECT count(*) FROM hold") == [(0,)]
        assert ledger._database.read("SELECT sum(held) FROM account") == [(0,)]


def test_a_signal_handler_that_makes_a_call_in_the_middle_of_a_transaction_is_told(open_here) -> None:
    here = open_here()
    told: list[str] = []

    def handle(*_: object) -> None:
        try:
            here.take(1)
        except LedgerError as error:
            told.append(str(error))

    with here.ledger._database.transaction() as execute:
        handle()
        assert execute("SELECT 1").fetchall() == [(1,)]
    assert "used again in the middle of a transaction" in told[0]
    assert isinstance(here.take(1), Hold)


def test_a_fork_in_the_middle_of_a_transaction_takes_it_back_and_goes_on(open_here) -> None:
    """As where a signal handler starts a program with ``preexec_fn``: the parent's transaction fails, and only that."""
    here = open_here()
    with pytest.raises(LedgerError):
        with here.ledger._database.transaction() as execute:
            execute("UPDATE account SET spent = 50")
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            execute("UPDATE account SET spent = 60")
    assert here.state() == (0, 0)
    thread_answers: list[Any] = []
    thread = threading.Thread(target=lambda: thread_answers.append(here.take(1)), daemon=True)
    thread.start()
    thread.join(30)
    assert isinstance(thread_answers[0], Hold)


def test_a_reservation_without_any_line_is_held_and_charged(open_here) -> None:
    here = open_here()
    hold = here.ledger.reserve([], (1,) * 6, expires_at=1, owner=None)
    assert isinstance(hold, Hold)
    here.ledger.close()
    assert here.rows("SELECT count(*) FROM hold") == [(0,)]


def test_a_line_that_only_warns_goes_the_long_way_and_says_so_once(open_here) -> None:
    here = open_here()
    line = [Line(here.account, 0, enforced=False)]
    first = here.ledger.reserve(line, (200,) * 6, expires_at=1, owner=None)
    second = here.ledger.reserve(line, (200,) * 6, expires_at=1, owner=None)
    assert isinstance(first, Hold)
    assert isinstance(second, Hold)
    assert first.notices is not None
    assert [notice.kind for notice in first.notices] == ["overshoot"]
    assert second.notices is None
    assert isinstance(here.take(1), Refusal)
