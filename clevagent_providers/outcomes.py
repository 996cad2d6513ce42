"""Telling a ticket what became of a request, from what the provider answered or how it failed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from clevagent_core.calls import LLMCall, Usage
from clevagent_core.interrupts import is_interrupt
from clevagent_core.tickets import Ticket
from clevagent_core.verdicts import Incident
from clevagent_providers.failures import may_be_billed
from clevagent_providers.usage import UnusableUsage, from_error

logger = logging.getLogger("clevagent")


def settle(ticket: Ticket, read: Callable[[], Usage | None], answer: object = None) -> None:
    """Settle a call to the usage that ``read`` finds; to its upper bound where there is none, or none that can be true.

    Args:
        ticket: the call's.
        read: reads the usage that the provider reported; may raise.
        answer: what the model said, for the loop guard.

    """
    usage = None
    try:
        usage = read()
    except UnusableUsage as problem:
        tell_unusable(ticket, problem)
    except Exception as error:  # whose code: ours, in the user's agent; the call is over, so its bound is charged
        if is_interrupt(error):
            ticket.charge(error, result=answer)
            raise
        logger.exception("ClevAgent could not read what a call used; it is charged its upper bound.")
    ticket.settle(usage, result=answer)


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


def tell_unusable(ticket: Ticket, problem: UnusableUsage) -> None:
    """Tell that a provider's report cannot be true, and that the call is charged its upper bound."""
    run, call = ticket.run, ticket.call
    model = call.model if isinstance(call, LLMCall) else call.tool
    run.watchdog.tell(
        Incident(
            kind="usage",
            message=(
                f"The provider of {model!r} reported usage that cannot be a token count ({problem}), so the call is charged its "
                "upper bound. What is spent may be told too high; it is never told too low."
            ),
            agent=run.watchdog.settings.agent,
            run_id=run.run_id,
            at=run.watchdog.clock.wall(),
        )
    )
