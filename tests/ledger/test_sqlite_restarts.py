"""What a ledger's file keeps when processes end, and what it does not keep: totals, files, and its own size."""

from __future__ import annotations

import gc
import logging
import os
import sqlite3
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from clevagent.testing import FakeClock
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.errors import BudgetExceeded, UsageError
from clevagent_core.ledger import database
from clevagent_core.ledger.account import AccountKey, Hold, Line, Refusal
from clevagent_core.ledger.inspection import LedgerFile
from clevagent_core.ledger.sqlite import SqliteLedger
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog

PRICES = {"m": Price(input=1, output=2)}


@pytest.fixture
def program(path: Path):
    """Start the program anew: a watchdog on the same file, with the clock going on."""
    made: list[Watchdog] = []

    def start(*budgets: Budget, clock: FakeClock, **given: Any) -> Watchdog:
        made.append(Watchdog(clock=clock, ledger=str(path), prices=PRICES, budgets=budgets, wait_s=0, **given))
        return made[-1]

    yield start
    for watchdog in made:
        watchdog.shutdown()


def call(run: Any) -> None:
    run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10)).settle(Usage(input_tokens=5, output_tokens=5))


def calls_until_refused(run: Any) -> int:
    for number in range(1000):
        try:
            call(run)
        except BudgetExceeded:
            return number
    raise AssertionError("it was never refused")


# -- totals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["day", "hour", "month", "lifetime", "thread"])
def test_totals_survive_a_restart(per: Any, program, clock) -> None:
    budget = Budget(llm_calls=5, per=per, name="b")
    for expected in (2, 3, 0):
        watchdog = program(budget, clock=clock)
        with watchdog.run(tags={"thread_id": "t1"}) as run:
            if expected == 2:
                call(run)
                call(run)
            else:
                assert calls_until_refused(run) == expected
        watchdog.shutdown()


def test_another_conversation_has_its_own_total_after_a_restart(program, clock) -> None:
    budget = Budget(llm_calls=2, per="thread", name="b")
    for thread_id in ("t1", "t2"):
        watchdog = program(budget, clock=clock)
        with watchdog.run(tags={"thread_id": thread_id}) as run:
            assert calls_until_refused(run) == 2
        watchdog.shutdown()


def test_a_run_begins_at_zero_also_in_the_next_process(program, clock) -> None:
    for _ in range(3):
        watchdog = program(Budget(llm_calls=3, name="of the run"), clock=clock)
        with watchdog.run() as run:
            assert calls_until_refused(run) == 3
        watchdog.shutdown()


def test_what_is_called_outside_of_runs_begins_at_zero_in_the_next_process(program, clock) -> None:
    for _ in range(3):
        watchdog = program(Budget(llm_calls=3, name="of the process"), clock=clock)
        assert calls_until_refused(watchdog.process_run) == 3
        watchdog.shutdown()


def test_what_is_called_outside_of_runs_is_each_processs_own(program, clock) -> None:
    budget = Budget(llm_calls=3, name="of the process")
    first, second = program(budget, clock=clock), program(budget, clock=clock)
    assert calls_until_refused(first.process_run) == 3
    assert calls_until_refused(second.process_run) == 3


def test_a_budget_stays_exhausted_until_its_window_is_over_and_that_is_told_once(program) -> None:
    clock = FakeClock(datetime(2026, 1, 1, 23, 59, tzinfo=UTC))
    budget = Budget(llm_calls=1, per="day", name="b", warn_at=1)
    watchdog = program(budget, clock=clock)
    assert calls_until_refused(watchdog.process_run) == 1
    watchdog.shutdown()
    watchdog = program(budget, clock=clock)
    clock.advance(59.999)
    for _ in range(3):
        with pytest.raises(BudgetExceeded), watchdog.run() as run:
            call(run)
    assert [incident.kind for incident in watchdog.recent] == []  # told by the first process
    clock.advance(0.001)
    call(watchdog.process_run)


def test_a_latch_ends_with_the_process_of_the_run_that_was_refused(program, clock) -> None:
    """What is left is for whoever comes next, and fits."""
    budget = Budget(tokens=100, per="day", name="b")
    watchdog = program(budget, clock=clock)
    with watchdog.run() as run:
        call(run)
        with pytest.raises(BudgetExceeded):
            run.open(LLMCall(model="m", input=["hello"], max_output_tokens=90))
        with pytest.raises(BudgetExceeded):
            call(run)
    watchdog.shutdown()
    call(program(budget, clock=clock).process_run)


