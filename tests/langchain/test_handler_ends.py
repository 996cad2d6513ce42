"""Every call that was let go is settled, released or charged in the end, whatever became of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListLLM, GenericFakeChatModel
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from clevagent import Budget, BudgetExceeded
from clevagent.testing import FakeClock, LoopbackProvider, Reply
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langchain.tracker import tracker_of

HELLO = {"messages": [HumanMessage("Hello")]}
MONEY = Budget(usd=1, per="lifetime")

both = pytest.mark.parametrize("is_async", [False, True])


@pytest.fixture
def one(watchdog):
    return watchdog(budgets=[MONEY])


@pytest.fixture
def config(one):
    return {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}


@pytest.fixture
def ends(one, balance):
    """What became of the calls: spent and held in pico-USD, how many were charged at their bound, what is still remembered."""

    def read():
        return balance(one).spent, balance(one).held, one.process_run.summary().calls_charged_at_bound, tracker_of(one).size()

    return read


def run(aio, is_async, target, value, config):
    return aio(target.ainvoke(value, config)) if is_async else target.invoke(value, config)


async def cancel_when_sent(provider, awaitable):
    """Start it, wait until the provider has the request, cancel it."""
    task = asyncio.ensure_future(awaitable)
    assert await asyncio.to_thread(provider.wait_for_requests)
    while not task.done():
        # Before Python 3.12 asyncio.wait_for, through which langchain-openai reads each piece, swallows one that comes with a piece.
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
    with pytest.raises(asyncio.CancelledError):
        await task


MINUTE_S = 60.0


@contextlib.asynccontextmanager
async def time_is_up_when_sent(provider):
    """Let a minute pass on the clock of the event loop as soon as the provider has the request: the SDK gives up much later."""
    loop = asyncio.get_running_loop()
    time = loop.time

    async def pass_a_minute():
        assert await asyncio.to_thread(provider.wait_for_requests)
        loop.time = lambda: time() + MINUTE_S

    passing = asyncio.create_task(pass_a_minute())
    try:
        yield
    finally:
        await passing
        loop.time = time


# -- settled --------------------------------------------------------------------------------------------------------------


@both
def test_an_answer_is_settled_to_its_usage(aio, provider, chat, config, ends, is_async):
    run(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert ends() == (provider.billed_pico, 0, 0, 0)
    assert provider.billed_pico > 0


@both
def test_a_parser_that_fails_comes_after_the_answer_was_settled(aio, provider, chat, config, balance, one, is_async):
    chain = chat(max_tokens=9) | RunnableLambda(lambda message: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(aio, is_async, chain, "Hello", config)
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)


def test_usage_that_an_sdk_error_carries_is_settled(provider, chat, config, ends):
    """OpenAI's parse() raises after the answer was billed, and its error holds the completion."""
    from pydantic import BaseModel

    class Answer(BaseModel):
        text: str

    class LengthLimited(Exception):
        def __init__(self, usage):
            self.completion = type("Completion", (), {"usage": usage})()

    class Usage:
        prompt_tokens = 5
        completion_tokens = 9

    model = chat(max_tokens=9)

    class Raising(type(model)):
        def _generate(self, *args, **kwargs):
            raise LengthLimited(Usage())

    with pytest.raises(LengthLimited):
        Raising(model="gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=9).invoke("Hello", config)
    assert ends() == (5 * 2_500_000 + 9 * 10_000_000, 0, 0, 0)


# -- released -------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_a_status_that_refuses_the_request_costs_nothing(aio, provider, chat, config, ends, is_async, status):
    provider.reset([Reply(status=status)])
    with pytest.raises(Exception, match=str(status)):
        run(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert provider.request_count == 1
    assert ends() == (0, 0, 0, 0)


@both
@pytest.mark.parametrize("status", [400, 429, 500])
def test_the_same_at_anthropic(aio, provider, anthropic, config, ends, is_async, status):
    provider.reset([Reply(status=status)])
    with pytest.raises(Exception, match=str(status)):
        run(aio, is_async, anthropic(max_tokens=9), "Hello", config)
    assert ends() == (0, 0, 0, 0)


@both
def test_nobody_listens_costs_nothing(aio, chat, config, ends, is_async):
    with LoopbackProvider() as closed:
        url = closed.openai_url
    with pytest.raises(Exception, match="Connection error"):
        run(aio, is_async, chat(max_tokens=9, base_url=url), "Hello", config)
    assert ends() == (0, 0, 0, 0)


# -- charged --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
@pytest.mark.parametrize("reply", [Reply(hang=True), Reply(drop="before"), Reply(drop="middle")], ids=["hang", "before", "middle"])
def test_a_timeout_or_a_dropped_connection_may_have_been_billed(aio, provider, chat, config, ends, is_async, reply):
    provider.reset([reply])
    with pytest.raises(Exception, match=r"timed out|Connection error|incomplete|closed|peer"):
        run(aio, is_async, chat(max_tokens=9, timeout=0.2 if reply.hang else 5), "Hello", config)
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent >= provider.billed_pico > 0


@both
@pytest.mark.parametrize("status", [408, 502, 504])
def test_a_gateway_that_gave_up_may_have_been_billed(aio, provider, chat, config, ends, is_async, status):
    provider.reset([Reply(status=status)])
    with pytest.raises(Exception, match=str(status)):
        run(aio, is_async, chat(max_tokens=9), "Hello", config)
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent > 0


def test_a_keyboard_interrupt_inside_the_model_is_charged(provider, chat, config, ends):
    def interrupt_it(body):
        raise AssertionError("nothing is sent")

    provider.reset(interrupt_it)
    model = chat(max_tokens=9)

    class Interrupted(type(model)):
        def _generate(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(model="gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=9).invoke("Hello", config)
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent > 0


# -- streams --------------------------------------------------------------------------------------------------------------


@both
def test_a_stream_that_drops_in_the_middle_is_charged(aio, provider, chat, config, ends, is_async):
    provider.reset([Reply(text="0123456789", chunks=10, drop="middle")])

    async def aread():
        async for _ in chat(max_tokens=9, stream_usage=True).astream("Hello", config):
            pass

    with pytest.raises(Exception, match=r"closed|incomplete|Connection|peer"):
        if is_async:
            aio(aread())
        else:
            list(chat(max_tokens=9, stream_usage=True).stream("Hello", config))
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent >= provider.billed_pico > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "break", "collect", "raise"])
def test_a_stream_broken_off_is_charged(provider, chat, config, ends, how):
    provider.reset([Reply(text="0123456789", chunks=10)])
    stream = chat(max_tokens=9, stream_usage=True).stream("Hello", config)
    if how == "raise":
        with pytest.raises(ZeroDivisionError):
            for _ in stream:
                raise ZeroDivisionError
        stream.close()
    elif how == "break":
        for _ in stream:
            break
        del stream
    else:
        next(stream)
        if how == "close":
            stream.close()
        del stream
    gc.collect()
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent >= provider.billed_pico > 0


@pytest.mark.parametrize("how", ["aclose", "cancel"])
def test_an_async_stream_broken_off_is_charged(aio, provider, chat, config, ends, how):
    provider.reset([Reply(text="0123456789", chunks=10, chunk_delay_s=60 if how == "cancel" else 0)])

    async def work():
        stream = chat(max_tokens=9, stream_usage=True).astream("Hello", config)
        if how == "aclose":
            await anext(stream)
            await stream.aclose()
        else:

            async def read():
                async for _ in stream:
                    pass

            await cancel_when_sent(provider, read())

    aio(work())
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent >= provider.billed_pico > 0


def test_a_stream_that_was_never_begun_costs_nothing(provider, chat, config, ends):
    chat(max_tokens=9).stream("Hello", config).close()
    assert provider.request_count == 0
    assert ends() == (0, 0, 0, 0)


@pytest.mark.slow
def test_langchain_drains_a_closed_chain_stream_to_its_end_and_it_is_settled(provider, chat, config, balance, one):
    provider.reset([Reply(text="0123456789", chunks=10)])
    stream = (chat(max_tokens=9, stream_usage=True) | StrOutputParser()).stream("Hello", config)
    next(stream)
    stream.close()
    gc.collect()
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0


# -- no end is ever told --------------------------------------------------------------------------------------------------


@pytest.fixture
def clocked(watchdog):
    """A watchdog with a clock that the test moves, and calls that are given up after a minute."""
    clock = FakeClock()
    return clock, watchdog(clock=clock, hold_s=60, budgets=[MONEY])


def give_up(clock, one):
    clock.advance(61)
    one.expire(clock.monotonic())


def cancelled(provider, model, config):
    return cancel_when_sent(provider, model.ainvoke("Hello", config))


async def waited_for(provider, model, config):
    with pytest.raises(TimeoutError):
        async with time_is_up_when_sent(provider):
            await asyncio.wait_for(model.ainvoke("Hello", config), MINUTE_S)


async def timed_out(provider, model, config):
    with pytest.raises(TimeoutError):
        async with time_is_up_when_sent(provider), asyncio.timeout(MINUTE_S):
            await model.ainvoke("Hello", config)


async def batched(provider, model, config):
    await cancel_when_sent(provider, model.abatch(["Hello"], config))


GIVEN_UP = [cancelled, waited_for, timed_out, batched]


def nothing_is_open(one, balance):
    return balance(one).held == 0 and tracker_of(one).size() == 0 and not one.process_run.open_work


@pytest.mark.parametrize("way", GIVEN_UP)
def test_a_bare_call_that_was_cancelled_is_charged_at_once(aio, provider, chat, one, config, balance, way):
    provider.reset([Reply(hang=True)])
    aio(way(provider, chat(max_tokens=9), config))
    assert nothing_is_open(one, balance)
    assert one.process_run.summary().calls_charged_at_bound == 1
    assert balance(one).spent >= provider.billed_pico > 0


@pytest.mark.parametrize("way", GIVEN_UP)
def test_and_inside_its_run_too(aio, provider, chat, one, config, balance, way):
    provider.reset([Reply(hang=True)])

    async def work():
        with one.run() as run:
            await way(provider, chat(max_tokens=9), config)
            assert nothing_is_open(one, balance)
            assert run.summary().calls_charged_at_bound == 1
            assert balance(one).spent >= provider.billed_pico > 0

    aio(work())


def test_calls_that_are_cancelled_one_after_the_other_do_not_keep_the_next_one_waiting(aio, provider, chat, watchdog, balance):
    one = watchdog(budgets=[Budget(llm_calls=3, per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}

    async def work():
        for _ in range(3):
            provider.reset([Reply(hang=True)])
            await cancelled(provider, chat(max_tokens=9), config)
        provider.reset()
        with pytest.raises(BudgetExceeded, match="has spent 3"):
            await chat(max_tokens=9).ainvoke("Hello", config)

    aio(work())
    assert provider.request_count == 0


def test_a_call_that_is_cancelled_beside_others_ends_alone(aio, provider, chat, one, config, balance):
    provider.reset(lambda body: Reply(hang=True) if "first" in str(body) else Reply())

    async def work():
        model = chat(max_tokens=9)
        first = asyncio.ensure_future(model.ainvoke("the first", config))
        assert await asyncio.to_thread(provider.wait_for_requests)
        await asyncio.gather(*(model.ainvoke(f"number {number}", config) for number in range(3)))
        assert balance(one).held > 0
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    aio(work())
    assert nothing_is_open(one, balance)
    assert one.process_run.summary().calls_charged_at_bound == 1
    assert one.process_run.summary().total.calls == 4


@pytest.mark.parametrize("kind", [GenericFakeChatModel, FakeListLLM])
def test_what_raises_before_anything_is_sent_gives_everything_back(aio, watchdog, balance, kind):
    one = watchdog(budgets=[Budget(llm_calls=9, per="lifetime")])
    model = kind(messages=iter(["a", "b"])) if kind is GenericFakeChatModel else kind(responses=["a", "b"])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one), Broken()]}
    sent = [[HumanMessage("a")], [HumanMessage("b")]] if kind is GenericFakeChatModel else ["a", "b"]
    with pytest.raises(RuntimeError, match="broken"):
        model.generate(sent, **config)
    with pytest.raises(RuntimeError, match="broken"):
        aio(model.agenerate(sent, **config))
    assert nothing_is_open(one, balance)
    assert balance(one).spent == 0
    assert one.process_run.summary().total.calls == 0


@pytest.mark.parametrize("way", GIVEN_UP)
@pytest.mark.parametrize("kind", ["chain", "graph"])
def test_and_inside_a_chain_or_a_graph(aio, provider, chat, one, config, balance, way, kind):
    provider.reset([Reply(hang=True)])
    model = chat(max_tokens=9)
    if kind == "chain":
        target = model | StrOutputParser()
    else:

        async def think(state):
            return {"messages": [await model.ainvoke("Hello")]}

        builder = StateGraph(dict)
        builder.add_node("think", think)
        builder.add_edge(START, "think")
        builder.add_edge("think", END)
        graph = builder.compile()
        target = RunnableLambda(lambda text: {"text": text}) | graph
    aio(way(provider, target, config))
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0
    assert tracker_of(one).size() == 0


@pytest.mark.slow
def test_a_call_given_up_inside_a_node_that_goes_on_is_charged_at_once(aio, provider, chat, one, config, balance):
    provider.reset([Reply(hang=True), Reply()])
    spent = []

    async def think(state):
        model = chat(max_tokens=9)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await model.ainvoke("Hello")
        spent.append(balance(one).spent)
        return {}

    builder = StateGraph(MessagesState)
    builder.add_node("think", think)
    builder.add_edge(START, "think")
    aio(builder.compile().ainvoke(HELLO, config))
    assert balance(one).held == 0
    assert balance(one).spent == spent[0] >= provider.billed_pico > 0


@pytest.mark.slow
def test_a_chain_stream_that_is_closed(aio, provider, chat, clocked, balance):
    """Nothing is told when it is closed; where the loop lives on, the generators inside are closed by it, and tell."""
    clock, one = clocked
    provider.reset([Reply(text="0123456789", chunks=10, chunk_delay_s=0.001)])

    async def work():
        stream = (chat(max_tokens=9, stream_usage=True) | StrOutputParser()).astream(
            "Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
        )
        await anext(stream)
        await stream.aclose()

    aio(work())
    gc.collect()
    give_up(clock, one)
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0


@pytest.mark.slow
@both
def test_v3_events_that_are_abandoned(aio, provider, chat, clocked, balance, is_async):
    clock, one = clocked
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    provider.reset([Reply(text="0123456789", chunks=10, chunk_delay_s=0.001)])
    model = chat(max_tokens=9, stream_usage=True)

    async def work():
        events = await model.astream_events("Hello", config, version="v3")
        async for _ in events:
            break

    if is_async:
        aio(work())
    else:
        for _ in model.stream_events("Hello", config, version="v3"):
            break
    gc.collect()
    give_up(clock, one)
    assert provider.request_count == 1
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0


class Broken(BaseCallbackHandler):
    """Another handler, which raises after ours let the call go."""

    raise_error = True

    def on_chat_model_start(self, *args, **kwargs):
        raise RuntimeError("broken")

    def on_llm_start(self, *args, **kwargs):
        raise RuntimeError("broken")


@both
def test_another_handler_that_raises_after_ours(aio, provider, chat, one, balance, is_async):
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one), Broken()]}
    with pytest.raises(RuntimeError, match="broken"):
        run(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert provider.request_count == 0
    assert nothing_is_open(one, balance)
    assert balance(one).spent == 0


@both
def test_another_handler_that_raises_after_ours_inside_a_chain(aio, provider, chat, one, balance, is_async):
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one), Broken()]}
    with pytest.raises(RuntimeError, match="broken"):
        run(aio, is_async, chat(max_tokens=9) | StrOutputParser(), "Hello", config)
    assert provider.request_count == 0
    assert (balance(one).held, tracker_of(one).size()) == (0, 0)


