"""What ClevAgent costs a crew: the callback called directly, and a kickoff bare, guarded and attached, against an A/A control.

    python benchmarks/crews.py

A kickoff takes milliseconds of CrewAI's own, and differs from one to the next by more than the guard costs; so the same bare kickoff
is timed twice in each round, as two alternatives (A/A), and what is added is compared with what those two differ by.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

if not __package__:  # run as a file: Python put this folder on the path, not the one that holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Before CrewAI is imported: nothing is sent while times are taken.
os.environ.update(
    CREWAI_DISABLE_TELEMETRY="true", OTEL_SDK_DISABLED="true", CREWAI_TRACING_ENABLED="false", CREWAI_DISABLE_VERSION_CHECK="true"
)

import clevagent
from benchmarks.hot_paths import ROWS, interleaved, row
from benchmarks.results import Section, contribute
from clevagent import Budget
from clevagent.testing import LoopbackProvider
from clevagent_crewai import step_callback, task_callback

ROUNDS = 100
DISTRIBUTIONS = ("clevagent", "crewai", "openai")
BIG = 1_000_000
"""US dollars: a ceiling that no benchmark reaches."""


def callbacks() -> None:
    from crewai.agents.parser import AgentAction, AgentFinish
    from crewai.tasks.task_output import TaskOutput

    clevagent.init()
    action = AgentAction(thought="t", tool="lookup", tool_input="{}", text="x", result="r")
    finish = AgentFinish(thought="t", output="o", text="x")
    task = TaskOutput(description="d", name="n", raw="r", agent="a")
    times = interleaved(
        {
            "AgentAction": lambda: step_callback(action),
            "AgentFinish": lambda: step_callback(finish),
            "TaskOutput": lambda: task_callback(task),
        },
        5_000,
    )
    for name in ("AgentAction", "AgentFinish"):
        row(f"step_callback({name}), called directly", f"{times[name]:.2f} us", "<= 3 us")
    row("task_callback(TaskOutput), called directly", f"{times['TaskOutput']:.2f} us", "<= 3 us")
    clevagent.shutdown()


def kickoffs() -> None:
    from crewai import LLM, Agent, Crew, Task

    with LoopbackProvider() as provider:

        def make() -> Crew:
            model = LLM(model="openai/gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=50)
            agent = Agent(role="writer", goal="help", backstory="old", llm=model)
            return Crew(agents=[agent], tasks=[Task(description="Do it.", expected_output="text", agent=agent)])

        budgets = [Budget(usd=BIG), Budget(usd=BIG, per="day"), Budget(llm_calls=BIG, per="month")]
        guarded = clevagent.guard(make(), budgets=budgets)
        bare, again = make(), make()
        times = rounds({"bare": bare.kickoff, "bare again": again.kickoff, "guarded": guarded.kickoff})
    base = median(times["bare"])
    noise = abs(median(times["bare again"]) - base)
    added = median(times["guarded"]) - base
    spread = median(abs(time - base) for time in times["bare"])
    row("kickoff of one task, bare", f"{base * 1e3:.2f} ms", "-")
    row("the same kickoff again (A/A): difference of medians", f"{noise * 1e6:.0f} us", "-")
    row("the same kickoff again (A/A): median deviation", f"{spread * 1e6:.0f} us", "-")
    row("guard(crew), three budgets: added to a kickoff", f"{added * 1e6:+.0f} us", "within the A/A control")


def rounds(alternatives: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Time each in turn; give the seconds of each round: the processor's, in all threads, because a kickoff has some of its own."""
    for function in alternatives.values():
        for _ in range(5):
            function()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    order = list(alternatives.items())
    for number in range(ROUNDS):
        # Not always in the same order: what comes after a slow one is slower.
        for name, function in order[number % len(order) :] + order[: number % len(order)]:
            start = process_time()
            function()
            times[name].append(process_time() - start)
    return times


def main() -> None:
    logging.getLogger("crewai").setLevel(logging.ERROR)
    logging.getLogger("clevagent").setLevel(logging.ERROR)
    callbacks()
    kickoffs()
    contribute("crews", [Section(title="CrewAI", header=("", "measured", "target"), rows=list(ROWS))], distributions=DISTRIBUTIONS)


if __name__ == "__main__":
    main()
