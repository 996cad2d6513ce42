"""A ReAct agent with tools that searches without end, and is stopped in a sentence rather than by an error.

    pip install ".[langchain]" langchain langchain-openai
    python examples/react_agent.py

``BudgetMiddleware`` ends the agent gracefully: the model itself writes the closing message, paid from what ``keep_usd`` keeps back.
"""

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from offline import MODEL, model_access

import clevagent
from clevagent.testing import Reply
from clevagent_langchain import BudgetMiddleware

QUESTION = "What did our warehouse in Lyon ship last quarter?"
PLACES = [
    "archive",
    "letters",
    "invoices",
    "minutes",
    "contracts",
    "plans",
    "mails",
    "reports",
    "notes",
    "lists",
    "drafts",
    "scans",
]


@tool
def search(query: str) -> str:
    """Search the company's documents."""
    return f"{len(query)} pages mention {query!r}; none of them is from Lyon."


def script(body):
    """Search on and on; sum up when no tools are offered any more."""
    if not body.get("tools"):
        return Reply(text="The documents that I searched say nothing about shipments from Lyon.", output_tokens=20)
    turns = sum(1 for message in body["messages"] if message["role"] == "assistant")
    return Reply(text="", tool_calls=[("search", {"query": f"{PLACES[turns % len(PLACES)]} of Lyon"})], output_tokens=30)


with model_access(script) as access:
    clevagent.init(agent="warehouse")
    model = clevagent.guard(ChatOpenAI(model=MODEL, max_tokens=100, **access.client))
    agent = create_agent(model, [search], middleware=[BudgetMiddleware(budgets=[clevagent.Budget(usd=0.0015, keep_usd=0.0005)])])
    with clevagent.run() as run:
        answer = agent.invoke({"messages": [("user", QUESTION)]})
    print("The agent says:", answer["messages"][-1].content)
    print(run)
    print(access.bill())
    clevagent.shutdown()
