"""Runs: how they begin and end, which calls belong to them, what they tell, and what happens at a ceiling."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import (
    Budget,
    BudgetBusy,
    BudgetExceeded,
    BudgetState,
    Incident,
    Remaining,
    RunSummary,
    Spend,
    Step,
    ToolCall,
    Usage,
    UsageError,
    hookimpl,
)


def message_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def in_thread(function):
    """Run in a raw thread, which inherits no context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=10)


# -- beginning and ending ---------------------------------------------------------------------------------------------------


def test_a_with_block_is_a_run(make):
    watchdog = make()
    with watchdog.run() as run:
        assert watchdog.current_run() is run
        assert run.ended_at is None
    assert run.ended_at is not None
    assert watchdog.current_run() is watchdog.process_run


def test_an_async_with_block_is_a_run(make):
    watchdog = make()

    async def work():
        async with watchdog.run() as run:
            await asyncio.sleep(0)
            assert watchdog.current_run() is run
        assert watchdog.current_run() is watchdog.process_run
        return run

    assert asyncio.run(work()).ended_at is not None


def test_each_call_of_a_decorated_function_is_a_run_of_its_own(make):
    watchdog = make()

    @watchdog.run(tags={"job": "x"})
    def work(number):
        """Do it."""
        return number, watchdog.current_run()

    (first, one), (second, other) = work(1), work(second := 2)
    assert (first, second, one is other, one.tags, one.ended_at is None) == (1, 2, False, {"job": "x"}, False)
    assert (work.__name__, work.__doc__) == ("work", "Do it.")


def test_a_decorated_coroutine_function_is_a_run_until_it_is_done(make):
    watchdog = make()

    @watchdog.run()
    async def work():
        await asyncio.sleep(0)
        return watchdog.current_run()

    run = asyncio.run(work())
    assert run is not watchdog.process_run
    assert run.ended_at is not None


def test_a_recursive_decorated_function_nests_its_runs(make):
    watchdog = make()

    @watchdog.run()
    def work(depth):
        run = watchdog.current_run()
        return [run, *(work(depth - 1) if depth else [])]

    outer, middle, inner = work(2)
    assert (inner.parent, middle.parent, outer.parent, inner.root) == (middle, outer, None, outer)


def test_what_a_block_raises_goes_on_and_the_run_ends(make):
    watchdog = make()
    with pytest.raises(KeyError), watchdog.run() as outer, watchdog.run() as inner:
        raise KeyError
    assert (outer.ended_at is None, inner.ended_at is None) == (False, False)
    assert watchdog.current.get() is None


def test_a_refusal_in_a_nested_block_leaves_the_outer_one_current(make, llm):
    watchdog = make(budgets=[Budget(usd=0.01)])
    with watchdog.run() as outer:
        with pytest.raises(BudgetExceeded), watchdog.run() as inner:
            inner.open(llm(2))
        assert watchdog.current_run() is outer


def test_observers_hear_when_runs_begin_and_end(make, heard, clock):
    watchdog = make(plugins=[heard])
    with watchdog.run() as run:
        clock.advance(5)
    assert heard.started == [watchdog.process_run, run]
    assert [(summary.run_id, summary.ended_at - summary.started_at) for summary in heard.ended] == [(run.run_id, 5)]


def test_a_run_ends_once(make, heard):
    with make(plugins=[heard]).run() as run:
        run.end()
        run.end()
    assert len(heard.ended) == 1


def test_the_end_of_a_run_charges_what_it_still_holds(make, llm):
    with make(budgets=[Budget(usd=1, per="lifetime")]).run() as run:
        run.open(llm(5))
    assert (run.summary().total.cost_usd, run.summary().calls_charged_at_bound, run.summary().held_usd) == (0.05, 1, 0)


def test_usage_that_comes_after_the_end_corrects_what_was_charged(make, llm):
    with make(budgets=[Budget(usd=1)]).run() as run:
        ticket = run.open(llm(5))
    ticket.settle(Usage(output_tokens=2))
    summary = run.summary()
    assert (summary.total.cost_usd, summary.calls_charged_at_bound, summary.budgets[0].spent) == (0.02, 0, 0.02)


