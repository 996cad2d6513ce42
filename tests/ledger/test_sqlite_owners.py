"""Who holds money in a ledger's file, and what becomes of it: other processes, stopped, killed, ended, or taken for dead."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from clevagent.testing import FakeClock
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.errors import BudgetBusy, BudgetExceeded
from clevagent_core.ledger.account import Hold, Refusal
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog

PRICES = {"m": Price(input=1, output=2)}


def owner_files(path: Path) -> list[str]:
    return sorted(found.name for found in path.parent.glob("*-owner-*"))


# -- alive or dead --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_process_holds_is_seen_by_all_and_given_back_by_it_alone(other, here) -> None:
    there = other()
    there.do("hold = take(60)")
    assert here.state() == (0, 60)
    assert here.ledger.holds() == []
    assert here.ledger.is_held_elsewhere()
    busy = here.take(50)
    assert isinstance(busy, Refusal)
    assert busy.reason == "busy"
    there.do("pay(hold, 10)")
    assert here.state() == (10, 0)
    assert not here.ledger.is_held_elsewhere()
    here.pay(here.hold(90), 90)
    assert there.ask("state()") == (100, 0)
    full = there.ask("(type(refused := take(1)).__name__, refused.reason)")
    assert full == ("Refusal", "exhausted")


@pytest.mark.slow
def test_a_stopped_process_is_alive_and_goes_on_with_what_it_holds(other, here) -> None:
    there = other()
    there.do("hold = take(60)")
    os.kill(there.pid, signal.SIGSTOP)
    try:
        os.waitpid(there.pid, os.WUNTRACED)
        for _ in range(3):
            refused = here.take(50)
            assert isinstance(refused, Refusal)
            assert refused.reason == "busy"
        here.ledger.evict(here.clock.wall() + 1000)
        assert here.state() == (0, 60)
    finally:
        os.kill(there.pid, signal.SIGCONT)
    there.do("pay(hold, 5)")
    assert here.state() == (5, 0)


@pytest.mark.slow
def test_what_a_killed_process_held_is_charged_once_by_whoever_needs_room(other, here, path, caplog) -> None:
    there, third = other(), other()
    there.do("holds = [take(20), take(30)]")
    there.kill()
    assert here.state() == (0, 50)
    with caplog.at_level(logging.WARNING, "clevagent"):
        refused = here.take(60)
    assert isinstance(refused, Refusal)
    assert refused.reason == "exhausted"
    assert here.state() == (50, 0)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"Process {there.pid} of agent 'other' ended with 2 calls in flight. They may have been billed, so their upper bounds "
        "are charged: $0.00000000005."
    )
    third.do("take(60)")
    assert here.state() == (50, 0)
    assert len(owner_files(path)) == 2


@pytest.mark.slow
def test_what_a_killed_process_held_is_charged_by_the_next_one_that_opens_the_file(other, open_here, path) -> None:
    there = other()
    there.do("take(20)")
    there.kill()
    assert open_here().state() == (20, 0)
    assert owner_files(path) == []


@pytest.mark.slow
def test_what_a_killed_process_held_is_charged_by_the_sweep_of_any_other(other, here, path) -> None:
    there = other()
    there.do("take(20)")
    there.kill()
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    assert here.state() == (20, 0)
    assert owner_files(path) == []


@pytest.mark.slow
def test_many_that_find_a_dead_process_at_once_charge_it_once(other, here) -> None:
    dead = [other(ceiling=10_000) for _ in range(2)]
    others = [other(ceiling=10_000) for _ in range(3)]
    for number, there in enumerate(dead):
        there.do(f"for _ in range(50): take({10 + number})")
    for there in dead:
        there.kill()
    for there in others:
        there.begin("for _ in range(20): take(100_000)")
    for there in others:
        there.answer()
    assert here.state() == (50 * 10 + 50 * 11, 0)
    assert here.rows("SELECT count(*) FROM hold") == [(0,)]


@pytest.mark.slow
def test_a_process_that_ends_without_shutdown_is_charged_what_it_held(other, here) -> None:
    there = other()
    there.do("hold = take(20); pay(take(7), 3)")
    assert there.finish() == 0
    assert isinstance(here.take(98), Refusal)
    assert here.state() == (23, 0)


@pytest.mark.slow
def test_a_process_that_closes_its_ledger_leaves_no_file_behind_and_is_charged(other, here, path) -> None:
    there = other()
    there.do("hold = take(20); ledger.close()")
    assert here.state() == (20, 0)
    assert owner_files(path) == []
    there.do("pay(hold, 4)")
    assert here.state() == (4, 0)


@pytest.mark.slow
def test_a_process_whose_lock_file_was_cleaned_away_is_charged_and_corrected_when_it_settles(other, here, path) -> None:
    there = other()
    there.do("first, second = take(20), take(30)")
    for name in owner_files(path):
        (path.parent / name).unlink()
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    assert here.state() == (50, 0)
    there.do("pay(first, 5)")
    assert here.state() == (35, 0)
    there.do("ledger.release(second)")
    assert here.state() == (5, 0)
    there.do("third = take(40)")
    assert here.state() == (5, 40)
    assert len(owner_files(path)) == 1
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    assert here.state() == (5, 40)


@pytest.mark.slow
def test_what_a_process_holds_that_was_taken_for_dead_before_is_charged_when_it_dies(other, here, path) -> None:
    """It was buried while it held nothing, so no settled call has told it."""
    there = other()
    there.do("pay(take(20), 1)")
    for name in owner_files(path):
        (path.parent / name).unlink()
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    assert here.rows("SELECT count(*) FROM owner") == [(0,)]
    there.do("take(30)")
    there.kill()
    assert isinstance(here.take(80), Refusal)
    assert here.state() == (31, 0)


@pytest.mark.slow
def test_a_process_of_a_file_that_was_deleted_does_not_shut_out_those_of_the_new_one(other, open_here, path) -> None:
    """The numbers of owners begin anew with the file, and the old process still has its lock."""
    there = other()
    there.do("hold = take(20)")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    new = open_here()
    hold = new.hold(30)
    third = other()
    assert third.ask("state()") == (0, 30)
    there.finish()
    assert isinstance(new.take(200), Refusal)
    assert new.state() == (0, 30)
    new.pay(hold, 4)
    assert third.ask("state()") == (4, 0)


@pytest.mark.slow
def test_the_ceiling_holds_where_a_cleaner_took_the_lock_of_transactions_away(other, open_here, path) -> None:
    """Who starts then waits in another queue; SQLite's own lock still keeps transactions apart."""
    there = [other(ceiling=1500)]
    Path(f"{path}-lock").unlink()
    there.append(other(ceiling=1500))
    Path(f"{path}-lock").unlink()
    there.append(other(ceiling=1500))
    for process in there:
        process.do("""
def spend():
    hold = take(1)
    if isinstance(hold, Hold):
        pay(hold, 1)
    return isinstance(hold, Hold)
""")
        process.begin("sum(spend() for _ in range(1000))", "=")
    assert sum(process.answer() for process in there) == 1500
    assert open_here(ceiling=1500).state() == (1500, 0)


