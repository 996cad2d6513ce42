"""What is asked for from outside: stop, pause, resume, and ceilings."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import pickle
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from clevagent import Budget, BudgetExceeded, LLMCall, RemoteStop, Usage
from clevagent.testing import FakeClock

STOP = {"id": "c1", "command": "stop", "by": "ana", "reason": "It writes to the wrong table."}
PAUSE = {"id": "c2", "command": "pause", "by": "ben", "reason": ""}
RESUME = {"id": "c3", "command": "resume", "by": "ana"}


@pytest.fixture
def reports():
    return []


@pytest.fixture
def ask(reports):
    """Have the monitor ask for something."""

    def ask(watchdog, *commands, **answer):
        watchdog.control.apply({"commands": list(commands), **answer}, lambda id_, result: reports.append((id_, result)))

    return ask


def call(cents=1):
    return LLMCall(model="cent", input=["hello"], max_output_tokens=cents)


def spend(run, cents=1):
    run.open(call(cents)).settle(Usage(output_tokens=cents))


# -- stop -------------------------------------------------------------------------------------------------------------------


def test_a_stop_takes_effect_at_the_next_call_and_names_who_and_why(make, ask, reports):
    watchdog = make(agent="research")
    with watchdog.run() as run:
        spend(run)
        ask(watchdog, STOP)
        with pytest.raises(RemoteStop) as caught:
            spend(run)
    assert (caught.value.by, caught.value.reason) == ("ana", "It writes to the wrong table.")
    assert str(caught.value) == snapshot(
        "This agent was stopped by ana: It writes to the wrong table. No call is sent until it is resumed on the monitor, or started anew."
    )
    assert pickle.loads(pickle.dumps(caught.value)).by == "ana"  # noqa: S301 - our own
    assert reports == [("c1", {"status": "done", "message": ""})]


def test_a_stop_holds_for_every_run_until_it_is_resumed(make, ask):
    watchdog = make()
    ask(watchdog, STOP)
    for _ in range(3):
        with watchdog.run() as run, pytest.raises(RemoteStop):
            spend(run)
    ask(watchdog, RESUME)
    with watchdog.run() as run:
        spend(run)
        assert run.summary().total.calls == 1


def test_a_stop_of_one_run_stops_it_and_those_nested_in_it(make, ask):
    watchdog = make()
    with watchdog.run() as run:
        ask(watchdog, {**STOP, "run_id": run.run_id})
        with watchdog.run() as nested, pytest.raises(RemoteStop):
            spend(nested)
        with pytest.raises(RemoteStop):
            run.check()
    with watchdog.run() as other:
        spend(other)
        other.check()


def test_a_stop_is_told_once_however_many_calls_it_refuses(make, ask, listener):
    watchdog = make()
    ask(watchdog, STOP)
    for _ in range(5):
        with pytest.raises(RemoteStop):
            spend(watchdog.process_run)
    watchdog.flush()
    assert [incident.kind for incident in listener.incidents] == ["remote"]
    assert watchdog.process_run.summary().refusals == 5


def test_a_command_that_is_repeated_is_carried_out_once_and_reported_again(make, ask, reports):
    watchdog = make()
    ask(watchdog, STOP)
    ask(watchdog, RESUME)
    ask(watchdog, STOP)  # its report was lost on the way
    spend(watchdog.process_run)
    assert [id_ for id_, _ in reports] == ["c1", "c3", "c1"]


def test_in_a_dry_run_a_stop_is_told_and_stops_nothing(make, ask):
    watchdog = make(dry_run=True)
    ask(watchdog, STOP)
    spend(watchdog.process_run)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "c9", "command": "explode"},
        {"id": "c9"},
        {"id": "c9", "command": "stop", "run_id": 5},
        {"id": "c9", "command": ["stop"]},
    ],
)
def test_what_is_not_understood_is_reported_and_changes_nothing(make, ask, reports, wrong):
    watchdog = make()
    ask(watchdog, wrong)
    spend(watchdog.process_run)
    assert [(id_, result["status"]) for id_, result in reports] == [("c9", "failed")]


@pytest.mark.parametrize(
    "answer", [{"commands": ["stop"]}, {"commands": [{"command": "stop"}]}, {"commands": 5}, {"budgets": 5}, {"budgets": [5]}, {}]
)
def test_an_answer_that_makes_no_sense_changes_nothing(make, reports, answer):
    watchdog = make()
    watchdog.control.apply(answer, lambda *report: reports.append(report))
    spend(watchdog.process_run)
    assert reports == []


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400), st.just([]), st.just({}),
    st.sampled_from(["run", "day", "stop", "pause", "1e999", "nan"]),
)  # fmt: skip
NAMES = st.sampled_from([field.name for field in dataclasses.fields(Budget)])
BASELINE = st.fixed_dictionaries({}, optional=dict.fromkeys(("median", "spread", "samples"), ODD))


@pytest.mark.slow
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "budgets": ODD | st.lists(ODD | st.dictionaries(NAMES, ODD, max_size=4), max_size=3),
            "baselines": ODD | st.fixed_dictionaries({}, optional={"run_cost": BASELINE | ODD, "beat_tokens": BASELINE}),
            "commands": ODD | st.lists(ODD | st.dictionaries(st.sampled_from(["id", "run_id", "by", "reason"]), ODD), max_size=3),
        },
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_answer_that_a_monitor_may_give_breaks_a_call(make, answer):
    watchdog = make(budgets=[Budget(usd=1, name="day", per="day")])
    watchdog.control.apply(answer, lambda *_: None)
    watchdog.pulse.beat()
    with watchdog.run() as run:
        try:
            spend(run)
        except BudgetExceeded as refused:
            assert "set by the monitor" in str(refused)
    watchdog.pulse.beat()


# -- pause ------------------------------------------------------------------------------------------------------------------


def test_a_paused_agent_waits_until_it_is_resumed(make, ask, clock):
    watchdog = make()
    ask(watchdog, PAUSE)
    worker = threading.Thread(target=spend, args=(watchdog.process_run,))
    worker.start()
    assert clock.wait_for_waiters(1)
    clock.advance(3600)
    assert worker.is_alive()
    ask(watchdog, RESUME)
    worker.join(10)
    assert watchdog.process_run.summary().total.calls == 1


def test_a_paused_agent_that_is_stopped_is_refused(make, ask, clock):
    watchdog = make()
    ask(watchdog, PAUSE)
    refused = []

    def work():
        with pytest.raises(RemoteStop) as caught:
            spend(watchdog.process_run)
        refused.append(caught.value.by)

    worker = threading.Thread(target=work)
    worker.start()
    assert clock.wait_for_waiters(1)
    ask(watchdog, STOP)
    worker.join(10)
    assert refused == ["ana"]


def test_what_waits_for_a_pause_to_end_is_refused_by_shutdown(make, ask, clock):
    watchdog = make()
    ask(watchdog, PAUSE)
    refused = []

    def work():
        with pytest.raises(RemoteStop):
            spend(watchdog.process_run)
        refused.append(True)

    worker = threading.Thread(target=work)
    worker.start()
    assert clock.wait_for_waiters(1)
    watchdog.shutdown()
    worker.join(10)
    assert refused == [True]


def test_a_paused_task_waits_without_blocking_its_loop(make, ask):
    watchdog = make(clock=FakeClock(auto_advance=False))

    async def main():
        ask(watchdog, PAUSE)
        waiting = asyncio.create_task(watchdog.process_run.aopen(call()))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        ask(watchdog, RESUME)
        (await waiting).settle(Usage(output_tokens=1))

    asyncio.run(main())
    assert watchdog.process_run.summary().total.calls == 1


def test_sync_code_in_an_event_loop_cannot_wait_and_is_refused(make, ask):
    watchdog = make()
    ask(watchdog, PAUSE)

    async def main():
        with pytest.raises(RemoteStop, match="paused by ben"):
            spend(watchdog.process_run)

    asyncio.run(main())


def test_a_call_that_waits_for_a_pause_to_end_is_not_stalled(make, ask, clock, listener):
    watchdog = make(stall_after=60)
    ask(watchdog, PAUSE)
    spent, go_on = threading.Event(), threading.Event()

    def work():
        with watchdog.run() as run:
            spend(run)
            spent.set()
            go_on.wait(30)

    worker = threading.Thread(target=work)
    worker.start()
    assert clock.wait_for_waiters(1)
    clock.advance(3600)
    ask(watchdog, RESUME)
    assert spent.wait(10)
    clock.advance(59)
    watchdog.flush()
    assert listener.of_kind("stall") == []
    clock.advance(2)
    watchdog.flush()
    assert len(listener.of_kind("stall")) == 1
    go_on.set()
    worker.join(10)


def test_a_run_that_calls_nothing_is_stalled_also_while_others_are_paused(make, ask, clock, listener):
    watchdog = make(stall_after=60)
    with watchdog.run() as run:
        ask(watchdog, {**PAUSE, "run_id": "another"})
        clock.advance(61)
        watchdog.flush()
        assert [incident.run_id for incident in listener.of_kind("stall")] == [run.run_id]


# -- ceilings ---------------------------------------------------------------------------------------------------------------


def limits(watchdog, *budgets):
    watchdog.control.apply({"budgets": list(budgets)}, lambda *_: None)


def test_a_ceiling_from_outside_holds_from_the_next_call_on(make):
    watchdog = make()
    with watchdog.run() as run:
        spend(run, 5)
        limits(watchdog, {"name": "page", "usd": 0.02, "per": "day"})
        spend(run, 2)
        with pytest.raises(BudgetExceeded, match="'page'"):
            spend(run, 1)


def test_a_ceiling_for_a_budget_of_the_code_counts_what_was_spent_before(make):
    watchdog = make(budgets=[Budget(usd=0.10, per="day", name="day")])
    spend(watchdog.process_run, 4)
    limits(watchdog, {"name": "day", "usd": 0.05})
    spend(watchdog.process_run, 1)
    with pytest.raises(BudgetExceeded) as caught:
        spend(watchdog.process_run, 1)
    assert (caught.value.spent, caught.value.ceiling) == (0.05, 0.05)


def test_calls_in_flight_count_against_a_ceiling_that_is_set_meanwhile(make):
    watchdog = make(budgets=[Budget(usd=0.10, per="day", name="day")])
    ticket = watchdog.process_run.open(call(4))
    limits(watchdog, {"name": "day", "usd": 0.05})
    with pytest.raises(BudgetExceeded):
        spend(watchdog.process_run, 2)
    ticket.settle(Usage(output_tokens=4))
    with pytest.raises(BudgetExceeded):
        spend(watchdog.process_run, 2)


def test_a_ceiling_from_outside_never_loosens_what_the_code_set(make):
    watchdog = make(budgets=[Budget(usd=0.02, per="day", name="day")])
    limits(watchdog, {"name": "day", "usd": 100})
    with pytest.raises(BudgetExceeded) as caught:
        spend(watchdog.process_run, 3)
    assert caught.value.ceiling == 0.02


def test_a_ceiling_that_is_taken_away_holds_no_more(make):
    watchdog = make()
    limits(watchdog, {"name": "page", "usd": 0.01, "per": "day"})
    spend(watchdog.process_run, 1)
    with pytest.raises(BudgetExceeded):
        spend(watchdog.process_run, 1)
    limits(watchdog)
    spend(watchdog.process_run, 1)


def test_what_cannot_be_a_ceiling_is_left_out_and_the_rest_holds(make, caplog):
    watchdog = make()
    with caplog.at_level(logging.WARNING, logger="clevagent"):
        limits(
            watchdog,
            {"name": "broken", "usd": -1},
            {"name": "page", "usd": 0.01, "per": "day"},
            {"name": "new", "usd": 1, "on_exceed": "warn"},
        )
    assert "'broken'" in caplog.text
    with pytest.raises(BudgetExceeded, match="'page'"):
        spend(watchdog.process_run, 2)
