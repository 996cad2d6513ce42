"""Deadlines: after so many seconds no call of a run is sent."""

from __future__ import annotations

import contextlib
import pickle
import threading

import pytest

from clevagent import Budget, BudgetExceeded, UsageError


@pytest.mark.parametrize(("after", "passes"), [(599.9, True), (600, False), (600.1, False)])
def test_no_call_is_sent_after_the_deadline(make, clock, spend, after, passes):
    watchdog = make()
    with watchdog.run(budgets=[Budget(seconds=600)]) as run:
        spend(run)
        clock.advance(after)
        if passes:
            spend(run)
        else:
            with pytest.raises(BudgetExceeded):
                spend(run)


def test_the_refusal_knows_what_was_given_and_what_has_passed(make, clock, spend):
    watchdog = make()
    with watchdog.run(budgets=[Budget(seconds=600, name="ten minutes")]) as run:
        clock.advance(612.5)
        with pytest.raises(BudgetExceeded) as caught:
            spend(run)
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (error.budget, error.incident.unit, error.spent, error.ceiling) == ("ten minutes", "seconds", 612.5, 600.0)


def test_a_deadline_holds_for_tools_and_nested_runs_too(make, clock, spend):
    from clevagent import ToolCall

    watchdog = make()
    with watchdog.run(budgets=[Budget(seconds=60)]) as run:
        clock.advance(50)
        with watchdog.run() as nested:
            spend(nested)
            clock.advance(10)
            with pytest.raises(BudgetExceeded):
                spend(nested)
            with pytest.raises(BudgetExceeded):
                nested.open(ToolCall(tool="search"))
        assert run.summary().refusals == 2


def test_a_deadline_of_a_nested_run_is_its_own(make, clock, spend):
    watchdog = make()
    with watchdog.run() as run:
        clock.advance(100)
        with watchdog.run(budgets=[Budget(seconds=60)]) as nested:
            clock.advance(59)
            spend(nested)
            clock.advance(1)
            with pytest.raises(BudgetExceeded):
                spend(nested)
        spend(run)


def test_a_deadline_of_the_watchdog_is_one_for_each_run(make, clock, spend):
    watchdog = make(budgets=[Budget(seconds=60)])
    for _ in range(3):
        with watchdog.run() as run:
            clock.advance(59)
            spend(run)


def test_a_deadline_stands_beside_other_limits(make, clock, spend):
    watchdog = make()
    with watchdog.run(budgets=[Budget(usd=0.02, seconds=60)]) as run:
        spend(run, 2)
        with pytest.raises(BudgetExceeded, match=r"\$0.02"):
            spend(run)
    with watchdog.run(budgets=[Budget(usd=0.02, seconds=60)]) as run:
        clock.advance(60)
        with pytest.raises(BudgetExceeded, match="deadline"):
            spend(run)


def test_a_deadline_for_a_tool_leaves_the_rest_alone(make, clock, spend):
    from clevagent import ToolCall

    watchdog = make()
    with watchdog.run(budgets=[Budget(seconds=60, tool="crawl")]) as run:
        clock.advance(61)
        spend(run)
        with pytest.raises(BudgetExceeded):
            run.open(ToolCall(tool="crawl"))


def test_a_deadline_is_told_close_and_passed_and_each_once(make, clock, spend, heard):
    watchdog = make(plugins=[heard])
    with watchdog.run(budgets=[Budget(seconds=100)]) as run:
        for _ in range(12):
            clock.advance(10)
            with contextlib.suppress(BudgetExceeded):
                spend(run)
    watchdog.flush()
    assert heard.kinds == ["budget_warning", "budget"]


def test_a_deadline_that_passes_while_nothing_is_called_is_told_by_itself(make, clock, spend, heard):
    watchdog = make(plugins=[heard])
    with watchdog.run(budgets=[Budget(seconds=100)]) as run:
        clock.advance(99)
        watchdog.flush()
        assert heard.kinds == []
        clock.advance(1)
        watchdog.flush()
        assert heard.kinds == ["budget"]
        assert "It has not come to its end, and the next call that it makes is refused" in heard.incidents[0].message
        with pytest.raises(BudgetExceeded):
            spend(run)
    watchdog.flush()
    assert heard.kinds == ["budget"]


def test_a_deadline_that_only_warns_stops_nothing(make, clock, spend, heard):
    watchdog = make(plugins=[heard])
    with watchdog.run(budgets=[Budget(seconds=10, on_exceed="warn", warn_at=1)]) as run:
        clock.advance(20)
        spend(run)
        spend(run)
    watchdog.flush()
    assert [(incident.kind, incident.action) for incident in heard.incidents] == [("budget", "warn")]


def test_a_dry_run_stops_nothing(make, clock, spend):
    watchdog = make(dry_run=True)
    with watchdog.run(budgets=[Budget(seconds=10)]) as run:
        clock.advance(20)
        spend(run)


@pytest.mark.parametrize(("answer", "passes"), [("warn", True), (None, False)])
def test_a_callable_is_asked_once(make, clock, spend, answer, passes):
    asked = []

    def on_exceed(incident):
        asked.append(incident.unit)
        return answer

    watchdog = make()
    with watchdog.run(budgets=[Budget(seconds=10, on_exceed=on_exceed)]) as run:
        clock.advance(20)
        for _ in range(3):
            if passes:
                spend(run)
            else:
                with pytest.raises(BudgetExceeded):
                    spend(run)
    assert asked == ["seconds"]


def test_a_deadline_holds_in_every_thread(make, clock, spend):
    watchdog = make()
    refused = []
    with watchdog.run(budgets=[Budget(seconds=10)]) as run:
        clock.advance(10)

        def work():
            try:
                spend(run)
            except BudgetExceeded:
                refused.append(True)

        threads = [threading.Thread(target=work) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(refused) == 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 0},
        {"seconds": -1},
        {"seconds": "60"},
        {"seconds": True},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": 60, "per": "day"},
    ],
)
def test_what_is_no_deadline_is_refused(wrong):
    with pytest.raises(UsageError, match="seconds"):
        Budget(**wrong)
