"""``clevagent.guard(graph)``: a graph of the same type, one run for each invocation, and three ways of stopping."""

from __future__ import annotations

import copy
import logging
import operator
import pickle
from typing import Annotated, TypedDict

import pytest
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphBubbleUp
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel
from langgraph.pregel.remote import RemoteGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langgraph import stopped, top_up
from tests.langgraph.conftest import PROMPT, Texts, thread


@pytest.fixture
def write(chat):
    model = chat()

    def write(state):
        return {"texts": [model.invoke(PROMPT).text]}

    return write


@pytest.fixture
def loop(write):
    """A graph that writes again and again, 20 times unless something stops it."""

    def make(*, saved=True):
        builder = StateGraph(Texts)
        builder.add_node("write", write)
        builder.add_edge(START, "write")
        builder.add_conditional_edges("write", lambda state: END if len(state["texts"]) >= 20 else "write")
        return builder.compile(checkpointer=InMemorySaver() if saved else None)

    return make


@pytest.mark.slow
def test_a_guarded_graph_is_of_the_same_type_and_leaves_the_users_own_alone(loop, provider):
    graph = loop()
    guarded = clevagent.guard(graph, budgets=[Budget(llm_calls=3)])
    assert isinstance(guarded, CompiledStateGraph)
    assert type(guarded).__name__ == "CompiledStateGraph"
    assert guarded is not graph
    with pytest.raises(BudgetExceeded):
        guarded.invoke({"texts": []}, thread())
    assert provider.request_count == 3
    graph.invoke({"texts": []}, thread("other"))
    assert provider.request_count == 23


def ways(aio):
    async def astream(graph, given, config, **kw):
        return [chunk async for chunk in graph.astream(given, config, **kw)]

    async def events(graph, given, config):
        return [event async for event in graph.astream_events(given, config, version="v2")]

    async def events_v3(graph, given, config):
        stream = await graph.astream_events(given, config, version="v3")
        async for _ in stream:
            pass

    return {
        "invoke": lambda graph, given, config: graph.invoke(given, config),
        "invoke_v2": lambda graph, given, config: graph.invoke(given, config, version="v2"),
        "ainvoke": lambda graph, given, config: aio(graph.ainvoke(given, config)),
        "stream": lambda graph, given, config: list(graph.stream(given, config)),
        "stream_messages": lambda graph, given, config: list(graph.stream(given, config, stream_mode="messages")),
        "stream_all": lambda graph, given, config: list(
            graph.stream(given, config, stream_mode=["values", "updates", "messages", "debug"], subgraphs=True)
        ),
        "stream_v2": lambda graph, given, config: list(graph.stream(given, config, stream_mode="updates", version="v2")),
        "astream": lambda graph, given, config: aio(astream(graph, given, config)),
        "astream_messages": lambda graph, given, config: aio(astream(graph, given, config, stream_mode="messages")),
        "batch": lambda graph, given, config: graph.batch([given], config),
        "abatch": lambda graph, given, config: aio(graph.abatch([given], config)),
        "astream_events": lambda graph, given, config: aio(events(graph, given, config)),
        "stream_events_v3": lambda graph, given, config: list(graph.stream_events(given, config, version="v3")),
        "astream_events_v3": lambda graph, given, config: aio(events_v3(graph, given, config)),
        "with_config": lambda graph, given, config: graph.with_config(config).invoke(given),
        "copy": lambda graph, given, config: graph.copy().invoke(given, config),
        "chain": lambda graph, given, config: (RunnableLambda(lambda x: x) | graph).invoke(given, config),
        "with_retry": lambda graph, given, config: graph.with_retry(stop_after_attempt=2).invoke(given, config),
    }


WAYS = list(ways(None))


@pytest.mark.slow
@pytest.mark.parametrize("on_exceed", ["raise", "halt", "ask"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_invoking_is_refused_at_the_ceiling(way, on_exceed, loop, provider, aio):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)], on_exceed=on_exceed)
    go = ways(aio)[way]
    if on_exceed == "raise":
        with pytest.raises(BudgetExceeded) as caught:
            go(graph, {"texts": []}, thread())
        assert isinstance(caught.value, GraphBubbleUp)
    else:
        go(graph, {"texts": []}, thread())
    # A run of its own for each attempt of with_retry.
    assert provider.request_count == (6 if way == "with_retry" and on_exceed == "raise" else 3)
    assert stopped(graph, thread()).budget == "3 llm_calls per run"
    assert clevagent.init().ledger.holds() == []