def test_a_run_in_a_generator_that_is_closed_in_another_context_ends(make):
    watchdog = make()
    runs = []

    def pieces():
        with watchdog.run() as run:
            runs.append(run)
            yield 1
            yield 2

    generator = pieces()
    next(generator)
    contextvars.Context().run(generator.close)
    assert runs[0].ended_at is not None


def test_a_run_in_a_generator_that_is_closed_in_another_context_leaves_that_contexts_run(make):
    watchdog = make()

    def pieces():
        with watchdog.run():
            yield 1

    generator = pieces()
    contextvars.copy_context().run(next, generator)
    with watchdog.run() as run:
        generator.close()
        assert watchdog.current_run() is run


def test_shutdown_ends_every_run(make):
    watchdog = make()
    run = watchdog.start_run()
    watchdog.shutdown()
    assert run.ended_at is not None


def test_shutdown_may_be_called_twice(make, heard):
    watchdog = make(plugins=[heard])
    watchdog.shutdown()
    watchdog.shutdown()
    assert [summary.run_id for summary in heard.ended] == [watchdog.process_run.run_id]


def test_shutdown_without_anything_started_does_nothing():
    clevagent.shutdown()
    clevagent.shutdown()


def test_after_shutdown_no_run_begins(make):
    watchdog = make()
    watchdog.shutdown()
    assert message_of(watchdog.run().__enter__) == snapshot(
        "This watchdog was shut down, so nothing would be guarded. Call clevagent.init() again first."
    )


def test_after_shutdown_a_ceiling_still_holds(make, llm):
    run = make(budgets=[Budget(usd=0.01)]).process_run
    run.watchdog.shutdown()
    with pytest.raises(BudgetExceeded):
        run.open(llm(2))


def test_tags_are_text(make):
    assert message_of(make().run(tags={"tenant": 5}).__enter__) == snapshot(
        "tags={'tenant': 5}: names and values of tags are text, by which Budget(by=...) tells accounts apart. Write str(5)."
    )


# -- nesting ----------------------------------------------------------------------------------------------------------------


def test_what_a_nested_run_uses_counts_against_both(make, spend):
    watchdog = make()
    with watchdog.run(budgets=[Budget(usd=1)]) as outer:
        spend(outer)
        with watchdog.run(budgets=[Budget(usd=2)]) as inner:
            spend(inner, 3)
    assert (inner.summary().total.cost_usd, outer.summary().total.cost_usd) == (0.03, 0.04)
    assert {state.budget: state.spent for state in inner.summary().budgets} == {"$1 per run": 0.04, "$2 per run": 0.03}


def test_a_nested_run_is_stopped_by_the_ceiling_around_it(make, spend):
    watchdog = make()
    with watchdog.run(budgets=[Budget(usd=0.02)]) as outer, watchdog.run(budgets=[Budget(usd=9)]) as inner:
        with pytest.raises(BudgetExceeded) as caught:
            spend(inner, 3)
    assert (caught.value.incident.key, caught.value.run_id) == (outer.run_id, inner.run_id)


def test_the_ceiling_of_a_nested_run_does_not_stop_the_one_around_it(make, spend):
    watchdog = make()
    with watchdog.run() as outer:
        with watchdog.run(budgets=[Budget(usd=0.01)]) as inner, pytest.raises(BudgetExceeded):
            spend(inner, 2)
        spend(outer, 2)


def test_refusals_are_counted_in_every_run_around(make, spend):
    watchdog = make()
    with watchdog.run() as outer, watchdog.run(budgets=[Budget(usd=0.01)]) as inner:
        for _ in range(2):
            with pytest.raises(BudgetExceeded):
                spend(inner, 2)
    assert (outer.summary().refusals, inner.summary().refusals) == (2, 2)


def test_a_nested_run_inherits_tags_and_may_change_them(make):
    watchdog = make()
    with watchdog.run(tags={"tenant": "a", "job": "x"}) as outer, watchdog.run(tags={"job": "y"}) as inner:
        pass
    assert (outer.tags, inner.tags) == ({"tenant": "a", "job": "x"}, {"tenant": "a", "job": "y"})


def test_a_budget_by_tag_covers_nested_runs_by_the_tag_they_inherit(make, spend):
    watchdog = make(budgets=[Budget(usd=0.02, per="lifetime", by="tenant")])
    with watchdog.run(tags={"tenant": "a"}), watchdog.run() as inner:
        spend(inner, 2)
    with watchdog.run(tags={"tenant": "a"}) as other, pytest.raises(BudgetExceeded):
        spend(other)


