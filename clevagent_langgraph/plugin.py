"""The LangGraph adapter as a plugin. LangGraph is imported once something of it is to be guarded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clevagent_core.errors import UsageError
from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog


class LangGraphPlugin:
    """Guards compiled graphs, and attaches to all of them with the LangChain adapter."""

    @hookimpl(tryfirst=True)
    def clevagent_guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None
    ) -> object | None:
        """Guard a compiled graph. Asked before LangChain's adapter, which refuses what of LangGraph's it does not know."""
        if "langgraph.pregel" not in sys.modules:
            return None  # then obj cannot be a graph
        from clevagent_langgraph.graphs import guard_graph  # noqa: PLC0415 - imports LangGraph

        return guard_graph(obj, watchdog, budgets, on_exceed)

    @hookimpl
    def clevagent_attach(self, name: str, watchdog: Watchdog) -> bool | None:
        """Attach to LangChain's callback managers, which graphs use too."""
        if name != "langgraph":
            return None
        if "langchain" not in watchdog.plugins.attachable():
            raise UsageError(
                "attach=['langgraph'] goes through the plugin 'langchain', which is blocked, so no graph would be guarded. "
                "Take 'langchain' out of block, or block 'langgraph' too and guard each graph: clevagent.guard(graph)."
            )
        watchdog.attach("langchain")
        return True

    @hookimpl
    def clevagent_attachable(self) -> Mapping[str, str]:
        """Name the module of compiled graphs: other distributions share the package ``langgraph``."""
        return {"langgraph": "langgraph.pregel"}