@pytest.mark.slow
def test_a_process_that_holds_nothing_but_had_a_run_ends_it_by_dying(other, here) -> None:
    there = other()
    there.do("run = ledger.open(AccountKey('run', 4, 'r1', ''), ceiling=9, keep=0, warn_mark=9, ends_at=math.inf, is_of_run=True)")
    assert here.rows("SELECT count(*) FROM account WHERE over_at IS NULL") == [(2,)]
    there.kill()
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    assert here.rows("SELECT budget FROM account WHERE over_at IS NULL") == [("b",)]


# -- waiting for others' money --------------------------------------------------------------------------------------------

ENDINGS = {"settles": "pay(hold, 10)", "releases": "ledger.release(hold)", "is topped up": "ledger.top_up(account, 100)"}


def in_process(path: Path) -> Watchdog:
    return Watchdog(ledger=str(path), prices=PRICES, budgets=[Budget(tokens=100, per="lifetime", name="b")], wait_s=60)


_SAME = """
account = ledger.open(AccountKey("b", 1, "all", ""), ceiling=100, keep=0, warn_mark=80, ends_at=math.inf)
def take(amount):
    return ledger.reserve([Line(account, 1, True)], (0, amount, 0, 0, 0, 0), expires_at=math.inf, owner=None)
def pay(hold, amount):
    ledger.settle(hold, (0, amount, 0, 0, 0, 0))
hold = take(80)
"""


