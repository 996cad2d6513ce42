"""The CrewAI adapter as a plugin. CrewAI is imported once something of it is to be guarded."""

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


class CrewAIPlugin:
    """Guards crews, agents, flows and models of CrewAI, and attaches to all of them."""

    @hookimpl
    def clevagent_guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None
    ) -> object | None:
        """Guard a crew (which can end gracefully), an agent, a flow or a model."""
        if "crewai" not in sys.modules or not _is_of_crewai(obj):
            return None
        from clevagent_crewai.guards import guard  # noqa: PLC0415 - imports CrewAI

        return guard(obj, watchdog, tuple(budgets), on_exceed)

    @hookimpl
    def clevagent_attach(self, name: str, watchdog: Watchdog) -> bool | None:
        """Attach to every kickoff and every model call of CrewAI in the process."""
        if name != "crewai":
            return None
        try:
            from clevagent_crewai.attach import attach  # noqa: PLC0415 - imports CrewAI
        except ImportError as error:
            raise UsageError(
                f"attach=['crewai'] needs CrewAI 1.15.19 or later, which cannot be imported ({error}). "
                "Install it with the [crewai] extra, or leave it out of attach."
            ) from error
        check_actions(watchdog.settings.budgets, where="init(attach=['crewai'], budgets=[...])")
        attach(watchdog)
        return True

    @hookimpl
    def clevagent_attachable(self) -> Mapping[str, str]:
        """CrewAI imports this module last of what is attached to."""
        return {"crewai": "crewai"}

    @hookimpl
    def clevagent_unconfigure(self, watchdog: Watchdog) -> None:
        """Detach."""
        if "clevagent_crewai.attach" in sys.modules:
            from clevagent_crewai.attach import detach  # noqa: PLC0415 - imported already

            detach(watchdog)


def _is_of_crewai(obj: object) -> bool:
    return any(base.__module__.partition(".")[0] == "crewai" for base in type(obj).__mro__)