@pytest.mark.slow
def test_raise_leaves_the_state_and_goes_on_once_there_is_more(loop, provider):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)])
    with pytest.raises(BudgetExceeded):
        graph.invoke({"texts": []}, thread())
    assert len(graph.get_state(thread()).values["texts"]) == 3
    assert graph.get_state(thread()).next == ("write",)
    with pytest.raises(BudgetExceeded):
        graph.invoke(None, thread())
    assert provider.request_count == 3, "a resumption is the same run, and has no new budget"
    top_up(graph, thread(), llm_calls=17)
    assert len(graph.invoke(None, thread())["texts"]) == 20
    assert provider.request_count == 20
    assert stopped(graph, thread()) is None


@pytest.mark.slow
def test_halt_gives_back_the_state_that_was_reached(loop, provider, caplog):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)], on_exceed="halt")
    with clevagent.run() as run:
        state = graph.invoke({"texts": []}, thread())
    assert state == {"texts": ["ok"] * 3}
    assert [stop.budget for stop in run.summary().stops] == ["3 llm_calls per run"]
    assert "ended early: A model call to 'gpt-4o' " in str(run)
    assert stopped(graph).budget == "3 llm_calls per run"
    assert [record.clevagent_incident.kind for record in caplog.records if hasattr(record, "clevagent_incident")] == [
        "budget_warning",
        "budget",
    ]
    assert provider.request_count == 3
    top_up(graph, thread(), llm_calls=20)
    assert len(graph.invoke(None, thread())["texts"]) == 20
    assert stopped(graph) is None


@pytest.mark.parametrize("on_exceed", ["halt", "ask", "raise"])
def test_a_call_that_is_too_large_ends_its_own_graph_and_no_other(chat, line, provider, on_exceed):
    def short(state):
        return {"texts": [chat().invoke("Hello").text]}

    def long(state):
        return {"texts": [chat().invoke("Hello " * 20_000).text]}

    budgets = [Budget(usd="0.10", per="day", name="daily", on_exceed=on_exceed)]
    graph = clevagent.guard(line(short, long), budgets=budgets)
    other = clevagent.guard(line(short), budgets=budgets)
    if on_exceed == "raise":
        with pytest.raises(BudgetExceeded) as caught:
            graph.invoke({"texts": []}, thread())
        assert caught.value.reason == "too_large"
    else:
        assert len(graph.invoke({"texts": []}, thread())["texts"]) == 1
        assert stopped(graph, thread()).details["reason"] == "too_large"
    assert len(other.invoke({"texts": []}, thread("other"))["texts"]) == 1
    assert provider.request_count == 2


def test_halt_needs_no_checkpointer(loop, provider):
    graph = clevagent.guard(loop(saved=False), budgets=[Budget(llm_calls=3)], on_exceed="halt")
    assert len(graph.invoke({"texts": []})["texts"]) == 3
    assert stopped(graph).budget == "3 llm_calls per run"
    assert len(graph.invoke({"texts": ["ok"] * 18})["texts"]) == 20
    assert stopped(graph) is None


@pytest.mark.parametrize("mode", ["values", "updates", ["values", "updates"]])
def test_a_stream_that_halts_ends_after_the_last_values(loop, mode, provider):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=2)], on_exceed="halt")
    chunks = list(graph.stream({"texts": []}, thread(), stream_mode=mode))
    updates, values = {"write": {"texts": ["ok"]}}, [{"texts": ["ok"] * count} for count in range(3)]
    if mode == "values":
        assert chunks == values
    elif mode == "updates":
        assert chunks == [updates] * 2
    else:
        assert [chunk for kind, chunk in chunks if kind == "values"] == values
        assert "__interrupt__" not in str(chunks)


