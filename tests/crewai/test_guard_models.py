"""``clevagent.guard(llm)``: every kind of CrewAI's models, called directly."""

from __future__ import annotations

import asyncio
import copy
import pickle
from decimal import Decimal

import pytest
from pydantic import BaseModel

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_providers import failures

KINDS = ["openai", "responses", "anthropic", "litellm", "custom"]
every = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("is_async", [False, True])


def call(aio, model, is_async, prompt="Hello", **kw):
    return aio(model.acall(prompt, **kw)) if is_async else model.call(prompt, **kw)


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr(failures, "wait_before_retry", lambda *_: 0.01)


@every
@both
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_recorded_as_it_is_billed_and_the_one_past_the_ceiling_is_not_sent(aio, provider, llm, kind, is_async, stream):
    model = clevagent.guard(llm(kind, max_tokens=40, **({} if kind == "custom" else {"stream": stream})))
    with clevagent.run(budgets=[Budget(llm_calls=2)]) as run:
        for _ in range(2):
            assert call(aio, model, is_async) == "ok"
        for _ in range(3):
            with pytest.raises(BudgetExceeded):
                call(aio, model, is_async)
    assert provider.request_count == 2
    summary = run.summary()
    assert Decimal(str(summary.total.cost_usd)) == provider.billed_usd > 0
    assert summary.calls_charged_at_bound == 0
    assert summary.held_usd == 0


@every
def test_the_guarded_model_is_of_the_same_type_and_the_given_one_stays_free(provider, llm, kind):
    plain = llm(kind)
    model = clevagent.guard(plain)
    assert isinstance(model, type(plain))
    assert type(plain).__name__ == type(model).__name__
    with clevagent.run(budgets=[Budget(llm_calls=1)]):
        model.call("Hello")
        with pytest.raises(BudgetExceeded):
            model.call("Hello")
        plain.call("Hello")
    assert provider.request_count == 2


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic", "litellm"])
@both
@pytest.mark.parametrize("limit", [None, 5000])
def test_the_output_limit_is_lowered_to_what_is_left(aio, provider, llm, kind, is_async, limit):
    model = clevagent.guard(llm(kind, **({"max_tokens": limit} if limit else {})))
    with clevagent.run(budgets=[Budget(usd=0.02)]) as run:
        for _ in range(20):
            try:
                call(aio, model, is_async)
            except BudgetExceeded:
                break
    assert 0.9 * 0.02 <= provider.billed_usd <= Decimal("0.02")
    assert Decimal(str(run.summary().total.cost_usd)) == provider.billed_usd
    sent = provider.requests[0].body
    granted = sent.get("max_tokens") or sent.get("max_output_tokens")
    assert granted < (limit or 32000)


def test_limits_given_in_other_words_are_lowered_too(provider, llm):
    model = clevagent.guard(llm(max_completion_tokens=4000, extra_body={"max_tokens": 9000}))
    with clevagent.run(budgets=[Budget(usd=0.03)]):
        with pytest.raises(BudgetExceeded):
            for _ in range(9):
                model.call("Hello")
    assert 0 < provider.billed_usd <= Decimal("0.03")


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic", "litellm"])
@both
def test_retries_of_the_sdk_are_made_with_a_reservation_each(aio, provider, llm, kind, is_async, fast_retries):
    provider.reset([Reply(drop="before"), Reply(drop="before"), Reply()])
    model = clevagent.guard(llm(kind, max_tokens=40))
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        assert call(aio, model, is_async) == "ok"
    assert provider.request_count == 3
    assert run.summary().calls_charged_at_bound == 2
    assert Decimal(str(run.summary().total.cost_usd)) >= provider.billed_usd


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic", "litellm"])
@both
@pytest.mark.parametrize("fault", [Reply(drop="before"), Reply(drop="middle"), Reply(hang=True)], ids=["drop", "middle", "timeout"])
def test_a_ceiling_holds_over_retries(aio, provider, llm, kind, is_async, fault, fast_retries):
    provider.reset([fault])
    model = clevagent.guard(llm(kind, max_tokens=400, timeout=0.2 if fault.hang else 10))
    with clevagent.run(budgets=[Budget(llm_calls=2)]) as run:
        for _ in range(3):
            with pytest.raises(Exception):
                call(aio, model, is_async)
    assert provider.request_count <= 2
    assert run.summary().calls_charged_at_bound == provider.request_count


@pytest.mark.parametrize("kind", ["openai", "anthropic", "litellm"])
def test_a_refusal_by_the_provider_costs_nothing(provider, llm, kind, fast_retries):
    provider.reset([Reply(status=400)])
    model = clevagent.guard(llm(kind, max_tokens=40))
    with clevagent.run(budgets=[Budget(usd=1)]) as run, pytest.raises(Exception, match="400"):
        model.call("Hello")
    assert run.summary().total.calls == 0
    assert run.summary().held_usd == 0


