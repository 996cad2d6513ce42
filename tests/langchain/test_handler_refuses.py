"""A refusal leaves every way of calling a model, and nothing is sent after it."""

from __future__ import annotations

import asyncio
import threading
from typing import Annotated, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import ToolException, tool
from langchain_openai import OpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Send
from pydantic import BaseModel

from clevagent import Budget, BudgetExceeded, ToolCall, UsageError
from clevagent.testing import FakeClock, Reply
from clevagent_core.calls import LLMCall
from clevagent_langchain import ClevAgentCallbackHandler

pytestmark = [
    pytest.mark.filterwarnings("ignore:astream_log is deprecated"),
    # Both are LangChain's own: a parsed answer that is written back into the message, and counts that OpenAI's SDK leaves empty.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected type for token usage:UserWarning"),
]

ONE = Budget(llm_calls=1, per="lifetime")


class Answer(BaseModel):
    """An answer."""

    text: str


@tool
def lookup(word: str) -> str:
    """Look a word up."""
    return word


class State(TypedDict):
    messages: Annotated[list, add_messages]


def graph_of(model, *, is_async=False):
    def node(state):
        return {"messages": [model.invoke(state["messages"])]}

    async def anode(state):
        return {"messages": [await model.ainvoke(state["messages"])]}

    builder = StateGraph(State)
    builder.add_node("think", anode if is_async else node)
    builder.add_edge(START, "think")
    builder.add_edge("think", END)
    return builder.compile()


def plain(model):
    return model


def chain(model):
    return ChatPromptTemplate.from_messages([("human", "{text}")]) | model | StrOutputParser()


def invoke(target, text, config):
    target.invoke(text, config)


def stream(target, text, config):
    for _ in target.stream(text, config):
        pass


def batch(target, text, config):
    target.batch([text], config)


def batch_as_completed(target, text, config):
    list(target.batch_as_completed([text], config))


def transform(target, text, config):
    for _ in target.transform(iter([text]), config):
        pass


async def ainvoke(target, text, config):
    await target.ainvoke(text, config)


async def astream(target, text, config):
    async for _ in target.astream(text, config):
        pass


async def abatch(target, text, config):
    await target.abatch([text], config)


async def invoke_inside_a_loop(target, text, config):
    target.invoke(text, config)


async def astream_events_v2(target, text, config):
    async for _ in target.astream_events(text, config, version="v2"):
        pass


async def astream_events_v3(target, text, config):
    events = await target.astream_events(text, config, version="v3")
    async for _ in events:
        pass


def stream_events_v3(target, text, config):
    for _ in target.stream_events(text, config, version="v3"):
        pass


async def astream_log(target, text, config):
    async for _ in target.astream_log(text, config):
        pass


WAYS = [
    invoke, stream, batch, batch_as_completed, transform, stream_events_v3,
    ainvoke, astream, abatch, invoke_inside_a_loop, astream_events_v2, astream_events_v3, astream_log,
]  # fmt: skip


def go(aio, way, *args):
    result = way(*args)
    if asyncio.iscoroutine(result):
        aio(result)


def passes_once_then_refuses(aio, provider, way, target, text, config):
    go(aio, way, target, text, config)
    assert provider.request_count == 1
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            go(aio, way, target, text, config)
    assert provider.request_count == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", [plain, chain])
def test_every_way_to_call_passes_once_and_is_then_refused(aio, provider, chat, watchdog, way, target):
    if target is chain and way in (astream_events_v3, stream_events_v3):
        pytest.skip("LangChain has v3 events for models and graphs only")
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    text = {"text": "Hello"} if target is chain else "Hello"
    passes_once_then_refuses(aio, provider, way, target(chat(max_tokens=9)), text, {"callbacks": [handler]})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_anthropic(aio, provider, anthropic, watchdog, way):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    passes_once_then_refuses(aio, provider, way, anthropic(max_tokens=9), "Hello", {"callbacks": [handler]})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_the_responses_api(aio, provider, chat, watchdog, way):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    passes_once_then_refuses(aio, provider, way, chat(use_responses_api=True, max_tokens=9), "Hello", {"callbacks": [handler]})


@pytest.mark.parametrize("way", [invoke, stream, batch, ainvoke, astream, abatch])
def test_every_way_to_call_a_text_completion_model(aio, provider, watchdog, way):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    model = OpenAI(model="gpt-3.5-turbo-instruct", api_key="test", base_url=provider.openai_url, max_retries=0, max_tokens=9)
    passes_once_then_refuses(aio, provider, way, model, "Hello", {"callbacks": [handler]})


