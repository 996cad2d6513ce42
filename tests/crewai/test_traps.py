"""Ways in which CrewAI lets a call pass that was refused, tries it again, or loses what it cost; each was found by running it."""

from __future__ import annotations

import threading
from decimal import Decimal

import pytest
from crewai.events.event_bus import crewai_event_bus
from crewai.events.types.llm_events import LLMCallCompletedEvent, LLMCallFailedEvent, LLMCallStartedEvent
from crewai.hooks import register_before_llm_call_hook, unregister_before_llm_call_hook
from crewai.hooks.dispatch import HookAborted
from crewai.tools import tool

import clevagent
from clevagent import Budget, BudgetExceeded, Stopped, UsageError
from clevagent.testing import Reply
from clevagent_crewai import models as module
from clevagent_crewai import step_callback
from clevagent_providers import failures


@tool("lookup")
def lookup(word: str) -> str:
    """Look a word up."""
    return f"found {word}"


def three_tools(body):
    asked = sum(message.get("role") == "tool" for message in body["messages"])
    return Reply(text="", tool_calls=[("lookup", {"word": str(asked)})]) if asked < 3 else Reply()


def test_a_step_callback_hears_once_of_three_tools_and_the_guard_of_each_call(provider, crew):
    heard = []
    provider.reset(three_tools)
    with clevagent.run() as run:
        clevagent.guard(crew(1, tools=[lookup], step_callback=heard.append)).kickoff()
    assert len(heard) == 1
    assert (run.summary().total.calls, run.summary().tool_calls) == (4, 3)


def test_a_refusal_is_counted_once(provider, crew):
    """Other errors than ours make CrewAI run the task three times."""
    with clevagent.run() as run, pytest.raises(BudgetExceeded):
        clevagent.guard(crew(2), budgets=[Budget(llm_calls=1)]).kickoff()
    assert run.summary().refusals == 1


def test_a_refusal_leaves_as_what_crewai_lets_pass(provider, crew):
    with pytest.raises(HookAborted) as stop:
        clevagent.guard(crew(2), budgets=[Budget(llm_calls=1)]).kickoff()
    assert isinstance(stop.value, BudgetExceeded)
    assert stop.value.reason == "exhausted"  # as everywhere; CrewAI only shows what stands there


def test_a_fault_of_ours_sends_nothing(provider, crew, monkeypatch):
    """CrewAI swallows what its hooks raise, and sends the request."""
    guarded = clevagent.guard(crew(1), budgets=[Budget(llm_calls=1)])
    monkeypatch.setattr(module, "describe", lambda *args: {}["bug"])
    with pytest.raises(Stopped, match="could not check a call"):
        guarded.kickoff()
    assert provider.request_count == 0


def test_an_unknown_price_leaves_at_once_and_sends_nothing(provider, crew, llm):
    with clevagent.run() as run, pytest.raises(UsageError, match="my-own-model"):
        clevagent.guard(crew(1, model=llm(model="openai/my-own-model")), budgets=[Budget(usd=1)]).kickoff()
    assert provider.request_count == 0
    assert run.summary().total.calls == 0


def test_hooks_of_the_users_own_work_as_they_did(provider, crew):
    seen = []

    def hook(context):
        seen.append(context.agent.role)
        raise LookupError  # which CrewAI swallows

    register_before_llm_call_hook(hook)
    try:
        clevagent.guard(crew(2), budgets=[Budget(usd=1)]).kickoff()
    finally:
        unregister_before_llm_call_hook(hook)
    assert seen == ["writer", "editor"]


def test_a_hook_of_the_users_own_that_refuses_costs_nothing(provider, crew):
    def hook(context):
        raise HookAborted("no")

    register_before_llm_call_hook(hook)
    try:
        with clevagent.run(budgets=[Budget(usd=1)]) as run, pytest.raises(HookAborted, match="no"):
            clevagent.guard(crew(1)).kickoff()
    finally:
        unregister_before_llm_call_hook(hook)
    assert provider.request_count == 0
    assert run.summary().total.cost_usd == 0
    assert run.watchdog.ledger.holds() == []


