"""The framework-free door: ``llm_call``, ``tool_call``, and what is recorded without being asked for."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, BudgetBusy, BudgetExceeded, Price, Spend, Usage, UsageError

PRICES = {"cent": Price(input=0, output=10_000, context_window=1000), "even": Price(input=1, output=1)}
"""``cent``: input is free, each output token costs one cent. ``even``: a dollar for a million tokens."""


@pytest.fixture
def init():
    """Start the process's watchdog with prices that are easy to reckon with; no call waits."""

    def init(**settings):
        return clevagent.init(**{"prices": PRICES, "wait_s": 0, **settings})

    return init


def message_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def call(cents=1, *, model="cent", **fields):
    return clevagent.llm_call(**{"model": model, "input": "hello", "max_output_tokens": cents, **fields})


def make(cents=1, **fields):
    """Make a call that costs as much as it may."""
    with call(cents, **fields) as opened:
        opened.settle(input_tokens=1, output_tokens=cents)


def spent(run):
    return run.summary().total.cost_usd


# -- model calls ------------------------------------------------------------------------------------------------------------


def test_a_call_is_refused_before_its_body_runs(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.02)]) as run, pytest.raises(BudgetExceeded), call(3):
        pytest.fail("the request went out")
    assert run.summary().refusals == 1


def test_an_async_call_is_refused_before_its_body_runs(init):
    init()

    async def work():
        async with clevagent.run(budgets=[Budget(usd=0.02)]), call(3):
            pytest.fail("the request went out")

    with pytest.raises(BudgetExceeded):
        asyncio.run(work())


def test_a_call_that_fits_exactly_passes(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.02)]) as run:
        make(2)
    assert spent(run) == 0.02