@pytest.mark.slow
def test_what_finished_branches_have_written_is_in_the_state_of_a_halt(write, provider):
    for saved in (True, False):
        provider.reset()
        builder = StateGraph(Texts)
        builder.add_node("write", write)
        builder.add_conditional_edges(START, lambda state: [Send("write", state)] * 20, ["write"])
        graph = clevagent.guard(
            builder.compile(checkpointer=InMemorySaver() if saved else None), budgets=[Budget(llm_calls=7)], on_exceed="halt"
        )
        assert len(graph.invoke({"texts": []}, thread())["texts"]) == 7
        assert provider.request_count == 7


def test_nothing_behind_a_node_that_was_refused_is_run(write, line, provider):
    """A jump to the end would not do: edges of the node are followed all the same."""
    ran = []

    def after(state):
        ran.append(1)
        return {}

    for end in ("halt", "ask", "raise"):
        graph = clevagent.guard(line(write, after), budgets=[Budget(usd="0.000001")], on_exceed=end)
        if end == "raise":
            with pytest.raises(BudgetExceeded):
                graph.invoke({"texts": []}, thread())
        else:
            graph.invoke({"texts": []}, thread())
    assert ran == []
    assert provider.request_count == 0


# -- ask ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ask_returns_a_question_and_goes_on_with_more(loop, provider):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)], on_exceed="ask")
    state = graph.invoke({"texts": []}, thread())
    assert len(state["texts"]) == 3
    (question,) = state["__interrupt__"]
    assert question.value["budget"] == "3 llm_calls per run"
    assert (question.value["spent"], question.value["ceiling"], question.value["unit"]) == (3, 3, "llm_calls")
    assert question.value["question"] == (
        "The budget '3 llm_calls per run' has spent 3 llm calls of 3 llm calls, and the next call could cost up to 1 llm calls. "
        "Raise it, or stop here?"
    )
    state = graph.invoke(Command(resume={"llm_calls": 2}), thread())
    assert len(state["texts"]) == 5
    assert state["__interrupt__"][0].value["ceiling"] == 5
    state = graph.invoke(Command(resume={"llm_calls": 100}), thread())
    assert len(state["texts"]) == 20
    assert "__interrupt__" not in state
    assert provider.request_count == 20


@pytest.mark.slow
def test_ask_ends_when_the_answer_is_to_stop(loop, provider, aio):
    for stop in ("stop", {"stop": True}, False):
        for resume in (
            lambda graph, command: graph.invoke(command, thread()),
            lambda graph, command: aio(graph.ainvoke(command, thread())),
        ):
            provider.reset()
            graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)], on_exceed="ask")
            graph.invoke({"texts": []}, thread())
            state = resume(graph, Command(resume=stop))
            assert state == {"texts": ["ok"] * 3}
            assert graph.get_state(thread()).next == ()
            assert stopped(graph, thread()).details == {"answer": "stop"}
            assert provider.request_count == 3


def test_an_answer_that_is_none_leaves_the_graph_waiting(loop, provider):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)], on_exceed="ask")
    graph.invoke({"texts": []}, thread())
    for answer in ("yes", {"usd": 2}, {"llm_calls": -1}, {"llm_calls": 0.5}, {"llm_calls": 1, "usd": 1}, {}):
        with pytest.raises(UsageError, match="the graph still waits"):
            graph.invoke(Command(resume=answer), thread())
    assert provider.request_count == 3
    assert len(graph.invoke(Command(resume={"llm_calls": 1}), thread())["texts"]) == 4


def test_going_on_without_more_asks_again_unless_it_was_topped_up_elsewhere(loop, provider):
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)], on_exceed="ask")
    graph.invoke({"texts": []}, thread())
    assert "__interrupt__" in graph.invoke(Command(resume="go on"), thread())
    assert "__interrupt__" in graph.invoke(None, thread())
    assert provider.request_count == 3
    top_up(graph, thread(), llm_calls=1)
    assert len(graph.invoke(Command(resume=True), thread())["texts"]) == 4