# -- threads and tasks ------------------------------------------------------------------------------------------------------


def test_a_raw_thread_belongs_to_the_only_run_that_is_active(make):
    watchdog = make()
    with watchdog.run() as run:
        assert in_thread(watchdog.current_run) is run


def test_a_raw_thread_belongs_to_the_innermost_of_nested_runs(make):
    watchdog = make()
    with watchdog.run(), watchdog.run() as inner:
        assert in_thread(watchdog.current_run) is inner


def test_with_two_unrelated_runs_without_budgets_a_raw_thread_belongs_to_the_process(make):
    watchdog = make()
    watchdog.start_run()
    watchdog.start_run()
    assert in_thread(watchdog.current_run) is watchdog.process_run


def test_a_run_that_is_not_inherited_leaves_raw_threads_to_the_process(make):
    watchdog = make()
    watchdog.start_run(inherited=False)
    assert in_thread(watchdog.current_run) is watchdog.process_run


def test_without_a_run_calls_belong_to_the_process(make, spend):
    watchdog = make()
    spend(watchdog.current_run(), 2)
    assert watchdog.process_run.summary().total.cost_usd == 0.02


def test_a_run_can_be_activated_in_a_thread(make):
    watchdog = make()
    run = watchdog.start_run()
    watchdog.start_run()

    def work():
        with run.activate() as active:
            assert active is run
            found = watchdog.current_run()
        return found, watchdog.current_run()

    assert in_thread(work) == (run, watchdog.process_run)


def test_one_block_entered_by_many_threads_at_once_is_a_run_for_each(make, spend):
    watchdog = make()
    block = watchdog.run(budgets=[Budget(usd=0.02)])
    barrier = threading.Barrier(8)

    def work(_):
        with block as run:
            barrier.wait(10)
            assert watchdog.current_run() is run
            spend(run, 2)
            barrier.wait(10)
        assert watchdog.current.get() is None
        return run

    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(work, range(8)))
    assert (len(set(runs)), {run.summary().total.cost_usd for run in runs}) == (8, {0.02})
    assert all(run.ended_at is not None for run in runs)


def test_one_block_entered_by_many_tasks_at_once_is_a_run_for_each(make, spend):
    watchdog = make()
    block = watchdog.run(budgets=[Budget(usd=0.02)])

    async def work(number):
        async with block as run:
            for _ in range(8 - number):
                await asyncio.sleep(0)
            assert watchdog.current_run() is run
            spend(run, 2)
        assert watchdog.current.get() is None
        return run

    async def everything():
        return await asyncio.gather(*(work(number) for number in range(8)))

    runs = asyncio.run(everything())
    assert (len(set(runs)), {run.summary().total.cost_usd for run in runs}) == (8, {0.02})
    assert all(run.ended_at is not None for run in runs)


def test_a_task_that_outlives_its_block_is_still_held_by_its_ceiling(make, spend):
    watchdog = make()

    async def late(go):
        await go.wait()
        spend(watchdog.current_run(), 2)

    async def work():
        go = asyncio.Event()
        async with watchdog.run(budgets=[Budget(usd=0.01)]):
            task = asyncio.create_task(late(go))
            await asyncio.sleep(0)
        go.set()
        await task

    with pytest.raises(BudgetExceeded):
        asyncio.run(work())


# -- waiting for held money -------------------------------------------------------------------------------------------------


def test_a_call_waits_in_a_thread_until_held_money_comes_back(make, clock, llm):
    run = make(budgets=[Budget(usd=0.02)], wait_s=60).process_run
    ticket = run.open(llm(2))
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(run.open, llm(1))
        assert clock.wait_for_waiters()
        ticket.settle(Usage(output_tokens=1))
        later.result(timeout=10).release()


def test_a_call_that_waited_in_vain_is_refused_as_busy(make, clock, llm):
    run = make(budgets=[Budget(usd=0.02)], wait_s=60).process_run
    run.open(llm(2))
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(run.open, llm(1))
        assert clock.wait_for_waiters()
        clock.advance(60)
        with pytest.raises(BudgetBusy):
            later.result(timeout=10)