def test_an_exhausted_budget_stays_so_until_it_is_topped_up(program, clock) -> None:
    budget = Budget(llm_calls=1, per="lifetime", name="b")
    watchdog = program(budget, clock=clock)
    assert calls_until_refused(watchdog.process_run) == 1
    watchdog.shutdown()
    watchdog = program(budget, clock=clock)
    assert calls_until_refused(watchdog.process_run) == 0
    watchdog.process_run.top_up(llm_calls=2)
    watchdog.shutdown()
    watchdog = program(budget, clock=clock)
    assert calls_until_refused(watchdog.process_run) == 2


# -- ceilings that change -------------------------------------------------------------------------------------------------


def test_a_ceiling_raised_in_the_code_keeps_what_was_topped_up(program, clock, caplog) -> None:
    watchdog = program(Budget(llm_calls=2, per="lifetime", name="b"), clock=clock)
    assert calls_until_refused(watchdog.process_run) == 2
    watchdog.process_run.top_up(llm_calls=1)
    assert calls_until_refused(watchdog.process_run) == 1
    watchdog.shutdown()
    with caplog.at_level(logging.WARNING, "clevagent"):
        watchdog = program(Budget(llm_calls=6, per="lifetime", name="b"), clock=clock)
        assert calls_until_refused(watchdog.process_run) == 6 + 1 - 3
    (told,) = [record.getMessage() for record in caplog.records if "is now given" in record.getMessage()]
    assert told == (
        "The ceiling of the budget 'b' (llm_calls, all) was 2 in the ledger and is now given as 6; that holds from now on, for every "
        "process that uses the file. What was spent stays spent."
    )


def test_a_ceiling_lowered_in_the_code_keeps_what_was_spent(program, clock) -> None:
    watchdog = program(Budget(llm_calls=5, per="lifetime", name="b"), clock=clock)
    call(watchdog.process_run)
    call(watchdog.process_run)
    watchdog.shutdown()
    watchdog = program(Budget(llm_calls=3, per="lifetime", name="b"), clock=clock)
    assert calls_until_refused(watchdog.process_run) == 1
    watchdog.shutdown()
    watchdog = program(Budget(llm_calls=2, per="lifetime", name="b"), clock=clock)
    assert calls_until_refused(watchdog.process_run) == 0
    state = watchdog.process_run.summary().budgets[0]
    assert (state.spent, state.ceiling) == (3, 2)


def test_what_is_kept_for_the_wrap_up_can_be_changed(path, open_here) -> None:
    first = open_here()
    key = AccountKey("kept", 0, "all", "")
    first.ledger.open(key, ceiling=100, keep=20, warn_mark=80, ends_at=float("inf"))
    first.ledger.close()
    second = open_here()
    account = second.ledger.open(key, ceiling=100, keep=50, warn_mark=70, ends_at=float("inf"))
    assert isinstance(second.take(51, account), Refusal)
    assert second.ledger.balance(account).keep == 50


def test_two_budgets_of_one_name_and_different_limits_are_refused_in_one_process(program, clock) -> None:
    watchdog = program(clock=clock)
    with watchdog.run(budgets=[Budget(llm_calls=2, per="day", name="b")]) as run:
        call(run)
        with (
            watchdog.run(budgets=[Budget(llm_calls=3, per="day", name="b")]) as inner,
            pytest.raises(UsageError, match="two ceilings"),
        ):
            call(inner)


@pytest.mark.slow
def test_two_budgets_of_one_name_and_different_limits_are_refused_also_one_after_the_other(program, clock) -> None:
    """Whether the first run's account is still in memory must not decide it."""
    watchdog = program(clock=clock)
    with watchdog.run(budgets=[Budget(llm_calls=2, per="day", name="b")]) as run:
        call(run)
    del run
    gc.collect()
    with watchdog.run(budgets=[Budget(llm_calls=3, per="day", name="b")]) as run, pytest.raises(UsageError, match="two ceilings"):
        call(run)


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_every_file_is_for_the_user_alone_whatever_the_umask(umask: int, path) -> None:
    before = os.umask(umask)
    try:
        ledger = SqliteLedger(path, FakeClock())
        account = ledger.open(AccountKey("b", 0, "all", ""), ceiling=9, keep=0, warn_mark=9, ends_at=1e12)
        hold = ledger.reserve([Line(account, 0, enforced=True)], (1,) * 6, expires_at=1, owner=None)
        assert isinstance(hold, Hold)
        database._checkpoint(ledger._database)
        modes = {found.name: stat.S_IMODE(found.stat().st_mode) for found in path.parent.iterdir()}
    finally:
        os.umask(before)
    wanted = 0o600 & ~umask
    assert modes == {f"ledger.db{end}": wanted for end in ("", "-lock", "-owner-1", "-wal", "-shm")}
    ledger.close()


