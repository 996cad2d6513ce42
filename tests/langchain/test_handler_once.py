"""However often, and wherever, the handler is attached: one call is asked for once."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

from clevagent import Budget, BudgetExceeded, Step, hookimpl
from clevagent.testing import Reply
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langchain.tracker import Tracker, tracker_of

CALLS = Budget(llm_calls=100, tool_calls=100, per="lifetime")
MONEY = Budget(usd=1, per="lifetime")

both = pytest.mark.parametrize("is_async", [False, True])


@pytest.fixture
def one(watchdog):
    return watchdog(budgets=[MONEY, CALLS])


def run(aio, is_async, target, value, config=None):
    return aio(target.ainvoke(value, config)) if is_async else target.invoke(value, config)


def in_config_and_constructor(chat, first, second):
    return chat(max_tokens=9, callbacks=[first]), {"callbacks": [second]}


def twice_in_config(chat, first, second):
    return chat(max_tokens=9), {"callbacks": [first, second]}


def with_config_and_config(chat, first, second):
    return chat(max_tokens=9).with_config(callbacks=[first]), {"callbacks": [second]}


def everywhere(chat, first, second):
    model = chat(max_tokens=9, callbacks=[first, second]).with_config(callbacks=[second, first])
    return (RunnableLambda(lambda text: text) | model).with_config(callbacks=[first]), {"callbacks": [second, first]}


@both
@pytest.mark.parametrize("place", [in_config_and_constructor, twice_in_config, with_config_and_config, everywhere])
@pytest.mark.parametrize("instances", [1, 2])
def test_one_call_is_counted_once(aio, provider, chat, one, balance, is_async, place, instances):
    first = ClevAgentCallbackHandler(watchdog=one)
    target, config = place(chat, first, first if instances == 1 else ClevAgentCallbackHandler(watchdog=one))
    run(aio, is_async, target, "Hello", config)
    assert provider.request_count == 1
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)
    assert tracker_of(one).size() == 0


@both
@pytest.mark.parametrize("place", [in_config_and_constructor, twice_in_config, with_config_and_config, everywhere])
def test_a_refusal_is_counted_once(aio, provider, chat, watchdog, is_async, place):
    one = watchdog(budgets=[Budget(usd="0.000001", per="lifetime")])
    target, config = place(chat, ClevAgentCallbackHandler(watchdog=one), ClevAgentCallbackHandler(watchdog=one))
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, target, "Hello", config)
    assert provider.request_count == 0
    assert [incident.kind for incident in one.recent] == ["budget"]
    assert one.ledger.holds() == []


class Runs:
    """Counts the runs that begin and end."""

    def __init__(self):
        self.started, self.ended = [], []

    @hookimpl
    def clevagent_run_started(self, run):
        self.started.append(run)

    @hookimpl
    def clevagent_run_ended(self, run, summary):
        self.ended.append(run)


@both
@pytest.mark.parametrize("instances", [1, 2])
def test_a_root_invocation_begins_one_run(aio, provider, chat, watchdog, is_async, instances):
    runs = Runs()
    one = watchdog(plugins=[runs])
    first = ClevAgentCallbackHandler(watchdog=one)
    second = first if instances == 1 else ClevAgentCallbackHandler(watchdog=one)
    chain = (chat(max_tokens=9) | StrOutputParser()).with_config(callbacks=[first])
    run(aio, is_async, chain, "Hello", {"callbacks": [first, second]})
    assert len(runs.started) == 2
    assert runs.started[0] is one.process_run
    assert runs.ended == runs.started[1:]
    assert not one._active


@both
def test_streams_are_counted_once(aio, provider, chat, one, balance, is_async):
    first, second = ClevAgentCallbackHandler(watchdog=one), ClevAgentCallbackHandler(watchdog=one)
    model = chat(max_tokens=9, callbacks=[first], stream_usage=True).with_config(callbacks=[second])

    async def read():
        async for _ in model.astream("Hello", {"callbacks": [first, second]}):
            pass

    if is_async:
        aio(read())
    else:
        list(model.stream("Hello", {"callbacks": [first, second]}))
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)
    assert one.process_run.summary().calls_charged_at_bound == 0


@both
def test_tools_are_counted_once(aio, one, is_async):
    @tool
    def act(word: str) -> str:
        """Act."""
        return word

    first, second = ClevAgentCallbackHandler(watchdog=one), ClevAgentCallbackHandler(watchdog=one)
    run(aio, is_async, act.with_config(callbacks=[first]), {"word": "a"}, {"callbacks": [first, second]})
    assert one.process_run.summary().tool_calls == 1
    assert one.ledger.holds() == []


def test_steps_are_told_once(provider, chat, watchdog):
    steps: list[Step] = []

    class Watch:
        @hookimpl
        def clevagent_step(self, run, step):
            steps.append(step)

    one = watchdog(plugins=[Watch()])
    first, second = ClevAgentCallbackHandler(watchdog=one), ClevAgentCallbackHandler(watchdog=one)
    chat(max_tokens=9, callbacks=[first]).invoke("Hello", {"callbacks": [second]})
    assert [(step.kind, step.name) for step in steps] == [("llm_call", "gpt-4o")]


@both
def test_an_agent_with_the_handler_everywhere(aio, provider, chat, one, balance, is_async):
    ran = []

    @tool
    def act(word: str) -> str:
        """Act."""
        ran.append(word)
        return word

    provider.reset([Reply(tool_calls=[("act", {"word": "a"})]), Reply()])
    first, second = ClevAgentCallbackHandler(watchdog=one), ClevAgentCallbackHandler(watchdog=one)
    agent = create_agent(chat(max_tokens=9, callbacks=[first]), [act]).with_config(callbacks=[second])
    run(aio, is_async, agent, {"messages": [HumanMessage("Hello")]}, {"callbacks": [first, second]})
    assert (provider.request_count, ran) == (2, ["a"])
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)
    assert tracker_of(one).size() == 0


def test_two_watchdogs_count_separately(provider, chat, watchdog, balance):
    left, right = watchdog(budgets=[MONEY]), watchdog(budgets=[Budget(usd=2, per="lifetime")])
    handlers = [ClevAgentCallbackHandler(watchdog=left), ClevAgentCallbackHandler(watchdog=right)]
    chat(max_tokens=9).invoke("Hello", {"callbacks": handlers})
    assert balance(left).spent == balance(right).spent == provider.billed_pico
    assert balance(left).held == balance(right).held == 0


def test_a_refusal_of_the_second_watchdog_is_charged_to_the_first_at_the_end_of_its_run(provider, chat, watchdog, balance):
    left, right = watchdog(budgets=[MONEY]), watchdog(budgets=[Budget(usd="0.000001", per="lifetime")])
    handlers = [ClevAgentCallbackHandler(watchdog=left), ClevAgentCallbackHandler(watchdog=right)]
    with pytest.raises(BudgetExceeded):
        (chat(max_tokens=9) | StrOutputParser()).invoke("Hello", {"callbacks": handlers})
    assert provider.request_count == 0
    assert balance(left).held == balance(right).held == 0


def test_what_is_counted_does_not_stand_in_the_handler(provider, chat, watchdog):
    """LangChain makes, copies and discards handlers as it likes: a new one for each call counts on."""
    one = watchdog(budgets=[Budget(llm_calls=2, per="lifetime")])
    for _ in range(2):
        chat(max_tokens=9).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    with pytest.raises(BudgetExceeded):
        chat(max_tokens=9).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert provider.request_count == 2


@pytest.mark.slow
def test_the_first_use_of_one_handler_by_many_threads(provider, chat, watchdog, balance):
    for _ in range(5):
        one = watchdog(budgets=[MONEY])
        config, model = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}, chat(max_tokens=9)
        provider.reset()
        barrier = threading.Barrier(8)

        def work(config=config, model=model, barrier=barrier):
            barrier.wait()
            model.invoke("Hello", config)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (balance(one).spent, balance(one).held, tracker_of(one).size()) == (provider.billed_pico, 0, 0)


def test_two_threads_that_see_one_start_at_once_open_one_ticket():
    """Two instances may be told of one run_id from different threads of LangChain's executor."""
    from uuid import uuid4

    tracker, run_id, won = Tracker(), uuid4(), []
    barrier = threading.Barrier(8)

    def begin():
        barrier.wait()
        won.append(tracker.begin_ticket(run_id))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]
    assert tracker.take_ticket(run_id) is None
    tracker.add_ticket(run_id, None, None)
    assert tracker.begin_ticket(run_id)


