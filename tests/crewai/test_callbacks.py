"""``step_callback`` and ``task_callback``: they take all that CrewAI hands over, tell it, and raise nothing."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
from crewai.agents.parser import AgentAction, AgentFinish
from crewai.tasks.task_output import TaskOutput
from crewai.tools import tool
from crewai.tools.tool_types import ToolResult

import clevagent
from clevagent import UsageError
from clevagent.testing import Reply
from clevagent_core.hookspecs import hookimpl
from clevagent_crewai import StepCallback, TaskCallback, step_callback, task_callback


class Listening:
    def __init__(self, *, fails=False):
        self.steps, self.fails = [], fails

    @hookimpl
    def clevagent_step(self, run, step):
        self.steps.append((step.kind, step.name, dict(step.detail)))
        if self.fails:
            raise LookupError


@pytest.fixture
def heard():
    listening = Listening()
    clevagent.init(plugins=[listening])
    return listening.steps


class Sly:
    @property
    def tool(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (ToolResult(result="r", result_as_answer=False), ("tool_call", "ToolResult", {"agent": None, "output": "r"})),
        (
            AgentAction(thought="t", tool="lookup", tool_input="{}", text="x", result="r"),
            ("tool_call", "lookup", {"agent": None, "tool": "lookup", "output": "r"}),
        ),
        (AgentFinish(thought="t", output="o", text="x"), ("node", "AgentFinish", {"agent": None, "output": "o"})),
        (None, ("node", "NoneType", {"agent": None, "output": None})),
        ("text", ("node", "str", {"agent": None, "output": None})),
    ],
    ids=["ToolResult", "AgentAction", "AgentFinish", "None", "text"],
)
def test_every_type_is_told_as_a_step(heard, given, told):
    step_callback(given)
    assert heard == [told]


def test_a_finished_task_is_told_with_its_agent_and_output(heard):
    task_callback(TaskOutput(description="Write.", name="writing", raw="done", agent="writer"))
    task_callback(TaskOutput(description="Write.", raw="done", agent="writer"))
    task_callback(object())
    assert [(kind, name, detail["agent"]) for kind, name, detail in heard] == [
        ("task", "writing", "writer"),
        ("task", "Write.", "writer"),
        ("task", "task", None),
    ]


def test_nothing_is_raised_whatever_happens(caplog):
    clevagent.init(plugins=[Listening(fails=True)])
    step_callback(Sly())
    task_callback(None)
    assert "could not tell a step" in caplog.text


def test_in_a_guarded_crew_they_know_the_agent_and_the_tool(provider, crew, heard):
    @tool("lookup")
    def lookup(word: str) -> str:
        """Look a word up."""
        return "found"

    provider.reset(
        lambda body: Reply(tool_calls=[("lookup", {"word": "a"})]) if body.get("tools") and len(body["messages"]) < 4 else Reply()
    )
    guarded = clevagent.guard(crew(2, tools=[lookup], step_callback=step_callback, task_callback=task_callback))
    guarded.kickoff()
    nodes = [(name, detail["agent"]) for kind, name, detail in heard if kind == "node"]
    assert nodes == [("writer", "writer"), ("editor", "editor")]
    assert {(name, detail["agent"]) for kind, name, detail in heard if kind == "task"} == {
        ("task 0", "writer"),
        ("task 1", "editor"),
    }


def test_the_articles_callback_runs_a_task_three_times_and_ours_once(provider, crew):
    """``step_output.agent`` is on no type of CrewAI's: the AttributeError makes it run the task again."""

    @tool("lookup")
    def lookup(word: str) -> str:
        """Look a word up."""
        return "found"

    def article(step_output):
        step_output.agent.lower()

    asks = lambda body: Reply(tool_calls=[("lookup", {"word": "a"})]) if body["messages"][-1]["role"] != "tool" else Reply()  # noqa: E731
    provider.reset(asks)
    with pytest.raises(AttributeError):
        crew(1, tools=[lookup], step_callback=article).kickoff()
    assert provider.request_count == 6
    provider.reset(asks)
    crew(1, tools=[lookup], step_callback=step_callback).kickoff()
    assert provider.request_count == 2


def test_an_agent_without_tools_is_never_told_of(crew, heard):
    crew(1, step_callback=step_callback).kickoff()
    assert heard == []


@pytest.mark.parametrize("callback", [step_callback, task_callback], ids=["step", "task"])
def test_the_ready_made_ones_can_be_copied_and_pickled(callback):
    assert pickle.loads(pickle.dumps(callback)) is callback  # noqa: S301 - made here
    assert copy.copy(callback) is callback


def test_a_watchdog_of_ones_own():
    listening = Listening()
    watchdog = clevagent.Watchdog(plugins=[listening])
    StepCallback(watchdog=watchdog)(AgentFinish(thought="t", output="o", text="x"))
    assert len(listening.steps) == 1
    watchdog.shutdown()


@pytest.mark.parametrize("make", [StepCallback, TaskCallback])
@pytest.mark.parametrize("asked", [{"budgets": [clevagent.Budget(usd=1)]}, {"on_exceed": "halt"}])
def test_asked_to_stop_they_say_what_can(make, asked):
    with pytest.raises(UsageError, match="it can neither refuse, nor lower a limit, nor halt") as told:
        make(**asked)
    assert "clevagent.guard(crew" in str(told.value)


def test_importing_them_imports_no_crewai():
    script = (
        "import sys\n"
        "from clevagent_crewai import step_callback, task_callback\n"
        "import clevagent\n"
        "step_callback(None)\n"
        "assert 'crewai' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
