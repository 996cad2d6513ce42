"""A ceiling that fits ten calls, fifty tried: the plain handler, output limits set, no retries inside the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
from langchain_core.output_parsers import StrOutputParser
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Send

from clevagent import Budget, BudgetExceeded
from clevagent.testing import Reply
from clevagent_langchain import ClevAgentCallbackHandler

FITS, TRIED = 10, 50
LIMIT = 1000
PROMPT = "Tell me something."

IN, OUT = 2_500_000, 10_000_000
CEILING = FITS * ((len(PROMPT) + 24) * IN + LIMIT * OUT)
"""What ten calls can cost at most, in pico-USD: the prompt's bytes, what is added for the message and the call, the limit."""


@pytest.fixture
def one(watchdog):
    return watchdog(budgets=[Budget(usd=f"{CEILING / 10**12:.12f}", per="lifetime")])


@pytest.fixture
def config(one):
    return {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}


@pytest.fixture
def holds(provider, one, balance):
    """The ceiling held, it was used, and every unit that was billed is recorded."""

    def check(*, exact=True):
        state = balance(one)
        assert state.ceiling == CEILING
        assert provider.request_count == FITS
        assert provider.billed_pico <= CEILING
        assert provider.billed_pico >= 0.9 * CEILING
        assert state.held == 0
        if exact:
            assert state.spent == provider.billed_pico
        else:
            assert provider.billed_pico <= state.spent <= CEILING

    return check


def ask(target, config, **kwargs):
    try:
        target.invoke(PROMPT, config, **kwargs)
    except BudgetExceeded:
        return 0
    return 1


def test_one_after_the_other(chat, config, holds):
    model = chat(max_tokens=LIMIT)
    assert sum(ask(model, config) for _ in range(TRIED)) == FITS
    holds()


def test_one_after_the_other_at_anthropic(provider, anthropic, watchdog, balance):
    bound = FITS * ((len(PROMPT) + 24) * 3_000_000 + LIMIT * 15_000_000)
    one = watchdog(budgets=[Budget(usd=f"{bound / 10**12:.12f}", per="lifetime")])
    config, model = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}, anthropic(max_tokens=LIMIT)
    assert sum(ask(model, config) for _ in range(TRIED)) == FITS
    assert 0.9 * bound <= provider.billed_pico == balance(one).spent <= bound


@pytest.mark.slow
def test_tasks(aio, chat, config, holds):
    async def work():
        model = chat(max_tokens=LIMIT)
        return await asyncio.gather(*(model.ainvoke(PROMPT, config) for _ in range(TRIED)), return_exceptions=True)

    answers = aio(work())
    assert sum(isinstance(answer, BudgetExceeded) for answer in answers) == TRIED - FITS
    holds()


@pytest.mark.slow
def test_tasks_of_chains(aio, chat, config, holds):
    async def work():
        chain = chat(max_tokens=LIMIT) | StrOutputParser()
        return await asyncio.gather(*(chain.ainvoke(PROMPT, config) for _ in range(TRIED)), return_exceptions=True)

    assert sum(isinstance(answer, BudgetExceeded) for answer in aio(work())) == TRIED - FITS
    holds()


@pytest.mark.slow
def test_threads(chat, config, holds):
    model, went = chat(max_tokens=LIMIT), []
    barrier = threading.Barrier(TRIED)

    def work():
        barrier.wait()
        went.append(ask(model, config))

    threads = [threading.Thread(target=work) for _ in range(TRIED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(went) == FITS
    holds()


@pytest.mark.slow
def test_batch(chat, config, holds):
    answers = chat(max_tokens=LIMIT).batch([PROMPT] * TRIED, {**config, "max_concurrency": 20}, return_exceptions=True)
    assert sum(isinstance(answer, BudgetExceeded) for answer in answers) == TRIED - FITS
    holds()


@pytest.mark.slow
def test_abatch(aio, chat, config, holds):
    answers = aio(chat(max_tokens=LIMIT).abatch([PROMPT] * TRIED, config, return_exceptions=True))
    assert sum(isinstance(answer, BudgetExceeded) for answer in answers) == TRIED - FITS
    holds()


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_fan_out(aio, chat, config, holds, is_async):
    model = chat(max_tokens=LIMIT)

    def branch(state):
        ask(model, None)
        return {}

    builder = StateGraph(MessagesState)
    builder.add_node("start", lambda state: {})
    builder.add_node("branch", branch)
    builder.add_edge(START, "start")
    builder.add_conditional_edges("start", lambda state: [Send("branch", {}) for _ in range(TRIED)], ["branch"])
    builder.add_edge("branch", END)
    graph = builder.compile()
    if is_async:
        aio(graph.ainvoke({"messages": []}, config))
    else:
        graph.invoke({"messages": []}, config)
    holds()


@pytest.mark.parametrize("stream_usage", [False, True])
def test_streams_that_are_broken_off(provider, chat, config, holds, stream_usage):
    provider.reset([Reply(text="0123456789", chunks=10)])
    model = chat(max_tokens=LIMIT, stream_usage=stream_usage)
    for _ in range(TRIED):
        with contextlib.suppress(BudgetExceeded):
            stream = model.stream(PROMPT, config)
            next(stream)
            stream.close()
    holds(exact=False)


@pytest.mark.slow
def test_async_streams_that_are_broken_off(aio, provider, chat, config, holds):
    provider.reset([Reply(text="0123456789", chunks=10)])
    model = chat(max_tokens=LIMIT)

    async def one_of_them():
        stream = model.astream(PROMPT, config)
        await anext(stream)
        await stream.aclose()

    async def work():
        return await asyncio.gather(*(one_of_them() for _ in range(TRIED)), return_exceptions=True)

    assert sum(isinstance(answer, BudgetExceeded) for answer in aio(work())) == TRIED - FITS
    holds(exact=False)


def test_streams_that_are_read_to_the_end(chat, config, holds):
    model = chat(max_tokens=LIMIT, stream_usage=True)
    for _ in range(TRIED):
        with contextlib.suppress(BudgetExceeded):
            list(model.stream(PROMPT, config))
    holds()


def test_calls_that_are_cancelled(aio, provider, chat, one, config, balance):
    """Each may have been billed. Nobody tells the handler, so the money stays held until the run ends: never sent twice."""
    provider.reset([Reply(hang=True)])
    model = chat(max_tokens=LIMIT)

    async def work():
        with one.run():
            tasks = [asyncio.ensure_future(model.ainvoke(PROMPT, config)) for _ in range(TRIED)]
            await asyncio.to_thread(provider.wait_for_requests, FITS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert ask(model, config) == 0

    aio(work())
    assert provider.request_count == FITS
    assert 0.9 * CEILING <= provider.billed_pico <= balance(one).spent <= CEILING
    assert balance(one).held == 0


@pytest.mark.slow
def test_with_retry_and_with_fallbacks(chat, config, holds):
    target = chat(max_tokens=LIMIT).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    target = target.with_fallbacks([chat(max_tokens=LIMIT)])
    assert sum(ask(target, config) for _ in range(TRIED)) == FITS
    holds()
