"""Finished tasks as signs of progress, from CrewAI's event bus: an observer, which may come late and stops nothing."""

from __future__ import annotations

from typing import Any, cast

from crewai.events.event_bus import crewai_event_bus
from crewai.events.types.task_events import TaskCompletedEvent

from clevagent_core.calls import Step
from clevagent_crewai.gates import task_name_of
from clevagent_crewai.works import works

_heard: list[bool] = []


def watch_tasks() -> None:
    """Hear of finished tasks, once in a process."""
    if not _heard:
        _heard.append(True)
        crewai_event_bus.register_handler(TaskCompletedEvent, cast("Any", task_completed))


def unwatch_tasks() -> None:
    """Hear of them no more."""
    if _heard:
        _heard.clear()
        crewai_event_bus.off(TaskCompletedEvent, cast("Any", task_completed))


def task_completed(source: Any, event: TaskCompletedEvent) -> None:
    """Tell the kickoff that the task is a part of: CrewAI runs handlers in a copy of the context they are emitted in."""
    task = event.task or source
    step = Step(kind="task", name=task_name_of(task) or "", detail={"agent": getattr(event.output, "agent", None)})
    told = []
    for work in works():
        if work.watchdog not in told and not work.is_over:
            told.append(work.watchdog)
            work.run.step(step)
