"""The published path, and the framework-free door inside a node."""

from __future__ import annotations

from typing import TypedDict

import pytest
from langgraph.graph import START, StateGraph

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError, hookimpl
from clevagent.integrations.langgraph import clevagent_node_callback, monitored_node


class State(TypedDict, total=False):
    done: int


class Steps:
    """An observer of steps."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def clevagent_step(self, run, step):
        self.seen.append((step.kind, step.name))


def two_nodes(first, second):
    builder = StateGraph(State)
    builder.add_node("first", first)
    builder.add_node("second", second)
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    return builder.compile()


def test_the_node_callback_takes_what_a_stream_of_updates_yields():
    steps = Steps()
    clevagent.init(plugins=[steps])
    graph = two_nodes(lambda _: {"done": 1}, lambda _: {"done": 2})
    for update in graph.stream({}, stream_mode="updates"):
        clevagent_node_callback(update)
    clevagent_node_callback("third", {"done": 3})
    clevagent_node_callback({"__interrupt__": ()})
    assert steps.seen == [("node", "first"), ("node", "second"), ("node", "third")]


@pytest.mark.parametrize("nonsense", [None, 5, object(), {}])
def test_the_node_callback_raises_nothing(nonsense):
    clevagent.init()
    clevagent_node_callback(nonsense)


def test_a_block_inside_a_node_is_told_under_its_name():
    clevagent.init(prices={"mine": clevagent.Price(input=1, output=1)})

    @monitored_node("research", budgets=[Budget(llm_calls=1)])
    def research(_):
        with clevagent.llm_call(model="mine", input="Hello", max_output_tokens=9) as call:
            call.settle(input_tokens=5, output_tokens=9)
        with clevagent.tool_call("search"):
            return {"done": 1}

    with clevagent.run() as run:
        two_nodes(research, lambda _: {}).invoke({})
        with pytest.raises(BudgetExceeded):
            two_nodes(research, lambda _: {}).invoke({})
    assert {name: spend.calls for name, spend in run.summary().by_node.items()} == {"research": 1}


def test_attaching_to_langgraph_without_the_plugin_that_it_goes_through_is_refused():
    with pytest.raises(UsageError, match="goes through the plugin 'langchain', which is blocked"):
        clevagent.init(attach=["langgraph"], block=["langchain"])


def test_attaching_to_langgraph_is_attaching_to_langchain(provider, chat):
    """Graphs call models through LangChain's callback managers; one handler hears them."""
    clevagent.init(attach=["langgraph", "langchain"], budgets=[Budget(llm_calls=1, per="lifetime")])
    graph = two_nodes(lambda _: {"done": len(chat().invoke("Hello").text)}, lambda _: {"done": len(chat().invoke("Hello").text)})
    with clevagent.run() as run, pytest.raises(BudgetExceeded):
        graph.invoke({})
    assert provider.request_count == 1
    assert (run.summary().total.calls, run.summary().refusals) == (1, 1)