@pytest.mark.slow
def test_one_answer_stands_for_all_branches_that_ask_about_one_account(write, provider):
    builder = StateGraph(Texts)
    builder.add_node("write", write)
    builder.add_conditional_edges(START, lambda state: [Send("write", state)] * 20, ["write"])
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[Budget(llm_calls=10)], on_exceed="ask")
    state = graph.invoke({"texts": []}, thread())
    assert (len(state["texts"]), len(state["__interrupt__"])) == (10, 10)
    state = graph.invoke(Command(resume={"llm_calls": 4}), thread())
    assert (len(state["texts"]), len(state["__interrupt__"])) == (14, 6)
    first = state["__interrupt__"][0]
    state = graph.invoke(Command(resume={first.id: {"llm_calls": 6}}), thread())
    assert len(state["texts"]) == 20
    assert provider.request_count == 20, "nothing was paid for twice"


class Poem(TypedDict):
    texts: Annotated[list[str], operator.add]


def test_the_users_own_questions_get_the_users_answers(chat, provider, line):
    """And an answer to one of the user's is never taken for money, nor taken twice."""
    model = chat()

    def work(state):
        first = interrupt("topic?")
        model.invoke(PROMPT)
        second = interrupt("title?")
        model.invoke(PROMPT)
        return {"texts": [first, second]}

    graph = clevagent.guard(line(work), budgets=[Budget(llm_calls=1)], on_exceed="ask")
    assert graph.invoke({"texts": []}, thread())["__interrupt__"][0].value == "topic?"
    assert graph.invoke(Command(resume="the sea"), thread())["__interrupt__"][0].value == "title?"
    # The node runs again from its top, and is refused at its first call: the answer waits.
    asked = graph.invoke(Command(resume={"llm_calls": 5}), thread())["__interrupt__"][0].value
    assert asked["budget"] == "1 llm_calls per run"
    state = graph.invoke(Command(resume={"llm_calls": 50}), thread())
    # {"llm_calls": 5} was the answer to "title?", whatever it looks like.
    assert state == {"texts": ["the sea", {"llm_calls": 5}]}


def test_an_answer_that_was_taken_is_not_taken_again_by_the_next_question(chat, provider, line):
    """LangGraph would: whatever a node asks after it has failed once gets the answer before."""
    model = chat()

    def work(state):
        first = interrupt("topic?")
        model.invoke(PROMPT)
        return {"texts": [first, interrupt("title?")]}

    for more in (Command(resume={"llm_calls": 5}), None):
        graph = clevagent.guard(line(work), budgets=[Budget(llm_calls=1, name="one")], on_exceed="ask")
        with clevagent.run():
            graph.invoke({"texts": []}, thread("first"))
        graph.invoke({"texts": []}, thread())
        # Used up, so that the first answer is followed by a question of ours.
        clevagent.init()
        before = provider.request_count
        assert graph.invoke(Command(resume="the sea"), thread())["__interrupt__"][0].value == "title?"
        assert provider.request_count == before + 1
        assert graph.invoke(Command(resume="Waves"), thread())["__interrupt__"][0].value["budget"] == "one"
        if more is None:
            top_up(graph, thread(), llm_calls=5)
        state = graph.invoke(more, thread())
        assert state == {"texts": ["the sea", "Waves"]}, more


def test_an_answer_before_the_money_ran_out_is_not_taken_again(chat, provider, line):
    model = chat()

    def spend(state):
        model.invoke(PROMPT)
        return {}

    def work(state):
        first = interrupt("topic?")
        model.invoke(PROMPT)
        return {"texts": [first, interrupt("title?")]}

    for more in (Command(resume={"llm_calls": 5}), None):
        graph = clevagent.guard(line(spend, work), budgets=[Budget(llm_calls=1)], on_exceed="ask")
        assert graph.invoke({"texts": []}, thread())["__interrupt__"][0].value == "topic?"
        assert "budget" in graph.invoke(Command(resume="the sea"), thread())["__interrupt__"][0].value
        if more is None:
            top_up(graph, thread(), llm_calls=5)
        assert graph.invoke(more, thread())["__interrupt__"][0].value == "title?"
        assert graph.invoke(Command(resume="Waves"), thread()) == {"texts": ["the sea", "Waves"]}


