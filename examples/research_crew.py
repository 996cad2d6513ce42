"""A crew of two, with the step and task callbacks, a ceiling for one agent, and a ping when the work is done.

    pip install ".[crewai]"
    python examples/research_crew.py

``guard(crew)`` is what holds the ceilings. The callbacks only tell what was done: CrewAI calls them when a model or a tool has answered,
which is too late to refuse it.
"""

import os

os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")  # this example dials nothing but its model
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")

from crewai import LLM, Agent, Crew, Task
from offline import MODEL, model_access

import clevagent
from clevagent.integrations.crewai import clevagent_step_callback, clevagent_task_callback
from clevagent.testing import Reply


def script(body):
    """Answer as the agent that is asked."""
    is_writer = "You are Writer" in str(body["messages"])
    text = "Watchdogs work best inside." if is_writer else "Three sources say: a process cannot report its own death."
    return Reply(text=f"Thought: I now can give a great answer\nFinal Answer: {text}", output_tokens=40)


with model_access(script) as access:
    clevagent.init(agent="research-crew")
    llm = LLM(model=f"openai/{MODEL}", max_tokens=200, **access.client)
    researcher = Agent(
        role="Researcher", goal="Find facts", backstory="You read everything.", llm=llm, step_callback=clevagent_step_callback
    )
    writer = Agent(role="Writer", goal="Write it down", backstory="You are brief.", llm=llm)
    research = Task(description="Find out how agents die.", expected_output="Facts", agent=researcher, name="research")
    write = Task(description="Write it up.", expected_output="A sentence", agent=writer, name="write")
    crew = clevagent.guard(
        Crew(agents=[researcher, writer], tasks=[research, write], task_callback=clevagent_task_callback),
        budgets=[clevagent.Budget(usd=0.01), clevagent.Budget(llm_calls=5, node="Researcher")],
    )
    with clevagent.run() as run:
        result = crew.kickoff()
        clevagent.ping("crew_complete", meta={"tasks": len(result.tasks_output)})
    print("The crew says:", result.raw)
    print(run)
    print(access.bill())
    clevagent.shutdown()