def test_settling_charges_what_was_used(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run, call(50) as opened:
        opened.settle(input_tokens=10, output_tokens=3)
    assert run.summary().total == Spend(calls=1, cost_usd=0.03, input_tokens=10, output_tokens=3)


def test_an_async_call_settles(init):
    init()

    async def work():
        async with clevagent.run(budgets=[Budget(usd=1)]) as run, call(50) as opened:
            opened.settle(input_tokens=10, output_tokens=3)
        return run

    assert spent(asyncio.run(work())) == 0.03


def test_only_the_first_settlement_counts(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run, call(50) as opened:
        opened.settle(input_tokens=10, output_tokens=3)
        opened.settle(input_tokens=10, output_tokens=40)
        opened.release()
    assert spent(run) == 0.03


def test_what_is_in_flight_is_held(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run, call(50) as opened:
        assert (run.remaining().usd, run.summary().held_usd) == (0.5, 0.5)
        opened.release()


def test_releasing_gives_everything_back(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        with call(50) as opened:
            opened.release()
        assert (run.remaining().usd, run.summary().total.calls) == (1, 0)


def test_leaving_without_a_word_charges_the_upper_bound(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run, call(50):
        pass
    assert (spent(run), run.summary().calls_charged_at_bound) == (0.5, 1)


def test_an_exception_in_the_body_charges_the_upper_bound_and_goes_on(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run, pytest.raises(TimeoutError), call(50):
        raise TimeoutError
    assert (spent(run), run.summary().calls_charged_at_bound) == (0.5, 1)


def test_a_cancelled_task_charges_the_upper_bound(init):
    init()

    async def work(run):
        with run.activate():
            async with call(50):
                await asyncio.sleep(60)

    async def cancelled():
        async with clevagent.run(budgets=[Budget(usd=1)]) as run:
            task = asyncio.create_task(work(run))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return run

    assert spent(asyncio.run(cancelled())) == 0.5


def test_an_exception_after_the_settlement_changes_nothing(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run, pytest.raises(KeyError), call(50) as opened:
        opened.settle(input_tokens=1, output_tokens=3)
        raise KeyError
    assert spent(run) == 0.03


@pytest.mark.parametrize("usage", [{"input_tokens": -1}, {"output_tokens": -3}, {"output_tokens": 1.5}, {"cache_read_tokens": -1}])
def test_usage_that_cannot_be_true_is_refused_and_the_call_stays_charged(init, usage):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        with pytest.raises(UsageError, match="is not a token count"), call(50) as opened:
            opened.settle(**{"input_tokens": 1, "output_tokens": 3, **usage})
    assert (spent(run), run.summary().calls_charged_at_bound) == (0.5, 1)


def test_the_message_of_usage_that_cannot_be_true():
    assert message_of(Usage, output_tokens=-3) == snapshot(
        "Usage(output_tokens=-3) is not a token count: counts are whole numbers of at least 0. The call stays charged at its upper bound until usage that can be true is given."
    )


def test_usage_past_what_was_held_is_recorded_and_stops_what_comes_after(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.10)]) as run:
        with call(5) as opened:
            opened.settle(input_tokens=1, output_tokens=15)
        with pytest.raises(BudgetExceeded), call(1):
            pytest.fail("the request went out")
    assert (spent(run), run.summary().overshoot_usd) == (0.15, 0.05)


def test_answers_multiply_the_output(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.05)]), pytest.raises(BudgetExceeded) as caught, call(2, answers=3):
        pytest.fail("the request went out")
    assert caught.value.needed == 0.06


def test_a_block_can_be_left_and_entered_again_for_another_call(init):
    init()
    block = call(2)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        for _ in range(2):
            with block as opened:
                opened.settle(input_tokens=1, output_tokens=2)
    assert run.summary().total == Spend(calls=2, cost_usd=0.04, input_tokens=2, output_tokens=4)


def test_sync_blocks_on_an_event_loop_do_not_wait(init):
    init(wait_s=60)

    async def work():
        with clevagent.run(budgets=[Budget(usd=0.02)]), call(2), call(1):
            pytest.fail("the request went out")

    with pytest.raises(BudgetBusy):
        asyncio.run(work())


def test_async_blocks_wait_for_held_money(init):
    init(wait_s=60)

    async def work(cents):
        async with call(cents) as opened:
            await asyncio.sleep(0)
            opened.settle(input_tokens=1, output_tokens=1)

    async def both():
        async with clevagent.run(budgets=[Budget(usd=0.03)]) as run:
            await asyncio.gather(work(2), work(2))
        return run

    assert spent(asyncio.run(both())) == 0.02


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": ""}, "llm_call(model='') names no model"),
        ({"model": None}, "llm_call(model=None) names no model"),
        ({"max_output_tokens": 0}, "llm_call(max_output_tokens=0) is no output limit"),
        ({"max_output_tokens": True}, "llm_call(max_output_tokens=True) is no output limit"),
        ({"answers": 0}, "llm_call(answers=0) asks for nothing"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_when_it_is_made(fields, told):
    assert told in message_of(call, **fields)


# -- clamping ---------------------------------------------------------------------------------------------------------------


def test_a_clamped_call_is_granted_what_is_left(init):
    init()
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        make(100)
        with call(1000, clamp=True) as opened:
            assert opened.max_output_tokens == 400
            opened.settle(input_tokens=1, output_tokens=400)
    assert (spent(run), run.summary().clamped_calls) == (5, 1)


def test_a_clamped_call_that_fits_is_granted_what_it_asks_for(init):
    init()
    with clevagent.run(budgets=[Budget(usd=5)]) as run, call(300, clamp=True) as opened:
        assert opened.max_output_tokens == 300
        opened.release()
    assert run.summary().clamped_calls == 0


def test_a_clamped_call_below_a_useful_answer_is_refused(init):
    init()
    with clevagent.run(budgets=[Budget(usd=2.55)]), pytest.raises(BudgetExceeded), call(1000, clamp=True):
        pytest.fail("the request went out")


def test_a_clamped_call_that_asks_for_little_is_granted_that_or_refused(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.10)]):
        with call(10, clamp=True) as opened:
            assert opened.max_output_tokens == 10
            opened.release()
        with pytest.raises(BudgetExceeded), call(11, clamp=True):
            pytest.fail("the request went out")


def test_answers_share_what_a_clamped_call_is_granted(init):
    init()
    with clevagent.run(budgets=[Budget(usd=6)]), call(1000, clamp=True, answers=2) as opened:
        assert opened.max_output_tokens == 300
        opened.release()


def test_without_clamping_the_limit_is_what_was_asked_for(init):
    init()
    with clevagent.run(budgets=[Budget(usd=5)]), call(300) as opened:
        assert opened.max_output_tokens == 300
        opened.release()


def test_what_a_clamped_call_leaves_of_a_token_ceiling_counts_the_input(init):
    init()
    with clevagent.run(budgets=[Budget(tokens=500)]) as run, call(1000, clamp=True) as opened:
        assert run.remaining().tokens == 0
        assert 256 <= opened.max_output_tokens < 500
        opened.release()


# -- prices -----------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_price_is_refused_under_a_ceiling_in_money(init):
    init()
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        assert message_of(call(model="my-very-own").__enter__) == snapshot(
            'The model \'my-very-own\' has no known price, so a ceiling in US dollars could not be held. Give its price with clevagent.init(prices={"my-very-own": clevagent.Price(input=..., output=...)}), in US dollars per million tokens (0 if it is free); or with unknown_price="allow", and then its calls count as $0.'
        )
    assert run.summary().total.calls == 0


def test_a_model_without_a_price_passes_where_that_is_allowed(init):
    init(unknown_price="allow")
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        make(5, model="my-very-own")
    assert (spent(run), run.summary().unpriced_calls) == (0, 1)


def test_a_model_without_a_price_passes_under_a_ceiling_in_tokens(init):
    init()
    with clevagent.run(budgets=[Budget(tokens=100)]) as run:
        make(5, model="my-very-own")
        assert run.remaining().tokens == 94
        with pytest.raises(BudgetExceeded), call(95, model="my-very-own"):
            pytest.fail("the request went out")


def test_a_model_without_a_price_passes_without_budgets(init):
    init()
    make(5, model="my-very-own")


def test_a_budget_that_only_warns_does_not_ask_for_a_price(init):
    init()
    with clevagent.run(budgets=[Budget(usd=5, on_exceed="warn")]):
        make(5, model="my-very-own")


def test_without_an_output_limit_one_is_assumed_and_that_is_told_once(init, caplog):
    watchdog = init(assume_output_tokens=7)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        for _ in range(3):
            with call(None) as opened:
                assert run.summary().held_usd == 0.07
                opened.release()
    assert [told.kind for told in watchdog.recent] == ["assumption"]
    assert (
        caplog.messages
        == [watchdog.recent[0].message]
        == snapshot(
            [
                "A call to 'cent' has no output limit, and what is attached cannot send one, so 7 output tokens are assumed for it and for every call like it: the ceiling is only as tight as that. Make it strict with clevagent.guard(model), which sends a limit that fits, or set max_tokens on the model. (Told once. assume_output_tokens= changes the number.)"
            ]
        )
    )


# -- what text cannot bound -------------------------------------------------------------------------------------------------

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}]}]


