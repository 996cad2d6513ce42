"""ClevAgent for LangGraph: ``clevagent.guard(graph)``, and ``monitored_node`` for nodes, tasks and entrypoints.

Importing this package imports no part of LangGraph; the names below do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clevagent_langgraph.nodes import monitored_node
    from clevagent_langgraph.threads import atop_up, stopped, top_up

__all__ = ["atop_up", "monitored_node", "stopped", "top_up"]


def __getattr__(name: str) -> Any:
    if name == "monitored_node":
        from clevagent_langgraph.nodes import monitored_node  # noqa: PLC0415 - LangGraph takes a second or two to import

        return monitored_node
    if name in __all__:
        from clevagent_langgraph import threads  # noqa: PLC0415 - as said

        return getattr(threads, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
