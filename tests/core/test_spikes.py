"""What is usual for an agent, what is far above it, and a ceiling by it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from clevagent import Budget, BudgetExceeded, LLMCall, Price, Step, Usage, UsageError, Watchdog
from clevagent.testing import FakeClock
from clevagent_core.baselines import Baseline, baseline_of
from clevagent_core.money import PICO_PER_USD

CENT = PICO_PER_USD // 100


@pytest.fixture
def live(spend):
    """Let an agent have had runs of so many cents."""

    def live(watchdog, *cents):
        for cost in cents:
            with watchdog.run() as run:
                for _ in range(cost):
                    spend(run)

    return live


def spikes(watchdog, heard):
    watchdog.flush()
    return [incident for incident in heard.incidents if incident.kind == "spike"]


# -- the baseline -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5] * 9, None),
        ([5] * 10, Baseline(5.0, 0.0, 10)),
        ([*range(1, 12)], Baseline(6.0, 1.4826 * 3, 11)),
        ([1] * 10 + [10_000], Baseline(1.0, 0.0, 11)),
    ],
)
def test_a_baseline_is_the_median_and_the_median_distance_from_it(values, expected):
    assert baseline_of(values) == expected


@pytest.mark.parametrize(
    ("baseline", "limit"), [(Baseline(100, 0, 10), 500), (Baseline(100, 200, 10), 1100), (Baseline(1, 0, 10), 50)]
)
def test_a_limit_is_a_multiple_or_far_outside_the_spread_or_the_floor(baseline, limit):
    assert baseline.limit(5, 50) == limit


# -- told -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cents", "told"), [(10, False), (11, True)])
def test_a_run_that_costs_over_five_times_the_usual_is_told_once(make, heard, live, cents, told):
    watchdog = make(plugins=[heard])
    live(watchdog, *[2] * 10, cents)
    found = spikes(watchdog, heard)
    assert len(found) == told
    if told:
        assert found[0].message == snapshot(
            "The run has cost $0.11, and $0.02 is usual (median of 10 runs). That is more than 5 times as much. Nothing was stopped; Budget(baseline_multiple=5) stops it."
        )
        assert (found[0].details["value"], found[0].details["limit"]) == (11 * CENT, 10 * CENT)


def test_a_run_that_goes_on_is_told_with_the_next_beat(make, clock, heard, live, spend):
    watchdog = make(plugins=[heard])
    live(watchdog, *[2] * 10)
    with watchdog.run() as run:
        for _ in range(20):
            spend(run)
        clock.advance(30)
        assert [incident.run_id for incident in spikes(watchdog, heard)] == [run.run_id]
    assert len(spikes(watchdog, heard)) == 1


def test_nothing_is_a_spike_while_the_agent_is_new(make, heard, live):
    watchdog = make(plugins=[heard])
    live(watchdog, *[1] * 9, 50)
    assert spikes(watchdog, heard) == []


def test_small_amounts_are_no_spike(make, heard, live):
    watchdog = make(plugins=[heard])
    live(watchdog, *[0] * 3, *[1] * 12, 5)
    assert spikes(watchdog, heard) == []


def test_what_differs_widely_is_no_spike(make, heard, live):
    watchdog = make(plugins=[heard])
    for cents in [1, 20] * 10:
        watchdog.baselines.remember("run_cost", cents * CENT)
    live(watchdog, 60)
    assert spikes(watchdog, heard) == []


def test_a_beat_with_many_tokens_is_told(make, clock, heard, llm):
    watchdog = make(plugins=[heard])
    for tokens in [3_000] * 10 + [15_000, 15_001]:
        watchdog.process_run.open(llm(1)).settle(Usage(input_tokens=tokens))
        clock.advance(30)
    found = spikes(watchdog, heard)
    assert [incident.details["value"] for incident in found] == [15_001]
    assert "15,001 tokens were used within 30 s, and 3,000 are usual" in found[0].message


def test_a_ledger_in_a_file_remembers_what_is_usual(make, heard, live, tmp_path):
    ledger = str(tmp_path / "ledger.db")
    live(make(ledger=ledger, agent="research"), *[2] * 10)
    again = make(ledger=ledger, agent="research", plugins=[heard])
    live(again, 11)
    assert len(spikes(again, heard)) == 1
    live(make(ledger=ledger, agent="another", plugins=[heard]), 11)
    assert len(spikes(again, heard)) == 1


@pytest.mark.parametrize("ledger", ["memory", "file"])
def test_the_last_hundred_runs_are_what_is_usual(make, tmp_path, ledger):
    watchdog = make(ledger="memory" if ledger == "memory" else str(tmp_path / "ledger.db"))
    for value in range(250):
        watchdog.ledger.remember("run_cost", value, 0.0)
    watchdog.ledger.remember("beat_tokens", 7, 0.0)
    assert watchdog.ledger.samples("run_cost") == list(range(150, 250))
    assert watchdog.ledger.samples("beat_tokens") == [7]


def test_what_the_monitor_says_is_usual_counts_while_the_agent_is_new(make, heard, live):
    watchdog = make(plugins=[heard])
    watchdog.control.apply({"baselines": {"run_cost": {"median": 2 * CENT, "spread": 0, "samples": 40}}}, lambda *_: None)
    live(watchdog, 11)
    assert len(spikes(watchdog, heard)) == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        5,
        {},
        {"run_cost": 5},
        {"run_cost": {"median": "x", "spread": 0, "samples": 40}},
        {"run_cost": {"median": -1, "spread": 0, "samples": 40}},
        {"run_cost": {"median": math.inf, "spread": 0, "samples": 40}},
        {"run_cost": {"median": math.nan, "spread": 0, "samples": 40}},
        {"run_cost": {"median": 1e300, "spread": 0, "samples": 40}},
        {"run_cost": {"median": 10**400, "spread": 0, "samples": 40}},
        {"run_cost": {"median": 1, "spread": 0, "samples": math.inf}},
    ],
)
def test_nonsense_of_the_monitor_changes_nothing(make, nonsense):
    watchdog = make()
    watchdog.control.apply({"baselines": nonsense}, lambda *_: None)
    assert watchdog.baselines.of("run_cost") is None


# -- the ceiling ------------------------------------------------------------------------------------------------------------


def test_a_ceiling_by_the_baseline_refuses_what_would_pass_it(make, live, spend):
    watchdog = make()
    live(watchdog, *[2] * 10)
    with watchdog.run(budgets=[Budget(baseline_multiple=5)]) as run:
        for _ in range(10):
            spend(run)
        with pytest.raises(BudgetExceeded) as caught:
            spend(run)
    assert (caught.value.spent, caught.value.ceiling, caught.value.budget) == (0.10, 0.10, "5 x baseline per run")


def test_while_the_agent_is_new_there_is_no_ceiling_and_that_is_told_once(make, heard, spend):
    watchdog = make(plugins=[heard], budgets=[Budget(baseline_multiple=5)])
    for _ in range(3):
        with watchdog.run() as run:
            spend(run, 50)
    watchdog.flush()
    assert [incident.kind for incident in heard.incidents] == ["baseline"]
    assert "from the tenth on" in heard.incidents[0].message


def test_a_ceiling_by_the_baseline_stays_what_it_was_when_the_run_began_to_spend(make, live, spend):
    watchdog = make()
    live(watchdog, *[2] * 10)
    with watchdog.run(budgets=[Budget(baseline_multiple=5)]) as run:
        spend(run)
        for _ in range(40):
            watchdog.baselines.remember("run_cost", 50 * CENT)
        for _ in range(9):
            spend(run)
        with pytest.raises(BudgetExceeded):
            spend(run)


def test_a_ceiling_by_the_baseline_can_be_topped_up(make, live, spend):
    watchdog = make()
    live(watchdog, *[2] * 10)
    with watchdog.run(budgets=[Budget(baseline_multiple=5)]) as run:
        for _ in range(10):
            spend(run)
        run.top_up(usd=0.02)
        spend(run, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"baseline_multiple": 1},
        {"baseline_multiple": "5"},
        {"baseline_multiple": True},
        {"baseline_multiple": float("inf")},
        {"baseline_multiple": 5, "per": "day"},
        {"baseline_multiple": 5, "usd": 1},
        {"baseline_multiple": 5, "by": "tenant"},
    ],
)
def test_what_is_no_ceiling_is_refused(wrong):
    with pytest.raises(UsageError, match="baseline_multiple"):
        Budget(**wrong)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    history=st.lists(st.integers(0, 30), min_size=10, max_size=20),
    calls=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=60),
)
def test_no_run_is_billed_more_than_its_ceiling_by_the_baseline(history, calls):
    """Whatever the agent's past, and whatever its calls cost within their bounds."""
    watchdog = Watchdog(clock=FakeClock(), wait_s=0, prices={"cent": Price(input=0, output=10_000, context_window=1000)})
    for cents in history:
        watchdog.ledger.remember("run_cost", cents * CENT, 0.0)
    usual = baseline_of([cents * CENT for cents in history])
    billed = 0
    with watchdog.run(budgets=[Budget(baseline_multiple=3)]) as run:
        for bound, cost in calls:
            try:
                ticket = run.open(LLMCall(model="cent", input=["x"], max_output_tokens=bound))
            except BudgetExceeded:
                continue
            ticket.settle(Usage(output_tokens=min(bound, cost)))
            billed += min(bound, cost) * CENT
        run.step(Step(kind="ping", name="ok"))
    assert billed <= usual.limit(3, PICO_PER_USD // 20)
    watchdog.shutdown()
