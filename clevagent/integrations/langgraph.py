"""ClevAgent for LangGraph, under its published path."""

from __future__ import annotations

from clevagent_langgraph.callbacks import node_callback as clevagent_node_callback
from clevagent_langgraph.nodes import monitored_node
from clevagent_langgraph.threads import atop_up, stopped, top_up

__all__ = ["atop_up", "clevagent_node_callback", "monitored_node", "stopped", "top_up"]
