"""By what a callback handler and a guarded model know of each other: each call counts once."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from clevagent_core.runs import Run

GUARDED = "clevagent_guarded"
"""The key by which a model's JSON tells that it is guarded, and with which budgets."""


class Serialized(dict[str, Any]):
    """What callbacks get to see of a guarded model: equal to that of the plain one."""


def asks_itself(serialized: object) -> bool:
    """Tell by what a callback handler is given of a model whether that asks before each call itself."""
    return isinstance(serialized, Serialized) or (isinstance(serialized, dict) and GUARDED in serialized)


root_run: ContextVar[Run | None] = ContextVar("clevagent_langchain_root_run", default=None)
"""The run that a callback handler found for the call that is being made, for models that are guarded too."""
