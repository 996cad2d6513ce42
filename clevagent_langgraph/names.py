"""Which nodes and tools a compiled graph has, as far as it can be looked into. Checked with langgraph 1.2.0 and 1.2.22."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langgraph.constants import START
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from clevagent_core.names import Kind, Known

_DEEP = 8
"""How deep graphs in graphs are looked at: one that holds itself has no end."""


def known_names(graph: Pregel[Any, Any, Any, Any]) -> dict[Kind, Known]:
    """Name the nodes, at any depth, and the tools.

    What is a node's own code may invoke other graphs and tools. LangGraph finds those that are in sight of a function; that there are no
    others is known of nodes that are graphs themselves only.
    """
    nodes: set[str] = set()
    tools: set[str] = set()
    opaque: set[str] = set()
    for path, bound in _nodes_of(graph, ()):
        nodes.update(("/".join(path), path[-1]))
        if isinstance(bound, ToolNode):
            tools.update(bound.tools_by_name)
        if not isinstance(bound, Pregel):
            opaque.update(("/".join(path), path[-1]))
    known: dict[Kind, Known] = {}
    if isinstance(graph, CompiledStateGraph):  # of @entrypoint, the tasks are not known before they are called
        known["node"] = Known(nodes, is_complete=not opaque, opaque=opaque)
    if tools:
        known["tool"] = Known(tools)
    return known


def _nodes_of(graph: Pregel[Any, Any, Any, Any], around: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    for name, node in graph.nodes.items():
        if name == START:
            continue
        path = (*around, name)
        yield path, node.bound
        if len(path) < _DEEP:
            for inside in node.subgraphs:
                if isinstance(inside, Pregel):
                    yield from _nodes_of(inside, path)
