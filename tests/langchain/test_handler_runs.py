"""Which run, node, tool, thread and tenant a call counts against."""

from __future__ import annotations

import threading

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError, hookimpl
from clevagent.testing import Reply
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langchain.tracker import tracker_of

HELLO = {"messages": [HumanMessage("Hello")]}

both = pytest.mark.parametrize("is_async", [False, True])


class Runs:
    """Keeps the summary of every run that has ended."""

    def __init__(self):
        self.ended = []

    @hookimpl
    def clevagent_run_ended(self, run, summary):
        self.ended.append(summary)


@pytest.fixture
def runs():
    return Runs()


def run(aio, is_async, target, value, config=None):
    return aio(target.ainvoke(value, config)) if is_async else target.invoke(value, config)


def graph_of(**models):
    """A graph of nodes in a row, each of which asks a model once."""
    builder = StateGraph(MessagesState)
    before = START
    for name, model in models.items():

        def think(state, model=model):
            return {"messages": [model.invoke("Hello")]}

        builder.add_node(name, think)
        builder.add_edge(before, name)
        before = name
    builder.add_edge(before, END)
    return builder


@both
def test_each_root_invocation_is_a_run(aio, provider, chat, watchdog, runs, is_async):
    one = watchdog(budgets=[Budget(llm_calls=1)], plugins=[runs])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    chain = chat(max_tokens=9) | StrOutputParser()
    for _ in range(3):
        run(aio, is_async, chain, "Hello", config)
    assert provider.request_count == 3
    assert len({summary.run_id for summary in runs.ended}) == 3
    assert [summary.total.calls for summary in runs.ended] == [1, 1, 1]
    assert one.process_run.summary().total.calls == 0


@both
def test_two_calls_within_one_root_invocation_share_its_budget(aio, provider, chat, watchdog, is_async):
    one = watchdog(budgets=[Budget(llm_calls=1)])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    model = chat(max_tokens=9)
    chain = model | RunnableLambda(lambda message: message.text) | model
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            run(aio, is_async, chain, "Hello", config)
    assert provider.request_count == 2


@both
def test_a_bare_model_belongs_to_the_process(aio, provider, chat, watchdog, runs, is_async):
    one = watchdog(budgets=[Budget(llm_calls=2)], plugins=[runs])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    for _ in range(2):
        run(aio, is_async, chat(max_tokens=9), "Hello", config)
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert (provider.request_count, runs.ended) == (2, [])
    assert one.process_run.summary().total.calls == 2


@both
def test_inside_a_run_of_ours_a_root_invocation_is_a_part_of_it(aio, provider, chat, watchdog, runs, is_async):
    one = watchdog(budgets=[Budget(llm_calls=2)], plugins=[runs])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    chain = chat(max_tokens=9) | StrOutputParser()
    with one.run() as ours:
        for _ in range(2):
            run(aio, is_async, chain, "Hello", config)
        with pytest.raises(BudgetExceeded):
            run(aio, is_async, chain, "Hello", config)
    assert provider.request_count == 2
    assert [summary.run_id for summary in runs.ended] == [ours.run_id]


def test_a_run_inside_a_node_counts_against_both(provider, chat, watchdog):
    """A run of ours that is opened inside a root invocation narrows it; the root's own ceiling belongs to the process's budgets."""
    one = watchdog(budgets=[Budget(llm_calls=10, per="lifetime")])
    model = chat(max_tokens=9)
    inner = []

    def think(text):
        with one.run(budgets=[Budget(llm_calls=1)]) as narrow:
            inner.append(narrow)
            model.invoke(text)
            model.invoke(text)

    with pytest.raises(BudgetExceeded):
        RunnableLambda(think).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert provider.request_count == 1
    assert inner[0].summary().total.calls == 1
    assert inner[0].summary().refusals == 1


