"""``clevagent.guard(crew)``, of agents and flows: every way to kick them off, whoever calls which model inside."""

from __future__ import annotations

import asyncio
import pickle
import threading
from decimal import Decimal

import pytest
from crewai import Agent, Crew, Process, Task
from crewai.crews.crew_output import CrewOutput
from crewai.flow.flow import Flow, listen, start

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply
from clevagent_core.hookspecs import hookimpl
from clevagent_crewai import GuardedCrewOutput

TWO = Budget(llm_calls=2)


def kickoff(aio, crew, how, **kw):
    if how == "kickoff":
        return crew.kickoff(**kw)
    return aio(getattr(crew, how)(**kw))


every_way = pytest.mark.parametrize("how", ["kickoff", "kickoff_async", "akickoff"])


@every_way
def test_the_call_past_the_ceiling_is_not_sent_and_the_task_is_not_tried_again(aio, provider, crew, how):
    guarded = clevagent.guard(crew(4), budgets=[TWO])
    for _ in range(2):
        provider.reset()
        with pytest.raises(BudgetExceeded) as stop:
            kickoff(aio, guarded, how)
        assert stop.value.budget == TWO.label
        assert provider.request_count == 2


@every_way
def test_what_fits_is_done_and_told_by_agent_and_model(aio, provider, crew, how):
    guarded = clevagent.guard(crew(3), budgets=[Budget(usd=1)])
    with clevagent.run() as run:
        output = kickoff(aio, guarded, how)
    assert (output.raw, len(output.tasks_output)) == ("ok", 3)
    summary = run.summary()
    assert Decimal(str(summary.total.cost_usd)) == provider.billed_usd
    assert {name: spend.calls for name, spend in summary.by_node.items()} == {"writer": 2, "editor": 1}
    assert list(summary.by_model) == ["gpt-4o"]
    assert summary.calls_charged_at_bound == 0


@every_way
def test_halt_gives_back_what_is_finished(aio, provider, crew, how):
    plain = crew(4)
    output = kickoff(aio, clevagent.guard(plain, budgets=[TWO], on_exceed="halt"), how)
    assert isinstance(output, CrewOutput)
    assert not output.is_complete
    assert output.incident.budget == TWO.label
    assert [task.name for task in output.tasks_output] == ["task 0", "task 1"]
    assert output.raw == "ok"
    assert output.token_usage.total_tokens > 0
    assert plain.tasks[1].output is output.tasks_output[1]
    assert provider.request_count == 2


def test_halt_says_so_when_all_is_done(crew):
    output = clevagent.guard(crew(2), budgets=[Budget(llm_calls=9, on_exceed="halt")]).kickoff()
    assert isinstance(output, GuardedCrewOutput)
    assert (output.is_complete, output.incident, len(output.tasks_output)) == (True, None, 2)


def test_a_halted_kickoff_does_not_count_what_an_earlier_one_finished(crew):
    guarded = clevagent.guard(crew(3), budgets=[Budget(llm_calls=3, per="lifetime", on_exceed="halt")])
    assert guarded.kickoff().is_complete
    output = guarded.kickoff()
    assert (output.is_complete, output.tasks_output, output.raw) == (False, [], "")


def test_a_halted_output_can_be_pickled(crew):
    output = clevagent.guard(crew(3), budgets=[TWO], on_exceed="halt").kickoff()
    again = pickle.loads(pickle.dumps(output))  # noqa: S301 - made here
    assert again.incident == output.incident
    assert (again.is_complete, again.raw) == (False, "ok")


def test_halt_is_also_for_the_budgets_around_the_crew(provider, crew):
    with clevagent.run(budgets=[TWO]):
        output = clevagent.guard(crew(3), on_exceed="halt").kickoff()
    assert not output.is_complete
    assert provider.request_count == 2


def test_ask_is_refused(crew):
    with pytest.raises(UsageError, match="which cannot stop it so that it can be resumed"):
        clevagent.guard(crew(), budgets=[TWO], on_exceed="ask")


# -- which crew it is -----------------------------------------------------------------------------------------------------


def test_the_guarded_crew_is_a_copy_that_shares_tasks_and_agents(provider, crew):
    plain = crew(2)
    guarded = clevagent.guard(plain, budgets=[TWO])
    assert guarded is not plain
    assert isinstance(guarded, Crew)
    assert guarded.tasks[0] is plain.tasks[0]
    assert guarded.agents[0] is plain.agents[0]
    guarded.kickoff()
    assert plain.tasks[1].output.raw == "ok"


def test_the_crew_that_was_given_stays_free(provider, crew):
    plain = crew(3)
    clevagent.guard(plain, budgets=[TWO])
    plain.kickoff()
    assert provider.request_count == 3


