"""An agent with ``BudgetMiddleware``: ceilings, the graceful end, and what it composes with."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import subprocess
import sys
import threading

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelFallbackMiddleware, ModelRetryMiddleware, hook_config
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from pydantic import BaseModel

import clevagent
from clevagent import Budget, BudgetBusy, BudgetExceeded, UsageError, hookimpl
from clevagent.testing import Reply
from clevagent_langchain import BudgetMiddleware, ClevAgentCallbackHandler

HELLO = {"messages": [("user", "What did Ada write?")]}
CEILING = Budget(usd=0.03, keep_usd=0.01)

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


def search(query: str) -> str:
    """Search the archive."""
    return f"nothing about {query}"


def is_closing(body):
    return "Answer now" in str(body["messages"][-1])


def searching(body):
    """A model that searches for something new for ever, until it is asked to close."""
    if is_closing(body):
        return Reply(text="Nothing was found.")
    return Reply(text="", tool_calls=[("search", {"query": f"page {len(body['messages'])}"})])


def run(aio, is_async, agent, value=HELLO, config=None):
    return aio(agent.ainvoke(value, config)) if is_async else agent.invoke(value, config)


def let_go(watchdog):
    """Wait until nothing refers to a graph that has ended: the thread of a tool may still have its context in hand."""
    for _ in range(1000):
        gc.collect()
        if not watchdog._active:
            return
        threading.Event().wait(0.01)


def assert_valid(messages):
    """No tool call is without an answer, no answer without a call, and the last word is the model's."""
    open_calls = set()
    for message in messages:
        if isinstance(message, ToolMessage):
            open_calls.remove(message.tool_call_id)
        else:
            assert not open_calls
            if isinstance(message, AIMessage):
                open_calls = {call["id"] for call in message.tool_calls}
    assert not open_calls
    assert isinstance(messages[-1], AIMessage)
    assert not messages[-1].tool_calls


# -- the graceful end -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["chat", "anthropic"])
def test_at_the_ceiling_the_agent_ends_with_a_plain_message(aio, request, provider, watchdog, runs, name, is_async):
    provider.reset(searching)
    one = watchdog(plugins=[runs])
    model = request.getfixturevalue(name)(max_tokens=300)
    agent = create_agent(model, [search], middleware=[BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=one)])
    state = run(aio, is_async, agent)
    assert provider.request_count == 3
    assert set(state) == {"messages"}
    assert_valid(state["messages"])
    last = state["messages"][-1]
    assert "3 of 3 llm calls" in last.text
    assert "3 results of tools (search)" in last.text
    told = last.response_metadata["clevagent"]
    assert json.loads(json.dumps(told)) == told
    assert {"kind": "budget", "action": "halt", "unit": "llm_calls", "spent": 3.0, "ceiling": 3.0}.items() <= told.items()
    assert told["run_id"] == runs.ended[0].run_id
    assert not one._active


def test_a_request_that_is_too_large_ends_its_agent_and_says_so(provider, chat, watchdog):
    budgets = [Budget(usd="0.10", per="day", name="daily")]
    agent = create_agent(chat(max_tokens=300), [], middleware=[BudgetMiddleware(budgets=budgets, watchdog=watchdog())])
    large = {"messages": [{"role": "user", "content": "Hello " * 20_000}]}
    assert "one request is larger than the whole budget 'daily'" in agent.invoke(large)["messages"][-1].text
    assert provider.request_count == 0
    agent.invoke(HELLO)
    assert provider.request_count == 1


@both
@pytest.mark.parametrize("name", ["chat", "anthropic"])
def test_with_money_kept_the_model_writes_the_closing_message(aio, request, provider, watchdog, runs, name, is_async):
    """One request more, without tools, and the bill stays below the ceiling."""
    provider.reset(searching)
    model = request.getfixturevalue(name)(max_tokens=300)
    agent = create_agent(model, [search], middleware=[BudgetMiddleware(budgets=[CEILING], watchdog=watchdog(plugins=[runs]))])
    state = run(aio, is_async, agent)
    assert_valid(state["messages"])
    assert state["messages"][-1].text == "Nothing was found."
    assert state["messages"][-1].response_metadata["clevagent"]["budget"] == "$0.03 per run"
    assert provider.billed_usd <= 0.03
    [summary] = runs.ended
    assert summary.total.calls == provider.request_count
    assert summary.total.cost_usd == pytest.approx(float(provider.billed_usd))
    closing = provider.requests[-1].body
    assert is_closing(closing)
    if name == "chat":
        assert "tools" not in closing
    else:  # which refuses a history of tool calls without them
        assert closing["tool_choice"] == {"type": "none"}
    assert not any("Answer now" in message.text for message in state["messages"])
    assert sum(is_closing(request.body) for request in provider.requests) == 1


