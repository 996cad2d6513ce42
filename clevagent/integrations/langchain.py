"""ClevAgent for LangChain, under its published path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clevagent_langchain.handler import ClevAgentCallbackHandler

if TYPE_CHECKING:
    from clevagent_langchain.middleware import BudgetMiddleware

__all__ = ["BudgetMiddleware", "ClevAgentCallbackHandler"]


def __getattr__(name: str) -> Any:
    if name == "BudgetMiddleware":
        import clevagent_langchain  # noqa: PLC0415 - agents take a second or two to import

        return clevagent_langchain.BudgetMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
