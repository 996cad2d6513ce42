"""``monitored_node``: whatever LangGraph takes as a node is still that node, and is watched."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import pytest
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphBubbleUp
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, RetryPolicy, Send, StreamWriter, interrupt
from typing_extensions import TypedDict

import clevagent
from clevagent import Budget, BudgetExceeded, LoopDetected, LoopGuard, UsageError, hookimpl
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langgraph import monitored_node
from tests.langgraph.conftest import PROMPT, Texts, thread


class Steps:
    """Hears the steps of nodes."""

    def __init__(self):
        self.names = []

    @hookimpl
    def clevagent_step(self, run, step):
        if step.kind == "node":
            self.names.append(step.name)


@pytest.fixture
def steps():
    heard = Steps()
    clevagent.init(plugins=[heard])
    return heard


@pytest.fixture(autouse=True)
def _quiet():
    # LangChain logs each exception of a callback that it raises all the same.
    logging.getLogger("langchain_core.callbacks.manager").setLevel(logging.CRITICAL)


# -- every kind of node ---------------------------------------------------------------------------------------------------


def write(state: Texts) -> dict:
    return {"texts": ["written"]}


async def awrite(state: Texts) -> dict:
    return {"texts": ["written"]}


def stream(state: Texts) -> Iterator[dict]:
    yield {"texts": ["draft"]}
    yield {"texts": ["written"]}


async def astream(state: Texts) -> AsyncIterator[dict]:
    yield {"texts": ["draft"]}
    yield {"texts": ["written"]}


class Writer:
    def __call__(self, state: Texts) -> dict:
        return {"texts": ["written"]}

    def method(self, state: Texts) -> dict:
        return {"texts": ["written"]}

    async def amethod(self, state: Texts) -> dict:
        return {"texts": ["written"]}

    @monitored_node("decorated")
    def decorated(self, state: Texts) -> dict:
        return {"texts": ["written"]}

    @monitored_node("static")
    @staticmethod
    def static(state: Texts) -> dict:
        return {"texts": ["written"]}


class AsyncWriter:
    async def __call__(self, state: Texts) -> dict:
        return {"texts": ["written"]}


class StreamingWriter:
    def __call__(self, state: Texts) -> Iterator[dict]:
        yield {"texts": ["draft"]}
        yield {"texts": ["written"]}


def partly(word: str, state: Texts) -> dict:
    return {"texts": [word]}


async def apartly(word: str, state: Texts) -> dict:
    return {"texts": [word]}


KINDS = {
    "function": (write, False),
    "async function": (awrite, True),
    "generator": (stream, False),
    "async generator": (astream, True),
    "object": (Writer(), False),
    "async object": (AsyncWriter(), True),
    "streaming object": (StreamingWriter(), False),
    "method": (Writer().method, False),
    "async method": (Writer().amethod, True),
    "partial": (functools.partial(partly, "written"), False),
    "async partial": (functools.partial(apartly, "written"), True),
    "lambda": (lambda state: {"texts": ["written"]}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_node_works_as_before_and_is_a_step(kind, steps, aio):
    node, is_async = KINDS[kind]
    for wrapped in (monitored_node("research")(node), monitored_node(node)):
        graph = StateGraph(Texts).add_node("node", wrapped).add_edge(START, "node").compile()
        with clevagent.run():
            if not is_async:
                assert graph.invoke({"texts": []}) == {"texts": ["written"]}
            assert aio(graph.ainvoke({"texts": []})) == {"texts": ["written"]}
    assert steps.names[0] == "research"
    assert len(steps.names) == (2 if is_async else 4)


def test_methods_that_are_decorated_in_their_class_work_as_before(steps):
    builder = StateGraph(Texts).add_node(Writer().decorated).add_node(Writer.static)
    graph = builder.add_edge(START, "decorated").add_edge("decorated", "static").compile()
    with clevagent.run():
        assert graph.invoke({"texts": []}) == {"texts": ["written"] * 2}
    assert steps.names == ["decorated", "static"]


def test_everything_that_langgraph_injects_arrives(steps, aio):
    class Context(TypedDict):
        user: str

    def full(state: Texts, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter, runtime: Runtime[Context]) -> dict:
        writer("custom")
        return {"texts": [config["configurable"]["thread_id"], type(store).__name__, runtime.context["user"]]}

    async def afull(
        state: Texts, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter, runtime: Runtime[Context]
    ) -> dict:
        return full(state, config, store=store, writer=writer, runtime=runtime)

    class Full:
        def __call__(
            self, state: Texts, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter, runtime: Runtime
        ) -> dict:
            return full(state, config, store=store, writer=writer, runtime=runtime)

    def more(word: str, state: Texts, config: RunnableConfig, *, store: BaseStore, writer: StreamWriter, runtime: Runtime) -> dict:
        return full(state, config, store=store, writer=writer, runtime=runtime)

    for node in (full, afull, Full(), functools.partial(more, "x")):
        builder = StateGraph(Texts, context_schema=Context).add_node("node", monitored_node("full")(node)).add_edge(START, "node")
        graph = builder.compile(checkpointer=InMemorySaver(), store=InMemoryStore())

        async def run(graph=graph):
            return [
                x async for x in graph.astream({"texts": []}, thread(), context={"user": "ada"}, stream_mode=["custom", "values"])
            ]

        chunks = aio(run())
        assert chunks[-1][1] == {"texts": ["t1", "InMemoryStore", "ada"]}, node
        assert ("custom", "custom") in chunks


class Private(TypedDict):
    note: str


def note(state: Texts) -> Private:
    return {"note": "x"}


def read(state: Private) -> Command[Literal["last", "__end__"]]:
    return Command(goto="last", update={"texts": [state["note"]]})


class Reader:
    def __call__(self, state: Private) -> Command[Literal["last", "__end__"]]:
        return read(state)


def read_more(word: str, state: Private) -> Command[Literal["last", "__end__"]]:
    return read(state)


def last(state: Texts) -> dict:
    return {"texts": ["last"]}


@pytest.mark.parametrize("reader", [read, Reader(), functools.partial(read_more, "x")], ids=["function", "object", "partial"])
def test_names_edges_and_schemas_survive(reader):
    def build(wrap):
        builder = StateGraph(Texts).add_node(wrap(note)).add_node(wrap(last))
        builder.add_node("read", wrap(reader))
        return builder.add_edge(START, "note").add_edge("note", "read").compile()

    watched = build(monitored_node)
    assert watched.invoke({"texts": []}) == {"texts": ["x", "last"]}
    assert "read -.-> last" in watched.get_graph().draw_mermaid()
    if not isinstance(reader, functools.partial):  # of a partial LangGraph itself reads neither
        plain = build(lambda node: node)
        assert watched.get_graph().draw_mermaid() == plain.get_graph().draw_mermaid()
        assert watched.get_input_jsonschema() == plain.get_input_jsonschema()


def test_tasks_and_entrypoints_are_decorated_below(steps):
    @task
    @monitored_node("chapter")
    def chapter(number: int) -> str:
        return f"chapter {number}"

    @entrypoint(checkpointer=InMemorySaver())
    @monitored_node("book")
    def book(chapters: int, *, previous: Any = None) -> entrypoint.final[list, str]:
        return entrypoint.final(value=[chapter(number).result() for number in range(chapters)], save="saved")

    with clevagent.run():
        assert book.invoke(2, thread()) == ["chapter 0", "chapter 1"]
    assert steps.names == ["chapter", "chapter", "book"]


def test_what_cannot_be_wrapped_is_refused_with_the_way_that_can(line):
    @task
    def chapter(number: int) -> str:
        return ""

    class Class:
        pass

    for wrong, way in (
        (RunnableLambda(write), "a Runnable.*clevagent.guard\\(graph"),
        (line(write), "a Runnable.*clevagent.guard\\(graph"),
        (chapter, "Write it below: @task"),
        (Class, "Give a function"),
        (classmethod(write), "write monitored_node below it"),
        (5, "Give a function"),
    ):
        with pytest.raises(UsageError, match=way):
            monitored_node("research")(wrong)
    with pytest.raises(UsageError, match="names nothing"):
        monitored_node("")
    for action in ("halt", "ask"):
        with pytest.raises(UsageError, match=r"monitored_node\(budgets=\[...\]\), which cannot.*clevagent.guard\(graph"):
            monitored_node("research", budgets=[Budget(usd=1, on_exceed=action)])


# -- what is counted ------------------------------------------------------------------------------------------------------


def test_costs_are_told_by_the_name_that_a_node_was_given(chat, provider, line):
    model = chat()

    def inside(state):
        return {"texts": [model.invoke(PROMPT).text]}

    @monitored_node("research")
    def first(state):
        line(inside, saved=False).invoke({"texts": []})
        return {"texts": [model.invoke(PROMPT).text]}

    graph = line(first, inside)
    paid = {"research/inside": 1, "research": 1, "inside": 1}
    for guarded in (clevagent.guard(graph), graph):
        with clevagent.run() as run:
            guarded.invoke({"texts": []}, {**thread(), "callbacks": [ClevAgentCallbackHandler()]})
        assert {name: spend.calls for name, spend in run.summary().by_node.items()} == paid
    model = clevagent.guard(chat())
    with clevagent.run() as run:
        graph.invoke({"texts": []}, thread())
    assert {name: spend.calls for name, spend in run.summary().by_node.items()} == paid


def test_a_step_is_told_when_a_node_has_finished_and_not_when_it_waits_or_fails(steps, line):
    @monitored_node
    def asks(state):
        return {"texts": [interrupt("title?")]}

    @monitored_node
    def fails(state):
        raise ZeroDivisionError

    graph = line(asks, fails)
    with clevagent.run() as run:
        assert "__interrupt__" in graph.invoke({"texts": []}, thread())
        assert steps.names == []
        with pytest.raises(ZeroDivisionError):
            graph.invoke(Command(resume="Waves"), thread())
    assert steps.names == ["asks"]
    assert run.summary().refusals == 0


def test_pausing_for_a_person_again_and_again_is_no_failure(line, caplog):
    """Booked as failures, five of them would look like a loop."""
    clevagent.init(on_loop="raise")

    @monitored_node
    def asks(state):
        return {"texts": [interrupt("title?") for _ in range(10)]}

    graph = clevagent.guard(line(asks))
    with clevagent.run() as run:
        graph.invoke({"texts": []}, thread())
        for number in range(10):
            graph.invoke(Command(resume=str(number)), thread())
    assert len(graph.get_state(thread()).values["texts"]) == 10
    assert run.summary().refusals == 0


# -- a ceiling of its own -------------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(chat):
    """A node with a ceiling, five times in a row; and what ran."""
    model, ran = chat(), []

    def make(*budgets, calls=1, guarded=True):
        @monitored_node("research", budgets=budgets)
        def research(state):
            ran.append(1)
            return {"texts": [model.invoke(PROMPT).text for _ in range(calls)]}

        builder = StateGraph(Texts).add_node("research", research).add_edge(START, "research")
        builder.add_conditional_edges("research", lambda state: END if len(state["texts"]) >= 5 else "research")
        graph = builder.compile(checkpointer=InMemorySaver())
        return clevagent.guard(graph) if guarded else graph

    make.ran = ran
    return make


@pytest.mark.parametrize("guarded", [True, False])
def test_a_node_of_which_nothing_is_left_is_refused_before_it_runs(rounds, provider, guarded):
    graph = rounds(Budget(llm_calls=3), guarded=guarded)
    with clevagent.run() as run, pytest.raises(BudgetExceeded, match="The node 'research' was not started") as caught:
        graph.invoke({"texts": []}, {**thread(), "callbacks": [ClevAgentCallbackHandler()]})
    assert isinstance(caught.value, GraphBubbleUp)
    assert caught.value.budget == "3 llm_calls per run in node research"
    assert provider.request_count == len(rounds.ran) == 3
    assert run.summary().refusals == 1


def test_a_nodes_ceiling_in_money_is_refused_before_it_runs_once_a_call_did_not_fit(rounds, provider):
    graph = rounds(Budget(usd="0.006"))
    with pytest.raises(BudgetExceeded):
        graph.invoke({"texts": []}, thread())
    assert float(provider.billed_usd) <= 0.006
    assert provider.request_count == 1
    assert len(rounds.ran) == 2, "a check holds nothing: whether a call fits, the call tells"
    with pytest.raises(BudgetExceeded, match="refused before it was sent") as caught:
        graph.invoke(None, thread())
    assert caught.value.reason == "exhausted", "what is resumed is asked anew"
    assert (provider.request_count, len(rounds.ran)) == (1, 3)


def test_a_node_that_has_refused_its_run_is_not_started_again(rounds, provider):
    graph = rounds(Budget(usd="0.006"))
    with clevagent.run():
        with pytest.raises(BudgetExceeded):
            graph.invoke({"texts": []}, thread())
        with pytest.raises(BudgetExceeded, match="was not started") as caught:
            graph.invoke(None, thread())
    assert caught.value.reason == "latched"
    assert (provider.request_count, len(rounds.ran)) == (1, 2)


def test_where_only_tool_calls_are_used_up_models_may_go_on(chat, provider, line):
    model = chat()

    @monitored_node("research", budgets=[Budget(tool_calls=1)])
    def research(state):
        if not state["texts"]:
            with clevagent.tool_call("search"):
                pass
        return {"texts": [model.invoke(PROMPT).text]}

    def again(state):
        return research(state)

    with clevagent.run():
        line(research, again).invoke({"texts": []}, {**thread(), "callbacks": [ClevAgentCallbackHandler()]})
    assert provider.request_count == 2


def test_equal_budgets_of_two_nodes_are_two_ceilings(chat, provider, line):
    model = chat()

    def make(name):
        @monitored_node(name, budgets=[Budget(llm_calls=1)])
        def node(state):
            return {"texts": [model.invoke(PROMPT).text]}

        node.__name__ = name
        return node

    with clevagent.run():
        clevagent.guard(line(make("a"), make("b"))).invoke({"texts": []}, thread())
    assert provider.request_count == 2


def test_a_nodes_ceiling_covers_what_is_called_further_inside(chat, provider, line):
    model = chat()

    def inside(state):
        return {"texts": [model.invoke(PROMPT).text]}

    @monitored_node("outer", budgets=[Budget(llm_calls=3)])
    def outer(state):
        for _ in range(3):
            line(inside, inside_too, saved=False).invoke({"texts": []})
        return {}

    @monitored_node("inside too", budgets=[Budget(llm_calls=9)])
    def inside_too(state):
        return inside(state)

    with pytest.raises(BudgetExceeded) as caught:
        clevagent.guard(line(outer)).invoke({"texts": []}, thread())
    assert caught.value.budget == "3 llm_calls per run in node outer"
    assert provider.request_count == 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_runnable_that_a_node_gives_back_is_a_part_of_the_node(chat, provider, asynchronous, aio):
    model = clevagent.guard(chat())

    @monitored_node("hand over", budgets=[Budget(llm_calls=2)])
    def hand_over(state):
        return RunnableLambda(lambda state: {"texts": [model.invoke(PROMPT).text]})

    @monitored_node("hand over", budgets=[Budget(llm_calls=2)])
    async def ahand_over(state):
        async def reply(state):
            return {"texts": [(await model.ainvoke(PROMPT)).text]}

        return RunnableLambda(reply)

    builder = StateGraph(Texts).add_node("node", ahand_over if asynchronous else hand_over).add_edge(START, "node")
    builder.add_conditional_edges("node", lambda state: END if len(state["texts"]) == 6 else "node")
    graph = builder.compile()
    with clevagent.run() as run, pytest.raises(BudgetExceeded):
        aio(graph.ainvoke({"texts": []})) if asynchronous else graph.invoke({"texts": []})
    assert provider.request_count == 2
    assert {name: spend.calls for name, spend in run.summary().by_node.items()} == {"hand over": 2}


def test_a_runnable_that_a_monitored_function_gives_back_elsewhere_is_its_result():
    given = RunnableLambda(len)
    assert monitored_node("make")(lambda: given)() is given


def test_a_nodes_ceiling_can_be_topped_up(rounds, provider):
    from clevagent_langgraph import top_up

    graph = rounds(Budget(llm_calls=3))
    with pytest.raises(BudgetExceeded):
        graph.invoke({"texts": []}, thread())
    top_up(graph, thread(), llm_calls=5)
    assert len(graph.invoke(None, thread())["texts"]) == 5


def test_a_nodes_ceiling_holds_beside_one_of_the_model(chat, provider, line):
    model = clevagent.guard(chat(), budgets=[Budget(llm_calls=3, name="model")])

    @monitored_node("research", budgets=[Budget(llm_calls=2, name="node")])
    def research(state):
        return {"texts": [model.invoke(PROMPT).text for _ in range(5)]}

    with clevagent.run() as run, pytest.raises(BudgetExceeded) as caught:
        line(research).invoke({"texts": []}, thread())
    assert caught.value.budget == "node"
    assert {state.budget: state.spent for state in run.summary().budgets} == {"model": 2, "node": 2}


# -- loops ----------------------------------------------------------------------------------------------------------------


class Work(TypedDict, total=False):
    status: str
    count: int
    log: list


def cycle(*nodes, until):
    builder = StateGraph(Work)
    for node in nodes:
        builder.add_node(node.__name__, node)
    builder.add_edge(START, nodes[0].__name__)
    for node, after in zip(nodes, (*nodes[1:], nodes[0]), strict=True):
        if node is nodes[-1]:
            builder.add_conditional_edges(node.__name__, lambda state: END if until() else nodes[0].__name__)
        else:
            builder.add_edge(node.__name__, after.__name__)
    return builder.compile()


class Ends:
    """True the 30th time it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.asked >= 30


