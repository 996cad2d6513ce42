"""What a refusal says, word for word: each message is produced and read here, and other tests assert fields.

A change of wording changes this file. Mistakes in settings of one area are read in the test of that area.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, BudgetBusy, BudgetExceeded, ToolCall, UsageError
from clevagent_core.guards.loop import LoopGuard


def said(error, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def run_of(make):
    """Begin a run whose id is the same each time."""

    @contextmanager
    def run_of(*budgets):
        with make().run(budgets=budgets) as run:
            run.run_id = "r1"
            yield run

    return run_of


# -- a call is refused ------------------------------------------------------------------------------------------------------


def test_a_call_that_does_not_fit(run_of, spend):
    with run_of(Budget(usd=0.02)) as run:
        spend(run)
        assert said(BudgetExceeded, spend, run, 2) == snapshot(
            "A model call to 'cent' was refused before it was sent. It could cost up to $0.02, and the budget '$0.02 per run' (r1) has spent $0.01 of $0.02, and calls in flight hold $0.00. Everything this budget covers is refused for the rest of this run. To go on, raise the ceiling with run.top_up(...); print(run) tells where the money went."
        )


def test_a_call_that_fits_where_an_earlier_one_did_not(run_of, llm):
    with run_of(Budget(tool_calls=1)) as run:
        search = ToolCall(tool="search", arguments={})
        run.open(search).settle()
        said(BudgetExceeded, run.open, search)
        assert said(BudgetExceeded, run.open, llm()) == snapshot(
            "A model call to 'cent' was refused before it was sent. An earlier call of this run did not fit, which stopped the run, and the budget '1 tool_calls per run' (r1) has spent 1 tool call of 1 tool call, and calls in flight hold 0 tool calls. Everything this budget covers is refused for the rest of this run. To go on, raise the ceiling with run.top_up(...); print(run) tells where the money went."
        )


def test_a_call_that_is_larger_than_the_whole_ceiling(run_of, spend):
    with run_of(Budget(usd=0.02)) as run:
        assert said(BudgetExceeded, spend, run, 3) == snapshot(
            "A model call to 'cent' was refused before it was sent. It alone could cost up to $0.03. That is more than the whole ceiling of the budget '$0.02 per run' (r1): $0.02. Only this request is refused: nothing else is stopped by it. Send a smaller request, or a lower output limit; or give the budget a larger ceiling (run.top_up(...) raises it)."
        )


def test_an_image_that_is_larger_than_all_that_is_not_kept(run_of, llm):
    with run_of(Budget(usd=0.02, keep_usd=0.005, tokens=500)) as run:
        assert said(BudgetExceeded, run.open, llm(2)) == snapshot(
            "A model call to 'cent' was refused before it was sent. It alone could cost up to $0.02. That is more than the whole ceiling of the budget '$0.02 500 tokens per run' (r1): $0.02, of which $0.005 is kept for wrap_up(). Only this request is refused: nothing else is stopped by it. Send a smaller request, or a lower output limit; or give the budget a larger ceiling (run.top_up(...) raises it)."
        )
        assert said(BudgetExceeded, run.open, llm(1, opaque=True)) == snapshot(
            "A model call to 'cent' was refused before it was sent. It alone could cost up to 1,001 tokens (the tokens of an image, a file or a stored prompt are not known before, so the model's whole context window counts). That is more than the whole ceiling of the budget '$0.02 500 tokens per run' (r1): 500 tokens. Only this request is refused: nothing else is stopped by it. Send a smaller request, or a lower output limit; or give the budget a larger ceiling (run.top_up(...) raises it)."
        )


def test_a_call_outside_of_runs(make, spend):
    watchdog = make(budgets=[Budget(llm_calls=1, per="day", name="daily")])
    spend(watchdog.process_run)
    assert said(BudgetExceeded, spend, watchdog.process_run) == snapshot(
        "A model call to 'cent' was refused before it was sent. It could cost up to 1 llm call, and the budget 'daily' has spent 1 llm call of 1 llm call, and calls in flight hold 0 llm calls. What does not fit is refused; it starts from zero when this day is over (UTC). To go on, raise the ceiling with run.top_up(...); print(run) tells where the money went."
    )


def test_a_call_of_a_run_that_a_day_has_refused(make, spend):
    watchdog = make(budgets=[Budget(usd=0.03, per="day", by="tenant", name="daily")])
    with watchdog.run(tags={"tenant": "a"}) as run:
        spend(run, 2)
        assert said(BudgetExceeded, spend, run, 2) == snapshot(
            "A model call to 'cent' was refused before it was sent. It could cost up to $0.02, and the budget 'daily' (tenant=a, 2026-01-01) has spent $0.02 of $0.03, and calls in flight hold $0.00. Everything this budget covers is refused for the rest of this run; it starts from zero when this day is over (UTC). To go on, raise the ceiling with run.top_up(...); print(run) tells where the money went."
        )
        assert said(BudgetExceeded, spend, run, 1) == snapshot(
            "A model call to 'cent' was refused before it was sent. An earlier call of this run did not fit, which stopped the run; this one could cost up to $0.01, and the budget 'daily' (tenant=a, 2026-01-01) has spent $0.02 of $0.03, and calls in flight hold $0.00. Everything this budget covers is refused for the rest of this run; it starts from zero when this day is over (UTC). To go on, raise the ceiling with run.top_up(...); print(run) tells where the money went."
        )


def test_a_call_that_would_fit_if_less_were_held(run_of, llm):
    with run_of(Budget(usd=0.02)) as run:
        held = run.open(llm(2))
        assert said(BudgetBusy, run.open, llm(1)) == snapshot(
            "A model call to 'cent' was refused before it was sent. It could cost up to $0.01, and the budget '$0.02 per run' (r1) has spent $0.00 of $0.02, and calls in flight hold $0.02. The room is only held: the same call may fit once those are settled. Try again later, make fewer calls at once, or let calls wait longer (wait_s is 0 s; on an event loop only guard(model) and `async with` blocks wait)."
        )
        held.release()


def test_a_call_after_the_deadline(run_of, clock, spend):
    with run_of(Budget(seconds=600, name="ten minutes")) as run:
        clock.advance(612.5)
        assert said(BudgetExceeded, spend, run) == snapshot(
            "The deadline of the budget 'ten minutes' has passed: its run began 612.5 s ago, and 600 s were given. A model call to 'cent' was refused before it was sent, and so is every later one of this run. Begin another run (with clevagent.run()), or give more time with a larger seconds=."
        )


# -- an action that there is not --------------------------------------------------------------------------------------------


def test_an_action_at_a_ceiling():
    assert said(UsageError, Budget, usd=1, on_exceed="explode") == snapshot(
        "Budget(on_exceed='explode') is no action, so nothing would happen at the ceiling. Use 'raise', 'warn', or a callable that gets the incident; for a graph also 'halt' or 'ask', for a crew 'halt'."
    )
    assert said(UsageError, clevagent.guard, object(), on_exceed="explode") == snapshot(
        "guard(obj, on_exceed='explode') is no action, so nothing would happen at the ceiling. Use 'raise', 'warn', or a callable that gets the incident; for a graph also 'halt' or 'ask', for a crew 'halt'."
    )


def test_an_action_at_a_loop(make):
    assert said(UsageError, make, on_loop="explode") == snapshot(
        "on_loop='explode' is no action, so nothing would happen when a run repeats itself. Use 'warn', 'raise', or a callable that gets the incident."
    )
    assert said(UsageError, LoopGuard, on_loop=None) == snapshot(
        "LoopGuard(on_loop=None) is no action, so nothing would happen when a run repeats itself. Use 'warn', 'raise', or a callable that gets the incident."
    )