class BrokenChain(BaseCallbackHandler):
    """Another handler, which raises after ours began a run for a chain."""

    raise_error = True

    def on_chain_start(self, *args, **kwargs):
        raise RuntimeError("broken")


@both
def test_another_handler_that_raises_when_a_chain_starts(aio, provider, chat, watchdog, is_async):
    """Nobody ends such a chain: its run stays open until the watchdog is shut down, and holds nothing."""
    one = watchdog(budgets=[MONEY])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one), BrokenChain()]}
    with pytest.raises(RuntimeError, match="broken"):
        run(aio, is_async, chat(max_tokens=9) | StrOutputParser(), "Hello", config)
    assert provider.request_count == 0
    assert one.ledger.holds() == []
    one.shutdown()
    assert not one._active


@both
def test_another_handler_that_raises_before_ours(aio, provider, chat, one, balance, is_async):
    """In async calls ours runs first, because it runs inline."""
    config = {"callbacks": [Broken(), ClevAgentCallbackHandler(watchdog=one)]}
    with pytest.raises(RuntimeError, match="broken"):
        run(aio, is_async, chat(max_tokens=9) | StrOutputParser(), "Hello", config)
    assert provider.request_count == 0
    assert (balance(one).held, tracker_of(one).size()) == (0, 0)


