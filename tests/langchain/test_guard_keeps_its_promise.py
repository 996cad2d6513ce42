"""Ways in which a ceiling was once passed, or an agent hung; each was found by trying."""

from __future__ import annotations

import contextvars
import gc
import threading
from decimal import Decimal

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langchain_openai.chat_models.base import BaseChatOpenAI

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.integrations.langchain import ClevAgentCallbackHandler
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.ledger import memory
from clevagent_providers import failures


def spend(model, tries=20, **kwargs):
    for _ in range(tries):
        try:
            model.invoke("x" * 100, **kwargs)
        except BudgetExceeded:
            return


class Box:
    """Something that only the garbage collector frees."""


@pytest.mark.slow
def test_a_stream_that_the_garbage_collector_closes_inside_the_ledger_is_charged(provider, chat, monkeypatch):
    """The collector may run at any allocation, also while this thread holds the ledger's lock."""
    model = clevagent.guard(chat(max_tokens=50))
    make_hold = memory.Hold

    def collect_first(*args, **kwargs):
        gc.collect()
        return make_hold(*args, **kwargs)

    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        box = Box()
        box.itself, box.stream = box, model.stream("Hello")
        next(box.stream)
        del box
        monkeypatch.setattr(memory, "Hold", collect_first)
        model.invoke("Hello")
        assert run.summary().calls_charged_at_bound == 1
    assert provider.request_count == 2


def test_a_dearer_service_tier_in_the_extra_body_is_priced(chat):
    """The bound is that of the tier that is sent, wherever it is named."""
    model = clevagent.guard(chat(max_tokens=1000))
    needed = []
    for sent in ({}, {"extra_body": {"service_tier": "priority"}}, {"service_tier": "priority"}):
        with clevagent.run(budgets=[Budget(usd=0.001)]), pytest.raises(BudgetExceeded) as stop:
            model.invoke("x" * 10_000, **sent)
        needed.append(stop.value.needed)
    assert needed[0] < needed[1] == needed[2]


def test_sound_in_the_answer_is_priced_as_sound(chat):
    model = clevagent.guard(chat(model="gpt-4o-audio-preview", max_tokens=1000))
    needed = []
    for sent in ({}, {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}):
        with clevagent.run(budgets=[Budget(usd=0.001)]), pytest.raises(BudgetExceeded) as stop:
            model.invoke("x" * 10_000, **sent)
        needed.append(stop.value.needed)
    assert needed[1] > needed[0]


def test_text_longer_than_the_listed_context_window_is_bounded_by_its_bytes(anthropic):
    """Models are offered with larger windows than the price list knows."""
    model = clevagent.guard(anthropic(max_tokens=500))
    with clevagent.run(budgets=[Budget(usd=3)]), pytest.raises(BudgetExceeded) as stop:
        model.invoke("a" * 1_500_000)
    assert stop.value.needed > 1_500_000 * 3e-6


@pytest.mark.slow
def test_retries_switched_on_after_guarding_are_still_ours(anthropic):
    model = clevagent.guard(anthropic(max_tokens=400, max_retries=0))
    with LoopbackProvider([Reply(drop="before")]) as provider:
        model = model.model_copy(update={"max_retries": 3, "anthropic_api_url": provider.anthropic_url})
        with clevagent.run(budgets=[Budget(usd=0.01)]):
            with pytest.raises((BudgetExceeded, Exception)):
                model.invoke("Hello")
            assert provider.billed_usd <= Decimal("0.01")
            assert model.max_retries == 0


def test_a_second_limit_among_the_models_own_keywords_is_lowered_too(provider):
    model = clevagent.guard(
        BaseChatOpenAI(
            model="gpt-4o",
            api_key="test",
            base_url=provider.openai_url,
            max_tokens=100,
            max_retries=0,
            model_kwargs={"max_completion_tokens": 5000},
        )
    )
    with clevagent.run(budgets=[Budget(usd=0.06)]):
        spend(model)
    assert 0 < provider.billed_usd <= Decimal("0.06")


def test_a_worker_that_was_there_before_two_branches_counts_against_the_run_around_both(provider, chat):
    model = clevagent.guard(chat(max_tokens=50))
    asked = threading.Event()

    def work():
        asked.wait(10)
        spend(model)

    raw = threading.Thread(target=work)
    raw.start()
    with clevagent.run(budgets=[Budget(llm_calls=5)]) as outer:
        first = clevagent.run(budgets=[Budget(llm_calls=2)])
        with first:
            entered, leave = threading.Event(), threading.Event()

            def sibling():
                with outer.activate(), clevagent.run():
                    entered.set()
                    leave.wait(10)

            other = threading.Thread(target=sibling)
            other.start()
            assert entered.wait(10)
            asked.set()
            raw.join()
            leave.set()
            other.join()
    assert provider.request_count == 5