@pytest.mark.slow
@pytest.mark.parametrize("way", [invoke, ainvoke, stream, astream])
@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(aio, provider, chat, watchdog, way, include_raw, method):
    provider.reset([Reply(text='{"text": "ok"}', tool_calls=[("Answer", {"text": "ok"})] if method == "function_calling" else ())])
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    target = chat(max_tokens=9).with_structured_output(Answer, method=method, include_raw=include_raw)
    passes_once_then_refuses(aio, provider, way, target, "Hello, as JSON", {"callbacks": [handler]})


@pytest.mark.parametrize("way", WAYS)
def test_bound_tools(aio, provider, chat, watchdog, way):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    passes_once_then_refuses(aio, provider, way, chat(max_tokens=9).bind_tools([lookup]), "Hello", {"callbacks": [handler]})


@pytest.mark.parametrize(
    "way", [invoke, stream, batch, ainvoke, astream, abatch, astream_events_v2, astream_events_v3, stream_events_v3]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_graph_nodes(aio, provider, chat, watchdog, way, is_async):
    if is_async and not asyncio.iscoroutinefunction(way):
        pytest.skip("LangGraph refuses to run an async node in a sync call")
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    graph = graph_of(chat(max_tokens=9), is_async=is_async)
    passes_once_then_refuses(aio, provider, way, graph, {"messages": [HumanMessage("Hello")]}, {"callbacks": [handler]})


@pytest.mark.parametrize(
    "way", [invoke, stream, batch, ainvoke, astream, abatch, astream_events_v2, astream_events_v3, stream_events_v3]
)
def test_agents(aio, provider, chat, watchdog, way):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))
    agent = create_agent(chat(max_tokens=9), [lookup])
    passes_once_then_refuses(aio, provider, way, agent, {"messages": [HumanMessage("Hello")]}, {"callbacks": [handler]})


def test_generate_with_two_prompts_refused_at_the_second_sends_neither(provider, chat, watchdog):
    # On a thread, the second waits for what the first holds, which is in vain here.
    one = watchdog(budgets=[Budget(llm_calls=1)], clock=FakeClock(auto_advance=True))
    handler = ClevAgentCallbackHandler(watchdog=one)
    with one.run() as run, pytest.raises(BudgetExceeded):
        chat(max_tokens=9).generate([[HumanMessage("a")], [HumanMessage("b")]], callbacks=[handler])
    assert provider.request_count == 0
    assert run.summary().total.calls == 0
    assert one.ledger.holds() == []


def test_generate_with_two_prompts_is_told_two_ends(provider, chat, watchdog, balance):
    one = watchdog(budgets=[Budget(usd=1, per="lifetime")])
    chat(max_tokens=9).generate([[HumanMessage("a")], [HumanMessage("bb")]], callbacks=[ClevAgentCallbackHandler(watchdog=one)])
    assert provider.request_count == 2
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)


def test_agenerate_with_two_prompts_refused_at_the_second(aio, provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=1)])

    async def work():
        with one.run() as run, pytest.raises(BudgetExceeded):
            await chat(max_tokens=9).agenerate(
                [[HumanMessage("a")], [HumanMessage("b")]], callbacks=[ClevAgentCallbackHandler(watchdog=one)]
            )
        return run

    run = aio(work())
    assert provider.request_count == 0
    assert run.summary().total.calls == 0
    assert one.ledger.holds() == []


def test_batch_sends_no_more_than_fit(provider, chat, watchdog):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(llm_calls=2, per="lifetime")]))
    answers = chat(max_tokens=9).batch(["Hello"] * 10, {"callbacks": [handler]}, return_exceptions=True)
    assert provider.request_count == 2
    assert sum(isinstance(answer, BudgetExceeded) for answer in answers) == 8


def test_abatch_sends_no_more_than_fit(aio, provider, chat, watchdog):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(llm_calls=2, per="lifetime")]))
    answers = aio(chat(max_tokens=9).abatch(["Hello"] * 10, {"callbacks": [handler]}, return_exceptions=True))
    assert provider.request_count == 2
    assert sum(isinstance(answer, BudgetExceeded) for answer in answers) == 8


class Fan(TypedDict):
    done: Annotated[list, lambda left, right: left + right]


def fan_out(model, width):
    def branch(state):
        try:
            return {"done": [model.invoke("Hello").content]}
        except BudgetExceeded:
            return {"done": []}

    builder = StateGraph(Fan)
    builder.add_node("start", lambda state: {"done": []})
    builder.add_node("branch", branch)
    builder.add_edge(START, "start")
    builder.add_conditional_edges("start", lambda state: [Send("branch", {}) for _ in range(width)], ["branch"])
    return builder.compile()


