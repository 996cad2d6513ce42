"""The remote guard: refuses calls, or lets them wait, because somebody stopped or paused the agent from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_core.calls import Call
    from clevagent_core.runs import Run
    from clevagent_core.verdicts import Stop


class RemoteGuard:
    """Answers by what the monitor asked for last: see :class:`clevagent_core.control.Control`."""

    fails_closed = True

    @hookimpl
    def clevagent_before_call(self, run: Run, call: Call) -> Stop | None:  # noqa: ARG002 - hot hooks take all arguments
        """Refuse the call where its run, or the whole agent, was stopped or paused."""
        return run.watchdog.control.verdict(run)


def plugin() -> RemoteGuard:
    """Make the built-in plugin of this module."""
    return RemoteGuard()
