"""Loops of real agents, graphs and chains: found, and stopped before more requests are sent; healthy ones are left alone."""

from __future__ import annotations

import contextlib
import operator
import uuid
from dataclasses import replace
from typing import Annotated, Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.messages.content import create_text_block
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import InjectedToolCallId, ToolException, tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState
from langgraph.types import Command, Send

import clevagent
from clevagent import Budget, LoopDetected, Stopped
from clevagent.testing import Reply
from clevagent_core import default
from clevagent_core.guards.fingerprints import message_of
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langchain.results import Said, answer_of, tool_result

HELLO = {"messages": [HumanMessage("Hello")]}
LIMIT = {"recursion_limit": 200}


@tool
def search(query: str) -> str:
    """Search."""
    return f"nothing found for {query}"


def told(watchdog):
    return [incident for incident in watchdog.recent if incident.kind == "loop"]


def again(name="search", text="", **arguments):
    """Ask for the same tool call for ever."""
    return [Reply(text=text, tool_calls=[(name, arguments or {"query": "x"})], output_tokens=1)]


async def collect(stream):
    return [chunk async for chunk in stream]


WAYS = {
    "invoke": lambda agent, aio, config: agent.invoke(HELLO, config),
    "ainvoke": lambda agent, aio, config: aio(agent.ainvoke(HELLO, config)),
    "stream": lambda agent, aio, config: list(agent.stream(HELLO, config, stream_mode="messages")),
    "astream": lambda agent, aio, config: aio(collect(agent.astream(HELLO, config, stream_mode="messages"))),
}
ways = pytest.mark.parametrize(
    "way", ["invoke", "astream", *(pytest.param(way, marks=pytest.mark.slow) for way in ("ainvoke", "stream"))]
)


@pytest.fixture(params=["openai", "responses", "anthropic"])
def model(request, chat, anthropic):
    def make(**kw):
        if request.param == "anthropic":
            return anthropic(max_tokens=300, **kw)
        return chat(max_tokens=300, use_responses_api=request.param == "responses", **kw)

    return make


@pytest.fixture(params=["attached", "handler", "guarded"])
def door(request):
    """Set the watchdog up in one of three ways; give what models and configs are put through."""

    def open_(**settings):
        if request.param == "attached":
            clevagent.init(attach=["langchain"], **settings)
            return (lambda model: model), {**LIMIT}
        clevagent.init(**settings)
        handler = {"callbacks": [ClevAgentCallbackHandler()], **LIMIT}
        if request.param == "handler":
            return (lambda model: model), handler
        return clevagent.guard, handler

    return open_


# -- stopped ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@ways
def test_an_agent_that_asks_for_the_same_tool_for_ever_is_stopped(aio, provider, model, door, way):
    provider.reset(again())
    through, config = door(on_loop="raise", budgets=[Budget(llm_calls=90)])
    agent = create_agent(through(model()), [search])
    with pytest.raises(LoopDetected) as caught:
        WAYS[way](agent, aio, config)
    # The fifth time of the tool is the loop; the model is not asked again.
    assert provider.request_count == 5
    assert caught.value.incident.details["calls"] == ["tool 'search'"]


@pytest.mark.slow
@ways
def test_by_default_it_is_told_and_goes_on(aio, provider, chat, door, way):
    provider.reset([*again() * 9, Reply(text="I give up.")])
    through, config = door()
    agent = create_agent(through(chat(max_tokens=300)), [search])
    WAYS[way](agent, aio, config)
    assert provider.request_count == 10
    assert ("same call and result", ["tool 'search'"]) in [
        (incident.details["rule"], incident.details["calls"]) for incident in told(default.current())
    ]
    assert {incident.action for incident in told(default.current())} == {"warn"}


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_a_guarded_model_alone_is_stopped_by_what_it_is_asked_and_answers(aio, provider, model, is_async):
    """No handler sees the tools, so the loop shows in the model's calls only."""
    provider.reset(again())
    clevagent.init(on_loop="raise")
    agent = create_agent(clevagent.guard(model()), [search])
    with clevagent.run(), pytest.raises(LoopDetected) as caught:
        aio(agent.ainvoke(HELLO, LIMIT)) if is_async else agent.invoke(HELLO, LIMIT)
    # The first question differs from those behind it.
    assert provider.request_count == 6
    assert caught.value.incident.details["calls"][0].startswith("model ")


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_an_agent_that_streams_is_stopped_by_what_its_model_answers(aio, provider, chat, streaming):
    provider.reset(again(text="Let me look."))
    clevagent.init(on_loop="raise")
    agent = create_agent(clevagent.guard(chat(max_tokens=300, streaming=streaming)), [search])
    with clevagent.run(), pytest.raises(LoopDetected):
        list(agent.stream(HELLO, LIMIT, stream_mode="messages"))
    assert provider.request_count == 6