def test_slow_listeners_of_the_event_bus_let_no_second_call_pass(provider, crew):
    """Settled by the event alone, a limit of one call lets two go out."""
    refused = threading.Event()

    class Hears:
        @clevagent.hookimpl
        def clevagent_incident(self, incident):
            refused.set()

    clevagent.init(plugins=[Hears()])
    with crewai_event_bus.scoped_handlers():

        @crewai_event_bus.on(LLMCallCompletedEvent)
        def slow(source, event):
            refused.wait(10)

        with pytest.raises(BudgetExceeded):
            clevagent.guard(crew(3), budgets=[Budget(llm_calls=1)]).kickoff()
        assert refused.is_set()
        assert provider.request_count == 1
        crewai_event_bus.flush(timeout=10)


def test_listeners_see_the_models_events_as_before(provider, crew):
    seen, lock = [], threading.Lock()
    with crewai_event_bus.scoped_handlers():

        def note(source, event):
            with lock:
                seen.append((type(event).__name__, event.model, type(source).__name__))

        for kind in (LLMCallStartedEvent, LLMCallCompletedEvent):
            crewai_event_bus.on(kind)(note)
        clevagent.guard(crew(1), budgets=[Budget(usd=1)]).kickoff()
        crewai_event_bus.flush(timeout=10)
    assert sorted(seen) == [
        ("LLMCallCompletedEvent", "gpt-4o", "OpenAICompletion"),
        ("LLMCallStartedEvent", "gpt-4o", "OpenAICompletion"),
    ]


@pytest.mark.parametrize("kind", ["openai", "anthropic", "litellm"])
def test_throttled_twice_and_then_answered_is_one_call(provider, crew, llm, kind, monkeypatch):
    """CrewAI tells failures, some twice, and then a completion of it."""
    told = []
    monkeypatch.setattr(failures, "wait_before_retry", lambda *_: 0.01)
    replies = iter([Reply(status=429), Reply(status=429), Reply()])
    # CrewAI asks Anthropic to count tokens first: without a limit, and free of charge.
    provider.reset(lambda body: next(replies) if "max_tokens" in body else Reply())
    with crewai_event_bus.scoped_handlers():
        crewai_event_bus.on(LLMCallFailedEvent)(lambda source, event: told.append(event))
        with clevagent.run(budgets=[Budget(usd=1)]) as run:
            clevagent.guard(crew(1, model=llm(kind, max_tokens=50))).kickoff()
        crewai_event_bus.flush(timeout=10)
    summary = run.summary()
    assert told or kind == "anthropic"
    sent = [request for request in provider.requests if "max_tokens" in request.body]
    assert (len(sent), summary.total.calls, summary.held_usd) == (3, 1, 0)
    assert Decimal(str(summary.total.cost_usd)) == provider.billed_usd


def test_messages_hold_no_word_by_which_crewai_would_try_again(provider, crew, llm):
    classifier = pytest.importorskip("crewai.llms.retry")._ThrottlingErrorClassifier
    provider.reset([Reply(status=429), Reply()])
    errors = []
    for budgets in ([Budget(llm_calls=1)], [Budget(usd=0.0001)], [Budget(tokens=10)]):
        with pytest.raises(BudgetExceeded) as stop:
            for _ in range(3):
                clevagent.guard(llm(max_retries=0), budgets=budgets).call("Hello")
        errors.append(stop.value)
    assert not [error for error in errors if classifier.is_throttling_error(error)]


def test_a_step_callback_that_is_ours_never_repeats_a_task(provider, crew):
    provider.reset(three_tools)
    clevagent.guard(crew(1, tools=[lookup], step_callback=step_callback), budgets=[Budget(usd=1)]).kickoff()
    assert provider.request_count == 4
