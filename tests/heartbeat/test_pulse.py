"""When a heartbeat is made, and what it says."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from clevagent import Amounts, Beat, Budget, BudgetExceeded, Incident, LLMCall, Price, Step, ToolCall, Usage, Watchdog, hookimpl
from clevagent.testing import FakeClock
from clevagent.testing.receiver import mistake
from clevagent_core.money import PICO_PER_USD

CENT = PICO_PER_USD // 100


def ping(run, status="ok", **detail):
    run.step(Step(kind="ping", name=status, detail=detail))


def call(cents=1):
    return LLMCall(model="cent", input=["hello"], max_output_tokens=cents)


def spend(run, cents=1):
    run.open(call(cents)).settle(Usage(input_tokens=3, output_tokens=cents))


def use(run, tool="search"):
    run.open(ToolCall(tool=tool)).settle()


# -- when -------------------------------------------------------------------------------------------------------------------


def test_a_beat_is_made_every_interval_from_the_first_step_on(make, clock, listener):
    watchdog = make(interval=30)
    clock.advance(1000)
    assert listener.beats == []
    ping(watchdog.process_run)
    clock.advance(29.999)
    assert listener.beats == []
    clock.advance(0.001)
    assert [beat.seq for beat in listener.beats] == [1]
    clock.advance(300)
    assert [beat.seq for beat in listener.beats] == list(range(1, 12))
    assert {later.sent_at - sooner.sent_at for sooner, later in zip(listener.beats, listener.beats[1:], strict=False)} == {30.0}


def test_beats_go_on_while_nothing_moves_and_tell_for_how_long(make, clock, listener):
    watchdog = make(interval=30)
    ping(watchdog.process_run)
    clock.advance(90)
    assert [beat.progress_age_s for beat in listener.beats] == [30.0, 60.0, 90.0]
    assert [beat.status for beat in listener.beats] == ["ok"] * 3


def test_an_incident_is_told_within_a_second(make, clock, listener):
    watchdog = make(interval=30)
    ping(watchdog.process_run)
    watchdog.tell(Incident(kind="own", message="Look at this.", at=clock.wall()))
    watchdog.flush()
    clock.advance(1)
    (beat,) = listener.beats
    assert (beat.status, [incident["message"] for incident in beat.incidents]) == ("warning", ["Look at this."])
    clock.advance(30)
    assert (listener.beats[1].status, listener.beats[1].incidents) == ("ok", [])


def test_a_storm_of_incidents_is_one_beat_a_second_and_a_bounded_list(make, clock, listener):
    watchdog = make(interval=30)
    ping(watchdog.process_run)
    for number in range(250):
        watchdog.tell(Incident(kind="own", message=str(number)))
    watchdog.flush()
    clock.advance(1)
    (beat,) = listener.beats
    assert [incident["message"] for incident in beat.incidents] == [str(number) for number in range(150, 250)]


def test_another_status_is_told_within_a_second_and_the_same_one_waits(make, clock, listener):
    watchdog = make(interval=30)
    ping(watchdog.process_run)
    clock.advance(30)
    ping(watchdog.process_run, "error", message="no answer")
    clock.advance(1)
    ping(watchdog.process_run, "error", message="still none")
    clock.advance(1)
    assert [(beat.status, beat.message) for beat in listener.beats] == [("ok", ""), ("error", "no answer")]
    clock.advance(29)
    assert (listener.beats[-1].status, listener.beats[-1].message) == ("error", "still none")


def test_the_last_beat_tells_that_the_process_ends_as_it_should(make, clock, listener):
    watchdog = make()
    ping(watchdog.process_run)
    watchdog.shutdown()
    assert [(beat.seq, beat.kind, beat.status) for beat in listener.beats] == [(1, "shutdown", "shutdown")]
    clock.advance(300)
    assert len(listener.beats) == 1


def test_what_never_moved_makes_no_beat(make, clock, listener):
    make().shutdown()
    clock.advance(300)
    assert listener.beats == []


def test_an_observer_that_fails_stops_no_beat(make, clock, listener):
    class Broken:
        @hookimpl
        def clevagent_beat(self, beat: Beat) -> None:
            raise RuntimeError(f"cannot hear {beat.seq}")

    watchdog = make(plugins=[Broken()])
    ping(watchdog.process_run)
    clock.advance(60)
    assert [beat.seq for beat in listener.beats] == [1, 2]


def test_without_the_plugin_there_are_no_beats_and_all_else_works(make, clock, listener):
    watchdog = make(block=["clevagent_heartbeat.pulse"], budgets=[Budget(usd=0.02)])
    spend(watchdog.process_run, 2)
    with pytest.raises(BudgetExceeded):
        spend(watchdog.process_run)
    clock.advance(300)
    assert (listener.beats, watchdog.flush()) == ([], 0)


@pytest.mark.slow
def test_a_watchdog_that_nobody_names_any_more_takes_its_beats_along():
    watchdog = Watchdog()
    ping(watchdog.process_run)
    reference = weakref.ref(watchdog)
    del watchdog
    gc.collect()
    assert reference() is None


# -- what -------------------------------------------------------------------------------------------------------------------


def test_a_beat_tells_what_was_used_since_the_beat_before_and_since_the_start(make, clock, listener):
    watchdog = make(budgets=[Budget(usd=0.05)])
    with watchdog.run() as run:
        spend(run, 2)
        use(run)
        clock.advance(30)
        spend(run, 3)
        with pytest.raises(BudgetExceeded):
            spend(run, 1)
        watchdog.flush()
        clock.advance(30)
    first, *_, last = listener.beats
    assert (
        first.amounts
        == first.totals
        == Amounts(input_tokens=3, output_tokens=2, cost_pico=2 * CENT, llm_calls=1, tool_calls=1, steps=2)
    )
    assert sum((beat.amounts for beat in listener.beats), Amounts()) == last.totals
    assert last.totals == Amounts(
        input_tokens=6, output_tokens=5, cost_pico=5 * CENT, llm_calls=2, tool_calls=1, steps=3, refusals=1
    )


def test_the_wire_carries_the_published_names_and_ours(make, clock, listener):
    watchdog = make(agent="research")
    with watchdog.run() as run:
        spend(run, 2)
        ping(run, "step_complete", message="read 3 pages", iteration_count=3, memory_mb=512, page="front")
        clock.advance(30)
    (beat,) = listener.beats
    wire = replace(beat, boot_id="boot", run_id="run", host="host", pid=1).to_wire()
    assert json.loads(json.dumps(wire)) == wire
    assert wire == snapshot(
        {
            "agent": "research",
            "status": "step_complete",
            "message": "read 3 pages",
            "tokens_used": 5,
            "cost_usd": 0.02,
            "tool_calls": 0,
            "llm_calls": 1,
            "steps": 2,
            "loops": 0,
            "refusals": 0,
            "iteration_count": 3,
            "memory_mb": 512.0,
            "meta": {"page": "front"},
            "run_id": "run",
            "boot_id": "boot",
            "seq": 1,
            "sent_at": 1767225601.0,
            "kind": "liveness",
            "progress_age_s": 1.0,
            "interval_s": 30.0,
            "totals": {
                "tokens": 5,
                "input_tokens": 3,
                "output_tokens": 2,
                "cost_usd": 0.02,
                "llm_calls": 1,
                "tool_calls": 0,
                "steps": 2,
                "loops": 0,
                "refusals": 0,
            },
            "dropped": 0,
            "incidents": [],
            "host": "host",
            "pid": 1,
        }
    )


def test_of_several_pings_the_last_speaks_and_all_are_steps(make, clock, listener):
    watchdog = make()
    for number in range(5):
        ping(watchdog.process_run, "step_complete", message=f"page {number}", page=number)
    clock.advance(30)
    beat = listener.beats[-1]
    assert (beat.message, beat.meta, beat.totals.steps) == ("page 4", {"page": 4}, 5)


def test_what_a_ping_told_is_not_told_again(make, clock, listener):
    watchdog = make()
    ping(watchdog.process_run, "reading", message="page 1", page=1, iteration_count=7)
    clock.advance(60)
    last = listener.beats[-1]
    assert (last.status, last.message, last.meta) == ("ok", "", {})
    assert last.iteration_count == 7  # how far it is stays true


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"at": {1, 2}.__class__}, {"at": "<class 'set'>"}),
        ({"share": math.nan}, {"share": "NaN"}),
        ({"nested": {"deep": [1, "two", None]}}, {"nested": {"deep": [1, "two", None]}}),
        ({"long": "x" * 20_000}, {"long": "x" * 10_000}),
        ({"much": ["x" * 10] * 5000}, {"left_out": "it is 70010 characters long, and at most 10000 are sent"}),
    ],
)
def test_whatever_a_ping_tells_can_be_sent(make, clock, listener, given, told):
    watchdog = make()
    ping(watchdog.process_run, **given)
    clock.advance(30)
    assert listener.beats[-1].meta == told
    json.dumps(listener.beats[-1].to_wire(), allow_nan=False)


@pytest.mark.parametrize("status", ["", "x" * 300, 5])
@pytest.mark.parametrize("said", [{"memory_mb": -5}, {"memory_mb": 1e300}, {"memory_mb": "much"}, {"iteration_count": 2**70}])
def test_what_a_ping_should_not_say_is_cut_or_left_out_and_the_beat_is_taken(make, clock, listener, status, said):
    watchdog = make(agent="a" * 300)
    ping(watchdog.process_run, status, **said)
    clock.advance(30)
    assert mistake(listener.beats[-1].to_wire()) is None


def test_an_object_that_cannot_be_written_is_left_out(make, clock, listener):
    class Mute:
        def __str__(self):
            raise RuntimeError("no words")

    watchdog = make()
    ping(watchdog.process_run, thing=Mute())
    clock.advance(30)
    assert listener.beats[-1].meta == {"left_out": "it cannot be written as JSON: RuntimeError"}


def test_what_a_ping_told_does_not_change_after_it(make, clock, listener):
    watchdog = make()
    pages = ["one"]
    ping(watchdog.process_run, pages=pages)
    pages.append("two")
    clock.advance(30)
    assert listener.beats[-1].meta == {"pages": ["one"]}


def test_a_beat_tells_where_it_comes_from(make, clock, listener):
    watchdog = make(agent="research", interval=10)
    with watchdog.run() as run:
        ping(run)
        clock.advance(10)
    (beat,) = listener.beats
    assert (beat.agent, beat.run_id, beat.pid, beat.interval_s) == ("research", run.run_id, os.getpid(), 10)
    assert beat.memory_mb > 1
    assert beat.host


class Curious:
    """A guard that fails over what it was given."""

    fails_closed = False

    @hookimpl
    def clevagent_before_call(self, run, call):
        raise ValueError(f"cannot read {call.input}")


@pytest.mark.parametrize("capture", [(), ("exception_messages",)])
def test_what_an_exception_says_is_sent_only_where_that_was_asked_for(make, clock, listener, capture):
    watchdog = make(plugins=[Curious()], capture=capture)
    watchdog.process_run.open(LLMCall(model="cent", input=["a secret"], max_output_tokens=1)).settle(Usage())
    watchdog.flush()
    clock.advance(30)
    (incident,) = [incident for beat in listener.beats for incident in beat.incidents]
    assert "The guard Curious failed: ValueError" in incident["message"]
    assert ("a secret" in json.dumps([beat.to_wire() for beat in listener.beats])) == bool(capture)


def test_two_watchdogs_of_one_process_are_two_boots(make, clock, listener):
    for watchdog in (make(), make()):
        ping(watchdog.process_run)
    clock.advance(30)
    assert len({beat.boot_id for beat in listener.beats}) == 2


class Accounts:
    """What every beat said, added up."""

    def __init__(self) -> None:
        self.told = Amounts()
        self.last = Amounts()
        self.negative: list[Amounts] = []

    @hookimpl
    def clevagent_beat(self, beat: Beat) -> None:
        self.told += beat.amounts
        self.last = beat.totals
        if min(beat.amounts.cost_pico, beat.amounts.llm_calls, beat.amounts.output_tokens) < 0:
            self.negative.append(beat.amounts)


ACTIONS = st.one_of(
    st.tuples(st.just("settle"), st.integers(0, 9)),
    st.tuples(st.just("charge"), st.integers(0, 9)),
    st.tuples(st.just("correct"), st.integers(0, 9)),
    st.tuples(st.just("release"), st.integers(0, 9)),
    st.tuples(st.just("beat"), st.just(0)),
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_what_beats_tell_adds_up_to_every_cent(actions):
    """Whatever is settled, charged, or corrected after it was told: amounts are never negative, and nothing is told twice."""
    clock, accounts = FakeClock(), Accounts()
    watchdog = Watchdog(
        clock=clock,
        prices={"cent": Price(input=0, output=10_000, context_window=1000)},
        plugins=[accounts],
        budgets=[Budget(usd=100)],
    )
    charged = []
    spent = peak = 0
    with watchdog.run() as run:
        ping(run)
        for action, cents in actions:
            if action == "beat":
                clock.advance(30)
            elif action == "correct":
                if charged:
                    charged.pop().settle(Usage(output_tokens=cents))
                    spent += cents - 10
            else:
                ticket = run.open(call(10))
                if action == "settle":
                    ticket.settle(Usage(output_tokens=cents))
                    spent += cents
                elif action == "charge":
                    ticket.charge()
                    charged.append(ticket)
                    spent += 10
                else:
                    ticket.release()
            peak = max(peak, spent)
    watchdog.shutdown()
    assert accounts.negative == []
    assert accounts.last.cost_pico == spent * CENT
    assert spent * CENT <= accounts.told.cost_pico <= peak * CENT
