"""A ledger's file across forks: the child is a process of its own, and what was in flight stays its parent's to settle."""

from __future__ import annotations

import ast
import contextlib
import math
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clevagent.testing import FakeClock
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.errors import BudgetExceeded
from clevagent_core.ledger.account import AccountKey, Hold, Refusal
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog

PRICES = {"m": Price(input=1, output=2)}
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning"),
]


class Child:
    """A forked process that does ``work`` and tells what that returned, as text."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._read)
                os.write(write, repr(work()).encode())
                code = 0
            except BaseException as error:
                os.write(write, repr(repr(error)).encode())
            finally:
                os._exit(code)  # as multiprocessing ends its children
        os.close(write)

    def end(self) -> Any:
        """What it returned; kills it and raises when it hangs."""
        told = b""
        while True:
            poll = select.poll()  # select() knows no descriptor above 1023
            poll.register(self._read, select.POLLIN)
            if not poll.poll(30_000):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError("the child hangs")
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                break
            told += chunk
        os.close(self._read)
        os.waitpid(self.pid, 0)
        return ast.literal_eval(told.decode() or "None")


def call(watchdog: Watchdog, run: Any = None) -> None:
    opened = (run or watchdog.process_run).open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
    opened.settle(Usage(input_tokens=5, output_tokens=5))


def calls_until_refused(watchdog: Watchdog, run: Any = None) -> int:
    for number in range(1000):
        try:
            call(watchdog, run)
        except BudgetExceeded:
            return number
    raise AssertionError("it was never refused")


@pytest.fixture
def watch(path: Path):
    made: list[Watchdog] = []

    def make(*budgets: Budget, **given: Any) -> Watchdog:
        made.append(
            Watchdog(**{"clock": FakeClock(), "ledger": str(path), "prices": PRICES, "budgets": budgets, "wait_s": 0, **given})
        )
        return made[-1]

    yield make
    for watchdog in made:
        watchdog.shutdown()


# -- what is the parent's and what the child's ----------------------------------------------------------------------------


@pytest.mark.slow
def test_parent_and_child_share_one_ceiling(watch) -> None:
    watchdog = watch(Budget(llm_calls=10, per="day", name="b"))
    call(watchdog)
    child = Child(lambda: [call(watchdog) for _ in range(4)] and watchdog.ledger.close())
    assert child.end() is None
    assert calls_until_refused(watchdog) == 5
    assert Child(lambda: calls_until_refused(watchdog)).end() == 0


@pytest.mark.slow
def test_a_call_in_flight_is_the_parents_alone(watch) -> None:
    """The child has a copy of its ticket: to settle, to charge or to shut down there changes nothing."""
    watchdog = watch(Budget(tokens=1000, per="day", name="b"))
    run = watchdog.start_run()
    tickets = [run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10)) for _ in range(4)]
    held = run.summary().budgets[0].held
    assert held > 0

    def work() -> object:
        assert watchdog.ledger.holds() == []
        tickets[0].settle(Usage(input_tokens=100, output_tokens=100))
        tickets[1].charge()
        tickets[2].release()
        watchdog.expire(math.inf)
        run.end()
        watchdog.shutdown()
        return run.summary().budgets[0].held, run.summary().budgets[0].spent

    assert Child(work).end() == (held, 0)
    state = run.summary().budgets[0]
    assert (state.spent, state.held) == (0, held)
    for ticket in tickets:
        ticket.settle(Usage(input_tokens=1, output_tokens=2))
    state = run.summary().budgets[0]
    assert (state.spent, state.held) == (12, 0)


@pytest.mark.slow
def test_the_childs_end_is_not_the_end_of_its_parents_run(watch) -> None:
    watchdog = watch()
    with watchdog.run(budgets=[Budget(llm_calls=10, name="b")]) as run:
        call(watchdog, run)

        def work() -> object:
            for _ in range(4):
                call(watchdog, run)
            watchdog.shutdown()
            return None

        assert Child(work).end() is None
        assert calls_until_refused(watchdog, run) == 5


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["ends", "shuts down"])
def test_a_run_whose_first_call_a_child_makes_is_still_its_parents(ending: str, watch) -> None:
    """The child opens the account: it must not be over when the child is."""
    watchdog = watch()
    with watchdog.run(budgets=[Budget(llm_calls=10, name="b")]) as run:

        def work() -> object:
            for _ in range(4):
                call(watchdog, run)
            if ending == "shuts down":
                watchdog.shutdown()
            return None

        assert Child(work).end() is None
        watchdog.ledger._evict_at = 0  # type: ignore[attr-defined]
        watchdog.ledger.evict(watchdog.clock.wall())
        assert calls_until_refused(watchdog, run) == 6


@pytest.mark.slow
def test_a_run_goes_on_in_the_child_when_the_parent_exits_first(path: Path) -> None:
    """The parent is a program of its own, which forks and ends; the child spends on, under the same ceiling."""
    script = f"""
