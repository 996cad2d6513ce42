"""Tools of a guarded crew: refused before they run, and a refusal stops the crew; loops of them are found."""

from __future__ import annotations

import pytest
from crewai.hooks import clear_all_global_hooks, register_before_tool_call_hook, unregister_before_tool_call_hook
from crewai.tools import tool

import clevagent
from clevagent import Budget, BudgetExceeded, LoopDetected, Stopped
from clevagent.testing import Reply


class Tools:
    """A tool that counts how often it ran, and a model that calls it until told otherwise."""

    def __init__(self):
        self.ran = []

        @tool("lookup")
        def lookup(word: str) -> str:
            """Look a word up."""
            self.ran.append(word)
            return f"found {word}"

        self.lookup = lookup

    def native(self, rounds, word="a{n}"):
        """Ask for the tool this many times, by function calls."""

        def answer(body):
            n = sum(message.get("role") == "tool" for message in body["messages"])
            if n < rounds and body.get("tools"):
                return Reply(text="", tool_calls=[("lookup", {"word": word.format(n=n)})])
            return Reply(text="the end")

        return answer

    def in_text(self, rounds):
        """The same, in words, as agents without function calling are asked to."""

        def answer(body):
            said = sum("Observation: found" in str(message.get("content")) for message in body["messages"])
            if said < rounds:
                return Reply(text=f'Thought: look\nAction: lookup\nAction Input: {{"word": "a{said}"}}')
            return Reply(text="Thought: I now can give a great answer\nFinal Answer: the end")

        return answer


@pytest.fixture
def tools():
    return Tools()


@pytest.fixture(params=["native", "text"])
def asking(request, tools, llm, provider, monkeypatch):
    """A model that asks for tools by function calls, or in text."""
    model = llm(max_tokens=50)
    if request.param == "text":
        monkeypatch.setattr(type(model), "supports_function_calling", lambda self: False)

    def script(rounds):
        provider.reset(tools.native(rounds) if request.param == "native" else tools.in_text(rounds))
        return model

    return script


@pytest.mark.parametrize("how", ["kickoff", "akickoff"])
def test_a_refused_tool_does_not_run_and_the_model_is_not_asked_again(aio, provider, crew, tools, asking, how):
    guarded = clevagent.guard(crew(1, model=asking(6), tools=[tools.lookup]), budgets=[Budget(tool_calls=2)])
    with pytest.raises(BudgetExceeded) as stop:
        guarded.kickoff() if how == "kickoff" else aio(guarded.akickoff())
    assert stop.value.incident.unit == "tool_calls"
    assert tools.ran == ["a0", "a1"]
    assert provider.request_count == 3


def test_halt_for_tools_gives_back_what_is_finished(provider, crew, tools, asking):
    output = clevagent.guard(
        crew(1, model=asking(6), tools=[tools.lookup]), budgets=[Budget(tool_calls=2)], on_exceed="halt"
    ).kickoff()
    assert not output.is_complete
    assert output.incident.unit == "tool_calls"
    assert tools.ran == ["a0", "a1"]


def test_tools_are_told_in_the_summary(provider, crew, tools, asking):
    with clevagent.run() as run:
        clevagent.guard(crew(1, model=asking(2), tools=[tools.lookup])).kickoff()
    summary = run.summary()
    assert summary.tool_calls == 2
    assert summary.by_tool["lookup"].calls == 2
    assert run.watchdog.tool.get() is None
    assert summary.held_usd == 0


def test_a_budget_of_one_tool(provider, crew, tools, asking):
    guarded = clevagent.guard(crew(1, model=asking(6), tools=[tools.lookup]), budgets=[Budget(tool_calls=1, tool="look*")])
    with pytest.raises(BudgetExceeded):
        guarded.kickoff()
    assert tools.ran == ["a0"]


def test_what_a_tool_spends_counts_as_the_tools(provider, crew, llm, tools):
    inner = clevagent.guard(llm(max_tokens=50))

    @tool("ask")
    def ask(word: str) -> str:
        """Ask another model."""
        return inner.call(word)

    provider.reset(
        lambda body: Reply(tool_calls=[("ask", {"word": "a"})]) if body.get("tools") and len(body["messages"]) < 4 else Reply()
    )
    with clevagent.run() as run:
        clevagent.guard(crew(1, tools=[ask])).kickoff()
    assert run.summary().by_tool["ask"].cost_usd > 0
    assert run.summary().by_node["writer"].calls == provider.request_count


def test_two_calls_in_turn_again_and_again_are_a_loop(provider, crew, tools):
    """CrewAI itself finds one call that is made five times in a row; not two in turn."""
    clevagent.init(on_loop="stop")

    def again(body):
        n = sum(message.get("role") == "tool" for message in body["messages"])
        return Reply(text="", tool_calls=[("lookup", {"word": "ab"[n % 2]})])

    provider.reset(again)
    with pytest.raises(LoopDetected):
        clevagent.guard(crew(1, tools=[tools.lookup], agent={"max_iter": 40})).kickoff()
    assert provider.request_count <= 10


def test_hooks_that_were_cleared_are_put_back_for_the_next_kickoff(provider, crew, tools, asking):
    guarded = clevagent.guard(crew(1, model=asking(6), tools=[tools.lookup]), budgets=[Budget(tool_calls=2)])
    clear_all_global_hooks()
    with pytest.raises(BudgetExceeded):
        guarded.kickoff()
    assert tools.ran == ["a0", "a1"]


def test_hooks_that_are_cleared_in_the_middle_leave_model_calls_guarded(provider, crew, tools, asking):
    def clear(inputs):
        clear_all_global_hooks()
        return inputs

    guarded = clevagent.guard(
        crew(1, model=asking(6), tools=[tools.lookup], before_kickoff_callbacks=[clear]),
        budgets=[Budget(tool_calls=2), Budget(llm_calls=3)],
    )
    with pytest.raises(BudgetExceeded) as stop:
        guarded.kickoff()
    assert stop.value.incident.unit == "llm_calls"
    assert provider.request_count == 3


def test_a_fault_of_ours_stops_the_tool_and_the_crew(provider, crew, tools, asking, monkeypatch):
    from clevagent_crewai import tools as tools_module

    guarded = clevagent.guard(crew(1, model=asking(3), tools=[tools.lookup]), budgets=[Budget(tool_calls=9)])
    monkeypatch.setattr(tools_module, "task_name_of", lambda task: {}["bug"] if provider.request_count else None)
    with pytest.raises(Stopped, match="could not check a call"):
        guarded.kickoff()
    assert tools.ran == []
    assert provider.request_count == 1


def test_a_hook_of_the_users_own_that_refuses_is_no_call(provider, crew, tools, asking):
    def never(context):
        return False

    register_before_tool_call_hook(never)
    try:
        with clevagent.run() as run:
            clevagent.guard(crew(1, model=asking(1), tools=[tools.lookup], agent={"max_iter": 2})).kickoff()
    finally:
        unregister_before_tool_call_hook(never)
    assert tools.ran == []
    assert run.watchdog.tool.get() is None
    assert run.watchdog.ledger.holds() == []
