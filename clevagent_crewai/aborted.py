"""The exception type that CrewAI lets pass: neither swallowed, as other exceptions of hooks are, nor answered by a retry of the task.

Checked with crewai 1.15.19 and 1.15.30: agents, tasks, converters, guardrails and flows let a ``HookAborted`` through.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from crewai.hooks.dispatch import HookAborted

from clevagent_core.errors import ClevAgentError, Stopped, passing
from clevagent_core.frames import frame_of
from clevagent_core.interrupts import is_interrupt
from clevagent_core.verdicts import Incident
from clevagent_crewai.caches import cache

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")


class CrewAborted(HookAborted):
    """What ClevAgent raises inside CrewAI is this, too."""

    def __init__(self, reason: str = "", source: object = None) -> None:
        """Take what CrewAI's own takes. An error of ours that is this, too, is made by the constructor of the other."""
        Exception.__init__(self, reason)
        self.source = source

    source: object = None
    """Which hook raised it; filled in by CrewAI."""

    @property
    def reason(self) -> str:  # type: ignore[override]  # CrewAI only reads it
        """Why, in sentences."""
        return str(self)


@cache
def aborting(outer: type[BaseException] | None) -> type[BaseException]:
    """Give the type to raise through a crew, inside a framework that lets ``outer`` pass."""
    if outer is None or issubclass(outer, CrewAborted):
        return outer or CrewAborted
    return type(CrewAborted.__name__, (CrewAborted, outer), {"__module__": __name__})


def aborted_by(error: Exception, watchdog: Watchdog) -> Exception:
    """Give what to raise through a crew when a call could not even be asked for: it must not be made, and not be tried again.

    A mistake of the user's (a price that is unknown), and what a signal handler raised, stays the error that it is; a bug of ours becomes
    ``Stopped``.
    """
    if isinstance(error, HookAborted) or is_interrupt(error):
        return error
    if isinstance(error, ClevAgentError):
        through = _through_crews(type(error))(*error.args)
        through.__cause__ = error.__cause__
        return through
    logger.error("ClevAgent could not check a call, so it was not made.", exc_info=error)
    stop = passing(Stopped, CrewAborted)(
        Incident(
            kind="guard",
            message=(
                f"ClevAgent could not check a call ({error!r}), so it was refused before it was made. This is a bug of ClevAgent's: please "
                "report it with what the log says."
            ),
            agent=watchdog.settings.agent,
            run_id=watchdog.current_run().run_id,
            at=watchdog.clock.wall(),
            action="raise",
            details={"error": repr(error)},
        )
    )
    stop.__cause__ = error
    return stop


@cache
def _through_crews(kind: type[ClevAgentError]) -> type[ClevAgentError]:
    def reduce(self: ClevAgentError) -> tuple[object, tuple[object, ...]]:
        return kind, self.args

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__reduce__": reduce}
    return type(kind.__name__, (kind, CrewAborted), body)


def through_crews(watchdog: Watchdog) -> type[BaseException]:
    """Give the type that CrewAI lets pass, and the framework around it, for what ``watchdog`` refuses here."""
    frame = frame_of(watchdog)
    return aborting(None if frame is None else frame.through)