def test_what_is_not_kept_is_used(provider, chat, watchdog):
    """The calls before the closing one come close to what they may use; the closing one to what is kept."""
    provider.reset(searching)
    agent = create_agent(
        chat(), [search], middleware=[BudgetMiddleware(budgets=[Budget(usd=0.10, keep_usd=0.01)], watchdog=watchdog())]
    )
    agent.invoke(HELLO)
    assert provider.billed_usd <= 0.10
    assert provider.billed_usd >= 0.08


def test_the_closing_call_is_clamped_to_what_is_kept(provider, chat, watchdog):
    provider.reset(searching)
    agent = create_agent(
        chat(max_tokens=2000),
        [search],
        middleware=[BudgetMiddleware(budgets=[Budget(usd=0.05, keep_usd=0.015)], watchdog=watchdog())],
    )
    state = agent.invoke(HELLO)
    assert state["messages"][-1].text == "Nothing was found."
    assert provider.requests[-1].body["max_completion_tokens"] < 2000
    assert provider.billed_usd <= 0.05


@pytest.mark.slow
@both
def test_what_is_kept_may_be_too_little(aio, provider, chat, watchdog, is_async):
    provider.reset(searching)
    agent = create_agent(
        chat(max_tokens=300),
        [search],
        middleware=[BudgetMiddleware(budgets=[Budget(usd=0.03, keep_usd=0.0001)], watchdog=watchdog())],
    )
    state = run(aio, is_async, agent)
    assert not any(is_closing(request.body) for request in provider.requests)
    assert_valid(state["messages"])
    assert state["messages"][-1].text.startswith("I stopped here")


@pytest.mark.slow
@both
def test_a_closing_call_that_fails_is_replaced_by_a_plain_message(aio, provider, chat, watchdog, is_async):
    provider.reset(lambda body: Reply(status=400) if is_closing(body) else searching(body))
    agent = create_agent(chat(max_tokens=300), [search], middleware=[BudgetMiddleware(budgets=[CEILING], watchdog=watchdog())])
    state = run(aio, is_async, agent)
    assert is_closing(provider.requests[-1].body)
    assert_valid(state["messages"])
    assert state["messages"][-1].text.startswith("I stopped here")


@pytest.mark.slow
@pytest.mark.parametrize(("text", "starts"), [("That is all.", "That is all."), ("", "I stopped here")])
def test_a_closing_message_asks_for_no_tools_whatever_the_model_does(provider, chat, watchdog, text, starts):
    provider.reset(
        lambda body: Reply(text=text, tool_calls=[("search", {"query": "more"})]) if is_closing(body) else searching(body)
    )
    agent = create_agent(chat(max_tokens=300), [search], middleware=[BudgetMiddleware(budgets=[CEILING], watchdog=watchdog())])
    state = agent.invoke(HELLO)
    assert_valid(state["messages"])
    assert state["messages"][-1].text.startswith(starts)


def test_pending_tool_calls_are_answered_before_the_closing_message(provider, chat, watchdog):
    """A history that ends in the middle of a turn stays one that providers take."""
    one = watchdog(budgets=[Budget(llm_calls=1, per="lifetime")])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=one)])
    agent.invoke(HELLO)
    call = {"name": "search", "args": {"query": "x"}, "id": "call_1"}
    state = agent.invoke({"messages": [HumanMessage("Go on"), AIMessage("", tool_calls=[call])]})
    assert provider.request_count == 1
    assert_valid(state["messages"])
    assert [type(message) for message in state["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]


def test_the_other_middleware_hears_of_the_end(provider, chat, watchdog):
    class Listening(AgentMiddleware):
        heard = 0

        def after_agent(self, state, runtime):
            self.heard += 1

    provider.reset(searching)
    first, last = Listening(), type("Last", (Listening,), {})()
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=2)], watchdog=watchdog())
    create_agent(chat(max_tokens=300), [search], middleware=[first, ours, last]).invoke(HELLO)
    assert (first.heard, last.heard, provider.request_count) == (1, 1, 2)