def test_being_busy_does_not_latch(make, llm):
    run = make(budgets=[Budget(usd=0.02)]).process_run
    ticket = run.open(llm(2))
    with pytest.raises(BudgetBusy):
        run.open(llm(1))
    ticket.release()
    run.open(llm(2)).release()


def test_a_busy_call_knows_what_is_held(make, llm):
    run = make(budgets=[Budget(usd=0.02)]).process_run
    run.open(llm(2))
    with pytest.raises(BudgetBusy) as caught:
        run.open(llm(1))
    error = caught.value
    assert (error.needed, error.spent, error.held, error.ceiling) == (0.01, 0, 0.02, 0.02)


def test_a_task_waits_until_held_money_comes_back(make, llm):
    run = make(budgets=[Budget(usd=0.02)], wait_s=60).process_run

    async def work():
        ticket = await run.aopen(llm(2))
        later = asyncio.create_task(run.aopen(llm(1)))
        await asyncio.sleep(0)
        ticket.release()
        (await asyncio.wait_for(later, 10)).release()

    asyncio.run(work())


def test_a_task_that_waited_in_vain_is_refused_as_busy(make, clock, llm):
    run = make(budgets=[Budget(usd=0.02)], wait_s=60).process_run

    async def work():
        await run.aopen(llm(2))
        later = asyncio.create_task(run.aopen(llm(1)))
        while not clock.waiting:  # noqa: ASYNC110 - the clock has no event for it
            await asyncio.sleep(0)
        clock.advance(60)
        await later

    with pytest.raises(BudgetBusy):
        asyncio.run(work())


def test_sync_code_on_an_event_loop_never_waits(make, llm):
    run = make(budgets=[Budget(usd=0.02)], wait_s=60).process_run

    async def work():
        run.open(llm(2))
        run.open(llm(1))

    with pytest.raises(BudgetBusy):
        asyncio.run(work())


def test_a_call_that_nobody_has_heard_of_again_is_charged_after_hold_s(make, clock, llm):
    watchdog = make(budgets=[Budget(usd=0.05)], hold_s=100)
    run = watchdog.process_run
    run.open(llm(4))
    clock.advance(99.9)
    watchdog.expire(clock.monotonic())
    assert run.summary().held_usd == 0.04
    clock.advance(0.1)
    watchdog.expire(clock.monotonic())
    assert (run.summary().held_usd, run.summary().total.cost_usd, run.summary().calls_charged_at_bound) == (0, 0.04, 1)


# -- the summary ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worked(make, clock, llm):
    """A run in which a little of everything happened."""
    watchdog = make(agent="research")
    with watchdog.run(budgets=[Budget(usd=0.10), Budget(tool="search", tool_calls=5)]) as run:
        run.run_id = "r1"
        run.open(llm(4, node="plan")).settle(Usage(input_tokens=1200, output_tokens=3))
        run.open(llm(1, tool="search")).settle(Usage(input_tokens=10, output_tokens=1))
        run.open(ToolCall(tool="search")).settle()
        run.open(llm(2)).charge()
        with pytest.raises(BudgetExceeded):
            run.open(llm(5))
        clock.advance(2.5)
    return run


def test_a_summary_is_typed_and_complete(worked):
    summary = worked.summary()
    assert isinstance(summary, RunSummary)
    assert (summary.agent, summary.run_id, summary.ended_at - summary.started_at) == ("research", "r1", 2.5)
    assert summary.total == Spend(calls=3, cost_usd=0.06, input_tokens=1210, output_tokens=4)
    assert summary.by_model == {"cent": summary.total}
    assert summary.by_node == {"plan": Spend(calls=1, cost_usd=0.03, input_tokens=1200, output_tokens=3)}
    assert summary.by_tool == {"search": Spend(calls=1, cost_usd=0.01, input_tokens=10, output_tokens=1)}
    assert (summary.tool_calls, summary.refusals, summary.calls_charged_at_bound, summary.unpriced_calls) == (1, 1, 1, 0)
    assert (summary.held_usd, summary.overshoot_usd, summary.clamped_calls) == (0, 0, 0)
    money = next(state for state in summary.budgets if state.unit == "usd")
    assert isinstance(money, BudgetState)
    assert (money.ceiling, money.spent, money.held, money.latched, money.overshoot) == (0.1, 0.06, 0, True, 0)