def held_tokens(run):
    return next(state.held for state in run.summary().budgets if state.unit == "input_tokens")


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "input_file", "file_url": "https://example.org/book.pdf"},
        {"type": "input_file", "file_data": "aGk=", "filename": "book.pdf"},
        {"type": "document", "source": {"type": "url", "url": "https://example.org/book.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "https://example.org/cat.png"}}]},
        {"type": "item_reference", "id": "msg_1"},
        {"file_data": {"mime_type": "application/pdf", "file_uri": "https://example.org/book.pdf"}},
        {"inline_data": {"mime_type": "image/png", "data": "aGk="}},
        {"image": {"format": "png", "source": {"bytes": b"hi"}}},
    ],
)
def test_what_text_cannot_bound_counts_as_the_context_window(init, block):
    init()
    with clevagent.run(budgets=[Budget(input_tokens=10_000)]) as run, call(input=[{"role": "user", "content": [block]}]):
        assert held_tokens(run) == 1000


@pytest.mark.parametrize(
    ("tool", "windows"),
    [
        ({"type": "web_search_20250305", "name": "web_search"}, 10),
        ({"type": "web_search_20250305", "name": "web_search", "max_uses": 1}, 2),
        ({"type": "mcp", "server_label": "x"}, 10),
        ({"type": "computer_use_preview"}, 1),
    ],
)
def test_tools_that_the_provider_runs_count_as_the_context_window_each_time_it_may_be_read(init, tool, windows):
    init()
    with clevagent.run(budgets=[Budget(input_tokens=20_000)]) as run, call(tools=[tool]):
        assert held_tokens(run) == windows * 1000


