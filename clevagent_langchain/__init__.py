"""ClevAgent for LangChain: ``clevagent.guard(model)``, a callback handler, a middleware for agents, and attachment to everything.

Importing this package imports no part of LangChain; the names below do when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clevagent_langchain.handler import ClevAgentCallbackHandler
    from clevagent_langchain.middleware import BudgetMiddleware

__all__ = ["BudgetMiddleware", "ClevAgentCallbackHandler"]


def __getattr__(name: str) -> Any:
    if name == "ClevAgentCallbackHandler":
        from clevagent_langchain.handler import ClevAgentCallbackHandler  # noqa: PLC0415 - LangChain takes 0.3 s to import

        return ClevAgentCallbackHandler
    if name == "BudgetMiddleware":
        return _budget_middleware()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _budget_middleware() -> type[BudgetMiddleware]:
    try:
        from clevagent_langchain.middleware import BudgetMiddleware  # noqa: PLC0415 - agents take a second or two to import
    except ImportError as error:
        from clevagent_core.errors import UsageError  # noqa: PLC0415 - off the usual path

        raise UsageError(
            f"BudgetMiddleware is for create_agent, which is in the package langchain; importing it failed: {error}. The [langchain] "
            "extra brings langchain-core only, because models and graphs need no more. Install the package: `pip install -U langchain` "
            "(1.4 is what this was checked with)."
        ) from error
    return BudgetMiddleware