def test_a_run_prints_as_a_table(worked):
    assert str(worked) == snapshot("""\
run r1 of 'research', started 2026-01-01 00:00:00 UTC, ended after 2.5 s
  spent $0.06 in 3 model calls (1,210 tokens in, 4 out) and 1 tool calls
  refused 1, clamped 0, charged at their upper bound 1, without a price 0
  model  cent                             3 calls           $0.06      1,210 in         4 out
  node   plan                             1 calls           $0.03      1,200 in         3 out
  tool   search                           1 calls           $0.01         10 in         1 out
  budget '$0.1 per run' (usd): $0.06 of $0.10 spent, $0.00 held, stopped
  budget '5 tool_calls per run tool=search' (tool_calls): 1 of 5 spent, 0 held\
""")


def test_an_active_run_prints_as_active(make):
    with make().run() as run:
        run.run_id = "r1"
        assert str(run) == snapshot("""\
run r1 of 'agent', started 2026-01-01 00:00:00 UTC, active
  spent $0.00 in 0 model calls (0 tokens in, 0 out) and 0 tool calls
  refused 0, clamped 0, charged at their upper bound 0, without a price 0\
""")
        assert repr(run) == "<Run r1 active>"
    assert repr(run) == "<Run r1 ended>"


def test_a_budget_that_only_warns_tells_by_how_much_it_was_passed(make, spend):
    with make().run(budgets=[Budget(usd=0.01, on_exceed="warn")]) as run:
        spend(run, 3)
    assert (run.summary().overshoot_usd, run.summary().budgets[0].latched) == (0.02, False)
    assert "passed by $0.02" in str(run)


def test_models_without_a_price_are_counted_as_such(make, llm):
    with make(unknown_price="allow").run(budgets=[Budget(usd=1)]) as run:
        run.open(llm(model="nobody-knows")).settle(Usage(output_tokens=5))
    assert (run.summary().unpriced_calls, run.summary().total) == (1, Spend(calls=1, output_tokens=5))


def test_remaining_tells_what_the_tightest_budgets_leave(make, llm, spend):
    watchdog = make(budgets=[Budget(usd=1), Budget(llm_calls=5)])
    with watchdog.run(budgets=[Budget(usd=0.10), Budget(tokens=2000), Budget(usd=0.01, tool="search")]) as run:
        spend(run, 2)
        assert run.remaining() == Remaining(usd=0.08, tokens=1997, llm_calls=4)
        run.open(llm(3))
        assert run.remaining().usd == 0.05


def test_without_budgets_nothing_limits(make):
    assert make().process_run.remaining() == Remaining()


def test_nothing_remains_of_a_budget_that_stopped(make, llm):
    run = make(budgets=[Budget(usd=0.05)]).process_run
    run.open(llm(1))
    with pytest.raises(BudgetExceeded):
        run.open(llm(6))
    assert run.remaining().usd == 0.04
    run.log(llm(1), clevagent.Usage(output_tokens=1), 10**10)
    with pytest.raises(BudgetExceeded):
        run.open(llm(5))
    assert run.remaining().usd == 0


# -- topping up -------------------------------------------------------------------------------------------------------------


def test_topping_up_raises_the_ceiling_and_opens_the_latch(make, spend):
    with make().run(budgets=[Budget(usd=0.02)]) as run:
        spend(run, 2)
        with pytest.raises(BudgetExceeded):
            spend(run)
        run.top_up(usd=0.01)
        spend(run)
        assert run.summary().budgets[0].ceiling == 0.03


@pytest.mark.parametrize("unit", ["tokens", "llm_calls", "tool_calls"])
def test_every_other_limit_can_be_topped_up(make, unit):
    with make().run(budgets=[Budget(**{unit: 1})]) as run:
        run.top_up(**{unit: 2})
        assert getattr(run.remaining(), unit) == 3


def test_topping_up_means_the_runs_own_budget_before_those_around_it(make):
    watchdog = make()
    with watchdog.run(budgets=[Budget(usd=1)]) as outer, watchdog.run(budgets=[Budget(usd=0.5)]) as inner:
        inner.top_up(usd=0.25)
        assert (inner.remaining().usd, outer.remaining().usd) == (0.75, 1)