@pytest.mark.slow
def test_a_closed_agent_that_is_sent_back_to_its_model_spends_nothing(provider, chat, watchdog):
    """Other middleware may insist: it gets the same answer, from nobody."""

    class Insisting(AgentMiddleware):
        left = 3

        @hook_config(can_jump_to=["model"])
        def after_model(self, state, runtime):
            if not state["messages"][-1].tool_calls and self.left:
                self.left -= 1
                return {"jump_to": "model"}
            return None

    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[CEILING], watchdog=watchdog())
    state = create_agent(chat(max_tokens=300), [search], middleware=[Insisting(), ours]).invoke(HELLO)
    assert sum(is_closing(request.body) for request in provider.requests) == 1
    assert is_closing(provider.requests[-1].body)
    assert [message.text[:14] for message in state["messages"][-4:]] == ["Nothing was fo", *["I stopped here"] * 3]


@pytest.mark.slow
@both
def test_on_request_the_ceiling_is_raised(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(searching)
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=2)], on_exceed="raise", watchdog=one)
    agent = create_agent(chat(max_tokens=300), [search], middleware=[ours])
    with pytest.raises(BudgetExceeded) as raised:
        run(aio, is_async, agent)
    assert (provider.request_count, raised.value.spent) == (2, 2)
    del raised
    let_go(one)
    assert [summary.total.calls for summary in runs.ended] == [2]
    assert not one._active


@both
def test_room_that_is_only_held_is_no_end(aio, provider, chat, watchdog, is_async):
    one = watchdog(budgets=[Budget(llm_calls=1, per="lifetime")], wait_s=0)
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=one)])
    held = one.process_run.open(clevagent.LLMCall(model="gpt-4o", input=["x"], max_output_tokens=9))
    with pytest.raises(BudgetBusy):
        run(aio, is_async, agent)
    held.release()
    assert run(aio, is_async, agent)["messages"][-1].text == "ok"


def test_a_budget_that_only_warns_ends_nothing(provider, chat, watchdog):
    provider.reset([*[Reply(text="", tool_calls=[("search", {"query": "a"})])] * 2, Reply(text="done")])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1, on_exceed="warn")], watchdog=watchdog())
    state = create_agent(chat(max_tokens=9), [search], middleware=[ours]).invoke(HELLO)
    assert (provider.request_count, state["messages"][-1].text) == (3, "done")


@pytest.mark.slow
def test_nothing_is_stopped_in_a_dry_run(provider, chat, watchdog):
    provider.reset([*[Reply(text="", tool_calls=[("search", {"query": "a"})])] * 7, Reply(text="done")])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1), Budget(tool_calls=1)], watchdog=watchdog(dry_run=True))
    state = create_agent(chat(max_tokens=9), [search], middleware=[ours]).invoke(HELLO)
    assert (provider.request_count, state["messages"][-1].text) == (8, "done")


# -- structured output ----------------------------------------------------------------------------------------------------


class Found(BaseModel):
    """What was found."""

    title: str


@both
@pytest.mark.parametrize("tools", [[search], []])
@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy])
@pytest.mark.parametrize("budget", [Budget(llm_calls=2), Budget(usd=0.03, keep_usd=0.01)])
def test_with_a_response_format_the_agent_ends_without_a_response(aio, provider, chat, watchdog, strategy, tools, budget, is_async):
    """The model answers in a way that makes the agent ask again, for ever."""
    wrong = Reply(text="", tool_calls=[("Found", {"headline": 1})] if strategy is ToolStrategy else [("search", {"query": "a"})])
    provider.reset(lambda body: Reply(text="Half of it.") if is_closing(body) else wrong)
    ours = BudgetMiddleware(budgets=[budget], on_loop="warn", watchdog=watchdog())
    agent = create_agent(chat(max_tokens=300), tools, response_format=strategy(Found), middleware=[ours])
    state = run(aio, is_async, agent)
    assert state["structured_response"] is None
    assert_valid(state["messages"])
    if budget.keep_usd:
        assert state["messages"][-1].text == "Half of it."
        assert "response_format" not in provider.requests[-1].body
    else:
        assert provider.request_count == 2
    assert provider.billed_usd <= 0.03