class Deaf(BaseCallbackHandler):
    """Another handler, which raises when a call has ended."""

    raise_error = True

    def on_llm_end(self, *args, **kwargs):
        raise RuntimeError("too late")


@both
@pytest.mark.parametrize("is_first", [False, True])
def test_another_handler_that_raises_at_the_end(aio, provider, chat, one, balance, is_async, is_first):
    ours = ClevAgentCallbackHandler(watchdog=one)
    handlers = [Deaf(), ours] if is_first else [ours, Deaf()]
    with pytest.raises(RuntimeError, match="too late"):
        run(aio, is_async, chat(max_tokens=9) | StrOutputParser(), "Hello", {"callbacks": handlers})
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0


class Nosy(BaseCallbackHandler):
    """Another handler, which raises at the first token."""

    raise_error = True

    def on_llm_new_token(self, *args, **kwargs):
        raise RuntimeError("nosy")


def test_a_stream_that_another_handler_stops_is_charged(provider, chat, config, ends):
    with pytest.raises(RuntimeError, match="nosy"):
        list(chat(max_tokens=9).stream("Hello", {"callbacks": [*config["callbacks"], Nosy()]}))
    spent, *rest = ends()
    assert rest == [0, 1, 0]
    assert spent >= provider.billed_pico > 0