@pytest.mark.slow
@pytest.mark.parametrize("way", [invoke, ainvoke])
def test_fan_out_of_fifty_sends_no_more_than_fit(aio, provider, chat, watchdog, way):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(llm_calls=10)]))
    go(aio, way, fan_out(chat(max_tokens=9), 50), {"done": []}, {"callbacks": [handler]})
    assert provider.request_count == 10


@pytest.mark.parametrize("way", [invoke, ainvoke])
def test_fan_out_whose_branches_raise_ends_with_the_refusal(aio, provider, chat, watchdog, way):
    model = chat(max_tokens=9)
    builder = StateGraph(Fan)
    builder.add_node("start", lambda state: {"done": []})
    builder.add_node("branch", lambda state: {"done": [model.invoke("Hello").content]})
    builder.add_edge(START, "start")
    builder.add_conditional_edges("start", lambda state: [Send("branch", {}) for _ in range(6)], ["branch"])
    one = watchdog(budgets=[Budget(llm_calls=1)])
    with pytest.raises(BudgetExceeded):
        go(aio, way, builder.compile(), {"done": []}, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert provider.request_count == 1
    assert one.ledger.holds() == []


def test_parallel_branches_of_a_chain(provider, chat, watchdog):
    model = chat(max_tokens=9)
    both = RunnableParallel(a=model, b=model, c=model)
    with pytest.raises(BudgetExceeded):
        both.invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(budgets=[ONE]))]})
    assert provider.request_count == 1


# -- tools ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [invoke, ainvoke])
def test_a_refused_tool_is_not_run(aio, watchdog, way):
    ran = []

    @tool
    def act(word: str) -> str:
        """Act."""
        ran.append(word)
        return word

    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(tool_calls=1, per="lifetime")]))
    go(aio, way, act, {"word": "a"}, {"callbacks": [handler]})
    with pytest.raises(BudgetExceeded):
        go(aio, way, act, {"word": "b"}, {"callbacks": [handler]})
    assert ran == ["a"]


def test_a_tool_that_handles_its_errors_does_not_handle_a_refusal(watchdog):
    ran = []

    @tool
    def act(word: str) -> str:
        """Act."""
        ran.append(word)
        raise ToolException("no")

    act.handle_tool_error = True
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(tool_calls=1, per="lifetime")]))
    assert act.invoke({"word": "a"}, {"callbacks": [handler]}) == "no"
    with pytest.raises(BudgetExceeded):
        act.invoke({"word": "b"}, {"callbacks": [handler]})
    assert ran == ["a"]


def test_a_guard_sees_a_tool_and_its_arguments(watchdog):
    seen = []

    class Watch:
        def clevagent_before_call(self, run, call):
            seen.append(call)

    from clevagent import hookimpl

    Watch.clevagent_before_call = hookimpl(Watch.clevagent_before_call)
    lookup.invoke({"word": "a"}, {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(plugins=[Watch()]))]})
    assert [(type(call), call.tool, call.arguments) for call in seen] == [(ToolCall, "lookup", {"word": "a"})]


@pytest.mark.parametrize("way", [invoke, ainvoke])
def test_an_agent_stops_when_its_tools_calls_are_used_up(aio, provider, chat, watchdog, way):
    ran = []

    @tool
    def act(word: str) -> str:
        """Act."""
        ran.append(word)
        return word

    provider.reset([Reply(tool_calls=[("act", {"word": "a"})])])
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(tool_calls=2)]))
    with pytest.raises(BudgetExceeded):
        go(aio, way, create_agent(chat(max_tokens=9), [act]), {"messages": [HumanMessage("Hello")]}, {"callbacks": [handler]})
    assert (len(ran), provider.request_count) == (2, 3)


@pytest.mark.parametrize("way", [invoke, ainvoke])
def test_an_agent_inside_a_tool_of_an_agent_counts_against_the_same_run(aio, provider, chat, watchdog, way):
    inner = create_agent(chat(max_tokens=9), [])

    @tool
    def delegate(task: str) -> str:
        """Delegate."""
        return inner.invoke({"messages": [HumanMessage(task)]})["messages"][-1].text

    @tool
    async def delegate_async(task: str) -> str:
        """Delegate."""
        return (await inner.ainvoke({"messages": [HumanMessage(task)]}))["messages"][-1].text

    act = delegate if way is invoke else delegate_async
    # Only the outer agent is given tools.
    provider.reset(lambda body: Reply(tool_calls=[(act.name, {"task": "t"})]) if body.get("tools") else Reply())
    one = watchdog(budgets=[Budget(llm_calls=3)])
    with pytest.raises(BudgetExceeded) as caught:
        go(
            aio,
            way,
            create_agent(chat(max_tokens=9), [act]),
            {"messages": [HumanMessage("Hi")]},
            {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]},
        )
    assert provider.request_count == 3
    assert caught.value.spent + caught.value.held == 3
    assert one.ledger.holds() == []


