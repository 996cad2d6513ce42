"""``guard(crew, budgets=[...])``: what misspells a tool, a model or a role is refused; what covered nothing is told at the end."""

from __future__ import annotations

import logging

import pytest
from crewai.tools import tool
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply


@pytest.fixture
def idle(caplog):
    """Give what was told of idle budgets."""
    caplog.set_level(logging.WARNING, logger="clevagent")

    def idle():
        found = [getattr(record, "clevagent_incident", None) for record in caplog.records]
        return [incident.message for incident in found if incident is not None and incident.kind == "idle_budget"]

    return idle


@tool("Read a page")
def read_page(url: str) -> str:
    """Read a page."""
    return url


def reads(body):
    count = sum(message["role"] == "tool" for message in body["messages"])
    return Reply(tool_calls=[("read_a_page", {"url": f"u{count}"})]) if body.get("tools") and count < 3 else Reply()


def refused(obj, *budgets):
    with pytest.raises(UsageError) as caught:
        clevagent.guard(obj, budgets=budgets)
    return str(caught.value)


def test_a_misspelt_tool_of_a_crew(crew):
    assert refused(crew(1, tools=[read_page]), Budget(tool_calls=1, tool="raed_a_page")) == snapshot(
        "Budget('1 tool_calls per run tool=raed_a_page', tool='raed_a_page') was given to guard(crew), which has no tool of that name, so it would never stop anything. Known here: 'read_a_page'. Did you mean tool='read_a_page'?"
    )


def test_a_misspelt_model_of_a_crew(crew):
    assert refused(crew(1), Budget(usd=1, model="gpt4o")) == snapshot(
        "Budget('$1 per run model=gpt4o', model='gpt4o') was given to guard(crew), which has no model of that name, so it would never stop anything. Known here: 'gpt-4o'. Did you mean model='gpt-4o'?"
    )


@pytest.mark.parametrize("name", ["Delegate work to coworkers", "ask_questoin_to_coworker"])
def test_misspelt_delegation(crew, name):
    assert "Did you mean tool=" in refused(crew(1, agent={"allow_delegation": True}), Budget(tool_calls=1, tool=name))
    clevagent.guard(crew(1), budgets=[Budget(tool_calls=1, tool=name)])  # which nobody has: it is told at the end


def test_a_misspelt_tool_of_a_task(crew):
    made = crew(2)
    made.tasks[1].tools = [read_page]
    assert "Known here: 'read_a_page'" in refused(made, Budget(tool_calls=1, tool="read_page"))


def test_a_misspelt_role_and_tool_of_an_agent(crew):
    agent = crew(1, tools=[read_page]).agents[0]
    assert "Did you mean node='writer'?" in refused(agent, Budget(usd=1, node="wirter"))
    assert "Did you mean tool='read_a_page'?" in refused(agent, Budget(tool_calls=1, tool="read_a_pgae"))


@pytest.mark.parametrize("pattern", ["read_a_page", "read*", "Delegate work to coworker", "Ask*", "something_else"])
def test_tools_that_exist_or_could_are_fine(crew, pattern):
    clevagent.guard(crew(1, tools=[read_page], agent={"allow_delegation": True}), budgets=[Budget(tool_calls=1, tool=pattern)])


@pytest.mark.parametrize("pattern", ["gpt-4o", "gpt*", "gpt-4o-mini", "my-model"])
def test_models_that_exist_or_are_others_are_fine(crew, pattern):
    clevagent.guard(crew(1), budgets=[Budget(usd=1, model=pattern)])


@pytest.mark.parametrize("name", ["read_a_page", "Read a page"])
def test_a_tool_of_a_crew_holds(provider, crew, name):
    """By the name it is given in code, or by the one that CrewAI calls it by."""
    provider.reset(reads)
    budget = Budget(tool_calls=1, tool=name)
    with pytest.raises(BudgetExceeded) as caught:
        clevagent.guard(crew(1, tools=[read_page]), budgets=[budget]).kickoff()
    assert caught.value.budget == budget.name


def test_budgets_of_a_task_and_of_an_agent_are_not_told(provider, crew, idle):
    budgets = [Budget(usd=1, node="task 0"), Budget(usd=1, node="editor"), Budget(tool_calls=5), Budget(tool_calls=2, tool="read*")]
    clevagent.guard(crew(2, tools=[read_page]), budgets=budgets).kickoff()
    assert idle() == []


def test_another_word_than_the_tools_is_told_at_the_end(provider, crew, idle):
    provider.reset(reads)
    clevagent.guard(crew(1, tools=[read_page]), budgets=[Budget(tool_calls=1, tool="browse")]).kickoff()
    [message] = idle()
    assert "(nodes: 'writer'; tools: 'read_a_page'; models: 'gpt-4o')" in message


def test_a_run_around_a_crew_that_is_not_guarded(provider, crew, idle):
    with clevagent.run(budgets=[Budget(usd=1)]):
        crew(1).kickoff()
    assert provider.request_count == 1
    [message] = idle()
    assert message.startswith("No model or tool call was seen in this run")
