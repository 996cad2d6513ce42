"""Guarding clients of Anthropic's SDK, one or all: see ``clevagent_core.providers.clients`` for how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

# Not public, and what every client derives from since the SDKs are generated: the one place through which all requests go.
from anthropic._base_client import AsyncAPIClient, SyncAPIClient

from clevagent_anthropic.endpoints import plan
from clevagent_core.providers.clients import Attachment, guard_client

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog

_attachment = Attachment(plan)


def guard(obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None) -> object | None:
    """Make a guarded copy of a client; ``None`` for anything else."""
    if not isinstance(obj, (SyncAPIClient, AsyncAPIClient)):
        return None
    guarded: object = guard_client(obj, plan, watchdog, budgets, on_exceed)
    return guarded


def attach(watchdog: Watchdog) -> None:
    """Ask ``watchdog`` before each request of every client, those that were made before included."""
    _attachment.attach(watchdog, (SyncAPIClient, AsyncAPIClient))


def detach(watchdog: Watchdog) -> None:
    """Stop asking ``watchdog``."""
    _attachment.detach(watchdog)
