"""A guarded graph is a guest that nobody notices: what its nodes, its streams and its callers see is what the plain one shows."""

from __future__ import annotations

from typing import TypedDict

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

import clevagent

STREAMS = ["values", "updates", "tasks", "messages", "custom"]
VARYING = {"id", "checkpoint", "langgraph_checkpoint_ns", "checkpoint_ns"}


class State(TypedDict, total=False):
    x: int


class Sees(BaseCallbackHandler):
    def __init__(self):
        self.seen = []

    def on_chain_start(self, serialized, inputs, *, metadata=None, **kwargs):
        self.seen.append({key: value for key, value in (metadata or {}).items() if key not in VARYING})


def make():
    seen = []

    def node(state: State, config: RunnableConfig) -> State:
        seen.append({key: value for key, value in config["metadata"].items() if key not in VARYING})
        return {"x": 1}

    return StateGraph(State).add_node(node).add_edge(START, "node").compile(checkpointer=InMemorySaver()), seen


@pytest.fixture(params=[False, True], ids=["plain", "guarded"])
def graph(request):
    plain, seen = make()
    return (clevagent.guard(plain) if request.param else plain), seen


def strip(item):
    if isinstance(item, dict):
        return {key: strip(value) for key, value in item.items() if key not in VARYING}
    return type(item)(map(strip, item)) if isinstance(item, (list, tuple)) else item


@pytest.mark.parametrize("mode", STREAMS)
def test_streams_nodes_and_callbacks_see_what_they_see_of_the_plain_graph(mode):
    told = []
    for guard in (lambda graph: graph, clevagent.guard):
        plain, seen = make()
        handler = Sees()
        config = {"configurable": {"thread_id": "t"}, "metadata": {"mine": 1}, "callbacks": [handler]}
        items = list(guard(plain).stream({}, config, stream_mode=mode))
        told.append((strip(items), seen, handler.seen))
    assert told[0] == told[1]


def test_without_a_thread_it_says_what_the_plain_graph_says(graph):
    with pytest.raises(ValueError, match="thread_id"):
        graph[0].invoke({})