@pytest.mark.slow
def test_an_agent_that_is_invoked_again_after_the_stop_begins_anew(provider, chat):
    provider.reset(again())
    clevagent.init(on_loop="raise", attach=["langchain"])
    agent = create_agent(chat(max_tokens=300), [search])
    for _ in range(2):
        with pytest.raises(LoopDetected):
            agent.invoke(HELLO, LIMIT)
    assert provider.request_count == 10


@pytest.mark.slow
def test_in_a_run_of_ours_the_stop_holds_until_it_is_forgiven(provider, chat):
    provider.reset(again())
    clevagent.init(on_loop="raise", attach=["langchain"])
    agent = create_agent(chat(max_tokens=300), [search])
    with clevagent.run() as run:
        for sent in (5, 5):
            with pytest.raises(LoopDetected):
                agent.invoke(HELLO, LIMIT)
            assert provider.request_count == sent
        run.forgive_loops()
        with pytest.raises(LoopDetected):
            agent.invoke(HELLO, LIMIT)
    assert provider.request_count == 10


def test_fallbacks_and_retries_do_not_go_round_the_stop(provider, chat):
    provider.reset(again())
    clevagent.init(on_loop="raise", attach=["langchain"])
    primary = chat(max_tokens=300)
    model = (
        primary.bind_tools([search])
        .with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
        .with_fallbacks([chat(max_tokens=200)])
    )
    with clevagent.run():
        for _ in range(5):
            model.invoke("Hello")
        for _ in range(3):
            with pytest.raises(LoopDetected):
                model.invoke("Hello")
    assert provider.request_count == 5


@pytest.mark.slow
def test_a_graph_whose_nodes_swallow_errors_sends_nothing_more(provider, chat):
    provider.reset([Reply(text="Let me think.", output_tokens=1)])
    clevagent.init(on_loop="raise", attach=["langchain"])
    model = chat(max_tokens=300)

    class State(TypedDict):
        rounds: Annotated[int, operator.add]

    def think(state):
        with contextlib.suppress(Exception):  # as many agents do
            model.invoke("What now?")
        return {"rounds": 1}

    builder = StateGraph(State)
    builder.add_node("think", think)
    builder.add_edge(START, "think")
    builder.add_conditional_edges("think", lambda state: "think" if state["rounds"] < 40 else END)
    builder.compile().invoke({"rounds": 0}, LIMIT)
    assert provider.request_count == 5


# -- what tools give back ---------------------------------------------------------------------------------------------------


def run_tool_loop(provider, chat, tool_, *, times=12, settings=None, replies=None):
    provider.reset([*(replies or again(tool_.name) * times), Reply(text="done")])
    watchdog = clevagent.init(attach=["langchain"], **(settings or {}))
    create_agent(chat(max_tokens=300), [tool_]).invoke(HELLO, LIMIT)
    assert provider.request_count == times + 1
    return watchdog


def tools_of(watchdog):
    return [
        (incident.details["rule"], incident.details["calls"])
        for incident in told(watchdog)
        if "tool" in str(incident.details["calls"])
    ]