def test_a_copy_is_guarded(provider, crew):
    with pytest.raises(BudgetExceeded):
        clevagent.guard(crew(3), budgets=[TWO]).copy().kickoff()
    assert provider.request_count == 2


def test_guarded_twice_both_sets_of_budgets_hold(provider, crew):
    guarded = clevagent.guard(clevagent.guard(crew(5), budgets=[TWO]), budgets=[Budget(llm_calls=4)])
    with pytest.raises(BudgetExceeded) as stop:
        guarded.kickoff()
    assert stop.value.budget == TWO.label
    assert provider.request_count == 2


def test_each_kickoff_is_a_run_of_its_own(provider, crew):
    guarded = clevagent.guard(crew(2), budgets=[TWO])
    for _ in range(3):
        guarded.kickoff()
    assert provider.request_count == 6


def test_a_daily_ceiling_goes_on_from_kickoff_to_kickoff(provider, crew):
    guarded = clevagent.guard(crew(2), budgets=[Budget(llm_calls=3, per="day")])
    guarded.kickoff()
    with pytest.raises(BudgetExceeded):
        guarded.kickoff()
    assert provider.request_count == 3


def test_a_watchdog_of_ones_own(provider, crew, clock):
    watchdog = clevagent.Watchdog(clock=clock)
    with pytest.raises(BudgetExceeded):
        clevagent.guard(crew(3), watchdog=watchdog, budgets=[TWO]).kickoff()
    assert provider.request_count == 2
    watchdog.shutdown()


# -- budgets by agent and by task -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "sent"),
    [
        (Budget(llm_calls=1, node="writer"), 2),
        (Budget(llm_calls=1, node="edit*"), 3),
        (Budget(input_tokens=10, node="task 2"), 2),
        (Budget(input_tokens=10, node="task 3"), 3),
        (Budget(llm_calls=3, node="*"), 3),
    ],
    ids=lambda value: value.node if isinstance(value, Budget) else None,
)
def test_a_budget_of_one_agent_or_task(provider, crew, budget, sent):
    """Tasks 0, 2 and 4 are the writer's, 1 and 3 the editor's."""
    with pytest.raises(BudgetExceeded):
        clevagent.guard(crew(5), budgets=[budget]).kickoff()
    assert provider.request_count == sent


def test_a_budget_of_a_task_that_has_room_stops_nothing(provider, crew):
    clevagent.guard(crew(3), budgets=[Budget(llm_calls=1, node="task 1")]).kickoff()
    assert provider.request_count == 3


def test_a_node_that_the_crew_has_not_is_told(crew):
    with pytest.raises(UsageError, match="no agent of that role and no task of that name"):
        clevagent.guard(crew(), budgets=[Budget(usd=1, node="wrtier")])


def test_budgets_of_init_and_run_know_agents_too(provider, crew):
    clevagent.init(budgets=[Budget(llm_calls=1, node="writer", per="day")])
    with pytest.raises(BudgetExceeded):
        clevagent.guard(crew(4)).kickoff()
    assert provider.request_count == 2


# -- for each -------------------------------------------------------------------------------------------------------------

ITEMS = [{"number": str(number)} for number in range(4)]


@pytest.mark.parametrize("how", ["kickoff_for_each", "kickoff_for_each_async", "akickoff_for_each"])
def test_one_ceiling_over_all_items(aio, provider, crew, how):
    guarded = clevagent.guard(crew(2), budgets=[Budget(llm_calls=5)])
    with pytest.raises(BudgetExceeded):
        answer = getattr(guarded, how)(inputs=ITEMS)
        if how != "kickoff_for_each":
            aio(answer)
    assert provider.request_count == 5


def test_for_each_halted_gives_what_is_finished_of_each(provider, crew):
    outputs = clevagent.guard(crew(2), budgets=[Budget(llm_calls=5)], on_exceed="halt").kickoff_for_each(inputs=ITEMS)
    assert [len(output.tasks_output) for output in outputs] == [2, 2, 1, 0]
    assert [output.is_complete for output in outputs] == [True, True, False, False]
    assert provider.request_count == 5


# -- what is called inside ------------------------------------------------------------------------------------------------


def delegating(body):
    tools = [tool["function"]["name"] for tool in body.get("tools", ())]
    if "delegate_work_to_coworker" in tools:
        arguments = {"task": "write", "context": "none", "coworker": "writer"}
        return Reply(tool_calls=[("delegate_work_to_coworker", arguments)])
    return Reply(text="done by the worker")


