"""Who is stopped by a refusal: the run that was refused, whoever swallows it, and nobody else. With both ledgers."""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import pickle
import threading
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevagent import Budget, BudgetBusy, BudgetExceeded, LLMCall, Price, ToolCall, Usage, Watchdog
from clevagent_core.verdicts import Incident

TIMEOUT_S = 30.0


@pytest.fixture(params=["memory", pytest.param("sqlite", marks=pytest.mark.slow)])
def watch(request, make, tmp_path):
    """Make watchdogs on the one ledger, or the other."""

    def watch(*budgets, **settings):
        ledger = "memory" if request.param == "memory" else f"sqlite:///{tmp_path / 'ledger.db'}"
        return make(budgets=budgets, ledger=ledger, **settings)

    return watch


def refusal(function, *args, **fields):
    """Why a call is refused; ``None`` where it is not."""
    try:
        function(*args, **fields)
    except BudgetExceeded as error:
        return error.reason
    return None


def tool():
    return ToolCall(tool="search", arguments={})


# -- one that is too large ----------------------------------------------------------------------------------------------------


def test_one_call_that_is_too_large_stops_nobody(watch, spend):
    """Not even the run that made it: a smaller one may go on."""
    watchdog = watch(Budget(usd=0.10, per="day", name="daily"))
    with watchdog.run() as run:
        assert refusal(spend, run, 11) == "too_large"
        assert refusal(spend, run, 3) is None
        assert not run.summary().budgets[0].latched
    with watchdog.run() as other:
        assert refusal(spend, other, 3) is None
    assert refusal(spend, watchdog.process_run, 3) is None


def test_an_image_counts_as_the_whole_window_and_stops_no_text(watch, spend, llm):
    """1 000 tokens of context: more than the ceiling."""
    with watch(Budget(tokens=900, per="day", name="daily")).run() as run:
        spend(run)
        assert refusal(run.open, llm(1, opaque=True)) == "too_large"
        spend(run)


def test_what_is_kept_for_the_wrap_up_does_not_make_a_call_fit(watch, spend):
    with watch().run(budgets=[Budget(usd=0.10, keep_usd=0.04)]) as run:
        assert refusal(spend, run, 7) == "too_large"
        with run.wrap_up():
            assert refusal(spend, run, 11) == "too_large"
            spend(run, 7)
        assert refusal(spend, run, 1) == "exhausted"


def test_where_nothing_is_left_every_call_finds_it_exhausted(watch, spend):
    """However large it is: one that is smaller would be refused, too."""
    with watch(Budget(usd=0.10, per="hour", name="hourly")).run() as run:
        spend(run, 10)
        assert refusal(spend, run, 11) == "exhausted"


def test_of_many_that_are_too_large_one_line_is_logged_and_one_more_when_the_ceiling_is_used_up(watch, spend, caplog):
    watchdog = watch(Budget(usd=0.10, per="day", name="daily", warn_at=1))
    with caplog.at_level(logging.WARNING, "clevagent"):
        for _ in range(500):
            with watchdog.run() as run:
                assert refusal(spend, run, 11) == "too_large"
        assert len(caplog.records) == 1
        spend(watchdog.process_run, 9)
        for _ in range(500):
            with watchdog.run() as run:
                assert refusal(spend, run, 2) == "exhausted"
        assert len(caplog.records) == 2
        watchdog.process_run.top_up(usd="0.005")
        assert refusal(spend, watchdog.process_run, 11) == "too_large"
        assert refusal(spend, watchdog.process_run, 2) == "exhausted"
    assert len(caplog.records) == 4


# -- the run that was refused -------------------------------------------------------------------------------------------------


def test_a_run_that_was_refused_goes_nowhere_whoever_swallows_that(watch, spend):
    watchdog = watch(Budget(usd=0.10, tool_calls=5, per="day", name="daily"))
    with watchdog.run() as run, watchdog.run() as inner:
        spend(inner, 8)
        assert refusal(spend, inner, 3) == "exhausted"
        assert [refusal(spend, each, 1) for each in (inner, run)] == ["latched", "latched"]
        assert refusal(inner.open, tool()) == "latched"  # it adds nothing in US dollars, and the budget covers it
    with watchdog.run() as other:
        spend(other, 1)


def test_a_call_that_adds_nothing_is_refused_too(watch, spend):
    with watch().run(budgets=[Budget(tool_calls=2, name="tools"), Budget(usd=9, name="money")]) as run:
        for _ in range(2):
            run.open(tool()).settle()
        assert refusal(run.open, tool()) == "exhausted"
        assert refusal(spend, run) == "latched"