# -- tools ----------------------------------------------------------------------------------------------------------------


@both
def test_a_tool_that_fails_did_run(aio, watchdog, balance, is_async):
    one = watchdog(budgets=[Budget(tool_calls=2, per="lifetime")])

    @tool
    def act(word: str) -> str:
        """Act."""
        raise ValueError(word)

    with pytest.raises(ValueError, match="a"):
        run(aio, is_async, act, {"word": "a"}, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert (balance(one).spent, balance(one).held) == (1, 0)
    assert one.process_run.summary().by_tool["act"].calls == 1


def test_a_cancelled_tool(aio, watchdog, balance):
    """langchain-core tells nothing up to 1.7.2, and an error from 1.8: it did run either way."""
    clock = FakeClock()
    one = watchdog(budgets=[Budget(tool_calls=2, per="lifetime")], clock=clock, hold_s=60)

    async def work():
        is_running = asyncio.Event()

        @tool
        async def act(word: str) -> str:
            """Act."""
            is_running.set()
            await asyncio.Event().wait()
            return word

        task = asyncio.ensure_future(act.ainvoke({"word": "a"}, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}))
        await is_running.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    aio(work())
    give_up(clock, one)
    assert (balance(one).spent, balance(one).held) == (1, 0)


# -- an interrupt is no failure -------------------------------------------------------------------------------------------


