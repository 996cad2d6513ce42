"""ClevAgent for LangChain: ``clevagent.guard(model)``, a callback handler, and attachment to the whole framework.

Importing this package imports no part of LangChain; the names below do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clevagent_langchain.handler import ClevAgentCallbackHandler

__all__ = ["ClevAgentCallbackHandler"]


def __getattr__(name: str) -> Any:
    if name == "ClevAgentCallbackHandler":
        from clevagent_langchain.handler import ClevAgentCallbackHandler  # noqa: PLC0415 - LangChain takes 0.3 s to import

        return ClevAgentCallbackHandler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
