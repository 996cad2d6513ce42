"""The OpenAI adapter as a plugin. The SDK is imported once something of it is to be guarded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clevagent_core.errors import UsageError
from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog


class OpenAIPlugin:
    """Guards clients, and attaches to all of them."""

    @hookimpl
    def clevagent_guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None
    ) -> object | None:
        """Guard a client, sync or async, of OpenAI's SDK or of a class that derives from one there."""
        if "openai" not in sys.modules:
            return None  # then obj cannot be a client
        from clevagent_openai.clients import guard  # noqa: PLC0415 - imports the SDK

        return guard(obj, watchdog, budgets, on_exceed)

    @hookimpl
    def clevagent_attach(self, name: str, watchdog: Watchdog) -> bool | None:
        """Attach to all clients of the process."""
        if name != "openai":
            return None
        try:
            from clevagent_openai.clients import attach  # noqa: PLC0415 - imports the SDK
        except ImportError as error:
            raise UsageError(
                f"attach=['openai'] needs the package openai, which cannot be imported ({error}). "
                "Install it with the [openai] extra, or leave it out of attach."
            ) from error
        attach(watchdog)
        return True

    @hookimpl
    def clevagent_attachable(self) -> Mapping[str, str]:
        """Whoever makes a client has imported this module."""
        return {"openai": "openai"}

    @hookimpl
    def clevagent_unconfigure(self, watchdog: Watchdog) -> None:
        """Detach."""
        if "clevagent_openai.clients" in sys.modules:
            from clevagent_openai.clients import detach  # noqa: PLC0415 - imported already

            detach(watchdog)
