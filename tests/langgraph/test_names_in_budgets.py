"""``guard(graph, budgets=[Budget(node=..., tool=...)])``: names that the graph has not are refused before anything is sent."""

from __future__ import annotations

import logging

import pytest
from inline_snapshot import snapshot
from langchain.agents import create_agent
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.integrations.langgraph import monitored_node
from clevagent.testing import Reply
from tests.langgraph.conftest import PROMPT

HELLO = {"messages": [("user", "Find out about tides.")]}


def lookup(word: str) -> str:
    """Look a word up."""
    return f"{word}: the sea comes and goes"


def asks_for_tools(body):
    count = sum(message["role"] == "tool" for message in body["messages"])
    return Reply(text="", tool_calls=[("lookup", {"word": f"w{count}"})]) if count < 3 else Reply(text="tides")


@pytest.fixture
def idle(caplog):
    """Give what was told of idle budgets."""
    caplog.set_level(logging.WARNING, logger="clevagent")

    def idle():
        found = [getattr(record, "clevagent_incident", None) for record in caplog.records]
        return [incident.message for incident in found if incident is not None and incident.kind == "idle_budget"]

    return idle


@pytest.fixture
def reader(chat, provider):
    """An agent with one tool."""
    provider.reset(asks_for_tools)
    return create_agent(chat(), [lookup], name="reader")


def around(agent, *, is_function, name="reading"):
    builder = StateGraph(MessagesState)
    builder.add_node(name, (lambda state: {"messages": agent.invoke(state)["messages"]}) if is_function else agent)
    builder.add_edge(START, name)
    return builder.compile()


def hidden(agent):
    """A graph whose node calls the agent where nobody can look into it."""
    registry = {"agent": agent}

    def reading(state):
        return {"messages": registry["agent"].invoke(state)["messages"]}

    builder = StateGraph(MessagesState)
    builder.add_node("reading", reading)
    builder.add_edge(START, "reading")
    return builder.compile()


def refused(graph, *budgets):
    with pytest.raises(UsageError) as caught:
        clevagent.guard(graph, budgets=budgets).invoke(HELLO)
    return str(caught.value)


# -- refused ------------------------------------------------------------------------------------------------------------------


def test_a_misspelt_node(reader, provider):
    assert refused(around(reader, is_function=False), Budget(llm_calls=1, node="raeding")) == snapshot(
        "Budget('1 llm_calls per run node=raeding', node='raeding') was given to guard(graph), which has no node of that name, so it would never stop anything. Known here: 'model', 'reading', 'reading/model', 'reading/tools', 'tools'. Did you mean node='reading'? (For something that is called inside one of them, write the path, as node='model/raeding', or guard that.)"
    )
    assert provider.request_count == 0


def test_a_node_that_a_graph_of_graphs_has_not(line):
    def first(state):
        return {"texts": ["one"]}

    empty = StateGraph(MessagesState)
    empty.add_node("inner", StateGraph(MessagesState).add_node("x", line(first)).add_edge(START, "x").compile())
    empty.add_edge(START, "inner")
    assert "Did you mean node='inner'?" in refused(empty.compile(), Budget(usd=1, node="iner"))


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("pattern", ["raeding", "reeding", "READING_"])
def test_a_misspelt_node_of_either_kind(reader, provider, is_function, pattern):
    assert "Did you mean node='reading'?" in refused(around(reader, is_function=is_function), Budget(usd=1, node=pattern))
    assert provider.request_count == 0


def test_a_misspelt_node_inside_a_subgraph(reader, provider):
    assert "Did you mean node='reading/model'?" in refused(around(reader, is_function=False), Budget(usd=1, node="reading/modle"))
    assert provider.request_count == 0


def test_a_misspelt_tool(reader, provider):
    assert refused(reader, Budget(tool_calls=1, tool="lokup")) == snapshot(
        "Budget('1 tool_calls per run tool=lokup', tool='lokup') was given to guard(graph), which has no tool of that name, so it would never stop anything. Known here: 'lookup'. Did you mean tool='lookup'?"
    )
    assert provider.request_count == 0


def test_a_misspelt_tool_of_a_subgraph(reader):
    assert "Did you mean tool='lookup'?" in refused(around(reader, is_function=False), Budget(tool_calls=1, tool="look_up"))


def test_the_second_guard_is_checked_too(reader, provider):
    once = clevagent.guard(reader, budgets=[Budget(llm_calls=9)])
    with pytest.raises(UsageError, match="Did you mean node='model'"):
        clevagent.guard(once, budgets=[Budget(llm_calls=1, node="modell")]).invoke(HELLO)
    assert provider.request_count == 0


def test_a_stream_and_an_async_invocation_are_refused(reader, provider, aio):
    guarded = clevagent.guard(reader, budgets=[Budget(llm_calls=1, node="modell")])
    with pytest.raises(UsageError, match="modell"):
        list(guarded.stream(HELLO))
    with pytest.raises(UsageError, match="modell"):
        aio(guarded.ainvoke(HELLO))
    assert provider.request_count == 0