def test_questions_of_both_kinds_wait_side_by_side(chat, provider):
    model = chat()

    def pay(state):
        return {"texts": [model.invoke(PROMPT).text, model.invoke(PROMPT).text]}

    def decide(state):
        return {"texts": [interrupt("title?")]}

    builder = StateGraph(Texts).add_node("pay", pay).add_node("decide", decide)
    builder.add_edge(START, "pay").add_edge(START, "decide")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[Budget(llm_calls=1)], on_exceed="ask")
    questions = {
        "ours" if isinstance(found.value, dict) else "theirs": found.id
        for found in graph.invoke({"texts": []}, thread())["__interrupt__"]
    }
    with pytest.raises(RuntimeError, match="specify the interrupt id"):
        graph.invoke(Command(resume={"llm_calls": 5}), thread())
    state = graph.invoke(Command(resume={questions["theirs"]: "Waves"}), thread())
    assert len(state["__interrupt__"]) == 1
    state = graph.invoke(Command(resume={questions["ours"]: {"llm_calls": 5}}), thread())
    assert sorted(state["texts"]) == ["Waves", "ok", "ok"]


def test_asking_needs_a_checkpointer(loop):
    for options in ({"on_exceed": "ask"}, {"budgets": [Budget(usd=1, on_exceed="ask")]}):
        with pytest.raises(UsageError, match=r"has no checkpointer.*compile\(checkpointer="):
            clevagent.guard(loop(saved=False), **options)


def test_each_budget_may_end_the_graph_in_its_own_way(loop, provider):
    ends = {"halt": Budget(llm_calls=4, on_exceed="halt"), "ask": Budget(llm_calls=2, on_exceed="ask", name="patience")}
    graph = clevagent.guard(loop(), budgets=list(ends.values()))
    assert "__interrupt__" in graph.invoke({"texts": []}, thread())
    state = graph.invoke(Command(resume={"llm_calls": 10}), thread())
    assert state == {"texts": ["ok"] * 4}


def test_the_runs_and_the_processes_ceilings_end_the_graph_in_its_way_too(loop, provider):
    clevagent.init(budgets=[Budget(llm_calls=9, per="day")])
    graph = clevagent.guard(loop(), on_exceed="halt")
    with clevagent.run(budgets=[Budget(llm_calls=4)]):
        assert len(graph.invoke({"texts": []}, thread("a"))["texts"]) == 4
    assert len(graph.invoke({"texts": []}, thread("b"))["texts"]) == 5
    assert provider.request_count == 9


def test_without_a_way_of_its_own_a_graph_raises(loop, provider):
    graph = clevagent.guard(loop())
    with clevagent.run(budgets=[Budget(llm_calls=4)]), pytest.raises(BudgetExceeded):
        graph.invoke({"texts": []}, thread())
    with pytest.raises(UsageError, match="on_exceed='warn'"):
        clevagent.guard(loop(), on_exceed="warn")


@pytest.mark.slow
def test_a_loop_ends_the_graph_in_its_way(chat, provider):
    """The same question and the same answer, until the loop guard has had enough."""
    model = chat()

    def make(on_exceed):
        builder = StateGraph(Texts)
        builder.add_node("write", lambda state: {"texts": [model.invoke("Hello").text]})
        builder.add_edge(START, "write")
        builder.add_conditional_edges("write", lambda state: END if len(state["texts"]) == 9 else "write")
        return clevagent.guard(builder.compile(checkpointer=InMemorySaver()), on_exceed=on_exceed)

    clevagent.init(on_loop="raise")
    assert len(make("halt").invoke({"texts": []}, thread())["texts"]) == 5
    graph = make("ask")
    state = graph.invoke({"texts": []}, thread())
    assert state["__interrupt__"][0].value["clevagent"] == "loop"
    assert len(graph.invoke(Command(resume="go on"), thread())["texts"]) == 9


# -- what is in it, and around it -----------------------------------------------------------------------------------------


