"""A call that is charged its upper bound, because nobody knows what it cost: with what, where no budget has worked that out."""

from __future__ import annotations

import pytest

from clevagent import Budget, LLMCall, Price, ToolCall, Usage, hookimpl

PRICES = {
    "m": Price(input=1, output=2, context_window=500),
    "windowless": Price(input=1, output=2),
    "free": Price(input=0, output=0),
}


def usd(run):
    return run.summary().total.cost_usd


@pytest.fixture
def watchdog(make):
    return make(prices=PRICES, assume_output_tokens=40, unknown_price="allow")


@pytest.mark.parametrize("budgets", [[], [Budget(usd=1, model="claude*")], [Budget(tool_calls=9)], [Budget(usd=1)]])
@pytest.mark.parametrize("end", ["charge", "fail", "settle"])
def test_it_is_recorded_with_the_same_whichever_budgets_cover_it(watchdog, budgets, end):
    with watchdog.run(budgets=budgets) as run:
        ticket = run.open(LLMCall(model="m", input=["hello"], max_output_tokens=100))
        if end == "fail":
            ticket.fail(TimeoutError(), sent=True)
        else:
            getattr(ticket, end)()
    assert 200e-6 + 5e-6 <= usd(run) <= 200e-6 + 50e-6
    assert run.summary().calls_charged_at_bound == 1
    assert watchdog.totals().cost_pico == round(usd(run) * 10**12)


@pytest.mark.parametrize(
    ("fields", "cost"),
    [
        ({"opaque": True, "max_output_tokens": 10}, 500e-6 + 20e-6),
        ({"opaque": True, "max_output_tokens": 10, "rounds": 3}, 1500e-6 + 20e-6),
        ({"opaque": True, "max_output_tokens": 10, "context_window": 100}, 100e-6 + 20e-6),
        ({"opaque": True, "answers": 2}, 500e-6 + 2 * 80e-6),
        ({"opaque": True, "max_output_tokens": 10, "model": "windowless"}, 20e-6),
        ({"max_output_tokens": 10, "model": "free"}, 0),
        ({"max_output_tokens": 10, "model": "nobody knows"}, 0),
    ],
)
def test_its_bound_counts_what_the_request_allows(watchdog, fields, cost):
    with watchdog.run() as run:
        run.open(LLMCall(**{"model": "m", "input": ["hello"], **fields})).charge()
    assert usd(run) == pytest.approx(cost)


def test_usage_that_comes_late_stands_in_its_place(watchdog):
    with watchdog.run() as outer, watchdog.run() as run:
        ticket = run.open(LLMCall(model="m", input=["hello"], max_output_tokens=100))
        ticket.charge()
        assert usd(run) == usd(outer) > 200e-6
        ticket.settle(Usage(input_tokens=5, output_tokens=5))
        assert usd(run) == usd(outer) == 15e-6


def test_observers_are_told_it(make):
    told = []

    class Listens:
        @hookimpl
        def clevagent_call_failed(self, run, call, outcome):
            told.append(outcome.cost_pico)

    watchdog = make(prices=PRICES, plugins=[Listens()])
    with watchdog.run() as run:
        run.open(LLMCall(model="m", input=["hello"], max_output_tokens=100)).charge()
        run.open(ToolCall(tool="t")).charge()
    assert told[0] >= 200_000_000
    assert told[1] is None