@pytest.mark.slow
def test_a_tool_that_answers_with_an_error_is_found(provider, chat):
    @tool
    def search(query: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> ToolMessage:
        """Search."""
        return ToolMessage(f"500 Internal Server Error (request {uuid.uuid4()})", tool_call_id=tool_call_id, status="error")

    assert tools_of(run_tool_loop(provider, chat, search)) == [("same call and result", ["tool 'search'"])]


@pytest.mark.slow
def test_the_same_error_to_new_arguments_is_found(provider, chat):
    @tool
    def search(query: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> ToolMessage:
        """Search."""
        return ToolMessage("syntax error", tool_call_id=tool_call_id, status="error")

    replies = [reply for number in range(12) for reply in again("search", query=f"words {number}")]
    assert ("same failure", ["tool 'search'"]) in tools_of(run_tool_loop(provider, chat, search, replies=replies))


@pytest.mark.slow
def test_a_tool_that_raises_is_found(provider, chat):
    @tool
    def search(query: str) -> str:
        """Search."""
        raise ToolException("503 Service Unavailable")

    search.handle_tool_error = True
    assert tools_of(run_tool_loop(provider, chat, search)) == [("same call and result", ["tool 'search'"])]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_whose_exception_the_graph_catches_is_found(aio, provider, chat, is_async):
    from langgraph.prebuilt import ToolNode

    @tool
    def search(query: str) -> str:
        """Search."""
        raise ConnectionError("503 Service Unavailable")

    provider.reset(again())
    clevagent.init(attach=["langchain"], on_loop="raise")
    bound = chat(max_tokens=300).bind_tools([search])
    builder = StateGraph(MessagesState)
    builder.add_node("model", RunnableLambda(lambda state: {"messages": [bound.invoke(state["messages"])]}))
    builder.add_node("tools", ToolNode([search], handle_tool_errors=True))
    builder.add_edge(START, "model")
    builder.add_edge("model", "tools")
    builder.add_edge("tools", "model")
    graph = builder.compile()
    with pytest.raises(Stopped):
        aio(graph.ainvoke(HELLO, LIMIT)) if is_async else graph.invoke(HELLO, LIMIT)
    assert provider.request_count == 5


@pytest.mark.slow
def test_a_tool_whose_results_change_is_polled_and_no_loop(provider, chat):
    states = iter(range(100))

    @tool
    def search(query: str) -> str:
        """Look how far it is."""
        return f"{next(states)} %"

    assert told(run_tool_loop(provider, chat, search, settings={"on_loop": "raise"})) == []


@pytest.mark.slow
def test_blocks_with_ids_of_their_own_are_the_same_result(provider, chat):
    """As adapters for MCP give them: LangChain makes an id for each block."""

    @tool
    def search(query: str) -> Any:
        """Search."""
        return [create_text_block("nothing found")]

    assert tool_result([create_text_block("x")])[0][0]["id"] != tool_result([create_text_block("x")])[0][0]["id"]
    assert tools_of(run_tool_loop(provider, chat, search)) == [("same call and result", ["tool 'search'"])]


@pytest.mark.slow
def test_what_the_graph_injects_is_no_part_of_the_arguments(provider, chat):
    @tool
    def search(query: str, state: Annotated[dict, InjectedState], tool_call_id: Annotated[str, InjectedToolCallId]) -> str:
        """Search."""
        return "nothing found"

    assert tools_of(run_tool_loop(provider, chat, search)) == [("same call and result", ["tool 'search'"])]


@pytest.mark.slow
def test_a_tool_that_gives_nothing_back_is_found(provider, chat):
    @tool
    def search(query: str) -> None:
        """Save it."""

    assert tools_of(run_tool_loop(provider, chat, search)) == [("same call and result", ["tool 'search'"])]


@pytest.mark.slow
def test_a_tool_that_is_called_without_an_agent_is_found_in_its_run():
    watchdog = clevagent.init(attach=["langchain"])

    @tool
    def save(text: str) -> None:
        """Save it."""

    with clevagent.run():
        for _ in range(6):
            save.invoke({"text": "x"})
    assert tools_of(watchdog) == [("same call and result", ["tool 'save'"])]


def test_hand_overs_with_the_whole_history_are_the_same_result():
    def hand_over(number, send):
        history = [HumanMessage("Hello"), *[AIMessage(f"step {step}", id=str(uuid.uuid4())) for step in range(number)]]
        update = {"messages": [*history, ToolMessage("Transferred.", tool_call_id=f"call_{number}")], "active_agent": "billing"}
        goto = [Send("billing", update)] if send else "billing"
        return tool_result(Command(goto=goto, update=update, graph=Command.PARENT))[0]

    for send in (False, True):
        assert message_of(hand_over(1, send)) == message_of(hand_over(2, send))
    assert message_of(tool_result(Command(goto="a"))[0]) != message_of(tool_result(Command(goto="b"))[0])
    assert message_of(tool_result(Command(update={"x": 1}))[0]) != message_of(tool_result(Command(update={"x": 2}))[0])
    assert tool_result([Command(goto="a"), ToolMessage("b", tool_call_id="1")])[0] == [("goto", "a", None), "b"]


# -- what models answer -----------------------------------------------------------------------------------------------------

ANSWERS = {
    "text": Reply(text="Let me look at that again."),
    "tool": Reply(text="", tool_calls=[("search", {"query": "x", "n": [1, 2.5, None]})]),
    "both": Reply(text="Let me look.", tool_calls=[("search", {"query": "x"}), ("search", {"query": "y"})]),
    "no arguments": Reply(text="", tool_calls=[("ping", {})]),
    "long": Reply(text="x " * 9000, tool_calls=[("write", {"text": "line\n" * 4000})]),
    "empty": Reply(text=""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("chunks", [1, pytest.param(3, marks=pytest.mark.slow), 17])
def test_a_streamed_answer_looks_like_the_same_answer_whole(provider, model, name, chunks):
    provider.reset([replace(ANSWERS[name], chunks=chunks)])
    one = model().bind_tools([search])
    whole = answer_of(ChatResult(generations=[ChatGeneration(message=one.invoke("Hello"))]))
    said, merged = Said(), None
    for chunk in one.stream("Hello"):
        said.note(chunk)
        merged = chunk if merged is None else merged + chunk
    assert said.answer() == whole
    assert message_of(said.answer()) == message_of(whole)
    assert message_of(answer_of(ChatResult(generations=[ChatGeneration(message=merged)]))) == message_of(whole)


@pytest.mark.slow
def test_answers_that_differ_look_different(provider, chat):
    seen = set()
    for reply in ANSWERS.values():
        provider.reset([reply])
        said = Said()
        for chunk in chat(max_tokens=30).stream("Hello"):
            said.note(chunk)
        seen.add(message_of(said.answer()))
    assert len(seen) == len(ANSWERS)


def test_arguments_that_are_no_json_are_told_apart():
    def invalid(written):
        calls = [{"type": "invalid_tool_call", "name": "f", "args": written, "id": "1", "error": None}]
        return answer_of(ChatResult(generations=[ChatGeneration(message=AIMessage("", invalid_tool_calls=calls))]))

    def streamed(written):
        said = Said()
        for name, piece in (("f", written[:3]), (None, written[3:])):
            chunk = {"name": name, "args": piece, "id": None, "index": 0, "type": "tool_call_chunk"}
            said.note(AIMessageChunk("", tool_call_chunks=[chunk]))
        return said.answer()

    assert invalid("{x: 1}") != invalid("{x: 2}")
    assert invalid("{x: 1}") == streamed("{x: 1}")


def test_chunks_without_an_index_are_calls_of_their_own():
    said = Said()
    for query in ("x", "y"):
        chunk = {"name": "search", "args": f'{{"query": "{query}"}}', "id": "1", "index": None, "type": "tool_call_chunk"}
        said.note(AIMessageChunk("", tool_call_chunks=[chunk]))
    assert said.answer() == ("", [("search", {"query": "x"}), ("search", {"query": "y"})])


# -- healthy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@ways
def test_an_agent_of_twelve_different_steps_is_no_loop(aio, provider, model, door, way):
    provider.reset([*[reply for number in range(12) for reply in again(query=f"part {number}")], Reply(text="done")])
    through, config = door(on_loop="raise")
    WAYS[way](create_agent(through(model()), [search]), aio, config)
    assert provider.request_count == 13


@pytest.mark.slow
@pytest.mark.parametrize("way", ["batch", "abatch", "loop", "batch in a run", "map"])
def test_one_prompt_over_many_inputs_is_no_loop(aio, provider, chat, door, way):
    provider.reset([Reply(text="no", output_tokens=1)])
    through, config = door(on_loop="raise")
    chain = (
        ChatPromptTemplate.from_messages([("system", "Is it spam?"), ("user", "{text}")])
        | through(chat(max_tokens=9))
        | StrOutputParser()
    )
    inputs = [{"text": f"mail about {number}"} for number in range(30)]
    if way == "batch":
        chain.batch(inputs, config)
    elif way == "abatch":
        aio(chain.abatch(inputs, config))
    elif way == "map":
        (RunnableLambda(lambda values: values) | chain.map()).invoke(inputs, config)
    elif way == "loop":
        for value in inputs:
            chain.invoke(value, config)
    else:
        with clevagent.run():
            chain.batch(inputs, config)
    assert provider.request_count == 30


@pytest.mark.slow
def test_greetings_to_a_bare_model_are_no_loop(provider, chat, door):
    provider.reset([Reply(text="Hello!", output_tokens=1)])
    through, config = door(on_loop="raise")
    model = through(chat(max_tokens=9))
    for _ in range(20):
        model.invoke("Hi!", config)
        model.invoke([HumanMessage("Hi!"), AIMessage("Hello!"), HumanMessage("Thanks!")], config)
    assert provider.request_count == 40


@pytest.mark.slow
def test_greetings_to_a_chain_are_no_loop(provider, chat, door):
    provider.reset([Reply(text="Hello!", output_tokens=1)])
    through, config = door(on_loop="raise")
    chain = through(chat(max_tokens=9)) | StrOutputParser()
    for _ in range(20):
        chain.invoke("Hi!", config)
    assert provider.request_count == 20


@pytest.mark.slow
def test_votes_taken_side_by_side_are_no_loop(aio, provider, chat, door):
    provider.reset([Reply(text="10", output_tokens=1, delay_s=0.05)])
    through, config = door(on_loop="raise")
    model = through(chat(max_tokens=9))

    async def vote():
        async with clevagent.run():
            await model.abatch(["How many?"] * 9, config)

    aio(vote())
    assert provider.request_count == 9


# -- two agents -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("grows", [False, True])
def test_two_nodes_that_feed_each_other_are_stopped(aio, provider, model, door, is_async, grows):
    provider.reset([Reply(text="Please take over.", output_tokens=1)])
    through, config = door(on_loop="raise")
    one = through(model())

    class State(TypedDict):
        support: list
        billing: list

    def agent(mine, other):
        def ask(state):
            answer = one.invoke(state[mine])
            turn = [answer, HumanMessage("Please take over.")]
            return {mine: [*state[mine], *turn] if grows else state[mine], other: state[other]}

        async def aask(state):
            answer = await one.ainvoke(state[mine])
            turn = [answer, HumanMessage("Please take over.")]
            return {mine: [*state[mine], *turn] if grows else state[mine], other: state[other]}

        return RunnableLambda(ask, afunc=aask)

    builder = StateGraph(State)
    builder.add_node("support_agent", agent("support", "billing"))
    builder.add_node("billing_agent", agent("billing", "support"))
    builder.add_edge(START, "support_agent")
    builder.add_edge("support_agent", "billing_agent")
    builder.add_edge("billing_agent", "support_agent")
    graph = builder.compile()
    state = {"support": [HumanMessage("You are support.")], "billing": [HumanMessage("You are billing.")]}
    with pytest.raises(LoopDetected):
        aio(graph.ainvoke(state, config)) if is_async else graph.invoke(state, config)
    # Three rounds of the same; of growing conversations the first round differs from those behind it.
    assert provider.request_count == (8 if grows else 6)
