"""A guarded graph is a guest that nobody notices: what its nodes, its streams and its callers see is what the plain one shows."""

from __future__ import annotations

import subprocess
import sys
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


MARKED = """
import sys
import subprocess
import sys
from typing import TypedDict
import clevagent
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph


class State(TypedDict, total=False):
    x: int


def told(guard):
    graph = guard(StateGraph(State).add_node("node", lambda state: {"x": 1}).add_edge(START, "node").compile(checkpointer=InMemorySaver()))
    config = {"configurable": {"thread_id": "t", "mine": 1}, "metadata": {"yours": 2}}
    shown = [item[1].get("payload", item[1])["metadata"] for item in graph.stream({}, config, stream_mode=["checkpoints", "debug"])
             if "metadata" in item[1].get("payload", item[1])]
    return shown, [saved.metadata for saved in graph.checkpointer.list(config)]


sys.path.insert(0, "")
plain, guarded = told(lambda graph: graph), told(clevagent.guard)
assert plain[0] and plain[1]
print("same" if plain == guarded else "marked")
print("clevagent_run" in guarded[1][0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limited", "marked"),
    [
        ("", False),
        ("clevagent.Budget(usd=1)", True),
        ("import copy, clevagent_core.budgets as b; x = clevagent.Budget(usd=1); b._made.clear(); copy.copy(x)", True),
        ("clevagent.init(endpoint='http://127.0.0.1:9', api_key='k')", True),
    ],
    ids=["nothing", "a budget", "one from elsewhere", "a monitor"],
)
def test_checkpoints_are_left_as_they_are_where_no_run_has_to_go_on(limited, marked, tmp_path):
    """In a process of its own, which has no budgets of other tests."""
    program = MARKED.replace('sys.path.insert(0, "")', limited)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.stdout.split(), done.returncode) == ((["marked", "True"] if marked else ["same", "False"]), 0), done.stderr