@pytest.mark.parametrize("strategy", [ToolStrategy, ProviderStrategy])
def test_below_the_ceiling_a_response_format_works_as_ever(provider, chat, watchdog, strategy):
    text = '{"title": "Notes"}'
    provider.reset([Reply(text="", tool_calls=[("Found", json.loads(text))]) if strategy is ToolStrategy else Reply(text=text)])
    ours = BudgetMiddleware(budgets=[Budget(usd=0.05)], watchdog=watchdog())
    state = create_agent(chat(max_tokens=300), [search], response_format=strategy(Found), middleware=[ours]).invoke(HELLO)
    assert state["structured_response"] == Found(title="Notes")


# -- ways to run an agent -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ceiling_of_the_process_holds_for_twenty_threads(provider, chat, watchdog):
    provider.reset(searching)
    one = watchdog(budgets=[Budget(usd=0.10, per="lifetime")], wait_s=30)
    agent = create_agent(chat(max_tokens=300), [search], middleware=[BudgetMiddleware(watchdog=one)])
    # On a busy machine one thread may get as far as the ceiling before the others begin.
    states = agent.batch([HELLO] * 20, {"recursion_limit": 200})
    assert provider.billed_usd <= 0.10
    assert provider.billed_usd >= 0.09
    for state in states:
        assert_valid(state["messages"])
    let_go(one)
    assert not one._active


@pytest.mark.slow
def test_a_ceiling_of_the_process_holds_for_twenty_tasks(aio, provider, chat, watchdog, runs):
    provider.reset(searching)
    one = watchdog(budgets=[Budget(usd=0.10, keep_usd=0.03, per="lifetime")], wait_s=30, plugins=[runs])
    agent = create_agent(chat(max_tokens=300), [search], middleware=[BudgetMiddleware(watchdog=one)])
    states = aio(agent.abatch([HELLO] * 20))
    assert 0.06 <= provider.billed_usd <= 0.10
    for state in states:
        assert_valid(state["messages"])
    assert len({summary.run_id for summary in runs.ended}) == 20
    assert sum(summary.total.calls for summary in runs.ended) == provider.request_count


@pytest.mark.slow
@both
def test_each_invocation_has_a_ceiling_of_its_own(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=watchdog(plugins=[runs]))
    agent = create_agent(chat(max_tokens=300), [search], middleware=[ours])
    if is_async:
        aio(agent.abatch([HELLO] * 5))
    else:
        agent.batch([HELLO] * 5)
    assert provider.request_count == 15
    assert [summary.total.calls for summary in runs.ended] == [3] * 5


@pytest.mark.slow
@both
def test_streams_of_messages_tell_the_closing_one_too(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[CEILING], watchdog=watchdog(plugins=[runs]))
    agent = create_agent(chat(max_tokens=300), [search], middleware=[ours])

    async def collect():
        return [chunk async for chunk in agent.astream(HELLO, stream_mode="messages")]

    chunks = aio(collect()) if is_async else list(agent.stream(HELLO, stream_mode="messages"))
    said = "".join(chunk.text for chunk, _ in chunks if isinstance(chunk, AIMessageChunk))
    assert said == "Nothing was found."
    assert all(request.body["stream"] for request in provider.requests)
    assert runs.ended[0].total.cost_usd == pytest.approx(float(provider.billed_usd))
    assert runs.ended[0].calls_charged_at_bound == 0
    assert provider.billed_usd <= 0.03