@pytest.mark.parametrize("how", ["kickoff", "akickoff"])
@pytest.mark.parametrize("budget", [Budget(llm_calls=4), Budget(llm_calls=1, node="writer")], ids=["all", "worker"])
def test_a_refused_coworker_stops_the_manager_too(aio, provider, crew, llm, how, budget):
    """The worker's refusal reaches the manager as a tool's error, and it would go on."""
    provider.reset(delegating)
    guarded = clevagent.guard(crew(1, process=Process.hierarchical, manager_llm=llm(max_tokens=50)), budgets=[budget])
    with pytest.raises(BudgetExceeded):
        kickoff(aio, guarded, how)
    sent = provider.request_count
    assert sent == 4 if budget.node is None else sent <= 4


def test_planning_is_counted(provider, crew, llm):
    guarded = clevagent.guard(crew(1, planning=True, planning_llm=llm(max_tokens=50)), budgets=[Budget(llm_calls=1)])
    with pytest.raises(Exception):
        guarded.kickoff()
    assert provider.request_count == 1


def test_models_that_crewai_makes_itself_are_counted(provider, crew, llm, monkeypatch):
    """A name is no model yet: CrewAI makes one of it when it needs one."""
    monkeypatch.setenv("OPENAI_BASE_URL", provider.openai_url)
    guarded = clevagent.guard(crew(1, planning=True, planning_llm="gpt-4o"), budgets=[Budget(llm_calls=1)])
    with pytest.raises(Exception):
        guarded.kickoff()
    assert provider.request_count == 1


def test_a_guardrail_in_words_is_counted(provider, llm):
    agent = Agent(role="writer", goal="help", backstory="old", llm=llm(max_tokens=50))
    task = Task(description="Write.", expected_output="text", agent=agent, guardrail="It is polite.")
    with pytest.raises(BudgetExceeded):
        clevagent.guard(Crew(agents=[agent], tasks=[task]), budgets=[Budget(llm_calls=1)]).kickoff()
    assert provider.request_count == 1


def test_async_tasks_hold_one_ceiling(provider, llm):
    agents = [Agent(role=f"agent {n}", goal="help", backstory="old", llm=llm(max_tokens=50)) for n in range(6)]
    tasks = [
        Task(description=f"Do {n}.", expected_output="text", agent=agent, async_execution=True) for n, agent in enumerate(agents)
    ]
    last = Task(description="End.", expected_output="text", agent=agents[0])
    with pytest.raises(BudgetExceeded):
        clevagent.guard(Crew(agents=agents, tasks=[*tasks, last]), budgets=[Budget(llm_calls=3)]).kickoff()
    assert provider.request_count <= 3


@pytest.mark.parametrize("is_async", [False, True])
def test_streaming(aio, provider, crew, is_async):
    guarded = clevagent.guard(crew(3, stream=True), budgets=[TWO])

    def read():
        return [chunk.content for chunk in guarded.kickoff()]

    async def aread():
        return [chunk.content async for chunk in await guarded.akickoff()]

    with pytest.raises(BudgetExceeded):
        aio(aread()) if is_async else read()
    assert provider.request_count == 2


def test_a_stream_that_is_broken_off_is_recorded(provider, crew):
    guarded = clevagent.guard(crew(2, stream=True), budgets=[Budget(usd=1)])
    with clevagent.run() as run:
        stream = guarded.kickoff()
        for _ in stream:
            break
        stream.close()
    assert Decimal(str(run.summary().total.cost_usd)) >= provider.billed_usd > 0


def test_a_raw_thread_inside_of_a_tool_is_a_part_of_the_kickoff(provider, crew, llm):
    from crewai.tools import tool

    model, refused = llm(max_tokens=50), []

    @tool("fan")
    def fan(word: str) -> str:
        """Ask many times."""

        def ask():
            try:
                model.call(word)
            except BudgetExceeded as error:
                refused.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return "done"

    provider.reset(lambda body: Reply(tool_calls=[("fan", {"word": "a"})]) if body.get("tools") else Reply())
    with pytest.raises(BudgetExceeded):
        clevagent.guard(crew(1, model=model, tools=[fan]), budgets=[Budget(llm_calls=3)]).kickoff()
    assert provider.request_count == 3
    assert len(refused) == 4


# -- cancelled ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kickoff_async", "akickoff"])
def test_a_cancelled_kickoff_gives_nothing_back_and_calls_no_more(provider, crew, how):
    asked, cancelled = threading.Event(), threading.Event()

    def reply(body):
        asked.set()
        cancelled.wait(30)
        return Reply()

    provider.reset(reply)
    guarded = clevagent.guard(crew(4), budgets=[Budget(llm_calls=9)])

    async def main():
        kickoff = asyncio.create_task(getattr(guarded, how)())
        assert await asyncio.to_thread(asked.wait, 30)
        kickoff.cancel()
        await asyncio.wait([kickoff])
        assert kickoff.cancelled()
        cancelled.set()

    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        asyncio.run(main())  # which waits for the thread of kickoff_async, too
    assert Decimal(str(run.summary().total.cost_usd)) >= provider.billed_usd > 0
    assert how == "kickoff_async" or provider.request_count == 1