@both
def test_runs_of_root_invocations_end_when_they_fail(aio, provider, chat, watchdog, runs, is_async):
    provider.reset([Reply(status=400)])
    one = watchdog(budgets=[Budget(llm_calls=1)], plugins=[runs])
    with pytest.raises(Exception, match="400"):
        run(aio, is_async, chat(max_tokens=9) | StrOutputParser(), "Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert len(runs.ended) == 1
    assert not one._active
    assert tracker_of(one).size() == 0


def test_streams_and_events_of_a_chain_are_one_run(aio, provider, chat, watchdog, runs):
    one = watchdog(budgets=[Budget(llm_calls=1)], plugins=[runs])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    chain = chat(max_tokens=9) | StrOutputParser()
    list(chain.stream("Hello", config))

    async def read():
        async for _ in chain.astream_events("Hello", config, version="v2"):
            pass

    aio(read())
    assert [summary.total.calls for summary in runs.ended] == [1, 1]


def test_each_item_of_a_batch_of_a_chain_is_a_run(provider, chat, watchdog, runs):
    one = watchdog(budgets=[Budget(llm_calls=1)], plugins=[runs])
    (chat(max_tokens=9) | StrOutputParser()).batch(["Hello"] * 5, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert [summary.total.calls for summary in runs.ended] == [1] * 5


def test_without_a_watchdog_of_its_own_it_asks_the_process(provider, chat):
    one = clevagent.init(budgets=[Budget(llm_calls=1, per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler()]}
    chat(max_tokens=9).invoke("Hello", config)
    with clevagent.run() as ours, pytest.raises(BudgetExceeded):
        chat(max_tokens=9).invoke("Hello", config)
    assert provider.request_count == 1
    assert (one.process_run.summary().total.calls, ours.summary().refusals) == (1, 1)


def test_a_handler_outlives_the_watchdog_of_the_process(provider, chat):
    handler = ClevAgentCallbackHandler()
    for _ in range(2):
        clevagent.init(budgets=[Budget(llm_calls=1, per="lifetime")])
        chat(max_tokens=9).invoke("Hello", {"callbacks": [handler]})
        with pytest.raises(BudgetExceeded):
            chat(max_tokens=9).invoke("Hello", {"callbacks": [handler]})
        clevagent.shutdown()
    assert provider.request_count == 2


@both
def test_by_node(aio, provider, chat, watchdog, runs, is_async):
    one = watchdog(plugins=[runs], budgets=[Budget(usd=1)])
    graph = graph_of(think=chat(max_tokens=9), check=chat(model="gpt-4o-mini", max_tokens=9)).compile()
    run(aio, is_async, graph, HELLO, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    summary = runs.ended[0]
    assert {name: spend.calls for name, spend in summary.by_node.items()} == {"think": 1, "check": 1}
    assert sum(spend.cost_usd for spend in summary.by_node.values()) == pytest.approx(float(provider.billed_usd))
    assert {name: spend.calls for name, spend in summary.by_model.items()} == {"gpt-4o": 1, "gpt-4o-mini": 1}


@both
def test_a_budget_for_one_node(aio, provider, chat, watchdog, is_async):
    one = watchdog(budgets=[Budget(llm_calls=1, node="che*", per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    graph = graph_of(think=chat(max_tokens=9), check=chat(max_tokens=9)).compile()
    run(aio, is_async, graph, HELLO, config)
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, graph, HELLO, config)
    assert provider.request_count == 3


@both
def test_by_tool(aio, provider, chat, watchdog, runs, is_async):
    """What a model costs inside a tool is the tool's: its own calls, and what is called in it, however deep."""
    inner = RunnableLambda(lambda text: text) | chat(model="gpt-4o-mini", max_tokens=9) | StrOutputParser()

    @tool
    def research(task: str) -> str:
        """Research."""
        return inner.invoke(task)

    provider.reset(
        lambda body: (
            Reply(tool_calls=[("research", {"task": "t"})]) if len(body["messages"]) == 1 and body.get("tools") else Reply()
        )
    )
    one = watchdog(plugins=[runs], budgets=[Budget(usd=1)])
    agent = create_agent(chat(max_tokens=9), [research])
    run(aio, is_async, agent, HELLO, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    summary = runs.ended[0]
    assert summary.tool_calls == 1
    assert summary.by_tool["research"].calls == 1
    mini = summary.by_model["gpt-4o-mini"]
    assert mini.calls == 1
    assert summary.by_tool["research"].cost_usd == mini.cost_usd > 0
    assert summary.total.cost_usd == pytest.approx(float(provider.billed_usd))
    assert "research" in str(summary)


@both
def test_a_budget_for_what_is_called_inside_a_tool(aio, provider, chat, watchdog, is_async):
    inner = chat(model="gpt-4o-mini", max_tokens=9)

    @tool
    def research(task: str) -> str:
        """Research."""
        inner.invoke(task)
        return inner.invoke(task).text

    one = watchdog(budgets=[Budget(llm_calls=1, tool="research")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, research, {"task": "t"}, config)
    run(aio, is_async, inner, "Hello", config)
    assert provider.request_count == 2


def test_a_tool_on_its_own_and_the_model_inside_it(provider, chat, watchdog):
    inner = chat(max_tokens=9)

    @tool
    def research(task: str) -> str:
        """Research."""
        return inner.invoke(task).text

    one = watchdog(budgets=[Budget(usd=1, per="lifetime")])
    research.invoke({"task": "t"}, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    summary = one.process_run.summary()
    assert (summary.tool_calls, summary.total.calls) == (1, 1)
    assert summary.by_tool["research"].cost_usd == summary.total.cost_usd > 0
    assert tracker_of(one).size() == 0


# -- threads and tenants --------------------------------------------------------------------------------------------------


@both
def test_a_conversation_has_one_budget_over_all_its_invocations(aio, provider, chat, watchdog, is_async):
    one = watchdog(budgets=[Budget(llm_calls=2, per="thread")])
    graph = graph_of(think=chat(max_tokens=9)).compile(checkpointer=InMemorySaver())
    callbacks = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    anna, bert = ({**callbacks, "configurable": {"thread_id": name}} for name in ("anna", "bert"))
    for config in (anna, bert, anna, bert):
        run(aio, is_async, graph, HELLO, config)
    for config in (anna, bert):
        with pytest.raises(BudgetExceeded):
            run(aio, is_async, graph, HELLO, config)
    assert provider.request_count == 4


def test_a_conversation_at_its_ceiling_does_not_stop_another(provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=1, per="thread")])
    graph = graph_of(think=chat(max_tokens=9)).compile(checkpointer=InMemorySaver())
    callbacks = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    anna, bert = ({**callbacks, "configurable": {"thread_id": name}} for name in ("anna", "bert"))
    graph.invoke(HELLO, anna)
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            graph.invoke(HELLO, anna)
    graph.invoke(HELLO, bert)
    assert provider.request_count == 2


def test_a_tool_in_a_graph_knows_its_conversation(provider, chat, watchdog):
    ran = []

    @tool
    def act(word: str) -> str:
        """Act."""
        ran.append(word)
        return word

    provider.reset(lambda body: Reply() if body["messages"][-1]["role"] == "tool" else Reply(tool_calls=[("act", {"word": "a"})]))
    one = watchdog(budgets=[Budget(tool_calls=1, per="thread")])
    agent = create_agent(chat(max_tokens=9), [act], checkpointer=InMemorySaver())
    callbacks = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    anna, bert = ({**callbacks, "configurable": {"thread_id": name}} for name in ("anna", "bert"))
    agent.invoke(HELLO, anna)
    with pytest.raises(BudgetExceeded):
        agent.invoke(HELLO, anna)
    agent.invoke(HELLO, bert)
    assert len(ran) == 2


def test_tenants_are_kept_apart(provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=2, per="lifetime", by="tenant")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    chain = chat(max_tokens=9) | StrOutputParser()
    refused = []

    def work(tenant):
        with one.run(tags={"tenant": tenant}):
            for _ in range(4):
                try:
                    chain.invoke("Hello", config)
                except BudgetExceeded as error:
                    refused.append((tenant, error.incident.key))

    threads = [threading.Thread(target=work, args=(tenant,)) for tenant in ("acme", "umbrella", "initech")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert provider.request_count == 6
    assert sorted(refused) == sorted((tenant, f"tenant={tenant}") for tenant in ("acme", "umbrella", "initech") for _ in range(2))


def test_runs_that_go_on_at_once_are_kept_apart(aio, provider, chat, watchdog):
    import asyncio

    one = watchdog()
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    chain = chat(max_tokens=9) | StrOutputParser()

    async def work(limit):
        with one.run(budgets=[Budget(llm_calls=limit)]) as ours:
            await asyncio.gather(*(chain.ainvoke("Hello", config) for _ in range(5)), return_exceptions=True)
        return ours.summary().total.calls

    async def all_of_them():
        return await asyncio.gather(*(work(limit) for limit in (1, 2, 3)))

    assert aio(all_of_them()) == [1, 2, 3]
    assert provider.request_count == 6


# -- after the end --------------------------------------------------------------------------------------------------------


def test_after_shutdown_a_chain_is_not_let_go_uncounted(provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=1, per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    one.shutdown()
    chain = chat(max_tokens=9) | StrOutputParser()
    chain.invoke("Hello", config)
    with pytest.raises((BudgetExceeded, UsageError)):
        chain.invoke("Hello", config)
    assert provider.request_count == 1


def test_dry_run_stops_nothing_and_tells_what_it_would_have_stopped(provider, chat, watchdog):
    one = watchdog(budgets=[Budget(llm_calls=1, per="lifetime")], dry_run=True)
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    for _ in range(3):
        chat(max_tokens=9).invoke("Hello", config)
    assert provider.request_count == 3
    assert any(incident.kind == "overshoot" for incident in one.recent)


def test_what_is_kept_back_pays_for_a_closing_answer(provider, chat, watchdog):
    one = watchdog(budgets=[Budget(usd="0.002", keep_usd="0.001", per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    model = chat(max_tokens=50)
    with one.run() as ours:
        with pytest.raises(BudgetExceeded):
            for _ in range(10):
                model.invoke("Hello", config)
        before = provider.request_count
        with ours.wrap_up():
            model.invoke("Sorry", config)
    assert provider.request_count == before + 1
    assert provider.billed_pico <= 2 * 10**9