def test_a_state_that_no_longer_changes_is_a_loop():
    ends = Ends()

    @monitored_node("wait")
    def wait(state):
        return {"status": "pending"}

    graph = cycle(wait, until=ends)
    with (
        clevagent.run(guards=[LoopGuard()]),
        pytest.raises(LoopDetected, match="node 'wait' was run with the same state 5 times") as caught,
    ):
        graph.invoke({"status": "pending"})
    assert isinstance(caught.value, GraphBubbleUp)
    assert ends.asked == 5


def test_a_round_of_nodes_in_which_nothing_changes_is_a_loop():
    ends = Ends()

    @monitored_node
    def plan(state):
        return {"status": "planned"}

    @monitored_node
    def act(state):
        return {"status": "failed"}

    graph = cycle(plan, act, until=ends)
    with (
        clevagent.run(guards=[LoopGuard()]),
        pytest.raises(LoopDetected, match=r"a round of 2 nodes \(node 'act', node 'plan'\) came 3 times"),
    ):
        graph.invoke({"status": "new"})
    assert ends.asked <= 6


@pytest.mark.parametrize(
    "update",
    [
        lambda state, number: {"count": state.get("count", 0) + 1},
        lambda state, number: {"status": f"{number} %"},
        lambda state, number: {"log": [*state.get("log", []), "still pending"]},
    ],
    ids=["counter", "progress", "log"],
)
def test_polling_whose_state_changes_is_no_loop(update):
    ends = Ends()

    @monitored_node
    def poll(state):
        return update(state, ends.asked)

    with clevagent.run(guards=[LoopGuard()]):
        cycle(poll, until=ends).invoke({})
    assert ends.asked == 30