@pytest.mark.parametrize("tool", [{"name": "search", "input_schema": {}}, {"type": "function", "function": {}}, {"type": "custom"}])
def test_tools_of_ones_own_do_not_count_as_the_context_window(init, tool):
    init(prices={"wide": Price(input=0, output=0, context_window=100_000)})
    with clevagent.run(budgets=[Budget(input_tokens=100_000)]) as run, call(model="wide", tools=[tool]):
        assert held_tokens(run) < 2000


def test_an_image_counts_as_the_context_window_of_the_price_list(init):
    init()
    with clevagent.run(budgets=[Budget(input_tokens=10**7)]) as run, call(model="gpt-4o", input=IMAGE):
        assert held_tokens(run) == 128_000


def test_an_image_for_a_model_whose_context_window_is_unknown_is_refused(init):
    init()
    with clevagent.run(budgets=[Budget(usd=5)]):
        assert message_of(call(model="even", input=IMAGE).__enter__) == snapshot(
            "The call to 'even' sends something whose tokens cannot be bounded from its text (an image, a file, a stored prompt), and the model's context window is not known, so it could not be priced against its budget and was refused. Give the window: clevagent.init(prices={'even': clevagent.Price(input=..., output=..., context_window=...)})."
        )


def test_under_a_ceiling_in_calls_an_image_needs_no_context_window(init):
    init()
    with clevagent.run(budgets=[Budget(llm_calls=5)]):
        make(model="even", input=IMAGE)


def test_text_is_bounded_by_its_bytes_whatever_the_price_list_says_of_the_context_window(init):
    init()
    with clevagent.run(budgets=[Budget(input_tokens=20_000)]) as run:
        with call(input="ü" * 100) as opened:
            assert 200 <= held_tokens(run) <= 230
            opened.release()
        with call(input="ü" * 5000) as opened:
            assert held_tokens(run) >= 10_000
            opened.release()


def test_tools_count_as_input(init):
    init()
    schema = {"type": "function", "function": {"name": "search", "description": "x" * 300, "parameters": {}}}
    with clevagent.run(budgets=[Budget(input_tokens=10_000)]) as run, call(model="even", tools=[schema]):
        assert held_tokens(run) >= 300


# -- tool calls -------------------------------------------------------------------------------------------------------------


def test_a_tool_call_counts(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=2)]) as run, clevagent.tool_call("search", {"q": "x"}):
        pass
    assert (run.summary().by_tool, run.remaining().tool_calls) == ({"search": Spend(calls=1)}, 1)


def test_a_tool_call_is_refused_before_its_body_runs(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=1)]):
        with clevagent.tool_call("search"):
            pass
        with pytest.raises(BudgetExceeded, match="A call of the tool 'search' was refused"), clevagent.tool_call("search"):
            pytest.fail("the tool ran")


def test_an_async_tool_call_is_refused_before_its_body_runs(init):
    init()

    async def work():
        async with clevagent.run(budgets=[Budget(tool_calls=1)]):
            async with clevagent.tool_call("search"):
                pass
            async with clevagent.tool_call("search"):
                pytest.fail("the tool ran")

    with pytest.raises(BudgetExceeded):
        asyncio.run(work())


