"""Repeating a failed attempt as the SDKs do: their own retries are switched off, because each one of them bills unseen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from clevagent_core.errors import UsageError
from clevagent_providers.failures import is_transient, wait_before_retry

T = TypeVar("T")


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


def repeat(retries: int, error: Exception, attempt: Callable[[], T]) -> T:
    """Make up to ``retries`` further attempts after the first, which failed with ``error``; waits between them.

    Raises:
        Exception: what the last attempt failed with, or ``error`` at once where the SDK would not have tried again.

    """
    if not retries or not is_transient(error):
        raise error
    import tenacity  # noqa: PLC0415 - off the hot path: only a failed call comes here

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=wait_before_retry,
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    return retrying(_after(error, attempt))


async def arepeat(retries: int, error: Exception, attempt: Callable[[], Awaitable[T]]) -> T:
    """Do what ``repeat`` does, waiting without blocking the event loop."""
    if not retries or not is_transient(error):
        raise error
    import tenacity  # noqa: PLC0415 - off the hot path: only a failed call comes here

    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=wait_before_retry,
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    again = _after(error, attempt)

    async def attempt_again() -> T:
        return await again()

    return await retrying(attempt_again)


def _after(error: Exception, attempt: Callable[[], T]) -> Callable[[], T]:
    """Let the attempt that was already made be the first one that tenacity sees."""
    pending = [error]

    def attempt_again() -> T:
        if pending:
            raise pending.pop()
        return attempt()

    return attempt_again