def test_subgraphs_and_runnables_are_covered(chat, provider, line):
    model = chat()

    def inner(state):
        return {"texts": [model.invoke(PROMPT).text]}

    def called(state):
        return line(inner, saved=False).invoke({"texts": []})

    builder = StateGraph(Texts)
    builder.add_node("sub", line(inner, saved=False))
    builder.add_node("called", called)
    builder.add_node(
        "chain", RunnableLambda(lambda state: PROMPT) | model | RunnableLambda(lambda answer: {"texts": [answer.text]})
    )
    builder.add_edge(START, "sub").add_edge("sub", "called").add_edge("called", "chain").add_edge("chain", "sub")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[Budget(llm_calls=5)], on_exceed="halt")
    with clevagent.run() as run:
        assert len(graph.invoke({"texts": []}, thread())["texts"]) >= 5
    assert provider.request_count == 5
    assert {name: spend.calls for name, spend in run.summary().by_node.items()} == {
        "sub/inner": 2,
        "called/inner": 2,
        "chain": 1,
    }


@pytest.mark.parametrize("on_exceed", ["raise", "halt", "ask"])
def test_a_graph_of_the_functional_api(chat, provider, on_exceed):
    model = chat()

    @task
    def write(number: int) -> str:
        return model.invoke(PROMPT).text

    @entrypoint(checkpointer=InMemorySaver())
    def book(chapters: int) -> list:
        return [write(number).result() for number in range(chapters)]

    graph = clevagent.guard(book, budgets=[Budget(llm_calls=3)], on_exceed=on_exceed)
    assert isinstance(graph, Pregel)
    if on_exceed == "raise":
        with pytest.raises(BudgetExceeded):
            graph.invoke(5, thread())
    else:
        graph.invoke(5, thread())
    assert provider.request_count == 3
    if on_exceed == "ask":
        assert graph.invoke(Command(resume={"llm_calls": 2}), thread()) == ["ok"] * 5
    else:
        top_up(graph, thread(), llm_calls=2)
        assert graph.invoke(None, thread()) == ["ok"] * 5
    assert provider.request_count == 5, "finished tasks are not paid for again"


@tool
def search(query: str) -> str:
    """Search the archive."""
    return "nothing"


@pytest.fixture
def searching(provider, chat):
    """A model that searches for ever, for something else each time."""
    provider.reset(lambda body: Reply(text="", tool_calls=[("search", {"query": f"part {len(body['messages'])}"})]))
    return chat()


@pytest.mark.parametrize("on_exceed", ["raise", "halt", "ask"])
@pytest.mark.parametrize("swallower", [None, "ModelRetryMiddleware", "ToolRetryMiddleware"])
@pytest.mark.parametrize("budget", [Budget(llm_calls=3), Budget(tool_calls=3, name="tools")], ids=["models", "tools"])
def test_agents_are_stopped_whatever_swallows_other_errors(searching, provider, on_exceed, swallower, budget):
    from langchain.agents import create_agent, middleware

    around = [getattr(middleware, swallower)(max_retries=2, initial_delay=0)] if swallower else []
    agent = create_agent(searching, [search], middleware=around, checkpointer=InMemorySaver())
    graph = clevagent.guard(agent, budgets=[budget], on_exceed=on_exceed)
    question = {"messages": [("user", "Find it")]}
    if on_exceed == "raise":
        with pytest.raises(BudgetExceeded):
            graph.invoke(question, thread())
    else:
        state = graph.invoke(question, thread())
        assert ("__interrupt__" in state) == (on_exceed == "ask")
    assert provider.request_count == (3 if budget.llm_calls else 4)
    tools = [message for message in graph.get_state(thread()).values["messages"] if message.type == "tool"]
    assert all(message.content == "nothing" for message in tools), "no refusal was told to the model"