def test_what_another_budget_covers_goes_on(watch, spend, llm):
    budgets = [Budget(llm_calls=1, model="even", name="even"), Budget(usd=1, name="all")]
    with watch().run(budgets=budgets) as run:
        run.open(llm(1, model="even")).settle(Usage(input_tokens=1, output_tokens=1))
        assert refusal(run.open, llm(1, model="even")) == "exhausted"
        spend(run)
        assert refusal(run.open, llm(1, model="even")) == "latched"


def test_one_tenants_run_stops_no_other_key(watch, spend):
    watchdog = watch(Budget(usd=0.10, per="day", by="tenant", name="tenants"))
    with watchdog.run(tags={"tenant": "a"}) as run:
        spend(run, 8)
        assert refusal(spend, run, 3) == "exhausted"
        with watchdog.run(tags={"tenant": "b"}) as inner:
            spend(inner, 3)
        assert refusal(spend, run) == "latched"


def test_the_next_window_is_another_account(watch, spend, clock):
    with watch(Budget(usd=0.10, per="hour", name="hourly")).run() as run:
        spend(run, 8)
        assert refusal(spend, run, 3) == "exhausted"
        assert refusal(spend, run, 1) == "latched"
        clock.advance(3600)
        spend(run, 3)


def test_outside_of_runs_only_a_ceiling_of_the_process_itself_latches(watch, spend):
    process = watch(Budget(usd=0.10, per="day", name="daily"), Budget(usd=0.20, name="own")).process_run
    spend(process, 8)
    assert [refusal(spend, process, 3), refusal(spend, process, 1)] == ["exhausted", None]
    process.top_up(usd=1, budget="daily")
    spend(process, 8)
    assert [refusal(spend, process, 4), refusal(spend, process, 1)] == ["exhausted", "latched"]


def test_busy_latches_nothing(watch, spend, llm):
    with watch(Budget(usd=0.10, per="day", name="daily")).run() as run:
        held = run.open(llm(8))
        with pytest.raises(BudgetBusy) as caught:
            spend(run, 3)
        assert (caught.value.reason, caught.value.retry_after_s) == ("busy", None)
        spend(run, 2)
        held.release()


def test_a_nested_run_that_was_refused_stays_so_when_it_is_over(watch, spend):
    """And the run around it keeps nothing of it."""
    watchdog = watch()
    with watchdog.run() as run:
        for _ in range(3):
            with watchdog.run(budgets=[Budget(usd=0.02)]) as inner:
                spend(inner)
                assert refusal(spend, inner, 2) == "exhausted"
            assert inner.summary().budgets[0].latched
        assert not run.latches


@pytest.mark.parametrize("refused", ["outer", "inner", "both"])
@pytest.mark.parametrize("over", ["before", "after"])
def test_what_goes_on_in_a_refused_run_that_is_over_stays_refused(watch, spend, over, refused):
    """A nested run, of which another thread or task is still a part: also a call for which there would be room."""
    watchdog = watch()
    with watchdog.run() as root:
        outer = watchdog.start_run(budgets=[Budget(usd=0.05)], parent=root)
        inner = watchdog.start_run(parent=outer)
        spend(inner, 2)
        if over == "before":
            outer.end()
        for run in {"outer": [outer], "inner": [inner], "both": [outer, inner]}[refused]:
            assert refusal(spend, run, 4) in {"exhausted", "latched"}
        outer.end()
        for run in (inner, outer):
            assert refusal(spend, run, 1) == "latched"
            assert run.summary().budgets[0].latched
        inner.end()
        assert outer.summary().budgets[0].latched
        spend(root)


def test_a_summary_says_what_has_stopped_the_run(watch, spend):
    watchdog = watch(Budget(usd=0.05, per="day", name="daily"))
    with watchdog.run() as refused:
        spend(refused, 4)
        assert refusal(spend, refused, 2) == "exhausted"
        assert refused.remaining().usd == 0
        assert str(refused).endswith("of $0.05 spent, $0.00 held, stopped")
    with watchdog.run() as other:
        spend(other)
        assert not other.summary().budgets[0].latched
        assert refusal(spend, other) == "exhausted"
        assert other.summary().budgets[0].latched


# -- attempts, wrap-ups, callables ----------------------------------------------------------------------------------------------