# -- where it runs --------------------------------------------------------------------------------------------------------


class Seen(BaseCallbackHandler):
    """An ordinary handler: LangChain runs it in another thread, beside others, in async calls."""

    def __init__(self):
        self.threads = []

    def on_chat_model_start(self, *args, **kwargs):
        self.threads.append(threading.get_ident())


@pytest.mark.parametrize("is_first", [False, True])
def test_it_runs_on_the_loops_thread_in_the_calling_task(aio, provider, chat, watchdog, is_first):
    asked = []

    class Watch:
        @hookimpl
        def clevagent_before_call(self, run, call):
            asked.append((threading.get_ident(), asyncio.current_task()))

    one = watchdog(plugins=[Watch()])
    other, ours = Seen(), ClevAgentCallbackHandler(watchdog=one)

    async def work():
        await chat(max_tokens=9).ainvoke("Hello", {"callbacks": [ours, other] if is_first else [other, ours]})
        return threading.get_ident(), asyncio.current_task()

    here = aio(work())
    assert asked == [here]
    assert other.threads
    assert other.threads[0] != here[0]


def test_a_refusal_stops_handlers_that_come_after_it(provider, chat, watchdog):
    other = Seen()
    one = watchdog(budgets=[Budget(usd="0.000001", per="lifetime")])
    with pytest.raises(BudgetExceeded):
        chat(max_tokens=9).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one), other]})
    assert other.threads == []


def test_batches_see_the_run_of_their_caller(aio, provider, chat, one):
    handler = ClevAgentCallbackHandler(watchdog=one)
    model = chat(max_tokens=9)
    with one.run(budgets=[Budget(llm_calls=3)]) as run:
        model.batch(["Hello"] * 5, {"callbacks": [handler]}, return_exceptions=True)
        aio(model.abatch(["Hello"] * 5, {"callbacks": [handler]}, return_exceptions=True))
    assert provider.request_count == 3
    assert run.summary().total.calls == 3


def test_a_copied_context_sees_the_run_too(provider, chat, one):
    handler = ClevAgentCallbackHandler(watchdog=one)
    with one.run() as run:
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(chat(max_tokens=9).invoke, "Hello", {"callbacks": [handler]})
        )
        thread.start()
        thread.join()
    assert run.summary().total.calls == 1