@both
def test_streams_of_messages_tell_a_plain_closing_message_once(aio, provider, chat, watchdog, is_async):
    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1)], watchdog=watchdog())
    agent = create_agent(chat(max_tokens=300), [search], middleware=[ours])

    async def collect():
        return [chunk async for chunk in agent.astream(HELLO, stream_mode="messages")]

    chunks = aio(collect()) if is_async else list(agent.stream(HELLO, stream_mode="messages"))
    assert sum(chunk.text.startswith("I stopped here") for chunk, _ in chunks) == 1


def test_what_streams_of_state_carry_can_be_written_as_json(provider, chat, watchdog):
    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1)], watchdog=watchdog())
    agent = create_agent(chat(max_tokens=300), [search], middleware=[ours])
    for chunk in agent.stream(HELLO, stream_mode="values"):
        json.dumps({name: value for name, value in chunk.items() if name != "messages"})


@both
def test_retries_of_the_sdk_are_made_and_counted_here(aio, provider, chat, watchdog, runs, is_async):
    provider.reset([Reply(status=500, headers={"retry-after-ms": "1"}), Reply()])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=5)], watchdog=watchdog(plugins=[runs]))
    run(aio, is_async, create_agent(chat(max_tokens=9, max_retries=2), middleware=[ours]))
    assert provider.request_count == 2
    assert runs.ended[0].total.cost_usd == pytest.approx(float(provider.billed_usd))


# -- what it composes with ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("has_handler", [False, True])
@pytest.mark.parametrize("has_block", [False, True])
def test_nothing_is_counted_twice(aio, provider, chat, watchdog, runs, is_async, is_guarded, has_handler, has_block):
    """Whatever else watches: the summary tells the provider's bill, and each tool call once."""
    provider.reset(searching)
    one = watchdog(plugins=[runs], budgets=[Budget(llm_calls=100), Budget(tool_calls=100)])
    model = clevagent.guard(chat(max_tokens=300), watchdog=one) if is_guarded else chat(max_tokens=300)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=3), Budget(tool_calls=50, tool="search")], watchdog=one)
    agent = create_agent(model, [search], middleware=[ours])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]} if has_handler else None
    if has_block:
        with one.run():
            run(aio, is_async, agent, config=config)
    else:
        run(aio, is_async, agent, config=config)
    assert provider.request_count == 3
    assert len(runs.ended) == 1 + (has_handler or has_block)
    for summary in runs.ended:
        assert (summary.total.calls, summary.tool_calls) == (3, 3)
        assert summary.total.cost_usd == pytest.approx(float(provider.billed_usd))
        used = {state.budget: state.spent for state in summary.budgets}
        assert used["100 llm_calls per run"] == used["100 tool_calls per run"] == 3
    assert not one._active


def test_attachment_to_everything_counts_nothing_twice(provider, chat):
    runs = Runs()
    provider.reset(searching)
    clevagent.init(attach=["langchain"], plugins=[runs])
    create_agent(chat(max_tokens=300), [search], middleware=[BudgetMiddleware(budgets=[Budget(llm_calls=3)])]).invoke(HELLO)
    assert [(summary.total.calls, summary.tool_calls) for summary in runs.ended] == [(3, 3), (3, 3)]
    assert provider.request_count == 3


@pytest.mark.slow
@both
def test_a_ceiling_of_the_run_around_ends_the_agent_gracefully(aio, provider, chat, watchdog, is_async):
    provider.reset(searching)
    one = watchdog()
    agent = create_agent(chat(max_tokens=300), [search], middleware=[BudgetMiddleware(watchdog=one)])
    with one.run(budgets=[Budget(llm_calls=5)]) as outer:
        for _ in range(2):
            assert_valid(run(aio, is_async, agent)["messages"])
    assert provider.request_count == 5
    assert outer.summary().total.calls == 5


def test_budgets_of_the_guarded_model_hold_too(provider, chat, watchdog):
    provider.reset(searching)
    one = watchdog()
    model = clevagent.guard(chat(max_tokens=300), budgets=[Budget(llm_calls=2)], watchdog=one)
    state = create_agent(model, [search], middleware=[BudgetMiddleware(watchdog=one)]).invoke(HELLO)
    assert provider.request_count == 2
    assert_valid(state["messages"])