# -- not refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("pattern", ["reading", "reading/model", "model", "read*", "*/model", "r?ading"])
def test_names_and_paths_that_exist_hold(reader, provider, is_function, pattern):
    graph = clevagent.guard(around(reader, is_function=is_function), budgets=[Budget(llm_calls=1, node=pattern)])
    with pytest.raises(BudgetExceeded):
        graph.invoke(HELLO)
    assert provider.request_count == 1


@pytest.mark.parametrize("pattern", ["model", "reading/model", "reading/*"])
def test_a_node_inside_code_that_cannot_be_looked_into_holds(reader, provider, pattern):
    graph = clevagent.guard(hidden(reader), budgets=[Budget(llm_calls=1, node=pattern)])
    with pytest.raises(BudgetExceeded):
        graph.invoke(HELLO)
    assert provider.request_count == 1


def test_a_tool_inside_code_that_cannot_be_looked_into_holds(reader, provider):
    graph = clevagent.guard(hidden(reader), budgets=[Budget(tool_calls=1, tool="lookup")])
    with pytest.raises(BudgetExceeded):
        graph.invoke(HELLO)


def test_a_task_of_an_entrypoint_holds(chat, provider):
    model = chat()

    @task
    def writer(text):
        return model.invoke(text).text

    @entrypoint()
    def write(text):
        return [writer(text).result() for _ in range(3)]

    with pytest.raises(BudgetExceeded):
        clevagent.guard(write, budgets=[Budget(llm_calls=1, node="writer")]).invoke(PROMPT)
    assert provider.request_count == 1


# -- told at the end ------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_inside_code_that_cannot_be_looked_into_is_told(reader, provider, idle):
    clevagent.guard(hidden(reader), budgets=[Budget(llm_calls=1, node="agent")]).invoke(HELLO)
    assert provider.request_count == 4
    [message] = idle()
    assert "(node='agent')" in message
    assert "nodes: 'model', 'reading', 'reading/model'; tools: 'lookup'" in message


def test_a_graph_in_which_nothing_calls_is_told_once(line, idle):
    def quiet(state):
        return {"texts": ["nothing"]}

    clevagent.guard(line(quiet), budgets=[Budget(usd=1), Budget(llm_calls=3)]).invoke(
        {"texts": []}, {"configurable": {"thread_id": "t"}}
    )
    assert len(idle()) == 1


def test_nodes_and_tools_that_had_nothing_to_do_are_not_told(chat, provider, idle):
    model = chat()
    builder = StateGraph(MessagesState)
    builder.add_node("greet", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("research", ToolNode([lookup]))
    builder.add_edge(START, "greet")
    budgets = [Budget(usd=1, node="research"), Budget(tool_calls=3, tool="lookup"), Budget(tool_calls=5)]
    clevagent.guard(builder.compile(), budgets=budgets).invoke(HELLO)
    assert provider.request_count == 1
    assert idle() == []


def test_a_graph_that_waits_to_be_resumed_is_not_told(line, idle):
    def wait(state):
        return {"texts": ["nothing"]}

    graph = clevagent.guard(line(wait, interrupt_before=["wait"]), budgets=[Budget(usd=1)])
    graph.invoke({"texts": []}, {"configurable": {"thread_id": "t"}})
    assert idle() == []


def test_what_was_called_before_a_pause_counts(chat, line, idle):
    model = chat()

    def write(state):
        return {"texts": [model.invoke(PROMPT).text]}

    def publish(state):
        return {"texts": ["published"]}

    graph = clevagent.guard(line(write, publish, interrupt_before=["publish"]), budgets=[Budget(usd=1)])
    config = {"configurable": {"thread_id": "t"}}
    graph.invoke({"texts": []}, config)
    graph.invoke(None, config)
    assert idle() == []


def test_a_handler_that_sees_tools_of_which_none_was_called(chat, provider, idle):
    model = chat()
    clevagent.init(attach=["langchain"])
    with clevagent.run(budgets=[Budget(tool_calls=3), Budget(usd=1)]):
        create_agent(model, [lookup]).invoke(HELLO)
    assert provider.request_count == 1
    assert idle() == []


# -- monitored_node -------------------------------------------------------------------------------------------------------------


def test_a_budget_of_a_node_that_misspells_it():
    with pytest.raises(UsageError) as caught:
        monitored_node("research", budgets=[Budget(llm_calls=1, node="reserach")])(lambda state: state)
    assert str(caught.value) == snapshot(
        "Budget('1 llm_calls per run node=reserach', node='reserach') was given to monitored_node('research'), which has no node of that name, so it would never stop anything. Known here: 'research'. Did you mean node='research'? (For something that is called inside one of them, write the path, as node='research/reserach', or guard that.)"
    )


@pytest.mark.parametrize("pattern", ["research", "re*", "model", "research/modle", "search"])
def test_a_budget_of_a_node_may_mean_what_is_called_inside(pattern):
    monitored_node("research", budgets=[Budget(llm_calls=1, node=pattern)])(lambda state: state)
