"""The Anthropic adapter as a plugin. The framework is imported once something of it is to be guarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog


class AnthropicPlugin:
    """Guards what is Anthropic's."""

    @hookimpl
    def clevagent_guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None
    ) -> object | None:
        """Nothing yet."""
        return None