def test_topping_up_reaches_a_budget_around_the_run(make):
    with make(budgets=[Budget(usd=1, per="day")]).run() as run:
        run.top_up(usd=1)
        assert run.remaining().usd == 2


def test_topping_up_one_of_two_needs_its_name(make):
    budgets = [Budget(usd=1, name="a"), Budget(usd=2, per="day", name="b")]
    with make().run(budgets=budgets) as run:
        assert message_of(run.top_up, usd=1) == snapshot(
            "top_up(usd=...) cannot tell which ceiling to raise, so none was: the budgets with a limit in usd are 'a', 'b'. Say which with budget=..., or top up the run that has one."
        )
        run.top_up(usd=5, budget="a")
        assert run.remaining().usd == 2


@pytest.mark.parametrize(
    "amounts", [{}, {"usd": 0}, {"llm_calls": -1}, {"tokens": 1.5}, {"tokens": True}, {"usd": 1, "tokens": -1}]
)
def test_topping_up_by_nothing_is_refused(make, amounts):
    with make().run(budgets=[Budget(usd=1, tokens=5, llm_calls=5)]) as run:
        assert "cannot be added: counts are whole numbers" in message_of(run.top_up, **amounts)
        assert run.remaining() == Remaining(usd=1, tokens=5, llm_calls=5)


def test_topping_up_by_a_negative_amount_of_money_is_refused(make):
    with make().run(budgets=[Budget(usd=1)]) as run:
        assert "usd=-1 is negative" in message_of(run.top_up, usd=-1)


def test_topping_up_what_nobody_limits_is_refused(make):
    with make().run(budgets=[Budget(usd=1)]) as run:
        assert message_of(run.top_up, llm_calls=1) == snapshot(
            "top_up(llm_calls=...) found no budget with a limit in llm_calls, in this run or around it, so no ceiling was raised. Top up the run that has one, or give this one a Budget(llm_calls=...)."
        )


def test_a_mistake_in_one_amount_leaves_every_ceiling_as_it_was(make):
    with make().run(budgets=[Budget(usd=1)]) as run:
        message_of(run.top_up, usd=1, llm_calls=1)
        assert run.remaining().usd == 1


def test_topping_up_wakes_a_call_that_waits(make, clock, llm):
    run = make(budgets=[Budget(usd=0.02)], wait_s=60).process_run
    run.open(llm(2))
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(run.open, llm(1))
        assert clock.wait_for_waiters()
        run.top_up(usd=0.01)
        later.result(timeout=10).release()


# -- keeping something for the end ------------------------------------------------------------------------------------------


def test_what_is_kept_is_only_for_the_wrap_up(make, spend):
    with make().run(budgets=[Budget(usd=0.10, keep_usd=0.02)]) as run:
        spend(run, 8)
        with pytest.raises(BudgetExceeded, match=r"of which \$0\.02 is kept for wrap_up\(\)"):
            spend(run)
        with run.wrap_up():
            spend(run, 2)
            with pytest.raises(BudgetExceeded):
                spend(run)


def test_after_the_wrap_up_the_stop_stands_again(make, spend):
    with make().run(budgets=[Budget(usd=0.10, keep_usd=0.02)]) as run:
        spend(run)
        with pytest.raises(BudgetExceeded):
            spend(run, 8)
        with run.wrap_up():
            spend(run)
        with pytest.raises(BudgetExceeded):
            spend(run)


# -- dry runs ---------------------------------------------------------------------------------------------------------------


def test_a_dry_run_stops_nothing_and_tells_what_was_passed(make, heard, spend):
    watchdog = make(plugins=[heard])
    with watchdog.run(budgets=[Budget(usd=0.01)], dry_run=True) as run:
        spend(run, 5)
        spend(run, 5)
    watchdog.flush()
    assert (run.summary().total.cost_usd, run.summary().refusals) == (0.1, 0)
    assert "overshoot" in heard.kinds


def test_in_a_dry_run_the_stop_of_a_guard_is_told_as_one(make, heard, llm):
    class Stopper:
        @hookimpl
        def clevagent_before_call(self, run, call):
            return clevagent.Stop(incident=Incident(kind="loop", message="it goes round"))

    watchdog = make(plugins=[heard, Stopper()], dry_run=True)
    watchdog.process_run.open(llm()).release()
    watchdog.flush()
    assert [(told.kind, told.action) for told in heard.incidents] == [("loop", "dry_run")]