@both
def test_a_graph_that_is_interrupted_and_resumed(aio, provider, chat, one, config, balance, is_async):
    from langgraph.checkpoint.memory import InMemorySaver

    model = chat(max_tokens=9)

    def think(state):
        return {"messages": [model.invoke("Hello")]}

    def ask(state):
        return {"messages": [HumanMessage(interrupt("go on?"))]}

    builder = StateGraph(MessagesState)
    builder.add_node("think", think)
    builder.add_node("ask", ask)
    builder.add_edge(START, "think")
    builder.add_edge("think", "ask")
    builder.add_edge("ask", END)
    graph = builder.compile(checkpointer=InMemorySaver())
    config = {**config, "configurable": {"thread_id": "t"}}
    run(aio, is_async, graph, HELLO, config)
    assert (balance(one).spent, balance(one).held, tracker_of(one).size()) == (provider.billed_pico, 0, 0)
    run(aio, is_async, graph, Command(resume="yes"), config)
    assert provider.request_count == 1
    assert (balance(one).spent, balance(one).held, tracker_of(one).size()) == (provider.billed_pico, 0, 0)


# -- nothing piles up -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_remembered_of_what_has_ended(aio, provider, chat, one, config):
    model = chat(max_tokens=9)
    chain = RunnableLambda(lambda text: text) | model | StrOutputParser()
    for _ in range(20):
        chain.invoke("Hello", config)
        model.invoke("Hello", config)
        list(chain.stream("Hello", config))
    aio(chain.abatch(["Hello"] * 20, config))
    assert tracker_of(one).size() == 0
    assert one.ledger.holds() == []
    assert not one._active