@pytest.mark.slow
def test_money_that_the_guarded_model_keeps_pays_for_the_closing_message(provider, chat, watchdog):
    provider.reset(searching)
    one = watchdog()
    model = clevagent.guard(chat(max_tokens=300), budgets=[CEILING], watchdog=one)
    state = create_agent(model, [search], middleware=[BudgetMiddleware(watchdog=one)]).invoke(HELLO)
    assert state["messages"][-1].text == "Nothing was found."
    assert provider.billed_usd <= 0.03


@both
@pytest.mark.parametrize("is_last", [False, True])
def test_a_model_that_other_middleware_puts_in_is_counted(aio, provider, chat, watchdog, runs, is_async, is_last):
    """First in the list it cannot clamp what others put in, but it counts and refuses it."""

    class Swapping(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request.override(model=chat(model="gpt-4o-mini", max_tokens=300)))

        async def awrap_model_call(self, request, handler):
            return await handler(request.override(model=chat(model="gpt-4o-mini", max_tokens=300)))

    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=watchdog(plugins=[runs]))
    middleware = [Swapping(), ours] if is_last else [ours, Swapping()]
    state = run(aio, is_async, create_agent(chat(max_tokens=300), [search], middleware=middleware))
    assert provider.request_count == 3
    assert runs.ended[0].by_model.keys() == {"gpt-4o-mini"}
    assert_valid(state["messages"])


@pytest.mark.parametrize("is_last", [False, True])
def test_retries_and_fallbacks_of_other_middleware_send_nothing_past_the_ceiling(provider, chat, watchdog, is_last):
    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=2)], watchdog=watchdog())
    others = [ModelRetryMiddleware(max_retries=2, initial_delay=0, jitter=False), ModelFallbackMiddleware(chat(max_tokens=300))]
    middleware = [*others, ours] if is_last else [ours, *others]
    state = create_agent(chat(max_tokens=300), [search], middleware=middleware).invoke(HELLO)
    assert provider.request_count == 2
    assert_valid(state["messages"])


def test_other_callers_of_the_model_stay_unguarded(provider, chat, watchdog):
    """The user's own model is a guarded copy for the agent only."""
    model = chat(max_tokens=9)
    create_agent(model, middleware=[BudgetMiddleware(budgets=[Budget(llm_calls=1)], watchdog=watchdog())]).invoke(HELLO)
    model.invoke("Hello")
    model.invoke("Hello")
    assert provider.request_count == 3


def test_a_node_of_the_agent_can_have_a_ceiling(provider, chat, watchdog):
    provider.reset(searching)
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=2, node="model"), Budget(llm_calls=9, node="other")], watchdog=watchdog())
    create_agent(chat(max_tokens=300), [search], middleware=[ours]).invoke(HELLO)
    assert provider.request_count == 2


# -- what is told where it is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"budgets": Budget(usd=1)}, "is no list"),
        ({"budgets": "0.50"}, "is no list"),
        ({"budgets": [0.5]}, "is no Budget"),
        ({"budgets": [Budget(usd=1, name="a"), Budget(usd=2, name="a")]}, "Two budgets are named 'a'"),
        ({"budgets": [Budget(usd=1, on_exceed="halt")]}, "Leave on_exceed out of the budget"),
        ({"budgets": [Budget(usd=1, on_exceed="ask")]}, "Leave on_exceed out of the budget"),
        ({"on_exceed": "stop"}, "Use 'halt' or 'raise'"),
        ({"on_exceed": ["halt"]}, "Use 'halt' or 'raise'"),
        ({"on_loop": "end"}, "Use 'halt', 'raise' or 'warn'"),
        ({"watchdog": "mine"}, "is no Watchdog"),
    ],
)
def test_mistakes_are_told_where_they_are_made(arguments, told):
    with pytest.raises(UsageError, match=told):
        BudgetMiddleware(**arguments)


def test_what_to_install_is_told_where_langchain_is_missing(monkeypatch):
    import clevagent.integrations.langchain as published
    import clevagent_langchain

    assert published.BudgetMiddleware is clevagent_langchain.BudgetMiddleware is BudgetMiddleware
    for name in ("middleware", "closing", "invocations"):
        monkeypatch.delitem(sys.modules, f"clevagent_langchain.{name}")
    monkeypatch.setitem(sys.modules, "langchain.agents.middleware", None)
    for module in (clevagent_langchain, published):
        with pytest.raises(UsageError, match="pip install -U langchain"):
            _ = module.BudgetMiddleware
    with pytest.raises(AttributeError):
        _ = published.Missing