import os, sys
from clevagent.testing import FakeClock
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.errors import BudgetExceeded
from clevagent_core.pricing import Price
from clevagent_core.watchdog import Watchdog
watchdog = Watchdog(clock=FakeClock(), ledger={str(path)!r}, prices={PRICES!r}, wait_s=0,
                    budgets=[Budget(llm_calls=10, per="day", name="day"), Budget(llm_calls=7, name="run")])
run = watchdog.start_run()
def call():
    run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10)).settle(Usage(input_tokens=5, output_tokens=5))
call()
ours, theirs = os.pipe()
if os.fork() == 0:
    os.close(theirs)
    os.read(ours, 1)  # until the parent is gone
    made = 0
    try:
        while True:
            call()
            made += 1
    except BudgetExceeded as error:
        print(made, error.budget, flush=True)
    watchdog.ledger.close()
    os._exit(0)
call()
watchdog.shutdown()
os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert ended.stdout.decode().strip() == "5 run"


@pytest.mark.slow
def test_a_grandchild_shares_the_ceiling_and_holds_for_itself(watch, path: Path) -> None:
    watchdog = watch(Budget(llm_calls=10, per="day", name="b"))
    call(watchdog)

    def grandchild() -> object:
        for _ in range(3):
            call(watchdog)
        watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
        return os.getpid()

    def child() -> object:
        call(watchdog)
        inner = Child(grandchild)
        answer = inner.end()
        call(watchdog)
        return answer

    assert Child(child).end() != os.getpid()
    # What the grandchild had in flight is charged when room is looked for: 1 + 3 + 1 + 2.
    assert calls_until_refused(watchdog) == 3
    assert not [name for name in path.parent.glob("*-owner-*") if name.name != f"ledger.db-owner-{watchdog.ledger._owner.id}"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_child_that_is_killed_is_charged_while_its_parent_lives(watch) -> None:
    watchdog = watch(Budget(llm_calls=10, per="day", name="b"))
    ours, theirs = os.pipe()

    def work() -> object:
        for _ in range(4):
            watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
        os.write(theirs, b"x")
        signal.pause()
        return None

    child = Child(work)
    os.read(ours, 1)
    assert watchdog.process_run.remaining().llm_calls == 6
    os.kill(child.pid, signal.SIGKILL)
    child.end()
    assert calls_until_refused(watchdog) == 6
    for descriptor in (ours, theirs):
        os.close(descriptor)


@pytest.mark.slow
def test_a_parent_that_is_killed_is_dead_while_its_child_lives(path: Path, other, open_here) -> None:
    """The lock by which it is seen to be alive must not live on in the child."""
    there = other()
    there.do("""
hold = take(40)
ours, theirs = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os.write(theirs, b"x")
    signal.pause()
os.read(ours, 1)
""")
    child = there.ask("child")
    there.kill()
    here = open_here()
    try:
        assert here.state() == (40, 0)
    finally:
        os.kill(child, signal.SIGKILL)


# -- forks at the worst moment --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forks_while_other_threads_make_transactions_neither_hang_nor_lose(open_here) -> None:
    here = open_here(ceiling=10**6)
    done = threading.Event()
    made = [0] * 3
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            while not done.is_set():
                here.pay(here.hold(3), 2)
                made[number] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(made))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(25):
            assert Child(lambda: [here.pay(here.hold(3), 1) for _ in range(2)] and here.ledger.close()).end() is None
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert here.state() == (2 * sum(made) + 25 * 2, 0)


