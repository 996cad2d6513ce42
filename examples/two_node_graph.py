"""A graph of two nodes, each with a name in the bill, and one with a ceiling of its own.

    pip install ".[langgraph]" langchain-openai
    python examples/two_node_graph.py

The critic sends the draft back again and again. ``monitored_node`` tells costs by node, and refuses the writer before it runs once it
has used up what it may: nothing is sent, and the state that was reached is kept by the checkpointer.
"""

from typing import TypedDict

from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command
from offline import MODEL, model_access

import clevagent
from clevagent.integrations.langgraph import monitored_node
from clevagent.testing import Reply


class State(TypedDict, total=False):
    """What the nodes hand on."""

    topic: str
    draft: str
    round: int


def script(body):
    """Praise nothing."""
    is_critic = "critic" in str(body["messages"])
    return Reply(text="Too long. Write it again." if is_critic else "Loops are hard to see from inside.", output_tokens=12)


with model_access(script) as access:
    clevagent.init(agent="essay")
    model = clevagent.guard(ChatOpenAI(model=MODEL, max_tokens=100, **access.client))

    @monitored_node("write", budgets=[clevagent.Budget(llm_calls=3)])
    def write(state: State) -> State:
        """Write, or write again."""
        number = state.get("round", 0) + 1
        return {"draft": model.invoke(f"Draft {number}: a sentence on {state['topic']}.").text, "round": number}

    @monitored_node("review")
    def review(state: State) -> Command:
        """Find fault."""
        verdict = model.invoke(f"You are a critic of draft {state['round']}: {state['draft']}").text
        return Command(goto="write" if "again" in verdict else "__end__")

    builder = StateGraph(State)
    builder.add_node("write", write)
    builder.add_node("review", review)
    builder.add_edge(START, "write")
    builder.add_edge("write", "review")
    graph = builder.compile(checkpointer=InMemorySaver())

    config = {"configurable": {"thread_id": "essay-1"}}
    with clevagent.run() as run:
        try:
            graph.invoke({"topic": "loops"}, config)
        except clevagent.BudgetExceeded as refusal:
            print("Stopped:", refusal)
    print("Reached:", graph.get_state(config).values)
    print(run)
    print(access.bill())
    clevagent.shutdown()