@pytest.mark.parametrize("door", ["handler", "attach", "model"])
def test_refusals_pass_tool_nodes_and_retries_where_only_a_call_is_guarded(searching, provider, door):
    """ToolNode(handle_tool_errors=True) would tell the model; RetryPolicy(retry_on=Exception) would run the node again."""
    clevagent.init(attach=["langchain"] if door == "attach" else [], agent=door)
    model = (clevagent.guard(searching) if door == "model" else searching).bind_tools([search])
    entered = []

    def agent(state):
        entered.append(1)
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("agent", agent, retry_policy=RetryPolicy(retry_on=Exception, initial_interval=0.01, max_attempts=4))
    builder.add_node("tools", ToolNode([search], handle_tool_errors=True))
    builder.add_edge(START, "agent").add_edge("agent", "tools").add_edge("tools", "agent")
    graph = builder.compile(checkpointer=InMemorySaver())
    config = thread() | ({"callbacks": [ClevAgentCallbackHandler()]} if door == "handler" else {})
    budgets = [Budget(llm_calls=3)] if door == "model" else [Budget(tool="search", tool_calls=3)]
    with clevagent.run(budgets=budgets), pytest.raises(BudgetExceeded) as caught:
        graph.invoke({"messages": [("user", "Find it")]}, config)
    assert isinstance(caught.value, GraphBubbleUp)
    assert type(pickle.loads(pickle.dumps(caught.value))) is type(caught.value)  # noqa: S301 - our own
    assert provider.request_count == (3 if door == "model" else 4)
    assert len(entered) == 4
    messages = graph.get_state(config).values["messages"]
    assert not any("refused" in str(message.content) for message in messages)


def test_a_guarded_graph_as_a_node_has_a_run_of_its_own(chat, provider, line):
    model = chat()

    def inner(state):
        model.invoke(PROMPT)
        return {"texts": [model.invoke(PROMPT).text]}

    sub = clevagent.guard(line(inner, saved=False), budgets=[Budget(llm_calls=1, name="inner")], on_exceed="halt")

    def after(state):
        return {"texts": ["after"]}

    for outer in (None, [Budget(llm_calls=1, name="outer")]):
        provider.reset()
        builder = StateGraph(Texts).add_node("sub", sub).add_node("after", after)
        builder.add_edge(START, "sub").add_edge("sub", "after")
        graph = builder.compile(checkpointer=InMemorySaver())
        if outer:
            graph = clevagent.guard(graph, budgets=outer)
        assert graph.invoke({"texts": []}, thread()) == {"texts": ["after"]}, "the inner one halted, the outer one went on"
        assert provider.request_count == 1


def test_the_outermost_graph_asks_for_those_inside_it(chat, provider, line):
    model = chat()

    def inner(state):
        model.invoke(PROMPT)
        return {"texts": [model.invoke(PROMPT).text]}

    plain = line(inner, saved=False)
    sub = clevagent.guard(plain, budgets=[Budget(llm_calls=1, name="inner")])
    builder = StateGraph(Texts).add_node("sub", sub).add_edge(START, "sub")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), on_exceed="ask")
    state = graph.invoke({"texts": []}, thread())
    assert state["__interrupt__"][0].value["budget"] == "inner"
    # The node is run again from its top: two more calls.
    state = graph.invoke(Command(resume={"llm_calls": 2}), thread())
    assert state == {"texts": ["ok"]}
    assert provider.request_count == 3


def test_a_graph_with_a_thread_of_its_own_inside_a_node_is_not_taken_for_finished(chat, provider, line):
    """LangGraph takes it for a graph of its own, which would end by an interrupt as if it were done."""
    model = chat()

    def inner(state):
        return {"texts": [model.invoke(PROMPT).text]}

    child = line(inner)
    seen = []

    def outer(state):
        child.invoke({"texts": []}, thread("child-1"))
        seen.append(child.invoke({"texts": []}, thread("child-2")))
        return {"texts": ["done"]}

    for on_exceed in ("halt", "ask"):
        graph = clevagent.guard(line(outer), budgets=[Budget(llm_calls=1)], on_exceed=on_exceed)
        if on_exceed == "halt":
            assert graph.invoke({"texts": []}, thread()) == {"texts": []}
        else:
            try:
                state = graph.invoke({"texts": []}, thread())
            except BudgetExceeded:
                pass
            else:  # langgraph 1.2.4 takes it for a part of the graph around it, which can ask
                assert "__interrupt__" in state
        assert seen == []
        assert stopped(graph, thread()) is not None


def test_asking_inside_a_graph_that_is_not_guarded_is_refused(chat, provider, line):
    def inner(state):
        return {}

    sub = clevagent.guard(line(inner), on_exceed="ask")
    builder = StateGraph(Texts).add_node("sub", sub).add_edge(START, "sub")
    with pytest.raises(UsageError, match="Guard the outermost graph"):
        builder.compile(checkpointer=InMemorySaver()).invoke({"texts": []}, thread())