@pytest.mark.slow
def test_threads_that_fork_at_once_do_not_hang_each_other(open_here) -> None:
    here = open_here(ceiling=10**6)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                assert Child(lambda: here.pay(here.hold(1), 1)).end() is None
                here.pay(here.hold(1), 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert here.state() == (4 * 15 * 2, 0)


@pytest.mark.slow
def test_a_fork_during_a_checkpoint_does_not_hang(open_here) -> None:
    here = open_here(ceiling=10**6)
    checkpointer = here.ledger._database._checkpointer

    def spend_and_poke() -> None:
        here.pay(here.hold(1), 1)
        here.ledger._database._checkpointer.poke()

    for _ in range(10):
        checkpointer.poke()
        here.pay(here.hold(1), 1)
        assert Child(spend_and_poke).end() is None
    assert here.state() == (20, 0)


@pytest.mark.slow
def test_a_fork_while_a_thread_waits_for_money_does_not_hang(watch, other) -> None:
    watchdog = watch(Budget(llm_calls=1, per="day", name="b"), clock=FakeClock(), wait_s=30)
    ticket = watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10))
    answers: list[object] = []

    def wait() -> None:
        with contextlib.suppress(BudgetExceeded):
            answers.append(watchdog.process_run.open(LLMCall(model="m", input=["hello"], max_output_tokens=10)))

    thread = threading.Thread(target=wait)
    thread.start()
    assert watchdog.clock.wait_for_waiters()  # type: ignore[attr-defined]
    assert Child(lambda: (watchdog.ledger.changes._listeners, watchdog.process_run.remaining().llm_calls)).end() == ((), 0)
    ticket.release()
    thread.join(30)
    assert len(answers) == 1
    answers[0].release()  # type: ignore[attr-defined]


# -- pools ----------------------------------------------------------------------------------------------------------------

_pool_here: Any = None


def _spend(amount: int) -> bool:
    answer = _pool_here.take(amount)
    if isinstance(answer, Hold):
        _pool_here.pay(answer, amount)
    return isinstance(answer, Hold)


@pytest.mark.slow
def test_a_pool_of_forked_processes_keeps_one_ceiling(open_here, monkeypatch) -> None:
    here = open_here(ceiling=50)
    monkeypatch.setattr(sys.modules[__name__], "_pool_here", here)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        answers = pool.map_async(_spend, [1] * 200).get(60)
    assert sum(answers) == 50
    assert here.state() == (50, 0)
    assert isinstance(here.take(1), Refusal)


@pytest.mark.slow
def test_spawned_processes_keep_one_ceiling(other, open_here) -> None:
    there = [other(ceiling=50) for _ in range(3)]
    for process in there:
        process.do("""
def spend(amount):
    hold = take(amount)
    if isinstance(hold, Hold):
        pay(hold, amount)
    return isinstance(hold, Hold)
""")
    for process in there:
        process.begin("sum(spend(1) for _ in range(60))", "=")
    assert sum(process.answer() for process in there) == 50
    assert open_here(ceiling=50).state() == (50, 0)


@pytest.mark.slow
def test_accounts_of_a_run_opened_by_its_owner_are_over_when_the_owner_dies_but_not_those_that_a_child_shares(other, here) -> None:
    there = other()
    there.do("""
key = AccountKey("run", 4, "r1", "")
run = ledger.open(key, ceiling=9, keep=0, warn_mark=9, ends_at=math.inf, is_of_run=True)
""")
    here.open(AccountKey("run", 4, "r1", ""), 9, is_of_run=True)
    there.kill()
    here.clock.advance(61)
    here.ledger.evict(here.clock.wall())
    assert here.rows("SELECT count(*) FROM account WHERE over_at IS NULL AND budget = 'run'") == [(1,)]