def test_a_clean_end_leaves_the_file_and_its_lock_and_nothing_else(path, program, clock) -> None:
    watchdog = program(Budget(llm_calls=5, per="day", name="b"), clock=clock)
    call(watchdog.process_run)
    watchdog.shutdown()
    assert sorted(found.name for found in path.parent.iterdir()) == ["ledger.db", "ledger.db-lock"]


@pytest.mark.slow
def test_watchdogs_made_and_shut_down_leave_no_descriptor_open(path, program, clock) -> None:
    program(Budget(llm_calls=500, per="day", name="b"), clock=clock).shutdown()
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        watchdog = Watchdog(clock=clock, ledger=str(path), prices=PRICES, budgets=[Budget(llm_calls=500, per="day", name="b")])
        call(watchdog.process_run)
        watchdog.shutdown()
        assert watchdog.process_run.summary().total.calls == 1
        del watchdog
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 5  # the one connection that the last summary has opened


@pytest.mark.slow
def test_opening_twice_changes_nothing(path, other) -> None:
    first = other()
    schema = "ledger._database.read('SELECT name, sql FROM sqlite_master ORDER BY name')"
    made = first.ask(schema)
    second = other()
    assert second.ask(schema) == made
    assert second.ask("ledger._database.read('PRAGMA user_version')") == [(2,)]


@pytest.mark.slow
def test_many_processes_that_make_the_file_at_once_make_it_once(path, other) -> None:
    there = [other("import logging, math\nfrom pathlib import Path") for _ in range(4)]
    for process in there:
        process.do("from clevagent_core.ledger.sqlite import SqliteLedger\nfrom clevagent.testing import FakeClock")
    for process in there:
        process.begin(f"ledger = SqliteLedger(Path({str(path)!r}), FakeClock())")
    for process in there:
        process.answer()
    assert {str(process.ask("ledger._database.read('SELECT count(*) FROM sqlite_master')")) for process in there} == {
        str(there[0].ask("ledger._database.read('SELECT count(*) FROM sqlite_master')"))
    }


def test_a_migration_that_was_interrupted_is_done_by_the_next_that_opens(path) -> None:
    file = database.Database(path, ("CREATE TABLE one (a)",))
    file.close()
    with pytest.raises(Exception, match="could not be used"):
        database.Database(path, ("CREATE TABLE one (a)", "CREATE TABLE two (a); CREATE TABLE one (a)"))
    file = database.Database(path, ("CREATE TABLE one (a)", "CREATE TABLE two (a)"))
    assert file.read("SELECT name FROM sqlite_master ORDER BY name") == [("one",), ("two",)]
    assert file.read("PRAGMA user_version") == [(2,)]
    file.close()


def test_a_link_to_the_file_is_the_file(path, open_here, tmp_path) -> None:
    here = open_here()
    hold = here.hold(10)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "link.db").symlink_to(path)
    file = LedgerFile(folder / "link.db")
    assert [owner.is_alive for owner in file.owners()] == [True]
    file.close()
    assert [found.name for found in folder.iterdir()] == ["link.db"]
    here.pay(hold, 1)


# -- size -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_log_stays_bounded(open_here, path) -> None:
    here = open_here(ceiling=10**9)
    biggest = 0
    for number in range(10_000):
        here.pay(here.hold(1), 1)
        if number % 100 == 0:
            biggest = max(biggest, Path(f"{path}-wal").stat().st_size)
    assert here.state() == (10_000, 0)
    # They write more than 1 GB; how far a checkpoint lags behind depends on the disk.
    assert biggest < 256 * 2**20


@pytest.mark.slow
def test_the_log_stays_bounded_while_several_processes_never_rest(other, here, path) -> None:
    there = [other(ceiling=10**9) for _ in range(3)]
    for process in there:
        process.begin("for _ in range(15_000): pay(take(1), 1)")
    biggest = 0
    event = threading.Event()
    while not all(process.has_answered() for process in there):
        biggest = max(biggest, Path(f"{path}-wal").stat().st_size)
        event.wait(0.01)
    for process in there:
        process.answer()
    assert there[0].ask("state()") == (45_000, 0)
    # They write more than 1 GB; how far a checkpoint lags behind depends on the disk.
    assert biggest < 256 * 2**20


