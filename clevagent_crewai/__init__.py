"""ClevAgent for CrewAI: ``clevagent.guard(crew)``, callbacks that tell progress, and attachment to everything.

Importing this package imports no part of CrewAI (which takes six seconds); the names below do not, either, but for the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clevagent_crewai.callbacks import StepCallback, TaskCallback, step_callback, task_callback
    from clevagent_crewai.outputs import GuardedCrewOutput

__all__ = ["GuardedCrewOutput", "StepCallback", "TaskCallback", "step_callback", "task_callback"]


def __getattr__(name: str) -> Any:
    if name == "GuardedCrewOutput":
        from clevagent_crewai.outputs import GuardedCrewOutput  # noqa: PLC0415 - CrewAI takes six seconds to import

        return GuardedCrewOutput
    if name in __all__:
        from clevagent_crewai import callbacks  # noqa: PLC0415 - seldom asked for in programs without CrewAI

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
