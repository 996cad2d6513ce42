"""What LangGraph around a call asks for: its node's name, and errors that it neither retries nor swallows.

LangGraph is not imported here: where a call is made in a node of it, it is there. Checked with langgraph 1.2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clevagent_core.budgets import Budget
from clevagent_core.calls import Call
from clevagent_core.errors import Stopped
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog


def node_of(watchdog: Watchdog, metadata: Mapping[str, Any]) -> str | None:
    """Name the node that a call is made in: as LangGraph has it, or as whoever wraps that very node calls it."""
    node: str | None = metadata.get("langgraph_node")
    named = watchdog.node.get()
    if named is None or (node is not None and getattr(named, "of", None) != node):
        return node  # or one further inside
    return named


def open_in_graph(run: Run, call: Call, budgets: Sequence[Budget] = ()) -> Ticket:
    """Do what ``run.open`` does; in a node, a refusal is of the type that LangGraph lets pass."""
    through = run.watchdog.through
    passes = _error("GraphBubbleUp") if call.node is not None and through.get() is None else None
    if passes is None:
        return run.open(call, budgets)
    through.set(passes)
    try:
        return run.open(call, budgets)
    finally:
        through.set(None)


async def aopen_in_graph(run: Run, call: Call, budgets: Sequence[Budget] = ()) -> Ticket:
    """Do what ``run.aopen`` does; in a node, a refusal is of the type that LangGraph lets pass."""
    through = run.watchdog.through
    passes = _error("GraphBubbleUp") if call.node is not None and through.get() is None else None
    if passes is None:
        return await run.aopen(call, budgets)
    through.set(passes)
    try:
        return await run.aopen(call, budgets)
    finally:
        through.set(None)


def is_pause(error: BaseException) -> bool:
    """Tell whether work waits for a person (``interrupt()``): it has not failed, and is done again once that has answered."""
    interrupt = _error("GraphInterrupt")
    return interrupt is not None and isinstance(error, interrupt) and not isinstance(error, Stopped)


def _error(name: str) -> type[BaseException] | None:
    return getattr(sys.modules.get("langgraph.errors"), name, None)
