"""Every error that ClevAgent raises.

ClevAgentError
├── Stopped (RuntimeError)     a guard stopped this call; nothing was sent
│   ├── BudgetExceeded         the money, tokens or calls of a budget are used up
│   │   └── BudgetBusy         what is left is only held by calls in flight: try again later
│   ├── LoopDetected           the run repeats itself without anything new
│   └── RemoteStop             somebody stopped the agent from outside
├── UsageError                 a mistake in how ClevAgent is used
├── LedgerError                what is spent cannot be counted: the ledger's file cannot be read or written
├── DeliveryError              the monitor did not take a heartbeat; never leaves the sender
└── PluginError                a named plugin is broken

``Stopped`` is a ``RuntimeError`` because LangGraph's default retry policy repeats other exceptions. No message contains
the words by which frameworks recognise a provider's own errors (they would retry the call).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clevagent_core.verdicts import Incident


class ClevAgentError(Exception):
    """Base of every error of ClevAgent."""


class Stopped(ClevAgentError, RuntimeError):
    """A guard stopped this call before it was sent.

    Attributes:
        incident: what happened, with the numbers it rests on.
        run_id: the run that was stopped.

    """

    def __init__(self, incident: Incident) -> None:
        """Keep the incident; its message is the error's text."""
        super().__init__(incident.message)
        self.incident = incident
        self.run_id = incident.run_id

    def __reduce__(self) -> tuple[type[Stopped], tuple[Incident]]:
        """Survive pickling with all fields: the default would pass the text where the incident belongs."""
        return type(self), (self.incident,)


def passing(kind: type[Stopped], through: type[BaseException]) -> type[Stopped]:
    """Make the subclass of ``kind`` that is also ``through``: the exception type that a framework neither retries nor swallows.

    It is named, caught and pickled like ``kind``; in another process it is of this type again if the framework is there.
    """
    found = _passing.get((kind, through))
    if found is not None:
        return found

    def reduce(self: Stopped) -> tuple[object, tuple[object, ...]]:
        return _stopped, (kind, through.__module__, through.__qualname__, self.incident)

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__reduce__": reduce}
    return _passing.setdefault((kind, through), type(kind.__name__, (kind, through), body))


_passing: dict[tuple[type[Stopped], type[BaseException]], type[Stopped]] = {}


def _stopped(kind: type[Stopped], module: str, name: str, incident: Incident) -> Stopped:
    through = getattr(sys.modules.get(module), name, None)
    return (passing(kind, through) if through is not None else kind)(incident)


class BudgetExceeded(Stopped):
    """A budget has no room for this call. ``reason`` says whether any later one has.

    Amounts are in the limit's own unit (``incident.unit``): US dollars, tokens or calls.
    """

    @property
    def reason(self) -> str:
        """Why it was refused.

        - ``exhausted``: what is left is too little for it, or its time is over. The run is stopped until the ceiling is raised.
        - ``latched``: an earlier call of the run was refused as exhausted; whoever swallowed that gets nowhere.
        - ``too_large``: it alone is larger than the whole ceiling. Nothing else is stopped: a smaller one may go on.
        - ``busy``: the room is only held by calls in flight (``BudgetBusy``).
        - ``run_over``: it was made in a run that has ended, whose budgets it would escape.
        - ``unattributed``: nobody can tell which of the active runs it belongs to, and one of them has a budget.
        """
        return str(self.incident.details.get("reason", "exhausted"))

    @property
    def resets_at(self) -> float | None:
        """When the budget starts from zero, in seconds since 1970 (UTC); ``None`` where no calendar ends its window."""
        at = self.incident.details.get("resets_at")
        return float(at) if isinstance(at, (int, float)) else None

    @property
    def retry_after_s(self) -> float | None:
        """How many seconds after the refusal that is; ``None`` too where it would not help, or need not be waited for."""
        at = self.resets_at
        return max(0.0, at - self.incident.at) if at is not None and self.reason in {"exhausted", "latched"} else None

    @property
    def budget(self) -> str:
        """The budget's name."""
        return self.incident.budget or ""

    @property
    def spent(self) -> float:
        """What was spent when the call was refused."""
        return self.incident.spent or 0

    @property
    def held(self) -> float:
        """What calls in flight held when the call was refused."""
        return self.incident.held or 0

    @property
    def needed(self) -> float:
        """What the refused call could have cost at most."""
        return self.incident.needed or 0

    @property
    def ceiling(self) -> float:
        """The ceiling that the call would have passed."""
        return self.incident.ceiling or 0


class BudgetBusy(BudgetExceeded):
    """What is left of a budget is held by calls in flight; the same call may fit once they are settled."""

    @property
    def reason(self) -> str:
        """``busy``."""
        return "busy"


class LoopDetected(Stopped):
    """The run repeats itself and nothing new comes of it. Every later call of the run is refused, until ``run.forgive_loops()``.

    Its incident tells in ``details`` the ``period`` (how many calls one round has), how many ``times``, ``since`` when (seconds since
    1970), the ``calls`` of one round, the ``rule`` that found it, and ``cost_usd``, what the run has cost since it began.
    """


class RemoteStop(Stopped):
    """Somebody stopped or paused the agent through the monitor; no call is sent until it is resumed there."""

    @property
    def by(self) -> str:
        """Who did it, as the monitor tells it."""
        return str(self.incident.details.get("by", ""))

    @property
    def reason(self) -> str:
        """Why, in their words."""
        return str(self.incident.details.get("reason", ""))


class DeliveryError(ClevAgentError):
    """A heartbeat could not be delivered. Kept inside the sender, which logs it: the agent never sees it.

    Attributes:
        permanent: whether sending the same again is of no use.
        retry_after_s: how many seconds the receiver asked to wait.

    """

    def __init__(self, message: str, *, permanent: bool, retry_after_s: float | None = None) -> None:
        """Keep what decides whether it is tried again."""
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        """Survive pickling with all fields."""
        return _delivery_error, (str(self), self.permanent, self.retry_after_s)


def _delivery_error(message: str, permanent: bool, retry_after_s: float | None) -> DeliveryError:  # noqa: FBT001 - for pickle
    return DeliveryError(message, permanent=permanent, retry_after_s=retry_after_s)


class UsageError(ClevAgentError):
    """A mistake in how ClevAgent is used. The message tells what happened, what it means and what to do."""


class LedgerError(ClevAgentError):
    """What is spent cannot be counted, because the ledger cannot be read or written; so no call is let through.

    The message tells what is wrong with the file, and what to do. The same call may be tried again once that is done.
    """


class PluginError(ClevAgentError):
    """A plugin that was asked for by name is broken."""