def test_in_a_dry_run_an_incident_of_a_budget_is_told_as_one(make, heard, spend):
    watchdog = make(plugins=[heard], dry_run=True, budgets=[Budget(usd=0.01)])
    spend(watchdog.process_run, 5)
    watchdog.flush()
    assert [told.action for told in heard.incidents if told.kind == "overshoot"] == ["dry_run"]


def test_a_run_in_a_dry_run_is_one_too(make, spend):
    watchdog = make()
    with watchdog.run(dry_run=True), watchdog.run(budgets=[Budget(usd=0.01)]) as inner:
        spend(inner, 5)


def test_a_dry_run_allows_models_without_a_price(make, llm):
    with make(dry_run=True).run(budgets=[Budget(usd=0.01)]) as run:
        run.open(llm(model="nobody-knows")).release()


# -- what happens at the ceiling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["warn", "alert_only"])
def test_warning_lets_the_call_go_and_tells_once(make, heard, spend, action):
    watchdog = make(plugins=[heard])
    with watchdog.run(budgets=[Budget(usd=0.02, on_exceed=action)]) as run:
        for _ in range(4):
            spend(run, 2)
    watchdog.flush()
    assert sorted(heard.kinds) == ["budget_warning", "overshoot"]


@pytest.mark.parametrize("action", ["raise", "stop"])
def test_raising_stops_the_call_and_every_later_one(make, spend, action):
    with make().run(budgets=[Budget(usd=0.02, on_exceed=action)]) as run:
        spend(run)
        with pytest.raises(BudgetExceeded):
            spend(run, 2)
        with pytest.raises(BudgetExceeded):
            spend(run, 1)


def test_a_refusal_knows_what_was_asked_for_and_what_is_left(make, spend):
    with make().run(budgets=[Budget(usd=0.02)]) as run:
        with pytest.raises(BudgetExceeded) as caught:
            spend(run, 3)
    error = caught.value
    assert (error.run_id, error.needed, error.spent, error.held, error.ceiling) == (run.run_id, 0.03, 0, 0, 0.02)


def test_a_refusal_is_told_once_for_each_latch(make, heard, spend):
    watchdog = make(plugins=[heard], budgets=[Budget(usd=0.02)])
    for _ in range(3):
        with pytest.raises(BudgetExceeded):
            spend(watchdog.process_run, 3)
    watchdog.process_run.top_up(usd=0.01)
    with pytest.raises(BudgetExceeded):
        spend(watchdog.process_run, 4)
    watchdog.flush()
    assert heard.kinds == ["budget", "budget"]


def test_the_share_of_a_ceiling_is_told_once_just_at_it(make, heard, spend):
    watchdog = make(plugins=[heard], budgets=[Budget(usd=0.10, warn_at=0.5)])
    spend(watchdog.process_run, 4)
    watchdog.flush()
    assert heard.kinds == []
    spend(watchdog.process_run, 1)
    spend(watchdog.process_run, 1)
    watchdog.flush()
    assert heard.kinds == ["budget_warning"]


def test_a_callable_that_tops_up_lets_the_call_pass(make, spend):
    asked = []

    def more(incident):
        asked.append(incident)
        run.top_up(usd=0.05)

    with make().run(budgets=[Budget(usd=0.02, on_exceed=more)]) as run:
        spend(run, 3)
    assert [(type(told), told.kind, told.needed) for told in asked] == [(Incident, "budget", 0.03)]


def test_a_callable_that_answers_warn_lets_the_call_go(make, spend):
    with make().run(budgets=[Budget(usd=0.02, on_exceed=lambda incident: "warn")]) as run:
        spend(run, 3)
    assert run.summary().total.cost_usd == 0.03


def test_a_callable_that_answers_anything_else_leaves_the_call_refused(make, spend):
    with make().run(budgets=[Budget(usd=0.02, on_exceed=lambda incident: True)]) as run, pytest.raises(BudgetExceeded):
        spend(run, 3)


