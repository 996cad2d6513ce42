"""Budgets whose names cannot match are refused where the names are known, or told at the end of the run."""

from __future__ import annotations

import logging

import pytest
from inline_snapshot import snapshot
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.caches import InMemoryCache

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_langchain import BudgetMiddleware, ClevAgentCallbackHandler

HELLO = {"messages": [("user", "Hello")]}


@pytest.fixture
def idle(caplog):
    """Give what was told of idle budgets."""
    caplog.set_level(logging.WARNING, logger="clevagent")

    def idle():
        found = [getattr(record, "clevagent_incident", None) for record in caplog.records]
        return [incident.message for incident in found if incident is not None and incident.kind == "idle_budget"]

    return idle


def fetch_page(url: str) -> str:
    """Fetch a page."""
    return url


def fetch_table(url: str) -> str:
    """Fetch a table."""
    return url


def fetches(body):
    count = sum(message["role"] == "tool" for message in body["messages"])
    return Reply(text="", tool_calls=[("fetch_page", {"url": f"u{count}"})]) if count < 2 else Reply(text="done")


# -- guard(model) -------------------------------------------------------------------------------------------------------------


def test_a_misspelt_model(chat):
    with pytest.raises(UsageError) as caught:
        clevagent.guard(chat(model="gpt-4o-mini"), budgets=[Budget(usd=1, model="gpt4o-mini")])
    assert str(caught.value) == snapshot(
        "Budget('$1 per run model=gpt4o-mini', model='gpt4o-mini') was given to guard(model), which has no model of that name, so it would never stop anything. Known here: 'gpt-4o-mini'. Did you mean model='gpt-4o-mini'?"
    )


def test_a_misspelt_model_of_what_is_built_on_it(chat):
    for built in (chat(model="gpt-4o").bind(stop=["x"]), chat(model="gpt-4o").with_fallbacks([chat(model="gpt-4o-mini")])):
        with pytest.raises(UsageError, match="Did you mean model='gpt-4o'"):
            clevagent.guard(built, budgets=[Budget(usd=1, model="gpt4o")])


@pytest.mark.parametrize("pattern", ["gpt-4o-mini", "gpt-4o", "gpt-4*", "claude-sonnet-4-5", "my-own-model", "gpt-4.1-mini"])
def test_models_that_exist_or_are_others_are_fine(chat, pattern):
    clevagent.guard(chat(model="gpt-4o-mini"), budgets=[Budget(usd=1, model=pattern)])


def test_a_model_that_is_named_by_the_call_holds(chat, provider):
    model = clevagent.guard(chat(model="gpt-4o-mini", max_tokens=9), budgets=[Budget(llm_calls=1, model="gpt-4o")])
    model.invoke("Hello")
    other = model.bind(model="gpt-4o")
    other.invoke("Hello")
    with pytest.raises(BudgetExceeded):
        other.invoke("Hello")
    assert provider.request_count == 2


# -- a run around what is not guarded ---------------------------------------------------------------------------------------------


def test_a_run_around_an_agent_that_is_not_guarded(chat, provider, idle):
    provider.reset(fetches)
    with clevagent.run(budgets=[Budget(llm_calls=1)]):
        create_agent(chat(), [fetch_page]).invoke(HELLO)
    assert provider.request_count == 3
    [message] = idle()
    assert message.startswith("No model or tool call was seen in this run")


def test_a_ceiling_on_tools_around_a_guarded_model(chat, provider, idle):
    provider.reset(fetches)
    with clevagent.run(budgets=[Budget(tool_calls=1)]):
        create_agent(clevagent.guard(chat(max_tokens=9)), [fetch_page]).invoke(HELLO)
    [message] = idle()
    assert "give middleware=[BudgetMiddleware()]" in message


