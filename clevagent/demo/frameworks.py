"""The same runaways by other ways in: a client without a framework, a graph, a crew."""

from __future__ import annotations

import io
import operator
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Annotated, Any, TypedDict

from langchain_core.language_models.chat_models import BaseChatModel
from langgraph.graph import START, StateGraph
from langgraph.types import Send
from openai import OpenAI

from clevagent.demo.acting import CENT_CALL, MODEL, PROMPT, Scene, chat_model
from clevagent.demo.scenes import ModelScene
from clevagent.testing import Reply

_TURNS = 60
"""After so many turns the script ends the loop that nobody guards; nothing else would."""
_LETTERS = 50
_CUSTOMERS = 30


def scenes() -> list[Scene]:
    """Give the scenes that can be played here: that of a crew needs CrewAI."""
    found: list[Scene] = [_CLIENT, _GRAPH]
    return [*found, _CREW] if has_crewai() else found


def has_crewai() -> bool:
    """Tell whether CrewAI is installed; it is not imported, which takes seconds."""
    return find_spec("crewai") is not None


def _client(base_url: str, arguments: Mapping[str, Any]) -> OpenAI:
    return OpenAI(base_url=base_url, api_key="demo", timeout=30, **arguments)


def _never_content(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Find a name for our dog. Say DONE when you are content."}]
    for _ in range(_TURNS):
        answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content or ""
        if "DONE" in answer:
            break
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Another one."}]


def _ideas() -> list[Reply]:
    names = ("Rex", "Bello", "Luna", "Fido", "Balu", "Nala", "Argos", "Laika")
    return [Reply(text=f"{name} {number}. Hm, not yet.", output_tokens=40) for number in range(1, 9) for name in names]


class _Letters(TypedDict, total=False):
    letter: int
    summaries: Annotated[list[str], operator.add]


def _graph(base_url: str, arguments: Mapping[str, Any]) -> Any:
    """Build a graph that reads all letters at once, with a model that nobody guards."""
    model: BaseChatModel = chat_model(base_url, arguments)

    def read(state: _Letters) -> _Letters:
        return {"summaries": [model.invoke(f"{state['letter']:02} {PROMPT[3:]}").text]}

    builder = StateGraph(_Letters)
    builder.add_node("read", read)
    builder.add_conditional_edges(START, lambda _: [Send("read", {"letter": number}) for number in range(_LETTERS)], ["read"])
    return builder.compile()


def _read_all(graph: Any) -> None:
    graph.invoke({"summaries": []}, {"max_concurrency": _LETTERS})


def _crew(base_url: str, arguments: Mapping[str, Any]) -> Any:
    """Hire a crew of one."""
    from crewai import LLM, Agent, Crew, Task  # noqa: PLC0415 - takes seconds

    llm = LLM(model=f"openai/{MODEL}", base_url=base_url, api_key="demo", **arguments)
    clerk = Agent(role="Clerk", goal="Answer letters", backstory="You are friendly.", llm=llm)
    task = Task(description="Answer the letter of customer {customer}.", expected_output="A friendly letter", agent=clerk)
    return Crew(agents=[clerk], tasks=[task])


def _answer_all(crew: Any) -> None:
    # CrewAI prints what it makes of an exception, across the screen.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        crew.kickoff_for_each(inputs=[{"customer": number} for number in range(_CUSTOMERS)])


_CLIENT = ModelScene(
    title="A loop of one's own",
    story="No framework: a script asks OpenAI's client again until the model says DONE, which it never does. "
    f"The history grows; the script gives up after {_TURNS} turns.",
    ceiling="0.02",
    make=_client,
    work=_never_content,
    replies=_ideas(),
    tells_usage=True,
    billing={"tokens_per_byte": 0.25},
)
_GRAPH = ModelScene(
    title="A graph that fans out",
    story=f"A LangGraph graph sends {_LETTERS} letters to its node at once, $0.01 each. The graph is guarded, its nodes are as they were.",
    ceiling="0.10",
    make=_graph,
    work=_read_all,
    replies=[Reply(delay_s=0.25)],
    tells_usage=True,
    model={**CENT_CALL, "max_retries": 0},
)
_CREW = ModelScene(
    title="A crew, 30 times",
    story=f"CrewAI kicks the same crew off for {_CUSTOMERS} customers, one after the other, about a cent each.",
    ceiling="0.10",
    make=_crew,
    work=_answer_all,
    replies=[Reply(text="Thought: I now can give a great answer\nFinal Answer: Dear customer, thank you.")],
    tells_usage=True,
    model=CENT_CALL,
)
