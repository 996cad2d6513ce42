"""What outlives its run: tasks, threads, and streams that are read after the block. And two watchdogs in one process."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import clevagent
from clevagent import Budget, BudgetExceeded
from clevagent.testing import LoopbackProvider
from clevagent_core.watchdog import Watchdog

from .conftest import LIMIT, WAIT_S, Client, Model, Users, counted, in_threads, sent


@pytest.fixture
def user(caller):
    return Users(1, caller)


# -- tasks and threads -----------------------------------------------------------------------------------------------------


class Later:
    """Something that was started in a run, and calls when it is told to: in a task, a thread, or an item of a pool."""

    def __init__(self, caller, in_loop):
        self.caller, self.in_loop = caller, in_loop

    def errors(self, how, around):
        """Open the blocks of ``around``, start in the innermost, leave all but the first, call; give what was raised."""
        return self.in_loop(self._task(around)) if how == "task" else self._thread(how, around)

    async def _task(self, around):
        go = asyncio.Event()

        async def call():
            await go.wait()
            try:
                await self.caller.aask("later")
            except clevagent.Stopped as stop:
                return stop

        with around() as (leave, _):
            task = asyncio.create_task(call())
            await asyncio.sleep(0)
            leave()
            go.set()
            return await task

    def _thread(self, how, around):
        go, answers = threading.Event(), []

        def call():
            go.wait(WAIT_S)
            try:
                self.caller.ask("later")
                answers.append(None)
            except clevagent.Stopped as stop:
                answers.append(stop)

        with ThreadPoolExecutor(1) as pool:
            with around() as (leave, _):
                if how == "item":
                    pool.submit(call)
                    waits = pool.shutdown
                else:
                    context = contextvars.copy_context()
                    thread = threading.Thread(target=call if how == "thread" else lambda: context.run(call))
                    thread.start()
                    waits = thread.join
                leave()
                go.set()
                waits()
        return answers[0]


@pytest.fixture
def later(caller, in_loop):
    return Later(caller, in_loop)


HOW = ["task", "thread", "item", "context"]


class _Around:
    """Blocks of runs around what is started: those after the first are left before it calls."""

    def __init__(self, *blocks, stays=0):
        self.blocks, self.stays, self.runs = blocks, stays, []

    def __call__(self):
        return self

    def __enter__(self):
        self.runs = [block.__enter__() for block in self.blocks]
        return self._leave, self.runs

    def _leave(self):
        for block in reversed(self.blocks[self.stays :]):
            block.__exit__(None, None, None)

    def __exit__(self, *error):
        for block in reversed(self.blocks[: self.stays]):
            block.__exit__(*error)


@pytest.mark.parametrize("how", HOW)
def test_what_outlives_a_run_with_a_ceiling_is_refused(later, how):
    around = _Around(clevagent.run(budgets=[Budget(llm_calls=LIMIT)]))
    stop = later.errors(how, around)
    assert isinstance(stop, BudgetExceeded)
    assert stop.reason == "run_over"
    assert sent(later.caller.provider) == {}
    assert counted(around.runs[0]) == 0


@pytest.mark.parametrize("how", HOW)
def test_what_outlives_a_run_without_a_ceiling_counts_for_the_process(later, how):
    watchdog = clevagent.init()
    assert later.errors(how, _Around(clevagent.run())) is None
    assert sent(later.caller.provider) == {"later": 1}
    assert counted(watchdog.process_run) == 1


@pytest.mark.parametrize("how", HOW)
def test_what_outlives_a_run_without_a_ceiling_is_held_to_the_processs_own(later, how):
    clevagent.init(budgets=[Budget(usd=0.0000001, per="day")])
    assert isinstance(later.errors(how, _Around(clevagent.run())), BudgetExceeded)
    assert sent(later.caller.provider) == {}


@pytest.mark.parametrize("how", HOW)
def test_what_outlives_a_run_counts_in_the_living_one_around_it(later, how):
    around = _Around(clevagent.run(budgets=[Budget(llm_calls=LIMIT)]), clevagent.run(budgets=[Budget(llm_calls=1)]), stays=1)
    assert later.errors(how, around) is None
    outer, inner = around.runs
    assert sent(later.caller.provider) == {"later": 1}
    assert (counted(outer), counted(inner)) == (1, 0)


@pytest.mark.parametrize("how", HOW)
def test_the_ceiling_of_the_living_run_around_it_holds(later, how):
    blocks = [clevagent.run(budgets=[Budget(usd=0.0000001)]), clevagent.run(), clevagent.run(budgets=[Budget(llm_calls=5)])]
    assert isinstance(later.errors(how, _Around(*blocks, stays=1)), BudgetExceeded)
    assert sent(later.caller.provider) == {}


@pytest.mark.parametrize("how", HOW)
def test_what_outlives_a_dry_run_is_not_refused(later, how):
    """It stops nothing while it goes on, and nothing after it."""
    around = _Around(clevagent.run(budgets=[Budget(llm_calls=LIMIT)], dry_run=True))
    assert later.errors(how, around) is None
    assert sent(later.caller.provider) == {"later": 1}


@pytest.mark.parametrize("nested", [clevagent.run, lambda: clevagent.run(budgets=[Budget(llm_calls=1)])])
def test_a_run_opened_in_what_outlived_its_own_counts_for_itself(caller, in_loop, nested):
    """It is a living run around the call."""

    async def call(go):
        await go.wait()
        with nested() as run:
            await caller.aask("later")
        return counted(run)

    async def main():
        go = asyncio.Event()
        with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as run:
            task = asyncio.create_task(call(go))
            await asyncio.sleep(0)
        go.set()
        return await task, counted(run)

    assert in_loop(main()) == (1, 0)
    assert sent(caller.provider) == {"later": 1}


def test_outside_runs_lets_what_outlived_its_run_go_on(caller, in_loop):
    async def call(go):
        await go.wait()
        with clevagent.outside_runs():
            await caller.aask("later")

    async def main():
        go = asyncio.Event()
        with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]):
            task = asyncio.create_task(call(go))
            await asyncio.sleep(0)
        go.set()
        await task

    in_loop(main())
    assert sent(caller.provider) == {"later": 1}


def test_the_task_and_thread_that_had_the_run_go_on_after_it(user, in_loop):
    """The block put back what was there: only what inherited it is refused."""

    async def main():
        with user.block():
            await user.aattempt("inside")
        return await user.aattempt("after")

    assert in_loop(main()) == "sent"
    with user.block():
        user.attempt("inside")
    assert user.attempt("after") == "sent"


# -- streams ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drive", ["sync", "async"])
def test_a_stream_read_after_its_block_counts_in_its_run_and_with_its_tags(caller, in_loop, drive):
    clevagent.init(budgets=[Budget(llm_calls=2, per="day", by="tenant", name="tenants")])

    def ask(tenant):
        with clevagent.run(budgets=[Budget(llm_calls=LIMIT)], tags={"tenant": tenant}) as run:
            stream = caller.stream(tenant)
        for _ in stream:
            pass
        return counted(run)

    async def aask(tenant):
        with clevagent.run(budgets=[Budget(llm_calls=LIMIT)], tags={"tenant": tenant}) as run:
            stream = await caller.astream(tenant)
        async for _ in stream:
            pass
        return counted(run)

    def one(tenant):
        return ask(tenant) if drive == "sync" else in_loop(aask(tenant))

    assert [one("acme"), one("acme")] == [1, 1]
    with pytest.raises(BudgetExceeded) as refused:
        one("acme")
    assert refused.value.budget == "tenants"
    assert one("globex") == 1
    assert sent(caller.provider) == {"acme": 2, "globex": 1}


@pytest.mark.parametrize("drive", ["sync", "async"])
def test_a_stream_counts_in_the_run_in_which_it_was_made_not_where_it_is_read(caller, in_loop, drive):
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as made:
        stream = caller.stream("one") if drive == "sync" else in_loop(caller.astream("one"))
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as read:
        if drive == "sync":
            list(stream)
        else:
            in_loop(_read(stream))
        caller.ask("two")
    assert (counted(made), counted(read)) == (1, 1)
    assert sent(caller.provider) == {"one": 1, "two": 1}


async def _read(stream):
    async for _ in stream:
        pass


def test_a_stream_read_in_another_thread_counts_in_the_run_in_which_it_was_made(users):
    caller = users.caller

    def work(user):
        streams = [caller.stream(f"{user} {number}") for number in range(LIMIT)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(list, streams))
        with pytest.raises(BudgetExceeded):
            list(caller.stream(f"{user} more"))

    users.each_in_a_run(work)
    users.have_made()


def test_streams_made_in_a_run_never_pass_its_ceiling_however_late_they_are_read(caller):
    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as run:
        streams = [caller.stream("one") for _ in range(LIMIT)]
        try:
            streams.append(caller.stream("one"))
        except BudgetExceeded:
            streams.append(iter(()))
    for stream in streams[:LIMIT]:
        list(stream)
    try:
        list(streams[-1])
    except BudgetExceeded as stop:
        assert stop.reason != "run_over"
    assert sent(caller.provider) == {"one": LIMIT}
    assert counted(run) == LIMIT


def test_a_stream_that_is_dropped_after_its_block_is_charged_to_its_run(caller):
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        stream = caller.stream("one")
    next(iter(stream))
    stream.close()
    assert run.summary().total.cost_usd >= float(caller.provider.billed_usd) > 0


# -- two watchdogs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """Two watchdogs of one process, and who calls with each."""
    made = [Watchdog(), Watchdog()]
    yield made
    for one in made:
        one.shutdown()


@pytest.fixture
def callers(kind, provider, pair):
    return [kind(provider, watchdog=one) for one in pair]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_runs_of_two_watchdogs_in_each_other_share_nothing(pair, callers, order):
    outer, inner = (pair[number] for number in order)
    with outer.run(budgets=[Budget(llm_calls=1)]) as around, inner.run(budgets=[Budget(llm_calls=2)]) as within:
        callers[order[1]].ask("inner")
        callers[order[1]].ask("inner")
        with pytest.raises(BudgetExceeded):
            callers[order[1]].ask("inner")
        callers[order[0]].ask("outer")
        with pytest.raises(BudgetExceeded):
            callers[order[0]].ask("outer")
    assert (counted(around), counted(within)) == (1, 2)
    assert within.parent is None
    assert sent(callers[0].provider) == {"inner": 2, "outer": 1}


def test_what_two_watchdogs_carry_to_a_thread_is_both(pair, callers):
    def call():
        for caller, name in zip(callers, ["first", "second"], strict=True):
            try:
                caller.ask(name)
            except BudgetExceeded:
                refused.append(name)

    refused = []
    with pair[0].run(budgets=[Budget(llm_calls=3)]) as first, pair[1].run(budgets=[Budget(llm_calls=4)]) as second:
        in_threads([call])
        with ThreadPoolExecutor(1) as pool:
            for _ in range(5):
                pool.submit(call).result(WAIT_S)
    assert (counted(first), counted(second)) == (3, 4)
    assert sorted(refused) == ["first"] * 3 + ["second"] * 2


def test_a_run_of_one_watchdog_that_is_over_refuses_nothing_of_the_other(pair, callers):
    go, answers = threading.Event(), []

    def call():
        go.wait(WAIT_S)
        for caller in callers:
            try:
                caller.ask("later")
                answers.append("sent")
            except BudgetExceeded as stop:
                answers.append(stop.reason)

    with pair[0].run(budgets=[Budget(llm_calls=LIMIT)]):
        thread = threading.Thread(target=call)
        thread.start()
    go.set()
    thread.join(WAIT_S)
    assert answers == ["run_over", "sent"]


def test_a_generators_block_of_one_watchdog_covers_nothing_of_the_other(pair, callers):
    def steps():
        with pair[0].run(budgets=[Budget(llm_calls=1)]):
            for _ in range(3):
                callers[1].ask("other")
                yield
            callers[0].ask("own")
            with pytest.raises(BudgetExceeded):
                callers[0].ask("own")

    list(steps())
    assert sent(callers[0].provider) == {"other": 3, "own": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind_of_caller", [Model, Client])
def test_the_bill_is_never_more_than_the_ceilings_of_all_runs(kind_of_caller):
    """Two jobs at once, each fanning out over a pool of its own: the provider's bill stays below the sum of both ceilings."""
    with LoopbackProvider() as provider:
        users = Users(2, kind_of_caller(provider))
        ceiling = 0.001
        users.block = lambda: clevagent.run(budgets=[Budget(usd=ceiling)])

        def work(user):
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda number: users.attempt(user, number), range(20)))

        users.each_in_a_run(work)
        assert 0 < provider.billed_usd <= 2 * ceiling
        for run in users.runs.values():
            assert run.summary().total.cost_usd <= ceiling
