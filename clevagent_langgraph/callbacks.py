"""``node_callback``: a sign of progress for each node that has finished, told by the program that drives a graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType

from clevagent_core import default
from clevagent_core.calls import Step
from clevagent_core.interrupts import is_interrupt
from clevagent_core.runs import Run

logger = logging.getLogger("clevagent")

_INTERRUPT = "__interrupt__"


def node_callback(node: str | Mapping[str, object], state: object = None) -> None:
    """Tell that a node has finished: a step of the current run. It comes after the work, so it can refuse nothing.

    Hand it what ``graph.stream(..., stream_mode="updates")`` yields, or call it in a node of your own. ``monitored_node`` tells the same
    by itself, feeds the loop guard and can have a ceiling; ``clevagent.guard(graph)`` holds ceilings for the whole graph. Safe from any
    thread; never raises.

    Args:
        node: the node's name; or the updates of one superstep, by node.
        state: what the node wrote, where ``node`` is a name.

    """
    try:
        updates = node if isinstance(node, Mapping) else {node: state}
        run = default.current().current_run()
        for name, update in updates.items():
            _step(run, name, update)
    except Exception as error:  # whose code: ours, in the user's program
        if is_interrupt(error):
            raise
        logger.exception("ClevAgent could not tell a step; the program goes on.")


def _step(run: Run, name: object, update: object) -> None:
    if name != _INTERRUPT:  # a graph that waits for a person has not finished
        run.step(Step(kind="node", name=str(name), detail=MappingProxyType({"output": update})))
