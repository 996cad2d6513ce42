"""A graph that asks a person for more money instead of failing, and goes on where it stopped.

    pip install ".[langgraph]" langchain-openai
    python examples/graph_that_asks.py

``guard(graph, on_exceed="ask")`` returns the state with ``__interrupt__``, as ``interrupt()`` in a node does. The answer is given the way
LangGraph takes answers: ``Command(resume={"usd": 0.001})``. A graph that asks needs a checkpointer, or it could not go on.
"""

from typing import TypedDict

from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command
from offline import MODEL, model_access

import clevagent
from clevagent.testing import Reply

CHAPTERS = 6


class State(TypedDict, total=False):
    """The book so far."""

    chapters: list[str]


def script(body):
    """Write a chapter."""
    return Reply(text=f"Chapter on {body['messages'][-1]['content'].split()[-1]}", output_tokens=100)


with model_access(script) as access:
    clevagent.init(agent="book")
    model = ChatOpenAI(model=MODEL, max_tokens=100, max_retries=0, **access.client)

    def write(state: State) -> State:
        """Write the next chapter."""
        done = state.get("chapters", [])
        return {"chapters": [*done, model.invoke(f"Write about part {len(done) + 1}").text]}

    def is_done(state: State) -> str:
        """Tell whether the book is finished."""
        return END if len(state["chapters"]) == CHAPTERS else "write"

    builder = StateGraph(State)
    builder.add_node("write", write)
    builder.add_edge(START, "write")
    builder.add_conditional_edges("write", is_done)
    graph = clevagent.guard(
        builder.compile(checkpointer=InMemorySaver()),
        budgets=[clevagent.Budget(usd=0.00025, per="thread", name="book")],
        on_exceed="ask",
    )

    config = {"configurable": {"thread_id": "book-1"}}
    state = graph.invoke({}, config)
    while "__interrupt__" in state:
        question = state["__interrupt__"][0].value
        print(f"{len(state['chapters'])} chapters. The graph asks:", question["question"])
        state = graph.invoke(Command(resume={"usd": 0.0002}), config)
    print(f"Done: {len(state['chapters'])} chapters.")
    print(access.bill())
    clevagent.shutdown()
