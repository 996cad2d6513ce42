"""Attaching to every run of LangChain and LangGraph in the process, through ``register_configure_hook``.

LangChain asks each registered variable, whenever it configures callbacks, for a handler to add. A ``ContextVar`` would only be
seen by code that inherits the context, not by raw threads; so the variable registered here has one value for the process. Hooks
cannot be unregistered: a slot whose watchdog is gone answers ``None``, and is used again.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from langchain_core.tracers.context import register_configure_hook

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog
    from clevagent_langchain.handler import ClevAgentCallbackHandler


class _Slot:
    """What LangChain takes for a ``ContextVar``: it only ever calls ``get``."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None
        self.handler: ClevAgentCallbackHandler | None = None

    def let_go(self, watchdog: Watchdog) -> None:
        """Add no handler of ``watchdog`` any more."""
        if self.watchdog is watchdog:
            self.watchdog = self.handler = None

    def get(self) -> ClevAgentCallbackHandler | None:
        """Give the handler to add."""
        watchdog = self.watchdog
        if self.handler is None and watchdog is not None:
            # Not when it is attached: that may be in the middle of LangChain's own imports.
            from clevagent_langchain.handler import ClevAgentCallbackHandler  # noqa: PLC0415 - as said

            self.handler = ClevAgentCallbackHandler(watchdog=watchdog)
        return self.handler


_lock = threading.RLock()
_slots: list[_Slot] = []


def attach(watchdog: Watchdog) -> None:
    """Add a handler of ``watchdog`` to every callback manager that LangChain configures from now on."""
    with _lock:
        slot = next((slot for slot in _slots if slot.watchdog is None), None)
        if slot is None:
            slot = _Slot()
            register_configure_hook(cast("Any", slot), inheritable=True)
            _slots.append(slot)
        slot.watchdog = watchdog


def detach(watchdog: Watchdog) -> None:
    """Stop adding handlers of ``watchdog``."""
    with _lock:
        for slot in _slots:
            slot.let_go(watchdog)
