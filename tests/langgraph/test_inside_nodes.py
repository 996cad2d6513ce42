"""What runs inside a node or a tool, at any depth, counts there: in budgets and in the bill, whoever sends it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

import clevagent
from clevagent import Budget, BudgetExceeded
from clevagent.testing import Reply
from clevagent_langchain import BudgetMiddleware
from clevagent_langgraph import monitored_node

PROMPT = "Hello"


@pytest.fixture
def client(provider):
    return clevagent.guard(openai.OpenAI(api_key="test", base_url=provider.openai_url, max_retries=0))


@pytest.fixture
def aclient(provider):
    return clevagent.guard(openai.AsyncOpenAI(api_key="test", base_url=provider.openai_url, max_retries=0))


def asked(text=PROMPT):
    return {"model": "gpt-4o", "max_tokens": 20, "messages": [{"role": "user", "content": text}]}


def rows(table):
    return {name: spend.calls for name, spend in table.items()}


def in_a_thread(call):
    errors = []

    def work():
        try:
            call()
        except BudgetExceeded as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def in_a_pool(call):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


WAYS = [pytest.param(lambda call: call(), id="here"), in_a_thread, in_a_pool]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_client_sends_in_a_node_is_the_nodes(client, provider, line, way):
    def writer(state):
        for _ in range(4):
            try:
                way(lambda: client.chat.completions.create(**asked()))
            except BudgetExceeded:
                break
        return {"texts": ["done"]}

    def reader(state):
        client.chat.completions.create(**asked())
        return {"texts": ["read"]}

    graph = clevagent.guard(line(reader, writer, saved=False), budgets=[Budget(llm_calls=2, node="writer")])
    with clevagent.run() as run:
        graph.invoke({"texts": []})
    assert provider.request_count == 3
    assert rows(run.summary().by_node) == {"reader": 1, "writer": 2}


def test_what_an_async_client_sends_in_the_tasks_of_a_node_is_the_nodes(aclient, provider, line, aio):
    async def writer(state):
        calls = (aclient.chat.completions.create(**asked()) for _ in range(5))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return {"texts": [type(answer).__name__ for answer in answers]}

    graph = clevagent.guard(line(writer, saved=False), budgets=[Budget(llm_calls=2, node="writer")])
    with clevagent.run() as run:
        state = aio(graph.ainvoke({"texts": []}))
    assert sorted(state["texts"]) == [*["BudgetExceeded"] * 3, *["ChatCompletion"] * 2]
    assert provider.request_count == 2
    assert rows(run.summary().by_node) == {"writer": 2}
    aio(aclient.close())


@pytest.mark.parametrize("is_subgraph", [True, False])
def test_a_ceiling_of_a_node_holds_for_the_agent_inside_it(chat, provider, line, is_subgraph):
    @tool
    def search(query: str) -> str:
        """Search."""
        return "nothing"

    def script(body):
        answered = sum(message["role"] == "tool" for message in body["messages"])
        return Reply(text="", tool_calls=[("search", {"query": f"q{answered}"})])

    provider.reset(script)
    agent = create_agent(clevagent.guard(chat()), [search])

    def researcher(state):
        return agent.invoke({"messages": [("user", PROMPT)]})

    builder = StateGraph(MessagesState)
    builder.add_node("researcher", agent if is_subgraph else researcher)
    builder.add_edge(START, "researcher")
    graph = clevagent.guard(builder.compile(), budgets=[Budget(llm_calls=2, node="researcher")])
    with clevagent.run() as run, pytest.raises(BudgetExceeded):
        graph.invoke({"messages": [("user", PROMPT)]})
    assert provider.request_count == 2
    assert rows(run.summary().by_node) == {"researcher/model": 2}


@pytest.mark.parametrize("door", ["handler", "middleware"])
def test_what_a_client_sends_in_a_tool_is_the_tools(chat, client, provider, door):
    @tool
    def search(query: str) -> str:
        """Search."""
        for _ in range(3):
            client.chat.completions.create(**asked(query))
        return "something"

    provider.reset([Reply(text="", tool_calls=[("search", {"query": "a"})]), Reply(text="x")])
    ceilings = [Budget(llm_calls=2, tool="search")]
    if door == "middleware":
        agent = create_agent(chat(), [search], middleware=[BudgetMiddleware(budgets=ceilings, on_exceed="raise")])
    else:
        clevagent.init(attach=["langchain"])
        agent = create_agent(chat(), [search])
    with clevagent.run(budgets=ceilings) as run, pytest.raises(BudgetExceeded):
        agent.invoke({"messages": [("user", PROMPT)]})
    assert provider.request_count == 3
    assert run.summary().by_tool["search"].cost_usd > 0


def test_a_tool_in_a_tool_counts_in_both(provider):
    with clevagent.run(budgets=[Budget(tool_calls=3, tool="outer")]) as run:
        with clevagent.tool_call("outer"):
            for _ in range(2):
                with clevagent.tool_call("inner"):
                    pass
            with pytest.raises(BudgetExceeded):
                clevagent.tool_call("inner").__enter__()
    assert rows(run.summary().by_tool) == {"outer": 1, "outer/inner": 2}


def test_a_node_by_its_path(client, provider):
    @monitored_node("model")
    def model(count):
        for _ in range(count):
            client.chat.completions.create(**asked())

    with clevagent.run(budgets=[Budget(llm_calls=1, node="researcher/model")]) as run:
        model(2)
        with pytest.raises(BudgetExceeded):
            monitored_node("researcher")(model)(2)
    assert rows(run.summary().by_node) == {"model": 2, "researcher/model": 1}


def test_a_name_with_a_slash_is_no_path(client, provider):
    """Nodes `a/b` and `b` in `a` are told apart by budgets, whatever the bill calls them."""

    def ask():
        client.chat.completions.create(**asked())

    inner = monitored_node("a")(monitored_node("b")(ask))
    with clevagent.run(budgets=[Budget(llm_calls=1, node="b")]):
        for _ in range(3):
            monitored_node("a/b")(ask)()
        inner()
        with pytest.raises(BudgetExceeded):
            inner()
    assert provider.request_count == 4


def test_what_has_left_its_node_counts_there_no_more(client, provider):
    with clevagent.run(budgets=[Budget(llm_calls=1, node="writer")]) as run:
        released = threading.Event()

        def later():
            released.wait(10)
            client.chat.completions.create(**asked())

        @monitored_node("writer")
        def writer():
            thread = threading.Thread(target=later)
            thread.start()
            return thread

        thread = writer()
        released.set()
        thread.join()
    assert provider.request_count == 1
    assert rows(run.summary().by_node) == {}
    assert run.summary().total.calls == 1
