"""Whose a request is: that of the model call which a framework's adapter opened around it, or one of its own.

An adapter of a framework opens a ticket and lets it cover (in the frame) what the framework sends; the adapter of the SDK below finds
it there, and does not count the request again. One ticket covers one request: what a callback or a tool sends while the ticket is
open, and what is sent after a cancelled call whose ticket nobody ended, is a request of its own.
"""

from __future__ import annotations

from clevagent_core.calls import LLMCall
from clevagent_core.frames import covering, enter, leave
from clevagent_core.tickets import Ticket
from clevagent_core.watchdog import Watchdog

_SWEEP = 256
"""From how many entries on a look for tickets that have ended is worth its time."""

_is_asked = False
_taken: dict[int, tuple[Ticket, object]] = {}
"""The tickets whose request was seen, by id; each with a mark of who saw it. Contexts do not do: a task has a copy of its own."""


def look_out() -> None:
    """Tell that somebody asks (``take``): an SDK's client is guarded. Until then nothing is noted."""
    global _is_asked  # noqa: PLW0603 - it never ends
    _is_asked = True


def cover(ticket: Ticket) -> None:
    """Let ``ticket`` cover the request that is sent next in this context, until it has ended or ``uncover`` is called.

    What covered it before (``generate([a, b])``) covers the next one.
    """
    if not _is_asked:
        return
    run = ticket.run
    frame = enter(run.watchdog, run)
    frame.covered = ticket
    ticket.frame = frame


def uncover(ticket: Ticket) -> None:
    """Let ``ticket`` cover nothing more, in whatever context."""
    if ticket.frame is not None:
        leave(ticket.frame)
    if _taken and not ticket.is_open:  # it covers nothing any more, and holds all that was sent
        _taken.pop(id(ticket), None)


def take(watchdog: Watchdog, model: str) -> Ticket | None:
    """Find the ticket that covers a request to ``model`` that is about to be sent here, and let it cover no other."""
    for frame in covering(watchdog):
        ticket: Ticket = frame.covered
        call = ticket.call
        if ticket.is_open and isinstance(call, LLMCall) and _is_same(call.model, model):
            mark = object()
            _make_room()
            # One operation: of two threads that see the same ticket, one gets it.
            if _taken.setdefault(id(ticket), (ticket, mark))[1] is mark:
                return ticket
    return None


def give_back(ticket: Ticket) -> None:
    """Let ``ticket`` cover another request: the one that was taken for it was refused unbilled, and may be repeated."""
    _taken.pop(id(ticket), None)


def _is_same(told: str, sent: str) -> bool:
    # Frameworks put the provider before the name (openai/gpt-4o), and some leave it there for a gateway.
    return told == sent or told.endswith(f"/{sent}") or sent.endswith(f"/{told}")


def _make_room() -> None:
    if len(_taken) > _SWEEP:
        for key, entry in list(_taken.items()):
            if not entry[0].is_open:
                _taken.pop(key, None)