def test_the_checkpointer_hands_the_log_over_when_it_grew_too_long(open_here, monkeypatch) -> None:
    here = open_here(ceiling=10**9)
    monkeypatch.setattr(database, "_WAL_PAGES", 10)
    for _ in range(20):
        here.pay(here.hold(1), 1)
    database._checkpoint(here.ledger._database)
    wal = Path(f"{here.ledger._database.path}-wal").stat().st_size
    for _ in range(5):
        here.pay(here.hold(1), 1)
    assert Path(f"{here.ledger._database.path}-wal").stat().st_size == wal  # written over from its beginning


def test_windows_that_are_over_ended_runs_and_idle_accounts_are_pruned(open_here, clock) -> None:
    here = open_here(clock=clock)
    now = clock.wall()
    day = here.open(AccountKey("day", 0, "all", "1"), ends_at=now + 100)
    here.pay(here.hold(1, day), 1)
    run = here.open(AccountKey("run", 0, "r", ""), is_of_run=True)
    here.pay(here.hold(1, run), 1)
    here.ledger.forget([run])
    here.open(AccountKey("idle", 0, "all", ""))
    spent = here.open(AccountKey("spent", 0, "all", ""))
    here.pay(here.hold(1, spent), 1)
    topped = here.open(AccountKey("topped", 0, "all", ""))
    here.ledger.top_up(topped, 5)
    refused = here.open(AccountKey("refused", 0, "all", ""))
    here.take(1000, refused)
    held = here.open(AccountKey("held", 0, "all", "1"), ends_at=now + 100)
    in_flight = here.hold(1, held)
    here.pay(here.hold(1), 1)

    def names() -> set[str]:
        here.ledger.evict(clock.wall())
        return {name for (name,) in here.rows("SELECT budget FROM account")}

    clock.advance(3599)
    assert names() == {"b", "day", "run", "idle", "spent", "topped", "refused", "held"}
    clock.advance(60)
    assert names() == {"b", "day", "spent", "topped", "held"}
    clock.advance(100)
    assert names() == {"b", "spent", "topped", "held"}
    here.pay(in_flight, 1)
    clock.advance(61)
    assert names() == {"b", "spent", "topped"}


def test_more_accounts_than_are_taken_out_at_once_are_taken_out_one_batch_after_another(open_here, clock) -> None:
    here = open_here(clock=clock)
    with here.ledger._database.transaction() as execute:
        for number in range(1200):
            execute(
                "INSERT INTO account (budget, unit, key, window, granted, ceiling, keep, warn_mark, opened_at, over_at) "
                "VALUES ('b', 0, ?, '', 1, 1, 0, 1, 0, 0)",
                (f"k{number}",),
            )
    clock.advance(61)
    assert [here.ledger.evict(clock.wall()) for _ in range(4)] == [500, 500, 200, 0]


@pytest.mark.slow
def test_many_runs_leave_nothing_in_memory_and_no_more_than_an_hour_of_them_in_the_file(program, clock) -> None:
    watchdog = program(clock=clock)
    for _ in range(300):
        with watchdog.run(budgets=[Budget(llm_calls=5, tokens=10**6)]) as run:
            call(run)
        clock.advance(30)
    gc.collect()
    ledger = watchdog.ledger
    assert len(ledger._accounts) <= 2
    assert ledger._holds == {}
    assert not ledger._closing
    assert not ledger._over
    rows = ledger._database.read("SELECT count(*) FROM account")[0][0]
    assert rows <= 2 * (3600 + 60) / 30 + 2


@pytest.mark.slow
def test_a_ledger_that_is_dropped_closes_its_connection(path) -> None:
    """Also in a cycle, where the connection's own finalizer, which warns from CPython 3.13 on, may come first."""
    ledger: Any = SqliteLedger(path, FakeClock())
    connection = ledger._database._connection
    ledger.me = ledger
    del ledger
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


# -- files of older versions ------------------------------------------------------------------------------------------------


def test_a_file_whose_accounts_latched_goes_on_working(program, clock, open_here) -> None:
    """The column is still there, for the version that wrote it, and says nothing any more."""
    budget = Budget(llm_calls=3, per="lifetime", name="shared")
    watchdog = program(budget, clock=clock)
    call(watchdog.process_run)
    watchdog.shutdown()
    here = open_here()
    with here.ledger._database.transaction() as execute:
        execute("UPDATE account SET latched = 1, told = 1")
    assert calls_until_refused(program(budget, clock=clock).process_run) == 2
    assert here.rows("SELECT latched, spent FROM account WHERE budget = 'shared'") == [(1, 3)]
