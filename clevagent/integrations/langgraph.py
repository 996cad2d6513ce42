"""ClevAgent for LangGraph, under its published path."""

from __future__ import annotations

from clevagent_langgraph.callbacks import node_callback as clevagent_node_callback
from clevagent_langgraph.nodes import monitored_node

__all__ = ["clevagent_node_callback", "monitored_node"]