def test_a_raw_thread_beside_unrelated_runs_is_told(provider, chat):
    watchdog = clevagent.Watchdog(unattributed="process")
    model = clevagent.guard(chat(max_tokens=50), watchdog=watchdog)
    one, two = watchdog.start_run(budgets=[Budget(usd=1)]), watchdog.start_run(budgets=[Budget(usd=1)])
    raw = threading.Thread(target=spend, args=(model, 2))
    raw.start()
    raw.join()
    assert [incident.kind for incident in watchdog.recent] == ["thread"]
    one.end()
    two.end()
    watchdog.shutdown()


def test_after_shutdown_a_budgeted_program_does_not_go_on_unguarded(provider, chat):
    clevagent.init(budgets=[Budget(llm_calls=1, per="day")])
    model = clevagent.guard(chat(max_tokens=50))
    model.invoke("Hello")
    clevagent.shutdown()
    with pytest.raises(UsageError, match="was shut down, and it had budgets"):
        model.invoke("Hello")
    assert provider.request_count == 1
    clevagent.init()
    model.invoke("Hello")
    assert provider.request_count == 2


class Interruption(Exception):
    status_code = 499


class Interrupting(BaseCallbackHandler):
    raise_error = True

    def on_llm_new_token(self, *args, **kwargs):
        raise Interruption


def test_what_somebodys_callback_raises_does_not_pass_for_the_providers_refusal(provider, chat):
    """It looks like an HTTP error, but the answer had begun: it is billed, so it is charged."""
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        with pytest.raises(Interruption):
            list(chat(max_tokens=50).stream("Hello", {"callbacks": [ClevAgentCallbackHandler(), Interrupting()]}))
        assert run.summary().calls_charged_at_bound == 1
        assert run.summary().total.cost_usd >= float(provider.billed_usd) > 0


def test_a_guarded_model_that_was_rebuilt_without_its_guard_is_refused(provider, chat):
    from langchain_core.runnables import ConfigurableField

    model = clevagent.guard(chat(max_tokens=50)).configurable_fields(temperature=ConfigurableField(id="warmth"))
    with clevagent.run(), pytest.raises(UsageError, match="was rebuilt from a guarded one"):
        model.invoke("Hello", {"configurable": {"warmth": 0.5}})
    assert provider.request_count == 0


def test_a_message_object_in_the_plain_door_is_seen_for_what_it_holds():
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])
    with clevagent.run(budgets=[Budget(input_tokens=10**9)]) as run:
        with clevagent.llm_call(model="gpt-4o", input=[picture], max_output_tokens=10):
            assert run.summary().budgets[0].held == 128_000


class Hedging(ChatOpenAI):
    """Asks the same once more beside the first request, by its own method."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        begun = self.metadata["begun"]
        if not begun:
            begun.append(contextvars.copy_context())
        return super()._generate(messages, stop=stop, run_manager=run_manager, **kwargs)

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        begun = self.metadata["begun"]
        if not begun:
            begun.append(contextvars.copy_context())
        return await super()._agenerate(messages, stop=stop, run_manager=run_manager, **kwargs)


@pytest.mark.parametrize("is_async", [False, True])
def test_what_outlives_an_attempt_is_no_part_of_the_next(provider, monkeypatch, aio, is_async):
    """What was begun in the first attempt asks while the second is waited for: it gets what is left, and the second is refused."""
    begun, late = [], []
    messages = [HumanMessage("Hi")]

    def wait(*_):
        late.append(begun[0].run(model._generate, messages))
        return 0

    monkeypatch.setattr(failures, "wait_before_retry", wait)
    provider.reset([Reply(status=429), Reply()])
    clevagent.init()
    model = clevagent.guard(
        Hedging(
            model="gpt-4o", api_key="test", base_url=provider.openai_url, max_retries=1, max_tokens=50, metadata={"begun": begun}
        )
    )
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run, pytest.raises(BudgetExceeded):
        aio(model.ainvoke("Hi")) if is_async else model.invoke("Hi")
    assert len(late) == 1
    assert (provider.request_count, run.summary().total.calls) == (2, 1)
    assert float(provider.billed_usd) == pytest.approx(run.summary().total.cost_usd)