def test_a_released_tool_call_does_not_count(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=1)]) as run:
        with clevagent.tool_call("search") as opened:
            opened.release()
        assert (run.remaining().tool_calls, run.summary().tool_calls) == (1, 0)


def test_a_tool_call_that_raises_counts_and_the_exception_goes_on(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=1)]) as run:
        with pytest.raises(KeyError), clevagent.tool_call("search"):
            raise KeyError
        assert run.remaining().tool_calls == 0


def test_model_calls_inside_a_tool_count_against_the_tools_budget(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.02, tool="search")]) as run:
        make(5)
        with clevagent.tool_call("search"):
            make(2)
            with pytest.raises(BudgetExceeded):
                make(1)
        make(5)
    assert run.summary().by_tool["search"] == Spend(calls=1, cost_usd=0.02, input_tokens=1, output_tokens=2)


def test_after_a_tool_inside_a_tool_the_outer_one_is_the_tool_again(init):
    init()
    with clevagent.run() as run, clevagent.tool_call("outer"):
        with clevagent.tool_call("inner"):
            make(1)
        make(2)
    make(4)
    assert {name: row.cost_usd for name, row in run.summary().by_tool.items()} == {"outer": 0.02, "outer/inner": 0.01}


def test_a_tool_call_in_a_generator_that_is_closed_in_another_context_is_settled(init):
    init()

    def pieces():
        with clevagent.tool_call("search"):
            yield 1

    with clevagent.run(budgets=[Budget(tool_calls=5)]) as run:
        generator = pieces()
        contextvars.copy_context().run(next, generator)
        generator.close()
        assert (run.remaining().tool_calls, run.summary().tool_calls) == (4, 1)


def test_a_refused_tool_call_latches_the_budget_for_model_calls_too(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=1)]):
        with clevagent.tool_call("search"):
            pass
        make(1)
        with pytest.raises(BudgetExceeded), clevagent.tool_call("search"):
            pytest.fail("the tool ran")
        with pytest.raises(BudgetExceeded) as caught, call(1):
            pytest.fail("the request went out")
    error = caught.value
    assert (error.budget, error.incident.unit, error.spent, error.held, error.ceiling) == (
        "1 tool_calls per run",
        "tool_calls",
        1,
        0,
        1,
    )


def test_a_tools_own_budget_does_not_stop_what_is_outside_the_tool(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=1, tool="search")]):
        with clevagent.tool_call("search"):
            pass
        with pytest.raises(BudgetExceeded), clevagent.tool_call("search"):
            pytest.fail("the tool ran")
        with clevagent.tool_call("other"):
            make(1)


def test_a_node_has_a_ceiling_of_its_own(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.02, node="plan")]):
        make(2, node="plan")
        make(2, node="act")
        with pytest.raises(BudgetExceeded):
            make(1, node="plan")
        with pytest.raises(BudgetExceeded), clevagent.tool_call("search", node="plan"):
            pytest.fail("the tool ran")


def test_a_tool_has_a_name():
    assert message_of(clevagent.tool_call, "") == snapshot("tool_call('') names no tool. Give the tool's name.")


# -- what is recorded -------------------------------------------------------------------------------------------------------


def test_a_cost_is_recorded(init):
    init()
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        clevagent.log_cost(tokens=1200, cost_usd=0.25, model="elsewhere")
        assert run.remaining().usd == 0.75
    assert run.summary().by_model == {"elsewhere": Spend(calls=1, cost_usd=0.25, input_tokens=1200)}


def test_a_cost_is_worked_out_from_tokens(init):
    init()
    with clevagent.run() as run:
        clevagent.log_cost(model="cent", input_tokens=10, output_tokens=5)
    assert run.summary().total == Spend(calls=1, cost_usd=0.05, input_tokens=10, output_tokens=5)