def test_a_guarded_model_inside_a_guarded_graph_counts_once(chat, provider, line):
    clevagent.init(attach=["langchain"])
    model = clevagent.guard(chat())

    def write(state):
        return {"texts": [model.invoke(PROMPT).text]}

    graph = clevagent.guard(line(write), budgets=[Budget(llm_calls=1)])
    with clevagent.run() as run:
        list(graph.stream({"texts": []}, thread(), stream_mode="messages"))
        graph.invoke({"texts": []}, {**thread("b"), "callbacks": [ClevAgentCallbackHandler()]})
    assert run.summary().total.calls == provider.request_count == 2
    assert run.summary().total.cost_usd == float(provider.billed_usd)


def test_what_the_consumer_of_a_stream_does_is_not_the_graphs(loop, chat, provider):
    watchdog = clevagent.init()
    mine = clevagent.guard(chat())
    graph = clevagent.guard(loop(), budgets=[Budget(llm_calls=3)])
    with clevagent.run() as run:
        with pytest.raises(BudgetExceeded):
            for _ in graph.stream({"texts": []}, thread()):
                assert watchdog.current.get() is run
                mine.invoke("Hello")
    assert provider.request_count == 6


def test_only_graphs_that_are_compiled_can_be_guarded():
    with pytest.raises(UsageError, match="StateGraph that is not compiled"):
        clevagent.guard(StateGraph(Texts))


def test_a_graph_that_runs_elsewhere_is_refused():
    remote = RemoteGraph("agent", url="http://127.0.0.1:9")
    with pytest.raises(UsageError, match="given a RemoteGraph: its nodes run in another process"):
        clevagent.guard(remote, budgets=[Budget(usd=1)])


def test_guarding_twice_holds_both(loop, provider):
    once = clevagent.guard(loop(), budgets=[Budget(llm_calls=5)])
    assert clevagent.guard(once) is once
    twice = clevagent.guard(once, budgets=[Budget(llm_calls=2)], on_exceed="halt")
    assert len(twice.invoke({"texts": []}, thread())["texts"]) == 2


def test_a_copy_of_a_guarded_graph_is_guarded(loop, provider):
    graph = copy.copy(clevagent.guard(loop(), budgets=[Budget(llm_calls=2)]))
    with pytest.raises(BudgetExceeded):
        graph.invoke({"texts": []}, thread())
    assert provider.request_count == 2


@pytest.mark.slow
def test_a_subgraph_that_remembers_asks_as_others_do(write, loop, provider):
    remembering = loop().builder.compile(checkpointer=True)

    def talk(state):
        return remembering.invoke(state)

    builder = StateGraph(Texts).add_node("talk", talk).add_edge(START, "talk")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[Budget(llm_calls=3)], on_exceed="ask")
    asked = graph.invoke({"texts": []}, thread())
    assert [question.value["budget"] for question in asked["__interrupt__"]] == ["3 llm_calls per run"]
    assert len(graph.invoke(Command(resume={"llm_calls": 17}), thread())["texts"]) == 20
    assert provider.request_count == 20


def test_a_guarded_graph_can_still_be_looked_into(loop):
    graph, plain = clevagent.guard(loop()), loop()
    assert graph.get_graph().draw_mermaid() == plain.get_graph().draw_mermaid()
    assert graph.get_input_jsonschema() == plain.get_input_jsonschema()
    assert list(graph.get_state_history(thread())) == []
    graph.update_state(thread(), {"texts": ["x"]}, as_node="write")
    assert graph.get_state(thread()).values == {"texts": ["x"]}


def test_importing_the_package_imports_no_framework(tmp_path):
    import subprocess
    import sys

    code = "import clevagent_langgraph, sys; assert not {'langgraph', 'langchain_core'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.fixture(autouse=True)
def _quiet():
    # LangChain logs each exception of a callback that it raises all the same.
    logging.getLogger("langchain_core.callbacks.manager").setLevel(logging.CRITICAL)