def test_a_clamped_call_that_still_fits_latches_nothing(watch, llm):
    with watch().run(budgets=[Budget(usd=0.10)]) as run:
        for most in (9, 8, 3):
            ticket = run.open(llm(most, clamp=True, min_output_tokens=1))
            ticket.settle(Usage(input_tokens=1, output_tokens=4))
        assert ticket.max_output_tokens == 2
        assert not run.latches


def test_a_clamped_call_that_does_not_fit_latches_at_its_floor(watch, llm):
    with watch().run(budgets=[Budget(usd=0.10)]) as run:
        run.open(llm(9)).settle(Usage(output_tokens=9))
        with pytest.raises(BudgetExceeded) as caught:
            run.open(llm(8, clamp=True, min_output_tokens=2))
        assert (caught.value.reason, caught.value.needed) == ("exhausted", 0.02)
        for clamp in (True, False):
            assert refusal(run.open, llm(1, clamp=clamp, min_output_tokens=1)) == "latched"
        assert refusal(run.open, llm(None, clamp=True, min_output_tokens=1)) == "latched"


def test_a_wrap_up_passes_the_latch_and_leaves_it_shut(watch, spend):
    with watch(Budget(usd=0.10, keep_usd=0.02, per="day", name="daily")).run() as run:
        spend(run, 7)
        assert refusal(spend, run, 2) == "exhausted"
        with run.wrap_up():
            spend(run, 2)
        assert refusal(spend, run, 1) == "latched"


def test_a_callable_that_tops_up_opens_the_latch(watch, spend):
    def more(incident):
        asked.append(incident.details["reason"])
        if len(asked) == 2:
            run.top_up(usd=0.10)

    asked = []
    with watch(Budget(usd=0.10, per="day", name="daily", on_exceed=more)).run() as run:
        spend(run, 8)
        assert refusal(spend, run, 3) == "exhausted"
        spend(run, 1)
    assert asked == ["exhausted", "latched"]


def test_a_top_up_voids_the_latches_of_every_run(watch, spend):
    watchdog = watch(Budget(usd=0.10, per="lifetime", name="all"))
    runs = [watchdog.start_run() for _ in range(3)]
    spend(runs[0], 9)
    assert [refusal(spend, run, 2) for run in runs] == ["exhausted"] * 3
    runs[1].top_up(usd=0.03)
    assert [refusal(spend, run, 1) for run in runs] == [None] * 3
    assert [refusal(spend, run, 2) for run in runs] == ["exhausted"] * 3
    assert [refusal(spend, run, 1) for run in runs] == ["latched"] * 3


def test_a_resumed_run_is_asked_anew(watch, spend):
    """The same id, here as a graph does it: what is left of its ceiling is still there."""
    watchdog = watch()
    budget = Budget(usd=0.10)
    for _ in range(2):
        run = watchdog.start_run(run_id="r", budgets=[budget], resumable=True)
        spend(run, 4)
        assert refusal(spend, run, 7) == "exhausted"
        assert refusal(spend, run, 1) == "latched"
        run.end()
    run = watchdog.start_run(run_id="r", budgets=[budget], resumable=True)
    spend(run, 2)
    assert refusal(spend, run, 1) == "exhausted"


def test_after_a_bill_past_the_ceiling_what_adds_to_it_is_refused(watch, heard, llm, spend):
    """The overshoot is told even where a refusal was told before."""
    watchdog = watch(Budget(usd=0.05, per="day", name="daily", warn_at=1), plugins=[heard])
    held = watchdog.process_run.open(llm(3))
    spend(watchdog.process_run, 1)
    assert refusal(spend, watchdog.process_run, 5) == "exhausted"
    held.settle(Usage(output_tokens=6))
    assert refusal(spend, watchdog.process_run, 1) == "exhausted"
    with watchdog.run() as run:
        run.open(tool()).settle()
    watchdog.flush()
    assert heard.kinds == ["budget", "budget_warning", "overshoot"]
    assert "calls that would add to it are refused" in heard.incidents[-1].message


def test_a_release_is_no_spending(watch, llm, heard):
    """A budget that only warns has passed the account it shares with one that refuses: giving back what the other held changes nothing."""
    watchdog = watch(plugins=[heard])
    strict, lenient = Budget(usd=0.05, per="day", name="b"), Budget(usd=0.05, per="day", name="b", on_exceed="warn")
    with watchdog.run(budgets=[strict]) as run:
        held = run.open(llm(1))
        lenient_run = watchdog.start_run(budgets=[lenient])
        lenient_run.open(llm(9)).settle(Usage(output_tokens=9))
        watchdog.flush()
        told = list(heard.kinds)
        held.release()
        watchdog.flush()
        assert heard.kinds == told
        assert not run.summary().budgets[0].latched
        run.top_up(usd=0.06)
        run.open(llm(2)).settle(Usage(output_tokens=2))