def test_a_callable_that_raises_leaves_the_call_refused(make, spend):
    def fails(incident):
        raise OSError("no pager")

    with make().run(budgets=[Budget(usd=0.02, on_exceed=fails)]) as run, pytest.raises(BudgetExceeded) as caught:
        spend(run, 3)
    assert caught.value.incident.details == {"reason": "too_large", "error": "OSError('no pager')"}


def test_a_callable_that_lets_one_budget_go_does_not_let_go_of_another(make, spend):
    budgets = [Budget(usd=0.02, on_exceed=lambda incident: "warn", name="soft"), Budget(usd=0.04, name="hard")]
    with make().run(budgets=budgets) as run:
        spend(run, 3)
        with pytest.raises(BudgetExceeded) as caught:
            spend(run, 3)
    assert caught.value.budget == "hard"


# -- telling ----------------------------------------------------------------------------------------------------------------


class Slow:
    """Hears of incidents, on whatever thread, and blocks until it is let go."""

    def __init__(self):
        self.threads = []
        self.let_go = threading.Event()
        self.began = threading.Event()

    @hookimpl
    def clevagent_incident(self, incident):
        self.threads.append(threading.current_thread().name)
        self.began.set()
        assert self.let_go.wait(10)


def test_incidents_are_told_off_the_callers_thread_and_never_delay_it(make, spend):
    slow = Slow()
    watchdog = make(plugins=[slow], budgets=[Budget(usd=0.02)])
    with pytest.raises(BudgetExceeded):
        spend(watchdog.process_run, 3)
    assert slow.began.wait(10)
    slow.let_go.set()
    assert watchdog.flush() == 0
    assert slow.threads == ["clevagent-incidents"]


def test_flush_tells_how_many_are_left_when_its_time_is_over(clock):
    slow = Slow()
    watchdog = clevagent.Watchdog(plugins=[slow])
    for number in range(3):
        watchdog.tell(Incident(kind="odd", message=str(number)))
    assert slow.began.wait(10)
    left = watchdog.flush(0.01)
    slow.let_go.set()
    assert (left, watchdog.flush(10), len(slow.threads)) == (2, 0, 3)
    watchdog.shutdown()


def test_what_waits_is_bounded_and_the_oldest_goes_first(make):
    slow = Slow()
    told = []

    class Last:
        @hookimpl(trylast=True)
        def clevagent_incident(self, incident):
            told.append(incident.message)

    watchdog = make(plugins=[Last(), slow])
    watchdog.tell(Incident(kind="odd", message="first"))
    assert slow.began.wait(10)
    for number in range(1005):
        watchdog.tell(Incident(kind="odd", message=str(number)))
    slow.let_go.set()
    watchdog.flush()
    assert (told[:2], told[-1], len(told)) == (["first", "5"], "1004", 1001)


@pytest.mark.slow
def test_the_latest_incidents_can_be_looked_up(make):
    watchdog = make()
    for number in range(150):
        watchdog.tell(Incident(kind="odd", message=str(number)))
    assert [told.message for told in watchdog.recent] == [str(number) for number in range(50, 150)]


def test_incidents_stand_in_the_log(make, caplog):
    told = Incident(kind="odd", message="it looks odd")
    make().tell(told)
    assert [(record.message, record.clevagent_incident) for record in caplog.records] == [("it looks odd", told)]


def test_shutdown_tells_what_is_waiting(make, heard):
    watchdog = make(plugins=[heard])
    watchdog.tell(Incident(kind="odd", message="last words"))
    watchdog.shutdown()
    assert [told.message for told in heard.incidents] == ["last words"]


def test_a_step_reaches_observers(make, heard):
    step = Step(kind="node", name="plan")
    make(plugins=[heard]).process_run.step(step)
    assert heard.steps == [step]


def test_the_parts_of_a_run_can_be_used_by_hand(make, spend):
    watchdog = make()
    run = watchdog.start_run(budgets=[Budget(usd=0.02)], tags={"a": "b"})
    work = functools.partial(spend, run, 2)
    with run.activate():
        work()
    assert run.end().total.cost_usd == 0.02


def test_a_run_may_have_budgets_and_guards(make, llm):
    class Counter:
        seen = 0

        @hookimpl
        def clevagent_before_call(self, run, call):
            self.seen += 1

    counter = Counter()
    with make().run(budgets=[Budget(usd=1)], guards=[counter]) as run:
        run.open(llm()).release()
    assert counter.seen == 1
