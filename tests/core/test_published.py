"""The words of the hosted service that programs were written for: they run unchanged, and lose nothing that they log."""

from __future__ import annotations

import logging
import types

import pytest
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, BudgetExceeded, Price, UsageError

PRICES = {"cent": Price(input=0, output=10_000), "even": Price(input=1, output=1), "dear-input": Price(input=20_000, output=10_000)}
SERVICE = {"api_key": "cv_secret", "agent": "research", "interval": 60, "endpoint": "http://127.0.0.1:9/api/v1"}


@pytest.fixture
def init(clock):
    def init(**settings):
        return clevagent.init(**{"prices": PRICES, "wait_s": 0, **settings})

    return init


def message_of(call, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def spend_a_cent(run):
    run.open(clevagent.LLMCall(model="cent", max_output_tokens=1)).settle(clevagent.Usage(output_tokens=1))


# -- init -----------------------------------------------------------------------------------------------------------------------


def test_a_program_of_the_hosted_service_runs_as_it_is(init, heard):
    watchdog = init(**SERVICE, auto_cost=True, on_loop="alert_only", on_cost_exceeded="alert_only", plugins=[heard])
    clevagent.ping(status="ok", meta={"stage": "start"})
    clevagent.ping("step_complete", "half of it", 1500, 0.02, 2, 3, 128.5, {"stage": "middle"})
    clevagent.log_cost(1500, 0.02, "gpt-4o", 2, 4)
    clevagent.log_cost(tokens=1500, cost=0.02)
    clevagent.log_tool_call("search", "q=x")
    clevagent.log_iteration()
    total = watchdog.process_run.summary()
    assert total.total.cost_usd == pytest.approx(0.06)
    assert total.total.calls == 3
    assert total.tool_calls == 5
    clevagent.shutdown()
    assert [(step.name, dict(step.detail)) for step in heard.steps] == snapshot(
        [
            ("ok", {"stage": "start"}),
            (
                "step_complete",
                {
                    "message": "half of it",
                    "iteration_count": 3,
                    "memory_mb": 128.5,
                    "stage": "middle",
                },
            ),
            ("iteration", {"iteration_count": 4}),
            ("iteration", {"iteration_count": 1}),
        ]
    )


def test_a_key_without_an_endpoint_sends_nothing_and_that_is_told(init, caplog):
    with caplog.at_level(logging.WARNING, logger="clevagent"):
        init(api_key="cv_secret", auto_cost=False)
    assert [record.message for record in caplog.records] == snapshot(
        [
            "ClevAgent was given an api_key and no endpoint, so no heartbeat is sent: what it guards, it guards in this process. Name the monitor: clevagent.init(endpoint='https://...')."
        ]
    )


def test_a_key_stands_in_no_message(init):
    watchdog = init(**SERVICE)
    assert "cv_secret" not in repr(watchdog.settings)
    assert "cv_secret" not in message_of(init, **{**SERVICE, "api_key": "cv_other"})
    assert "cv_other" not in message_of(init, **{**SERVICE, "api_key": "cv_other"})


@pytest.mark.parametrize("key", ["schl\u00fcssel", "two words", "two\nlines", b"cv_secret", 5])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(init, key):
    with pytest.raises(UsageError, match="api_key") as refused:
        init(**{**SERVICE, "api_key": key})
    assert str(key) not in str(refused.value)


def test_a_key_out_of_a_file_may_end_with_its_newline(init):
    assert init(**{**SERVICE, "api_key": "cv_secret\n"}).settings.api_key == "cv_secret"


@pytest.mark.parametrize(
    "address",
    [
        "monitor:8080",
        "ftp://monitor",
        "http://",
        "http://mon itor",
        "http://monitor:99999",
        "http://monitor/?key=1",
        "http://monitor#x",
    ],
)
def test_an_endpoint_to_which_nothing_can_be_sent_is_refused(init, address):
    with pytest.raises(UsageError, match="is no address"):
        init(**{**SERVICE, "endpoint": address})


def test_an_endpoint_with_a_password_is_refused_and_not_shown(init):
    assert message_of(init, **{**SERVICE, "endpoint": "https://ana:hunter2@monitor/"}) == snapshot(
        "endpoint='https://...@monitor/' is no address, so no heartbeat could be sent there. Write it with its scheme, without a user's name, query or fragment, for example endpoint='https://monitor.example.com'."
    )


def test_what_only_tells_something_raises_nothing_after_the_end(init, caplog):
    init(budgets=[Budget(usd=1)])
    clevagent.shutdown()
    clevagent.ping("done")
    clevagent.log_cost(tokens=5, model="cent")
    clevagent.log_tool_call("search")
    clevagent.log_iteration(3)
    assert [record.message.partition(" ")[0] for record in caplog.records] == [
        "ping()",
        "log_cost()",
        "log_tool_call()",
        "log_iteration()",
    ]


@pytest.mark.parametrize("tokens", [2.0, pytest.param(types.SimpleNamespace, id="numpy's")])
def test_a_count_may_be_any_whole_number(init, tokens):
    class Index:  # as numpy's integers are
        def __index__(self):
            return 2

    init()
    with clevagent.run() as run:
        clevagent.log_cost(tokens=tokens if isinstance(tokens, float) else Index(), model="cent")
    assert run.summary().total.cost_usd == pytest.approx(0.02)


def test_a_ping_takes_whatever_it_is_told(init, heard):
    watchdog = init(plugins=[heard])
    clevagent.ping(custom="half way", meta=[1, 2])
    assert [step.detail for step in heard.steps] == [{"custom": "half way", "meta": [1, 2]}]
    assert watchdog.process_run.summary().total.calls == 0


@pytest.mark.parametrize("wrong", [{"api_key": ""}, {"endpoint": 5}, {"interval": 0}, {"interval": "soon"}, {"auto_cost": "yes"}])
def test_what_cannot_be_meant_is_refused(init, wrong):
    assert str(next(iter(wrong.values()))) in message_of(init, **wrong)


# -- on_cost_exceeded -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warns", ["alert_only", "warn"])
def test_alert_only_rules_over_what_budgets_say(init, warns):
    init(on_cost_exceeded=warns)
    with clevagent.run(budgets=[Budget(usd="0.02")]) as run:
        for _ in range(5):
            spend_a_cent(run)
    assert run.summary().total.calls == 5


@pytest.mark.parametrize("stops", ["stop", "raise"])
def test_stop_rules_over_what_budgets_say(init, stops):
    init(on_cost_exceeded=stops)
    with clevagent.run(budgets=[Budget(usd="0.02", on_exceed="warn")]) as run:
        spend_a_cent(run)
        spend_a_cent(run)
        with pytest.raises(BudgetExceeded):
            spend_a_cent(run)


def test_a_callable_rules_over_what_budgets_say(init):
    asked = []

    def asks(incident):
        asked.append(incident.budget)
        return "warn"

    init(on_cost_exceeded=asks)
    with clevagent.run(budgets=[Budget(usd="0.02", name="small")]) as run:
        for _ in range(3):
            spend_a_cent(run)
    assert asked == ["small"]


def test_budgets_in_code_stop_by_default(init):
    init(budgets=[Budget(usd="0.01")])
    with clevagent.run() as run:
        spend_a_cent(run)
        with pytest.raises(BudgetExceeded):
            spend_a_cent(run)


def test_from_the_environment(init, monkeypatch):
    monkeypatch.setenv("CLEVAGENT_ON_COST_EXCEEDED", "alert_only")
    assert init().settings.on_cost_exceeded == "warn"


@pytest.mark.parametrize("action", ["halt", "ask", "explode", 5])
def test_an_action_that_cannot_be_for_every_ceiling_is_refused(init, action):
    assert f"on_cost_exceeded={action!r} is no action for every ceiling" in message_of(init, on_cost_exceeded=action)


def test_an_async_action_is_refused(init):
    async def asks(incident):
        return "warn"

    assert "nothing would wait for it" in message_of(init, on_cost_exceeded=asks)


# -- what is logged -------------------------------------------------------------------------------------------------------------


def test_a_cost_that_is_logged_stops_the_next_call(init):
    init()
    with clevagent.run(budgets=[Budget(usd="0.02")]) as run:
        clevagent.log_cost(cost=0.05)
        with pytest.raises(BudgetExceeded):
            spend_a_cent(run)
    assert run.summary().total.cost_usd == 0.05


def test_amounts_of_a_ping_are_recorded(init):
    init()
    with clevagent.run(budgets=[Budget(tokens=100), Budget(tool_calls=2)]) as run:
        clevagent.ping(tokens_used=150, cost_usd=0.5, tool_calls=2)
        with pytest.raises(BudgetExceeded):
            spend_a_cent(run)
        with pytest.raises(BudgetExceeded), clevagent.tool_call("search"):
            pytest.fail("the tool ran")
    assert (run.summary().total.cost_usd, run.summary().total.input_tokens, run.summary().tool_calls) == (0.5, 150, 2)


@pytest.mark.parametrize(("model", "usd"), [("cent", 0.05), ("dear-input", 0.1), ("even", 0.000005)])
def test_tokens_that_are_not_told_apart_cost_what_the_dearer_kind_does(init, model, usd):
    init()
    with clevagent.run() as run:
        clevagent.log_cost(5, model=model)
    assert run.summary().total.cost_usd == pytest.approx(usd)


def test_tokens_without_a_price_count_and_it_is_told_once(init, heard):
    watchdog = init(plugins=[heard])
    with clevagent.run(budgets=[Budget(tokens=100)]) as run:
        for _ in range(3):
            clevagent.log_cost(50, model="my-own")
        with pytest.raises(BudgetExceeded):
            spend_a_cent(run)
    assert run.summary().total.input_tokens == 150
    watchdog.flush()
    assert [incident.message for incident in heard.incidents if incident.kind == "price"] == snapshot(
        [
            "Tokens of the model 'my-own' were recorded without a cost, and no price of it is known: they count in tokens and calls, and budgets in US dollars do not see them. Give cost_usd=... with them, or a price: clevagent.init(prices={'my-own': clevagent.Price(input=..., output=...)}). (Told once for each model.)"
        ]
    )


@pytest.mark.parametrize("amounts", [{"tokens_used": -1}, {"tokens_used": 1.5}, {"cost_usd": -1}, {"tool_calls": -2}])
def test_a_ping_with_an_impossible_amount_says_so(init, amounts):
    init()
    assert "ping(" in message_of(clevagent.ping, **amounts) or "cost_usd" in message_of(clevagent.ping, **amounts)


def test_iterations_are_counted_for_each_run_and_make_no_loop(init, heard):
    watchdog = init(plugins=[heard], on_loop="raise")
    for _ in range(2):
        with clevagent.run():
            for _ in range(100):
                clevagent.log_iteration()
    clevagent.log_iteration(7)
    watchdog.flush()
    counts = [step.detail["iteration_count"] for step in heard.steps]
    assert counts == [*range(1, 101), *range(1, 101), 7]
    assert heard.incidents == []