# -- when it starts from zero ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per", "ends"),
    [
        ("hour", datetime(2028, 2, 28, 23, tzinfo=UTC)),
        ("day", datetime(2028, 2, 29, tzinfo=UTC)),
        ("month", datetime(2028, 3, 1, tzinfo=UTC)),
        ("run", None),
        ("thread", None),
        ("lifetime", None),
    ],
)
def test_a_refusal_knows_when_its_budget_starts_from_zero(watch, clock, spend, per, ends):
    watchdog = watch(Budget(usd=0.10, per=per, name="b"))
    clock.set(datetime(2028, 2, 28, 22, 15, 30, tzinfo=UTC))
    with watchdog.run(tags={"thread_id": "t"}) as run:
        spend(run, 8)
        for reason in ("exhausted", "latched"):
            with pytest.raises(BudgetExceeded) as caught:
                spend(run, 3)
            error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
            assert error.reason == reason
            if ends is None:
                assert (error.resets_at, error.retry_after_s) == (None, None)
            else:
                assert error.resets_at == ends.timestamp()
                assert error.retry_after_s == ends.timestamp() - clock.wall()
            clock.advance(1)


def test_for_what_is_too_large_waiting_does_not_help(watch, spend):
    with pytest.raises(BudgetExceeded) as caught:
        spend(watch(Budget(usd=0.10, per="day", name="b")).process_run, 11)
    assert caught.value.resets_at is not None
    assert caught.value.retry_after_s is None


def test_the_run_of_a_resumable_graph_has_no_window_that_a_calendar_ends(watch, spend):
    run = watch().start_run(run_id="r", budgets=[Budget(usd=0.10)], resumable=True)
    spend(run, 10)
    with pytest.raises(BudgetExceeded) as caught:
        spend(run)
    assert caught.value.resets_at is None


def test_a_deadline_is_exhausted_time(watch, clock, spend):
    with watch().run(budgets=[Budget(seconds=5)]) as run:
        clock.advance(6)
        assert refusal(spend, run) == "exhausted"


def test_what_a_plugin_refuses_has_a_reason_too():
    assert BudgetExceeded(Incident(kind="budget", message="no")).reason == "exhausted"
    assert BudgetBusy(Incident(kind="busy", message="no")).reason == "busy"
    assert BudgetExceeded(Incident(kind="budget", message="no", details={"reason": "run_over"})).reason == "run_over"


# -- many at once ---------------------------------------------------------------------------------------------------------------


def test_of_many_runs_at_once_only_those_that_were_refused_are_stopped(watch, spend):
    """Whoever is refused stays so; what all of them spend is within the ceiling."""
    watchdog = watch(Budget(llm_calls=100, per="day", name="daily"))
    start, results = threading.Barrier(8), []

    def work(number):
        with watchdog.run() as run:
            start.wait(TIMEOUT_S)
            reasons = [refusal(spend, run) for _ in range(20)]
            results.append(reasons)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sum(reasons.count(None) for reasons in results) == 100
    for reasons in results:
        first = next((at for at, reason in enumerate(reasons) if reason is not None and reason != "busy"), len(reasons))
        assert set(reasons[first + 1 :]) <= {"latched"}


def test_tasks_share_the_latch_of_their_run(watch, llm):
    async def ask(run, cents):
        async with clevagent_call(run, llm(cents)) as reason:
            return reason

    async def main():
        with watch(Budget(usd=0.10, per="day", name="daily")).run() as run:
            first = await ask(run, 8)
            return [first, *await asyncio.gather(*(ask(run, cents) for cents in (3, 1, 1)))]

    class clevagent_call:  # noqa: N801 - reads as the public block does
        def __init__(self, run, call):
            self.run, self.call = run, call

        async def __aenter__(self):
            try:
                ticket = await self.run.aopen(self.call)
            except BudgetExceeded as error:
                return error.reason
            ticket.settle(Usage(output_tokens=self.call.max_output_tokens))
            return None

        async def __aexit__(self, *error):
            return None

    assert asyncio.run(main()) == [None, "exhausted", "latched", "latched"]


