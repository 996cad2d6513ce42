"""What LangGraph around a call asks for: its node's name, and errors that it neither retries nor swallows.

LangGraph is not imported here: where a call is made in a node of it, it is there. Checked with langgraph 1.2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clevagent_core.budgets import Budget
from clevagent_core.calls import Call, LLMCall, ToolCall, parts_of, path
from clevagent_core.errors import Stopped
from clevagent_core.frames import Activity, Frame, enter, frame_of, nodes_around, place
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog


def put_in_place(call: LLMCall | ToolCall, frame: Frame | None, metadata: Mapping[str, Any] | None) -> None:
    """Write into a call which nodes and tools it is made in: as LangGraph has them, or as whoever wraps those very nodes calls them."""
    place(call, frame)
    if isinstance(call, ToolCall) and call.inside is not None:
        outer = parts_of(call.inside)
        # The middleware, around it, has told of this very tool.
        call.inside = path(outer[:-1] if outer[-1] == call.tool else outer)
    if not metadata:
        return
    call.thread_id = metadata.get("thread_id")
    nodes = nodes_of(metadata)
    if nodes:
        call.node = path(_named(nodes, nodes_around(frame)))


def nodes_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the nodes that a call is made in, the outermost graph's first."""
    node = metadata.get("langgraph_node")
    if node is None:
        return ()
    # One part for each graph, with the id of the task; of a subgraph that remembers, without, and with a number of its own.
    parts = [part.partition(":")[0] for part in metadata.get("langgraph_checkpoint_ns", "").split("|")]
    names = [part for part in parts if part and not part.isdigit()]
    return tuple(names) if names and names[-1] == node else (*names, node)


def enter_node(watchdog: Watchdog, run: Run, nodes: tuple[str, ...]) -> Frame:
    """Enter a node of a graph, in the context that LangGraph runs it in; for whoever leaves it."""
    frame = enter(watchdog, run, Activity("node", nodes[-1], nodes), begins=True)
    if frame.through is None:
        frame.through = _error("GraphBubbleUp")
    return frame


def _named(nodes: tuple[str, ...], activities: Sequence[Activity]) -> list[str]:
    """Put what is known of the nodes of LangGraph and what is known of the blocks around this context together."""
    if not activities:
        return list(nodes)
    around: list[str] = []
    at: dict[int, list[str]] = {}
    deepest = 0
    for activity in activities:
        if activity.place and nodes[: len(activity.place)] == activity.place:
            deepest = len(activity.place)
            at.setdefault(deepest, []).append(activity.name)
        elif deepest:
            at[deepest].append(activity.name)
        else:
            around.append(activity.name)
    return [*around, *(name for depth, node in enumerate(nodes, 1) for name in at.get(depth, [node]))]


def open_in_graph(run: Run, call: Call, budgets: Sequence[Budget] = ()) -> Ticket:
    """Do what ``run.open`` does; in a node, a refusal is of the type that LangGraph lets pass."""
    return run.open(call, budgets, through=_through(run, call))


async def aopen_in_graph(run: Run, call: Call, budgets: Sequence[Budget] = ()) -> Ticket:
    """Do what ``run.aopen`` does; in a node, a refusal is of the type that LangGraph lets pass."""
    return await run.aopen(call, budgets, through=_through(run, call))


def _through(run: Run, call: Call) -> type[BaseException] | None:
    if call.node is None:
        return None
    frame = frame_of(run.watchdog)
    return _error("GraphBubbleUp") if frame is None or frame.through is None else None


def is_pause(error: BaseException) -> bool:
    """Tell whether work waits for a person (``interrupt()``): it has not failed, and is done again once that has answered."""
    interrupt = _error("GraphInterrupt")
    return interrupt is not None and isinstance(error, interrupt) and not isinstance(error, Stopped)


def _error(name: str) -> type[BaseException] | None:
    return getattr(sys.modules.get("langgraph.errors"), name, None)
