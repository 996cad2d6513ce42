"""ClevAgent for CrewAI, under its published path."""

from __future__ import annotations

from clevagent_crewai.callbacks import step_callback as clevagent_step_callback
from clevagent_crewai.callbacks import task_callback as clevagent_task_callback

__all__ = ["clevagent_step_callback", "clevagent_task_callback"]
