"""The adapters of the two SDKs as plugins. An SDK is imported once something of it is to be guarded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from clevagent_core.errors import UsageError
from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_clients.clients import Clients
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog


class ClientPlugin:
    """Guards clients of one SDK, and attaches to all of them. Subclasses name both."""

    sdk: ClassVar[str]
    """The SDK's package, which is also the name to attach by, and the extra."""
    adapter: ClassVar[str]
    """The module that holds the SDK's ``clients``, a :class:`~clevagent_clients.clients.Clients`."""

    @hookimpl
    def clevagent_guard(
        self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None
    ) -> object | None:
        """Guard a client, sync or async, of the SDK or of a class that derives from one there."""
        if self.sdk not in sys.modules:
            return None  # then obj cannot be a client
        return self._clients().guard(obj, watchdog, budgets, on_exceed)

    @hookimpl
    def clevagent_attach(self, name: str, watchdog: Watchdog) -> bool | None:
        """Attach to all clients of the process."""
        if name != self.sdk:
            return None
        try:
            clients = self._clients()
        except ImportError as error:
            raise UsageError(
                f"attach=[{self.sdk!r}] needs the package {self.sdk}, which cannot be imported ({error}). "
                f"Install it with the [{self.sdk}] extra, or leave it out of attach."
            ) from error
        clients.attach(watchdog)
        return True

    @hookimpl
    def clevagent_attachable(self) -> Mapping[str, str]:
        """Whoever makes a client has imported this module."""
        return {self.sdk: self.sdk}

    @hookimpl
    def clevagent_unconfigure(self, watchdog: Watchdog) -> None:
        """Detach."""
        if self.adapter in sys.modules:
            self._clients().detach(watchdog)

    def _clients(self) -> Clients:
        found: Clients = importlib.import_module(self.adapter).clients
        return found


class OpenAIPlugin(ClientPlugin):
    """Guards clients of OpenAI's SDK, and attaches to all of them."""

    sdk = "openai"
    adapter = "clevagent_clients.openai"


class AnthropicPlugin(ClientPlugin):
    """Guards clients of Anthropic's SDK, and attaches to all of them."""

    sdk = "anthropic"
    adapter = "clevagent_clients.anthropic"
