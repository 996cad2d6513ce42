"""One ceiling for a LangChain agent, a crew and a graph.

    pip install ".[langgraph,crewai]" langchain langchain-openai
    python examples/shared_budget.py

Each framework is guarded in its own way; a run around them, or ``init(budgets=[...])``, holds one ceiling over all of them. The crew
gets what the agent has left, and the graph what the crew has left: here, nothing.
"""

import os

os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")  # this example dials nothing but its model
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")

from typing import TypedDict

from crewai import LLM, Agent, Crew, Task
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from offline import MODEL, model_access

import clevagent
from clevagent.testing import Reply


class State(TypedDict, total=False):
    """What the graph works on."""

    text: str


with model_access([Reply(text="Thought: done\nFinal Answer: it is so", output_tokens=100)]) as access:
    clevagent.init(agent="three-in-one")
    model = ChatOpenAI(model=MODEL, max_tokens=100, **access.client)
    agent = create_agent(clevagent.guard(model), [])

    clerk = Agent(
        role="Clerk", goal="Help", backstory="Helpful.", llm=LLM(model=f"openai/{MODEL}", max_tokens=100, **access.client)
    )
    crew = clevagent.guard(Crew(agents=[clerk], tasks=[Task(description="Check it.", expected_output="Yes or no", agent=clerk)]))

    builder = StateGraph(State)
    builder.add_node("sum_up", lambda _: {"text": model.invoke("Sum it up.").text})
    builder.add_edge(START, "sum_up")
    graph = clevagent.guard(builder.compile())

    work = {
        "agent": lambda: agent.invoke({"messages": [("user", "Is it so?")]}),
        "crew": crew.kickoff,
        "graph": lambda: graph.invoke({}),
    }
    with clevagent.run(budgets=[clevagent.Budget(llm_calls=2, name="all three")]) as run:
        for name, start in work.items():
            try:
                start()
                print(f"{name}: done")
            except clevagent.BudgetExceeded as refusal:
                print(f"{name}: stopped, {refusal.spent:.0f} of {refusal.ceiling:.0f} calls are used up")
    print(run)
    print(access.bill())
    clevagent.shutdown()