def test_branches_side_by_side_are_no_loop(line):
    @monitored_node
    def vote(state):
        return {"texts": ["yes"]}

    builder = StateGraph(Texts).add_node("vote", vote)
    builder.add_conditional_edges(START, lambda state: [Send("vote", {"texts": []})] * 30, ["vote"])
    with clevagent.run(guards=[LoopGuard()]):
        assert len(builder.compile().invoke({"texts": []})["texts"]) == 30


def test_invocations_of_one_graph_are_told_apart(line):
    """Many graphs that do the same are a batch."""

    @monitored_node
    def work(state):
        return {"texts": ["done"]}

    graph = clevagent.guard(line(work, saved=False))
    with clevagent.run(guards=[LoopGuard()]):
        for _ in range(20):
            graph.invoke({"texts": []})


def test_a_loop_of_nodes_is_told_by_default_and_stops_nothing(caplog):
    ends = Ends()

    @monitored_node("wait")
    def wait(state):
        return {"status": "pending"}

    with clevagent.run():
        cycle(wait, until=ends).invoke({"status": "pending"})
    assert ends.asked == 30
    assert [record.message for record in caplog.records if "repeats itself" in record.message]


def test_a_loop_that_was_forgiven_goes_on():
    ends = Ends()

    @monitored_node("wait")
    def wait(state):
        return {"status": "pending"}

    with clevagent.run(guards=[LoopGuard()]) as run:
        for _ in range(5):
            with pytest.raises(LoopDetected):
                cycle(wait, until=ends).invoke({"status": "pending"})
            run.forgive_loops()
        cycle(wait, until=ends).invoke({"status": "pending"})
    assert ends.asked == 30


def test_a_node_that_is_refused_is_not_tried_again_by_a_retry_policy(provider):
    ran = []

    @monitored_node("research", budgets=[Budget(llm_calls=1)])
    def research(state):
        ran.append(1)
        with clevagent.llm_call(model="gpt-4o", input="Hello", max_output_tokens=10) as call:
            call.settle(input_tokens=1, output_tokens=1)
        return {}

    builder = StateGraph(Texts)
    builder.add_node("research", research, retry_policy=RetryPolicy(retry_on=Exception, initial_interval=0.01))
    graph = builder.add_edge(START, "research").compile()
    with clevagent.run():
        graph.invoke({"texts": []})
        with pytest.raises(BudgetExceeded):
            graph.invoke({"texts": []})
    assert ran == [1]


def test_a_monitored_node_is_an_ordinary_function_elsewhere(steps):
    @monitored_node("research")
    def research(state: Texts) -> dict:
        """Look things up."""
        return {"texts": ["x"]}

    assert research({"texts": []}) == {"texts": ["x"]}
    assert (research.__name__, research.__doc__) == ("research", "Look things up.")
