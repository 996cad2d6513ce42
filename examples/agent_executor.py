"""The older ``AgentExecutor`` of LangChain, with the callback handler: what was called is refused, and the work so far is kept.

    pip install ".[langchain]" langchain-classic langchain-openai
    python examples/agent_executor.py

A handler cannot change a request. So the model has an output limit (``max_tokens``) and no retries of its own, and is told to ask for
usage when it streams, which the executor makes it do.
"""

from langchain_classic.agents import AgentExecutor, create_tool_calling_agent
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from offline import MODEL, model_access

import clevagent
from clevagent.integrations.langchain import ClevAgentCallbackHandler
from clevagent.testing import Reply

CITIES = ["Lyon", "Turin", "Graz", "Ghent", "Porto"]
seen = []


@tool
def temperature(city: str) -> str:
    """Tell how warm it is in a city."""
    seen.append(city)
    return f"{city}: {15 + len(city)} degrees"


def script(body):
    """Ask for one city after the other."""
    asked = sum(1 for message in body["messages"] if message["role"] == "tool")
    if asked < len(CITIES):
        return Reply(text="", tool_calls=[("temperature", {"city": CITIES[asked]})], output_tokens=20)
    return Reply(text="It is warm everywhere.")


with model_access(script) as access:
    clevagent.init(agent="weather")
    model = ChatOpenAI(model=MODEL, max_tokens=100, max_retries=0, stream_usage=True, **access.client)
    prompt = ChatPromptTemplate([("system", "You report the weather."), ("user", "{input}"), ("placeholder", "{agent_scratchpad}")])
    executor = AgentExecutor(agent=create_tool_calling_agent(model, [temperature], prompt), tools=[temperature])
    with clevagent.run(budgets=[clevagent.Budget(tool_calls=3)]) as run:
        try:
            executor.invoke({"input": f"How warm is it in {', '.join(CITIES)}?"}, {"callbacks": [ClevAgentCallbackHandler()]})
        except clevagent.BudgetExceeded as refusal:
            print("Stopped:", refusal)
    print("Known so far:", ", ".join(seen))
    print(run)
    print(access.bill())
    clevagent.shutdown()