def test_answers_from_a_cache_are_no_reason_to_warn(chat, provider, idle):
    cache = InMemoryCache()
    for _ in range(2):
        model = clevagent.guard(chat(max_tokens=9, cache=cache))
        model.invoke("Hello")
        idle_before = len(idle())
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        model.invoke("Hello")
    assert provider.request_count == 1
    assert run.summary().total.calls == 0
    assert (idle_before, idle()) == (0, [])


# -- BudgetMiddleware --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_a_misspelt_tool_of_an_agent(chat, provider, aio, is_async):
    agent = create_agent(
        chat(max_tokens=9), [fetch_page], middleware=[BudgetMiddleware(budgets=[Budget(tool_calls=1, tool="fecth_page")])]
    )
    with pytest.raises(UsageError) as caught:
        aio(agent.ainvoke(HELLO)) if is_async else agent.invoke(HELLO)
    assert str(caught.value) == snapshot(
        "Budget('1 tool_calls per run tool=fecth_page', tool='fecth_page') was given to BudgetMiddleware(), which has no tool of that name, so it would never stop anything. Known here: 'fetch_page'. Did you mean tool='fetch_page'?"
    )
    assert provider.request_count == 0


@pytest.mark.parametrize("pattern", ["fetch_page", "fetch_*", "*"])
def test_a_tool_of_an_agent_holds(chat, provider, pattern):
    provider.reset(fetches)
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1, tool=pattern)])
    create_agent(chat(max_tokens=9), [fetch_page], middleware=[ours]).invoke(HELLO)
    assert provider.request_count == 3  # the refused tool is answered, and the model goes on


def test_a_tool_that_other_middleware_holds_back_is_known(chat, provider, idle):
    """It chooses the tools of each request; the agent has more."""

    class OnlyPages(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request.override(tools=[tool for tool in request.tools if tool.name == "fetch_page"]))

    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1, tool="fetch_table")])
    create_agent(chat(max_tokens=9), [fetch_page, fetch_table], middleware=[OnlyPages(), ours]).invoke(HELLO)
    assert provider.request_count == 1
    assert idle() == []


def test_tools_that_were_not_called_are_not_told(chat, provider, idle):
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1, tool="fetch_page"), Budget(tool_calls=9), Budget(usd=1)])
    with clevagent.run(budgets=[Budget(tool_calls=5), Budget(tool_calls=2, tool="fetch*")]):
        create_agent(chat(max_tokens=9), [fetch_page], middleware=[ours]).invoke(HELLO)
    assert idle() == []


@pytest.mark.parametrize("is_guarded", [False, True])
def test_a_handler_knows_the_tools_that_a_model_is_offered(chat, provider, idle, is_guarded):
    model = clevagent.guard(chat(max_tokens=9)) if is_guarded else chat(max_tokens=9)
    with clevagent.run(budgets=[Budget(tool_calls=5, tool="fetch_page"), Budget(tool_calls=5, name="any")]):
        create_agent(model, [fetch_page]).invoke(HELLO, {"callbacks": [ClevAgentCallbackHandler()]})
    assert provider.request_count == 1
    assert idle() == []


def test_another_word_than_the_tools_is_told_at_the_end(chat, provider, idle):
    provider.reset(fetches)
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1, tool="browse")])
    create_agent(chat(max_tokens=9), [fetch_page], middleware=[ours]).invoke(HELLO)
    [message] = idle()
    assert "3 model calls and 2 tool calls (nodes: 'model'; tools: 'fetch_page'; models: 'gpt-4o')" in message


def test_the_models_of_an_agent_are_told_at_the_end(chat, provider, idle):
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1, model="gpt4o")])
    create_agent(chat(max_tokens=9), [], middleware=[ours]).invoke(HELLO)
    [message] = idle()
    assert "Did you mean model='gpt-4o'?" in message


def test_an_agent_that_failed_is_not_told(chat, provider, idle):
    provider.reset(lambda body: Reply(status=400))
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1, tool="browse")])
    with pytest.raises(Exception, match="400"):
        create_agent(chat(max_tokens=9), [fetch_page], middleware=[ours]).invoke(HELLO)
    assert idle() == []
