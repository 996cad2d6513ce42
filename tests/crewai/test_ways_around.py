"""Ways by which CrewAI, or its user, would come past a guard: clients of its own, threads without a context, calls that say not whose."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from crewai import Agent, Crew, Task
from crewai.flow.async_feedback import HumanFeedbackPending
from crewai.flow.flow import Flow, listen, start
from crewai.flow.human_feedback import human_feedback
from crewai.flow.persistence import SQLiteFlowPersistence
from crewai.llms.providers.openai.completion import OpenAICompletion
from crewai.tools import tool
from pydantic import BaseModel

import clevagent
from clevagent import Budget, BudgetExceeded, Stopped
from clevagent.testing import Reply


class Number(BaseModel):
    x: int


@tool
def noop(q: str) -> str:
    """Nothing."""
    return q


def task_of(agent, **fields):
    return Task(name="count", description="Count.", expected_output="text", agent=agent, **fields)


def worker(model, *tools):
    return Agent(role="worker", goal="g", backstory="b", llm=model, tools=[*tools])


def prose_then_numbers(body):
    """Answer in prose, so that CrewAI asks once more for what fits; then as is asked."""
    names = [entry.get("function", entry).get("name") for entry in body.get("tools") or []]
    if names and "noop" not in names:
        return Reply(tool_calls=[(names[0], {"x": 1})])
    if body.get("response_format"):
        return Reply(text='{"x": 1, "valid": true, "feedback": "ok"}')
    return Reply(text="the answer is one")


def calls(provider):
    """The requests that are billed; counting tokens is free."""
    return [request for request in provider.requests if "count" not in request.path]


# -- output that has to fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("how", ["kickoff", "akickoff"])
def test_a_request_for_json_is_asked_for_like_any_other(provider, llm, aio, monkeypatch, kind, how):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", provider.anthropic_url)
    provider.reset(prose_then_numbers)
    clevagent.init()
    agent = worker(llm(kind, max_tokens=50), noop)
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent, output_json=Number)]), budgets=[Budget(llm_calls=1)])
    with pytest.raises(BudgetExceeded):
        crew.kickoff() if how == "kickoff" else aio(crew.akickoff())
    assert len(calls(provider)) == 1


def test_requests_for_json_are_recorded_as_they_are_billed_and_stay_within_the_ceiling(provider, llm):
    provider.reset(prose_then_numbers)
    clevagent.init()
    agent = worker(llm(max_tokens=50), noop)
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent, output_json=Number)]))
    with clevagent.run(budgets=[Budget(usd=0.05)]) as run:
        for _ in range(20):
            with contextlib.suppress(BudgetExceeded):
                assert crew.kickoff().json_dict == {"x": 1}
    assert 0.04 * 10**12 < provider.billed_pico <= 0.05 * 10**12
    assert run.summary().total.cost_usd == pytest.approx(provider.billed_pico / 10**12)
    assert all(request.body.get("max_tokens") for request in provider.requests)


# -- whose a call is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "how"),
    [
        (scope, how)
        for scope in ("agent", "agent a day", "task", "role")
        for how in ("output_pydantic", "output_json", "guardrail")
        # What judges in words is an agent of its own: the task's, and not the worker's.
        if (scope, how) != ("role", "guardrail")
    ],
)
def test_a_scoped_budget_covers_what_a_task_does_after_its_agent(provider, llm, scope, how):
    provider.reset(prose_then_numbers)
    clevagent.init()
    agent = worker(llm(max_tokens=50), noop)
    if scope.startswith("agent"):
        agent = clevagent.guard(agent, budgets=[Budget(llm_calls=1, per="day" if "day" in scope else "run")])
    crew = Crew(agents=[agent], tasks=[task_of(agent, **({how: Number} if how != "guardrail" else {how: "must be fine"}))])
    if scope in ("task", "role"):
        crew = clevagent.guard(crew, budgets=[Budget(llm_calls=1, node="count" if scope == "task" else "worker")])
    with contextlib.suppress(Exception):  # some of it CrewAI turns into an answer
        crew.kickoff()
    assert provider.request_count == 1


def use_once(body):
    if body.get("tools") and body["messages"][-1]["role"] != "tool":
        return Reply(tool_calls=[("fan", {"q": "x"})])
    return Reply()


def fan_of(model, before=lambda: None, after=lambda: None):
    @tool
    def fan(q: str) -> str:
        """Ask twenty times, in threads that inherit nothing."""

        def one(_):
            try:
                return model.call("hello")
            except Stopped as error:
                return type(error).__name__

        before()
        with ThreadPoolExecutor(8) as pool:
            found = str(list(pool.map(one, range(20))))
        after()
        return found

    return fan


@pytest.mark.parametrize("how", ["crew", "agent in a crew", "crew in a flow"])
def test_raw_threads_of_a_tool_count_against_the_kickoff(provider, llm, how):
    provider.reset(use_once)
    clevagent.init()
    model = llm(max_tokens=50)
    agent = worker(model, fan_of(model))
    if how == "agent in a crew":
        agent = clevagent.guard(agent, budgets=[Budget(llm_calls=50)])
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]), budgets=[Budget(llm_calls=3)])

    class Around(Flow):
        @start()
        def go(self):
            return crew.kickoff().raw

    with pytest.raises(BudgetExceeded):
        clevagent.guard(Around(), budgets=[Budget(llm_calls=3)]).kickoff() if how == "crew in a flow" else crew.kickoff()
    assert provider.request_count == 3


def test_raw_threads_of_two_crews_with_one_model_never_go_unasked(provider, llm):
    """Whose they are cannot be told, and that is; the sum of both ceilings holds."""
    provider.reset(use_once)
    watchdog = clevagent.init()
    model = llm(max_tokens=50)
    both = threading.Barrier(2, timeout=20)
    fan = fan_of(model, both.wait, both.wait)

    def kick_off():
        agent = worker(model, fan)
        with contextlib.suppress(Exception):  # the other's barrier may be broken by a refusal
            clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]), budgets=[Budget(llm_calls=3)]).kickoff()

    threads = [threading.Thread(target=kick_off) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert provider.request_count <= 6
    assert [incident.kind for incident in watchdog.recent if "inherits no kickoff" in incident.message] == ["thread"]


@pytest.mark.parametrize("how", ["resume", "resume_async"])
@pytest.mark.parametrize("attach", [[], ["crewai"]])
def test_a_flow_that_is_resumed_is_guarded(provider, llm, aio, tmp_path, how, attach):
    clevagent.init(attach=attach)
    store = SQLiteFlowPersistence(str(tmp_path / "flow.db"))
    model = llm(max_tokens=50)

    class Nobody:
        def request_feedback(self, context, flow):
            raise HumanFeedbackPending(context=context)

    class Asks(Flow):
        @start()
        @human_feedback(message="ok?", provider=Nobody())
        def go(self):
            return model.call("first")

        @listen(go)
        def after(self, _):
            for _ in range(10):
                with contextlib.suppress(Exception):  # whatever the flow does about it
                    model.call("more")
            return "done"

    flow = Asks(persistence=store)
    flow.kickoff()
    provider.reset()
    again = clevagent.guard(Asks.from_pending(flow.flow_id, store), budgets=[Budget(llm_calls=2)])
    with contextlib.suppress(Stopped):
        again.resume("fine") if how == "resume" else aio(again.resume_async("fine"))
    assert provider.request_count == 2


# -- models and tools ---------------------------------------------------------------------------------------------------------


def test_a_model_that_tries_again_by_itself_is_charged_for_each_request(provider):
    class Stubborn(OpenAICompletion):
        def call(self, *args, **kwargs):
            for _ in range(5):
                with contextlib.suppress(Exception):  # as users write it
                    return super().call(*args, **kwargs)
            raise ValueError("no answer")

    provider.reset([Reply(drop="middle")] * 100)
    clevagent.init()
    plain = Stubborn(model="gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=50, max_retries=0)
    model = clevagent.guard(plain, budgets=[Budget(usd=1)])
    with clevagent.run() as run, pytest.raises(ValueError, match="no answer"):
        model.call("hello")
    assert provider.request_count == 5
    assert run.summary().total.cost_usd >= provider.billed_pico / 10**12


@pytest.mark.parametrize("said", ['"text"', "null", "{bad"])  # what CrewAI itself survives
def test_whatever_a_model_says_as_arguments_of_a_tool_a_guarded_crew_goes_on(provider, llm, monkeypatch, said):
    def script(body):
        if body.get("tools") and not any(message["role"] == "tool" for message in body["messages"]):
            return Reply(tool_calls=[("noop", {"q": "MARK"})])
        return Reply(text="done")

    write = json.dumps

    def odd(value, *args, **kwargs):
        text = write(value, *args, **kwargs)
        return said if text in ('{"q": "MARK"}', '{"q":"MARK"}') else text

    provider.reset(script)
    clevagent.init()
    agent = Agent(role="worker", goal="g", backstory="b", llm=llm(max_tokens=50), tools=[noop], max_iter=4)
    crew = clevagent.guard(Crew(agents=[agent], tasks=[task_of(agent)]))
    monkeypatch.setattr("clevagent.testing.dialects.json.dumps", odd)
    assert crew.kickoff().raw