def _other_process(path, pipe):
    """Do in a process of its own what the test asks for."""
    watchdog = Watchdog(
        ledger=f"sqlite:///{path}",
        prices={"cent": Price(input=0, output=10_000, context_window=1000)},
        budgets=[Budget(usd="0.10", per="lifetime", name="shared")],
        wait_s=0,
        block=["clevagent_heartbeat.pulse"],
    )
    run = watchdog.start_run()
    while (order := pipe.recv()) is not None:
        what, cents = order
        if what == "top up":
            run.top_up(usd=cents / 100)
            pipe.send(None)
            continue
        call = LLMCall(model="cent", input=["hello"], max_output_tokens=cents)
        try:
            run.open(call).settle(Usage(output_tokens=cents))
        except BudgetExceeded as error:
            pipe.send(error.reason)
        else:
            pipe.send(None)
    watchdog.shutdown()


@pytest.mark.slow
def test_two_processes_stop_each_other_by_what_is_spent_only_and_a_top_up_of_one_is_seen_by_the_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(2):
        here, there = context.Pipe()
        processes.append(context.Process(target=_other_process, args=(tmp_path / "ledger.db", there)))
        processes[-1].start()
        pipes.append(here)

    def ask(number, what, cents):
        pipes[number].send((what, cents))
        assert pipes[number].poll(TIMEOUT_S)
        return pipes[number].recv()

    try:
        assert ask(0, "spend", 11) == "too_large"
        assert ask(1, "spend", 7) is None
        assert ask(0, "spend", 4) == "exhausted"
        assert ask(0, "spend", 1) == "latched"
        assert ask(1, "spend", 1) is None
        assert ask(1, "top up", 2) is None
        assert ask(0, "spend", 4) is None
        assert [ask(0, "spend", 1), ask(1, "spend", 1)] == ["exhausted", "exhausted"]
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(TIMEOUT_S)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


# -- close to a ceiling ---------------------------------------------------------------------------------------------------------


@given(
    ceiling=st.one_of(st.integers(1, 20), st.integers(1, 2**63 - 1)),
    share=st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([0.1, 0.3, 0.7, 0.8, 0.9, 1, 1e-9])),
)
def test_the_warning_mark_is_the_share_of_the_ceiling_rounded_up(ceiling, share):
    mark = Budget(llm_calls=1, warn_at=share).warn_mark(ceiling)
    exact = Decimal(str(share)).as_integer_ratio()
    assert (mark - 1) * exact[1] < ceiling * exact[0] <= mark * exact[1]
    assert 1 <= mark <= ceiling


@pytest.mark.parametrize(("ceiling", "warned_at"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (10, 8)])
def test_a_small_ceiling_is_close_only_when_so_much_of_it_is_used(watch, heard, ceiling, warned_at):
    watchdog = watch(plugins=[heard])
    with watchdog.run(budgets=[Budget(tool_calls=ceiling)]) as run:
        for number in range(1, ceiling + 1):
            run.open(tool()).settle()
            watchdog.flush()
            assert heard.kinds == ["budget_warning"] * (number >= warned_at)


# -- any order ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    ceiling=st.integers(1, 12),
    calls=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14), st.sampled_from(["spend", "spend", "top up"])), max_size=20),
)
def test_in_any_order_a_refused_run_stays_refused_and_no_other_is(ceiling, calls):
    """Beside a model: what is spent, and which runs were refused at which ceiling."""
    watchdog = Watchdog(
        prices={"cent": Price(input=0, output=10_000)},
        budgets=[Budget(usd=ceiling / 100, per="lifetime", name="b")],
        wait_s=0,
        block=["clevagent_heartbeat.pulse"],
    )
    runs = [watchdog.process_run, watchdog.start_run(), watchdog.start_run()]
    spent, refused = 0, dict.fromkeys(runs, math.inf)
    for index, cents, what in calls:
        run = runs[index]
        if what == "top up":
            run.top_up(usd=cents / 100)
            ceiling += cents
            continue
        expected = "latched" if ceiling <= refused[run] != math.inf else None
        if expected is None and spent + cents > ceiling:
            expected = "too_large" if spent < ceiling < cents else "exhausted"
            if expected == "exhausted" and run is not watchdog.process_run:
                refused[run] = ceiling
        call = LLMCall(model="cent", input=["hello"], max_output_tokens=cents)
        assert refusal(lambda run=run, call=call, cents=cents: run.open(call).settle(Usage(output_tokens=cents))) == expected
        spent += cents if expected is None else 0
    watchdog.shutdown()