# -- agents and flows -----------------------------------------------------------------------------------------------------


def agent(llm, **kw):
    return Agent(**{"role": "helper", "goal": "help", "backstory": "old", "llm": llm(max_tokens=50)} | kw)


@every_way
def test_an_agent_on_its_own(aio, provider, llm, how):
    guarded = clevagent.guard(agent(llm), budgets=[Budget(llm_calls=2, per="lifetime")])
    for _ in range(2):
        answer = guarded.kickoff("Hello") if how == "kickoff" else aio(getattr(guarded, how)("Hello"))
        assert answer.raw == "ok"
    with pytest.raises(BudgetExceeded):
        guarded.kickoff("Hello") if how == "kickoff" else aio(getattr(guarded, how)("Hello"))
    assert provider.request_count == 2


def test_a_guarded_agent_in_a_crew_that_is_not(provider, llm):
    guarded = clevagent.guard(agent(llm), budgets=[Budget(llm_calls=1)])
    tasks = [Task(description=f"Do {n}.", expected_output="text", agent=guarded) for n in range(3)]
    with clevagent.run() as run, pytest.raises(BudgetExceeded):
        Crew(agents=[guarded], tasks=tasks).kickoff()
    assert provider.request_count == 1
    assert run.summary().by_node["helper"].calls == 1


class Steps(Flow):
    model = None
    crew = None

    @start()
    def first(self):
        return self.model.call("Hello")

    @listen(first)
    def second(self):
        return self.crew.kickoff().raw

    @listen(second)
    def third(self):
        return self.model.call("Hello")


@every_way
def test_a_flow_with_crews_and_models_is_one_run(aio, provider, crew, llm, how):
    flow = Steps()
    object.__setattr__(flow, "model", llm(max_tokens=50))
    object.__setattr__(flow, "crew", crew(2))
    guarded = clevagent.guard(flow, budgets=[Budget(llm_calls=3)])
    assert guarded is flow
    with clevagent.run() as run, pytest.raises(BudgetExceeded):
        kickoff(aio, guarded, how)
    assert provider.request_count == 3
    assert run.summary().total.calls == 3


def test_a_flow_cannot_halt_and_says_so():
    with pytest.raises(UsageError, match="which cannot end a framework's work"):
        clevagent.guard(Steps(), budgets=[TWO], on_exceed="halt")


def test_tenants_have_ceilings_of_their_own(provider, crew):
    clevagent.init(budgets=[Budget(llm_calls=2, by="tenant", per="day")])
    guarded = clevagent.guard(crew(2))
    for tenant, fits in (("a", True), ("a", False), ("b", True)):
        with clevagent.run(tags={"tenant": tenant}):
            if fits:
                guarded.kickoff()
            else:
                with pytest.raises(BudgetExceeded):
                    guarded.kickoff()
    assert provider.request_count == 4


# -- progress -------------------------------------------------------------------------------------------------------------


class Listening:
    def __init__(self):
        self.steps = []

    @hookimpl
    def clevagent_step(self, run, step):
        self.steps.append((step.kind, step.name))


def test_finished_tasks_are_steps(provider, crew):
    from crewai.events.event_bus import crewai_event_bus

    listening = Listening()
    clevagent.init(plugins=[listening])
    clevagent.guard(crew(2)).kickoff()
    crewai_event_bus.flush(timeout=10)
    assert [name for kind, name in listening.steps if kind == "task"] == ["task 0", "task 1"]
    assert [name for kind, name in listening.steps if kind == "llm_call"] == ["gpt-4o", "gpt-4o"]


def test_a_hundred_refused_kickoffs_leave_crewai_as_it_was(provider, crew):
    """Each leaves events that it never ends, and CrewAI refuses to work where there are a hundred of them."""
    guarded = clevagent.guard(crew(2), budgets=[Budget(llm_calls=1, per="lifetime")])
    for _ in range(120):
        with pytest.raises(BudgetExceeded):
            guarded.kickoff()
    halting = clevagent.guard(crew(2), budgets=[Budget(llm_calls=1, per="lifetime", name="other")], on_exceed="halt")
    for _ in range(120):
        assert not halting.kickoff().is_complete
    assert provider.request_count == 2
    assert crew(2).kickoff().raw == "ok"
