"""What ClevAgent costs in a graph: added to a node by ``monitored_node``, and to an invocation by ``clevagent.guard(graph)``.

    python benchmarks/graphs.py

Alternatives are timed in turn, in blocks, and the fastest block of each is compared: see hot_paths.py.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing_extensions import TypedDict

import clevagent
from benchmarks.hot_paths import BIG, PRICES, ROWS, bench_model, interleaved, row
from benchmarks.results import Section, contribute
from clevagent import Budget, Watchdog
from clevagent_langgraph import monitored_node

STEPS = 50
"""How many nodes the graph runs whose steps are measured: the cost of one invocation is spread over them."""


class State(TypedDict, total=False):
    count: int
    text: str


def node(state: State) -> State:
    return {"count": state.get("count", 0) + 1}


def trivial(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def repeating(function: Callable[..., Any], steps: int) -> Any:
    from langgraph.graph import END, START, StateGraph

    builder = StateGraph(State).add_node("node", function).add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: END if state["count"] % steps == 0 else "node")
    return builder.compile()


def invoking(graph: Any, steps: int) -> Callable[[], Any]:
    """Begin from a state that was not there before: what repeats is a loop, and telling its length is no part of a step."""
    begins = itertools.count(steps * 1_000_000, steps)
    return lambda: graph.invoke({"count": next(begins)})


def answering(model: Any) -> Any:
    from langgraph.graph import START, StateGraph

    def write(state: State) -> State:
        return {"text": model.invoke("Hello").text}

    return StateGraph(State).add_node("write", write).add_edge(START, "write").compile()


def nodes(watchdog: Watchdog) -> None:
    print("\nmonitored_node (a node that counts)")
    counts = itertools.count()
    text = "x" * 200
    own = [Budget(usd=BIG)]
    wrapped = {
        "bare": node,
        "trivial": trivial(node),
        "monitored": monitored_node("node", watchdog=watchdog)(node),
        "ceiling": monitored_node("costly", watchdog=watchdog, budgets=own)(node),
    }
    with watchdog.run(budgets=[Budget(usd=BIG)]):
        alternatives = {
            name: lambda function=function: function({"count": next(counts), "text": text}) for name, function in wrapped.items()
        }
        times = interleaved(alternatives, 2000)
        added = {name: time - times["bare"] for name, time in times.items()}
        row("trivial wrapper, called directly, added", f"{added['trivial']:.2f} us", "-")
        row("monitored_node, called directly, added", f"{added['monitored']:.2f} us", "<= 8 us a step")
        row("monitored_node with a ceiling of its own, called directly, added", f"{added['ceiling']:.2f} us", "-")
        graphs = {name: repeating(function, STEPS) for name, function in wrapped.items()}
        times = interleaved({name: invoking(graph, STEPS) for name, graph in graphs.items()}, 4)
        added = {name: (time - times["bare"]) / STEPS for name, time in times.items()}
        row(f"a graph of {STEPS} steps, bare, per step", f"{times['bare'] / STEPS:.1f} us", "-")
        row("trivial wrapper, in a graph, added per step", f"{added['trivial']:.2f} us", "-")
        row("monitored_node, in a graph, added per step", f"{added['monitored']:.2f} us", "<= 8 us a step")
        row("monitored_node with a ceiling of its own, in a graph, added per step", f"{added['ceiling']:.2f} us", "-")


def graphs(watchdog: Watchdog) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    from clevagent.integrations.langchain import ClevAgentCallbackHandler

    class NoOp(BaseCallbackHandler):
        raise_error = True
        run_inline = True

    print("\nclevagent.guard(graph) (one node, and one model that answers at once)")
    for what, graph, given in (
        ("a graph that calls nothing", repeating(node, 1), {"count": 0}),
        ("a graph with one model call", answering(bench_model()), {"text": ""}),
    ):
        guarded = clevagent.guard(graph, budgets=[Budget(usd=BIG)], watchdog=watchdog)
        ours = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog)]}
        times = interleaved(
            {
                "bare": functools.partial(graph.invoke, given),
                "noop": functools.partial(graph.invoke, given, {"callbacks": [NoOp()]}),
                "handler": functools.partial(graph.invoke, given, ours),
                "guarded": functools.partial(guarded.invoke, given),
            },
            60,
        )
        row(f"{what}: bare invoke", f"{times['bare']:.0f} us", "-")
        row(f"{what}: no-op inline handler, added", f"{times['noop'] - times['bare']:.1f} us", "-")
        row(f"{what}: ClevAgentCallbackHandler, added", f"{times['handler'] - times['bare']:.1f} us", "-")
        row(f"{what}: guard(graph), added", f"{times['guarded'] - times['bare']:.1f} us", "-")


def main() -> None:
    logging.getLogger("clevagent").disabled = True
    watchdog = Watchdog(prices=PRICES)
    ROWS.clear()
    nodes(watchdog)
    graphs(watchdog)
    title = "LangGraph: added to nodes and invocations"
    section = Section(title=title, header=("", "measured", "target"), rows=list(ROWS))
    contribute("graphs", [section], distributions=("clevagent", "langgraph"))


if __name__ == "__main__":
    main()