@pytest.mark.slow
def test_what_no_end_is_told_of_is_forgotten_once_it_was_charged(aio, provider, chat, clocked):
    """Entries that runs or time have closed are swept out, so that a service that cancels does not grow."""
    from clevagent_langchain import handler as module

    clock, one = clocked
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one), Broken()]}
    model = chat(max_tokens=1)
    for number in range(module._SWEEP + 50):
        if number % 100 == 0:
            clock.advance(61)
        with pytest.raises(RuntimeError, match="broken"):
            model.invoke("Hello", config)
    assert tracker_of(one).size() <= module._SWEEP + 1


def test_a_refusal_leaves_nothing_behind(aio, provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=1, per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    model = chat(max_tokens=9)
    model.invoke("Hello", config)
    for _ in range(20):
        with pytest.raises(BudgetExceeded):
            (model | StrOutputParser()).invoke("Hello", config)
        with pytest.raises(BudgetExceeded):
            aio(model.ainvoke("Hello", config))
    assert tracker_of(one).size() == 0
    assert one.ledger.holds() == []


@pytest.mark.slow
def test_calls_from_many_threads_end_in_order(provider, chat, one, config, ends):
    model = chat(max_tokens=9)
    chain = RunnableLambda(lambda text: text) | model
    threads = [threading.Thread(target=chain.invoke, args=("Hello", config)) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent, held, charged, size = ends()
    assert (spent, held, charged, size) == (provider.billed_pico, 0, 0, 0)
