"""The LangChain adapter as a plugin. LangChain is imported once something of it is to be guarded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clevagent_core.budgets import check_actions
from clevagent_core.errors import UsageError
from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog


class LangChainPlugin:
    """Guards chat models, and attaches to every callback manager."""

    @hookimpl
    def clevagent_guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None
    ) -> object | None:
        """Guard a chat model, or the one inside a binding (``model.bind_tools(...)``)."""
        if "langchain_core.language_models" not in sys.modules:
            return None  # then obj cannot be a model
        from clevagent_langchain.models import check_model_names, guard_model  # noqa: PLC0415 - imports LangChain

        guarded = guard_model(obj, watchdog, budgets)
        if guarded is not None:
            check_actions(budgets, where="guard(model)")
            check_model_names(obj, watchdog, budgets)
            if on_exceed is not None and not budgets:
                raise UsageError(
                    f"guard(model, on_exceed={on_exceed!r}) has no budgets of its own to which that could apply. "
                    "Give budgets=[...] beside it, or say on_exceed in the budgets of init() or run()."
                )
        return guarded

    @hookimpl
    def clevagent_attach(self, name: str, watchdog: Watchdog) -> bool | None:
        """Attach to every run of LangChain and LangGraph in the process."""
        if name != "langchain":
            return None
        try:
            from clevagent_langchain.attach import attach  # noqa: PLC0415 - imports LangChain
        except ImportError as error:
            raise UsageError(
                f"attach=['langchain'] needs langchain-core, which cannot be imported ({error}). "
                "Install it with the [langchain] extra, or leave it out of attach."
            ) from error
        attach(watchdog)
        return True

    @hookimpl
    def clevagent_attachable(self) -> Mapping[str, str]:
        """LangChain imports this module when it first looks for handlers to add, before it does."""
        return {"langchain": "langchain_core.tracers.context"}

    @hookimpl
    def clevagent_unconfigure(self, watchdog: Watchdog) -> None:
        """Detach."""
        if "clevagent_langchain.attach" in sys.modules:
            from clevagent_langchain.attach import detach  # noqa: PLC0415 - imported already

            detach(watchdog)