def test_the_error_is_the_one_that_crewai_made(provider, llm, fast_retries):
    provider.reset([Reply(drop="before")])
    with pytest.raises(ConnectionError, match="Failed to connect"):
        clevagent.guard(llm()).call("Hello")


@both
def test_a_custom_model_that_tells_nothing_is_charged_its_bound(aio, provider, llm, is_async):
    model = clevagent.guard(llm("custom", tells=False))
    with clevagent.run(budgets=[Budget(usd=0.02)]) as run:
        for _ in range(9):
            try:
                call(aio, model, is_async)
            except BudgetExceeded:
                break
    summary = run.summary()
    assert summary.calls_charged_at_bound == provider.request_count > 1
    assert provider.billed_usd <= Decimal(str(summary.total.cost_usd)) <= Decimal("0.02")


def test_what_a_custom_model_keeps_on_itself_is_kept(llm):
    model = clevagent.guard(llm("custom"))
    for _ in range(3):
        model.call("Hello")
    assert model.calls == 3


def test_a_model_that_hands_on_to_another_counts_once(provider, llm):
    from crewai.llms.base_llm import BaseLLM

    inner = llm(max_tokens=40)

    class Router(BaseLLM):
        def call(self, messages, *args, **kwargs):
            return inner.call(messages)

    model = clevagent.guard(Router(model="gpt-4o"))
    watchdog = clevagent.init(attach=["crewai"])
    with clevagent.run(budgets=[Budget(llm_calls=2)]) as run:
        for _ in range(2):
            model.call("Hello")
        with pytest.raises(BudgetExceeded):
            model.call("Hello")
    assert provider.request_count == 2
    assert Decimal(str(run.summary().total.cost_usd)) == provider.billed_usd
    assert watchdog.ledger.holds() == []


def test_guarded_and_attached_and_in_a_guarded_crew_counts_once(provider, llm, crew):
    clevagent.init(attach=["crewai"], budgets=[Budget(usd=1, per="lifetime", name="life")])
    guarded = clevagent.guard(crew(2, model=clevagent.guard(clevagent.guard(llm(max_tokens=40)))))
    with clevagent.run() as run:
        guarded.kickoff()
    summary = run.summary()
    assert (summary.total.calls, provider.request_count) == (2, 2)
    assert Decimal(str(summary.total.cost_usd)) == provider.billed_usd


def test_budgets_of_the_model_and_of_its_second_guard_both_hold(provider, llm):
    model = clevagent.guard(clevagent.guard(llm(), budgets=[Budget(llm_calls=5)]), budgets=[Budget(llm_calls=2, name="two")])
    with clevagent.run():
        with pytest.raises(BudgetExceeded) as stop:
            for _ in range(9):
                model.call("Hello")
    assert stop.value.budget == "two"
    assert provider.request_count == 2


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, copy.copy) for kind in KINDS), *((kind, copy.deepcopy) for kind in ("litellm", "custom"))]
)
def test_copies_stay_guarded(provider, llm, kind, how):
    """Native models cannot be copied deeply, guarded or not: their clients hold locks."""
    model = how(clevagent.guard(llm(kind), budgets=[Budget(llm_calls=1)]))
    with clevagent.run():
        model.call("Hello")
        with pytest.raises(BudgetExceeded):
            model.call("Hello")
    assert provider.request_count == 1


def test_the_error_survives_pickling(llm):
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
        model = clevagent.guard(llm())
        model.call("Hello")
        with pytest.raises(BudgetExceeded) as stop:
            model.call("Hello")
    again = pickle.loads(pickle.dumps(stop.value))  # noqa: S301 - made here
    assert (type(again), again.incident) == (type(stop.value), stop.value.incident)
    assert again.run_id == run.run_id
    assert again.reason == "exhausted"  # as everywhere; CrewAI only shows what stands there


def test_stop_words_and_streaming_of_one_call_reach_the_model(provider, llm):
    from crewai.llms.base_llm import call_stop_override

    model = clevagent.guard(llm(max_tokens=40))
    provider.reset([Reply(text="one END two")])
    with call_stop_override(model, ["END"]):
        assert model.call("Hello") == "one"
    assert model.call("Hello") == "one END two"


class Word(BaseModel):
    text: str


@pytest.mark.parametrize("kind", ["openai", "litellm", "anthropic"])
def test_structured_answers_are_not_cut(provider, llm, kind):
    provider.reset([Reply(text='{"text": "x"}', tool_calls=[("Word", {"text": "x"})] if kind == "litellm" else ())])
    model = clevagent.guard(llm(kind, max_tokens=2000))
    with clevagent.run(budgets=[Budget(usd=0.01)]), pytest.raises(BudgetExceeded):
        model.call("Hello", response_model=Word)
    assert provider.request_count == 0
    if kind == "openai":
        with clevagent.run(budgets=[Budget(usd=0.1)]) as run:
            assert model.call("Hello", response_model=Word).text == "x"
        assert Decimal(str(run.summary().total.cost_usd)) == provider.billed_usd