@pytest.mark.slow
@pytest.mark.parametrize("module", ["clevagent_langchain", "clevagent.integrations.langchain"])
def test_importing_the_package_imports_no_agents(module):
    """They take a second or two, and the extra does not bring them."""
    code = f"import sys, {module}; sys.exit(any(name.startswith(('langchain.', 'langgraph')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_cannot_be_guarded_is_refused_before_anything_is_sent(provider, watchdog):
    from langchain.chat_models import init_chat_model

    model = init_chat_model(
        "gpt-4o", model_provider="openai", configurable_fields=("temperature",), base_url=provider.openai_url, api_key="test"
    )
    agent = create_agent(model, [search], middleware=[BudgetMiddleware(watchdog=watchdog())])
    with pytest.raises(UsageError):
        agent.invoke(HELLO)
    assert provider.request_count == 0


def test_a_model_without_a_price_is_an_error_not_an_end(provider, chat, watchdog):
    agent = create_agent(
        chat(model="nobody-knows", max_tokens=9),
        [search],
        middleware=[BudgetMiddleware(budgets=[Budget(usd=1)], watchdog=watchdog())],
    )
    with pytest.raises(UsageError, match="nobody-knows"):
        agent.invoke(HELLO)
    assert provider.request_count == 0


@pytest.mark.slow
def test_a_failing_provider_fails_as_without_us(provider, chat, watchdog, runs):
    provider.reset([Reply(status=400)])
    one = watchdog(plugins=[runs])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(budgets=[Budget(usd=1)], watchdog=one)])
    with pytest.raises(Exception, match="400"):
        agent.invoke(HELLO)
    let_go(one)
    assert [summary.total.calls for summary in runs.ended] == [0]
    assert not one._active


# -- the end of runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cancelled_agent_ends_its_run(aio, provider, chat, watchdog, runs):
    provider.reset([Reply(hang=True)])
    one = watchdog(plugins=[runs])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(budgets=[Budget(usd=1)], watchdog=one)])

    async def cancel():
        task = asyncio.create_task(agent.ainvoke(HELLO))
        await asyncio.to_thread(provider.wait_for_requests, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    aio(cancel())
    let_go(one)
    assert [summary.calls_charged_at_bound for summary in runs.ended] == [1]
    assert not one._active


@pytest.mark.slow
@both
def test_a_stream_that_is_broken_off_ends_its_run(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(searching)
    one = watchdog(plugins=[runs])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(budgets=[Budget(usd=1)], watchdog=one)])

    async def take_one():
        stream = agent.astream(HELLO)
        async for _ in stream:
            break
        await stream.aclose()

    if is_async:
        aio(take_one())
    else:
        stream = agent.stream(HELLO)
        next(stream)
        stream.close()
    let_go(one)
    assert len(runs.ended) == 1
    assert not one._active


@pytest.mark.slow
def test_many_invocations_leave_nothing_behind(provider, chat, watchdog, runs):
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1)], watchdog=one)
    agent = create_agent(chat(max_tokens=9), [search], middleware=[ours])
    with one.run() as outer:
        for _ in range(20):
            agent.invoke(HELLO)
        assert not outer.state
    assert not one._active
    assert not ours._invocations._resumable
    assert len(ours._models) == 1


def test_the_key_in_the_state_is_a_text_to_everybody_else(watchdog):
    """It is copied, pickled and written as JSON like one; only the graph that runs holds the run by it."""
    from clevagent_langchain.invocations import Invocation, Seat

    invocation = Invocation(watchdog().start_run(), clevagent.LoopGuard())
    seat = Seat("key", invocation)
    assert copy.deepcopy({"a": seat})["a"] is seat
    assert type(pickle.loads(pickle.dumps(seat))) is str  # noqa: S301 - our own
    assert json.dumps(seat) == '"key"'
    assert invocation.seat() is seat
