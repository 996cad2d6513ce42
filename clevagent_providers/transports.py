"""The HTTP clients below the SDKs: what they do by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clevagent_core.errors import UsageError


def check_transport(client: Any, what: str) -> None:
    """Refuse an SDK's client whose HTTP client sends requests again by itself, unseen. Told by the names of its transports' classes.

    Raises:
        UsageError: it does.

    """
    http = getattr(client, "_client", None)
    mounted = getattr(http, "_mounts", None)
    for transport in (getattr(http, "_transport", None), *(mounted.values() if isinstance(mounted, Mapping) else ())):
        names = [kind.__name__ for kind in type(transport).__mro__]
        if any("retry" in name.lower() or "retries" in name.lower() for name in names):
            raise UsageError(
                f"{what} was given an HTTP client whose transport ({names[0]}) sends requests again by itself: each may be billed, and no "
                "budget would see it. Give it a plain transport, and max_retries= to the client: ClevAgent repeats then, each attempt with "
                "a reservation of its own."
            )