def test_raw_threads_that_are_given_the_handler(provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=3, per="lifetime")])
    model = chat(max_tokens=9, callbacks=[ClevAgentCallbackHandler(watchdog=one)])
    refused = []

    def work():
        try:
            model.invoke("Hello")
        except BudgetExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (provider.request_count, len(refused)) == (3, 7)


# -- why the handler is what it is ----------------------------------------------------------------------------------------


class Refuse(BaseCallbackHandler):
    def on_chat_model_start(self, *args, **kwargs):
        raise RuntimeError("refused")


class RefuseAsync(AsyncCallbackHandler):
    raise_error = True

    async def on_chat_model_start(self, *args, **kwargs):
        raise RuntimeError("refused")


@pytest.mark.parametrize("kind", [Refuse, RefuseAsync])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_langchain_lets_the_call_go_when_such_a_handler_refuses(provider, chat, kind):
    chat(max_tokens=9).invoke("Hello", {"callbacks": [kind()]})
    assert provider.request_count == 1


def test_ours_raises_and_runs_inline():
    handler = ClevAgentCallbackHandler()
    assert (handler.raise_error, handler.run_inline) == (True, True)
    assert not isinstance(handler, AsyncCallbackHandler)


def test_a_retriever_a_retry_and_events_of_users_are_not_asked_for():
    handler = ClevAgentCallbackHandler()
    assert (handler.ignore_retriever, handler.ignore_retry, handler.ignore_custom_event) == (True, True, True)
    assert not (handler.ignore_llm or handler.ignore_chat_model or handler.ignore_chain or handler.ignore_agent)


def test_a_model_without_a_price_is_refused_under_a_budget_in_dollars(provider, chat, watchdog):
    handler = ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(usd=1, per="lifetime")]))
    with pytest.raises(UsageError, match="nobody-knows-this"):
        chat(model="nobody-knows-this", max_tokens=9).invoke("Hello", {"callbacks": [handler]})
    assert provider.request_count == 0


def test_a_chain_that_calls_no_model_is_not_refused(watchdog):
    one = watchdog(budgets=[ONE])
    handler = ClevAgentCallbackHandler(watchdog=one)
    assert [RunnableLambda(lambda text: text).invoke("Hello", {"callbacks": [handler]}) for _ in range(3)] == ["Hello"] * 3


def test_a_decision_model_is_asked_for_as_a_chain_of_type_llm(watchdog):
    """langchain-core 1.8 tells of decision models so; played here because 1.7 has none."""
    from uuid import uuid4

    one = watchdog(budgets=[ONE])
    handler = ClevAgentCallbackHandler(watchdog=one)
    first = uuid4()
    handler.on_chain_start(
        {"name": "decider"}, {"question": "?"}, run_id=first, run_type="llm", metadata={"ls_model_name": "gpt-4o"}
    )
    handler.on_chain_end({}, run_id=first)
    with pytest.raises(BudgetExceeded):
        handler.on_chain_start(
            {"name": "decider"}, {"question": "?"}, run_id=uuid4(), run_type="llm", metadata={"ls_model_name": "gpt-4o"}
        )
    summary = one.process_run.summary()
    assert (summary.by_model["gpt-4o"].calls, summary.calls_charged_at_bound, summary.refusals) == (1, 1, 1)


def test_history_of_messages_is_described_as_it_is_sent(provider, chat, watchdog):
    from clevagent import hookimpl

    seen: list[LLMCall] = []

    class Watch:
        @hookimpl
        def clevagent_before_call(self, run, call):
            seen.append(call)

    history = [
        HumanMessage("Hello"),
        AIMessage("", tool_calls=[{"name": "lookup", "args": {"word": "a"}, "id": "1"}]),
    ]
    handler = ClevAgentCallbackHandler(watchdog=watchdog(plugins=[Watch()], budgets=[Budget(usd=1)]))
    chat(max_tokens=9).invoke(history[:1], {"callbacks": [handler]})
    call = seen[0]
    assert (call.model, call.input, call.max_output_tokens, call.answers) == ("gpt-4o", ["Hello"], 9, 1)
