"""ClevAgent for LangChain, under its published path."""

from __future__ import annotations

from clevagent_langchain.handler import ClevAgentCallbackHandler

__all__ = ["ClevAgentCallbackHandler"]