def test_a_tool_that_runs_inside_a_call_may_call_models_of_its_own(provider, llm):
    model, other = clevagent.guard(llm(max_tokens=40)), clevagent.guard(llm(max_tokens=30))
    provider.reset(lambda body: Reply(tool_calls=[("ask", {"word": "a"})]) if body.get("tools") else Reply(text="inner"))
    tool = {
        "type": "function",
        "function": {
            "name": "ask",
            "description": "Ask.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        answer = model.call("Hello", tools=[tool], available_functions={"ask": lambda word: other.call(word, None)})
    assert answer == "inner"
    assert (provider.request_count, run.summary().total.calls) == (2, 2)
    assert Decimal(str(run.summary().total.cost_usd)) == provider.billed_usd


@both
def test_a_cancelled_call_is_charged(aio, provider, llm, is_async):
    provider.reset([Reply(hang=True)])
    model = clevagent.guard(llm(max_tokens=40))

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.acall("Hello"), 0.2)

    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        aio(main())
    assert run.summary().calls_charged_at_bound == 1
    assert Decimal(str(run.summary().total.cost_usd)) >= provider.billed_usd > 0


def test_an_unknown_price_is_refused_with_a_budget_in_money(provider, llm):
    model = clevagent.guard(llm(model="openai/my-own-model"))
    with clevagent.run(budgets=[Budget(usd=1)]), pytest.raises(UsageError, match="my-own-model"):
        model.call("Hello")
    assert provider.request_count == 0


def test_tool_calls_cannot_be_limited_at_a_model(llm):
    with pytest.raises(UsageError, match="limits tool calls"):
        clevagent.guard(llm(), budgets=[Budget(tool_calls=1)])


@pytest.mark.parametrize("action", ["halt", "ask"])
def test_a_model_cannot_end_gracefully_and_says_so(llm, action):
    with pytest.raises(UsageError, match="which cannot"):
        clevagent.guard(llm(), budgets=[Budget(usd=1)], on_exceed=action)


def test_outside_of_what_is_guarded_nothing_is_asked(provider, llm):
    clevagent.guard(llm())
    plain = llm()
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
        for _ in range(3):
            plain.call("Hello")
    assert provider.request_count == 3
    assert run.summary().total.calls == 0


# -- what litellm would ask besides ---------------------------------------------------------------------------------------


def fails(model, how):
    return lambda body: how if body["model"] == model else Reply()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "how", [Reply(status=500), Reply(status=404), Reply(drop="before"), Reply(drop="after")], ids=["500", "404", "lost", "cut"]
)
@pytest.mark.parametrize("fallback", ["openai/gpt-4o", {"model": "openai/gpt-4o", "max_tokens": 20}], ids=["name", "mapping"])
def test_a_fallback_of_litellm_is_a_call_of_its_own_with_its_own_price(provider, llm, aio, is_async, how, fallback):
    provider.reset(fails("gpt-4o-mini", how))
    clevagent.init()
    model = clevagent.guard(
        llm("litellm", model="openai/gpt-4o-mini", max_tokens=50, num_retries=0, max_retries=0, fallbacks=[fallback])
    )
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        assert aio(model.acall("hi")) if is_async else model.call("hi")
    sent = [request.body for request in provider.requests]
    assert [body["model"] for body in sent] == ["gpt-4o-mini", "gpt-4o"]
    assert sent[1]["max_tokens"] == (50 if isinstance(fallback, str) else 20)
    assert run.summary().by_model["gpt-4o"].calls == 1
    assert run.summary().total.cost_usd >= float(provider.billed_usd) > 0


def test_a_refusal_is_no_reason_to_ask_a_fallback(provider, llm):
    clevagent.init()
    model = clevagent.guard(
        llm("litellm", max_tokens=50, fallbacks=["openai/gpt-4o-mini"]), budgets=[Budget(llm_calls=1, per="lifetime")]
    )
    model.call("hi")
    with pytest.raises(BudgetExceeded):
        model.call("hi")
    assert provider.request_count == 1


def test_a_fallback_that_does_not_fit_is_refused(provider, llm):
    provider.reset(fails("gpt-4o-mini", Reply(status=404)))
    clevagent.init()
    model = clevagent.guard(
        llm("litellm", model="openai/gpt-4o-mini", max_tokens=300, max_retries=0, fallbacks=["openai/gpt-4o"]),
        budgets=[Budget(usd=0.002, per="lifetime")],
    )
    with pytest.raises(BudgetExceeded, match="gpt-4o'"):
        model.call("hi")
    assert [request.body["model"] for request in provider.requests] == ["gpt-4o-mini"]


def test_what_litellm_would_ask_in_every_call_is_refused_with_the_way_that_works(provider, llm, monkeypatch):
    import litellm

    monkeypatch.setattr(litellm, "model_fallbacks", ["gpt-4o"])
    clevagent.init()
    with pytest.raises(UsageError, match=r"litellm.model_fallbacks.*LLM\(fallbacks="):
        clevagent.guard(llm("litellm", max_tokens=50)).call("hi")
    assert provider.request_count == 0