def ask(output: int = 30) -> LLMCall:
    return LLMCall(model="m", input=["hello"], max_output_tokens=output)


class Waiting:
    """A thread that waits for money, begun once it waits."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.answer: Any = None
        self.has_looked = threading.Event()
        """Set once the file was looked at: from then on, only a change of it or the time tells."""
        watchdog.ledger.changes.subscribe(self.has_looked.set)
        self._thread = threading.Thread(target=self._work, args=(watchdog,))
        self._thread.start()
        _until(lambda: len(watchdog.ledger.changes._listeners) == 2)

    def _work(self, watchdog: Watchdog) -> None:
        try:
            self.answer = watchdog.process_run.open(ask())
        except Exception as error:
            self.answer = error

    def end(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.answer


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_thread_that_waits_for_another_process_goes_on_when_that(ending: str, other, path) -> None:
    there = other()
    there.do(_SAME)
    watchdog = in_process(path)
    waiting = Waiting(watchdog)
    there.do(ENDINGS[ending])
    waiting.end().settle(Usage(input_tokens=1, output_tokens=1))
    watchdog.shutdown()


@pytest.mark.slow
def test_a_thread_that_waits_for_a_process_that_dies_is_told_that_the_money_is_spent(other, path) -> None:
    there = other()
    there.do(_SAME)
    watchdog = in_process(path)
    waiting = Waiting(watchdog)
    assert waiting.has_looked.wait(30)
    there.kill()
    error = waiting.end()
    assert type(error) is BudgetExceeded
    assert (error.spent, error.held) == (80, 0)
    watchdog.shutdown()


@pytest.mark.slow
def test_a_thread_that_waits_for_two_processes_gets_what_the_one_gives_back_after_the_other_died(other, path) -> None:
    first, second = other(), other()
    first.do(_SAME.replace("take(80)", "take(30)"))
    second.do(_SAME.replace("take(80)", "take(50)"))
    watchdog = in_process(path)
    waiting = Waiting(watchdog)
    first.kill()
    _until(lambda: watchdog.process_run.summary().budgets[0].spent == 30)
    second.do("ledger.release(hold)")
    waiting.end().settle(Usage(input_tokens=1, output_tokens=1))
    assert watchdog.process_run.summary().budgets[0].spent == 32
    watchdog.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_task_that_waits_for_another_process_goes_on_when_that(ending: str, other, path) -> None:
    there = other()
    there.do(_SAME)
    watchdog = in_process(path)

    async def main() -> None:
        waiting = asyncio.create_task(watchdog.process_run.aopen(ask()))
        for _ in range(10_000):
            if watchdog.ledger.changes._listeners:
                break
            await asyncio.sleep(0)
        there.do(ENDINGS[ending])
        async with asyncio.timeout(30):
            (await waiting).settle(Usage(input_tokens=1, output_tokens=1))

    asyncio.run(main())
    watchdog.shutdown()


@pytest.mark.slow
def test_who_waits_in_vain_is_told_that_others_hold_the_money(other, path) -> None:
    there = other()
    there.do(_SAME)
    clock = FakeClock(auto_advance=True)
    budgets = [Budget(tokens=100, per="lifetime", name="b")]
    watchdog = Watchdog(ledger=str(path), prices=PRICES, budgets=budgets, wait_s=60, clock=clock)
    with pytest.raises(BudgetBusy):
        watchdog.process_run.open(ask())
    assert clock.monotonic() >= 60
    assert watchdog.ledger.changes._listeners == ()
    there.do("pay(hold, 10)")
    watchdog.process_run.open(ask()).release()
    watchdog.shutdown()


def _until(condition: Any) -> None:
    event = threading.Event()
    for _ in range(30_000):
        if condition():
            return
        event.wait(0.001)
    raise AssertionError("it did not happen")


def test_a_hold_here_is_none_of_another_ledgers_of_this_process(open_here) -> None:
    first, second = open_here(), open_here()
    hold = first.hold(60)
    assert second.ledger.is_held_elsewhere()
    assert isinstance(second.take(50), Refusal)
    second.ledger.close()
    assert first.state() == (0, 60)
    first.pay(hold, 1)
    assert isinstance(second.take(99), Hold)