def test_a_cost_past_the_ceiling_is_recorded_and_the_next_call_is_refused(init):
    watchdog = init()
    with clevagent.run(budgets=[Budget(usd=0.10)]) as run:
        clevagent.log_cost(cost_usd=0.25)
        with pytest.raises(BudgetExceeded), call(1):
            pytest.fail("the request went out")
    assert (spent(run), run.summary().overshoot_usd) == (0.25, 0.15)
    assert "overshoot" in [told.kind for told in watchdog.recent]


def test_a_cost_that_was_recorded_holds_nothing(init):
    watchdog = init(budgets=[Budget(usd=1)])
    clevagent.log_cost(cost_usd=0.25)
    assert watchdog.ledger.holds() == []


def test_a_cost_inside_a_tool_counts_against_the_tools_budget(init):
    init()
    with clevagent.run(budgets=[Budget(usd=0.10, tool="search")]) as run, clevagent.tool_call("search"):
        clevagent.log_cost(cost_usd=0.25)
    assert run.summary().by_tool["search"].cost_usd == 0.25


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "cent"},
        {"tokens": -5},
        {"tokens": 2.5},
        {"cost_usd": -1},
        {"cost": -1},
        {"cost": 1, "cost_usd": 1},
        {"cost_usd": 1, "tool_calls": -1},
        {"cost_usd": float("nan")},
        {"cost_usd": 1, "input_tokens": -5},
    ],
)
def test_a_cost_that_cannot_be_told_is_refused_and_nothing_is_recorded(init, fields):
    init()
    with clevagent.run() as run:
        message_of(clevagent.log_cost, **fields)
    assert run.summary().total == Spend()


def test_the_message_of_a_cost_that_cannot_be_told(init):
    init()
    assert message_of(clevagent.log_cost, model="cent") == snapshot(
        "log_cost(model='cent') tells neither a cost nor tokens, so there is nothing to record. Give cost_usd=..., or the name of a model and its input_tokens= and output_tokens=."
    )


@pytest.mark.parametrize(
    "nothing", [{"tokens": 0}, {"tokens": 0, "model": "cent"}, {"input_tokens": 0, "output_tokens": 0}, {"tool_calls": 0}]
)
def test_a_cost_of_nothing_is_no_error(init, nothing):
    """A program logs what its provider told, and that may be nothing."""
    init()
    with clevagent.run() as run:
        clevagent.log_cost(**nothing)
        clevagent.log_cost(iteration_count=3)
    assert run.summary().total == Spend()


def test_a_tool_call_is_recorded_and_the_next_one_refused(init):
    init()
    with clevagent.run(budgets=[Budget(tool_calls=2)]) as run:
        for _ in range(3):
            clevagent.log_tool_call("search", "q=x")
        with pytest.raises(BudgetExceeded), clevagent.tool_call("search"):
            pytest.fail("the tool ran")
    assert run.summary().tool_calls == 3


def test_a_ping_is_a_step_of_the_current_run(init, heard):
    init(plugins=[heard])
    clevagent.ping()
    clevagent.ping("step_complete", "half of it", meta={"done": 5})
    assert [(step.kind, step.name, step.detail) for step in heard.steps] == [
        ("ping", "ok", {}),
        ("ping", "step_complete", {"message": "half of it", "done": 5}),
    ]


# -- estimates --------------------------------------------------------------------------------------------------------------


def test_an_expected_estimate_holds_less_than_the_upper_bound(init):
    init(estimate="expected")
    with clevagent.run(budgets=[Budget(usd=1)]) as run, call(40) as opened:
        assert run.summary().held_usd == 0.1
        opened.release()


def test_an_expected_estimate_can_be_passed_and_that_is_told(init):
    watchdog = init(estimate="expected")
    with clevagent.run(budgets=[Budget(usd=0.10)]) as run, call(40) as opened:
        opened.settle(input_tokens=1, output_tokens=40)
    assert run.summary().overshoot_usd == 0.3
    assert "overshoot" in [told.kind for told in watchdog.recent]
