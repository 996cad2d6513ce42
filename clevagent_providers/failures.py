"""What a failed request means: was it billed, and may it be sent again?

Providers' SDKs are recognised by what their errors carry, not imported: an error's ``status_code``, its ``response`` headers, and
the names of its classes (those of httpx and of the Stainless-generated SDKs of OpenAI and Anthropic).
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from clevagent_core.calls import UnusableUsage
from clevagent_core.errors import ClevAgentError
from clevagent_providers.usage import from_error

if TYPE_CHECKING:
    import tenacity

    from clevagent_core.tickets import Ticket

_NEVER_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "InvalidURL", "ProxyError"})
"""httpx errors that come before the first byte of a request has left."""
_CONNECTION = frozenset({"APIConnectionError", "APITimeoutError"})
_GATEWAY = frozenset({408, 502, 504, 520, 521, 522, 523, 524})
"""Statuses by which something between us and the model gives up while the model may go on: they may be billed."""
_RETRIED = frozenset({408, 409, 429})
_FIRST_ERROR = 400
_SERVER_ERROR = 500


def fail(ticket: Ticket, error: BaseException, *, sent: bool | None = None) -> None:
    """Release or charge a call that failed; settle it where the error itself carries usage.

    Args:
        ticket: the call's.
        error: what it failed with.
        sent: whether it may have been billed; worked out from ``error`` when not told.

    """
    try:
        usage = from_error(error)
    except UnusableUsage:
        usage = None
    if usage is not None:
        ticket.settle(usage, error=error)
    else:
        ticket.fail(error, sent=may_be_billed(error) if sent is None else sent)


def may_be_billed(error: BaseException) -> bool:
    """Tell whether a request that ended in ``error`` may have been billed.

    A status that refuses the request is not billed; no connection, nothing sent. Everything else (a timeout, a dropped
    connection, a cancelled task, an answer that cannot be read, an error inside a stream) may have been, and counts as if it was.
    """
    if isinstance(error, ClevAgentError):
        # Somebody further in has refused it; what was sent before, and failed, is its cause.
        return error.__cause__ is not None and may_be_billed(error.__cause__)
    status = _status(error)
    if status is not None:
        return status in _GATEWAY or status < _FIRST_ERROR
    return not any(type(cause).__name__ in _NEVER_SENT for cause in _causes(error))


def is_transient(error: BaseException) -> bool:
    """Tell whether the SDK would have sent the request again: the rules of the OpenAI and Anthropic SDKs."""
    if isinstance(error, ClevAgentError) or not isinstance(error, Exception):
        return False
    wish = _header(error, "x-should-retry")
    if wish in {"true", "false"}:
        return wish == "true"
    status = _status(error)
    if status is not None:
        return status in _RETRIED or status >= _SERVER_ERROR
    return any(base.__name__ in _CONNECTION for base in type(error).__mro__)


def wait_before_retry(state: tenacity.RetryCallState, root_of: Callable[[BaseException], BaseException] | None = None) -> float:
    """Tell how many seconds to wait: what the server asks for, up to a minute; else half a second, doubled, up to 8, with jitter.

    ``root_of`` finds the SDK's error in what a framework made of it.
    """
    import tenacity  # noqa: PLC0415 - off the hot path: only a failed call comes here

    error = state.outcome.exception() if state.outcome is not None else None
    if error is not None and root_of is not None:
        error = root_of(error)
    asked = _retry_after(error) if error is not None else None
    if asked is not None and 0 < asked <= 60:  # noqa: PLR2004 - as the SDKs do
        return asked
    return (tenacity.wait_exponential(multiplier=0.5, max=8) + tenacity.wait_random(0, 0.25))(state)


def _status(error: BaseException) -> int | None:
    # An SDK's error carries the response; a web framework's, raised by somebody's callback, does not.
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) and getattr(error, "response", None) is not None else None


def _header(error: BaseException, name: str) -> str | None:
    headers = getattr(getattr(error, "response", None), "headers", None)
    value = headers.get(name) if headers is not None else None
    return value if isinstance(value, str) else None


def _retry_after(error: BaseException) -> float | None:
    milliseconds = _header(error, "retry-after-ms")
    seconds = _header(error, "retry-after")
    try:
        if milliseconds is not None:
            return float(milliseconds) / 1000
        if seconds is not None:
            return float(seconds)
    except ValueError:
        date = email.utils.parsedate_tz(seconds or "")
        return email.utils.mktime_tz(date) - time.time() if date is not None else None
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    # Not __context__: that may be any error that the caller was handling when this request was made.
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__
