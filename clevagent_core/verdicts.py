"""What guards answer (``None``, :class:`Warn`, :class:`Stop`) and what observers hear (:class:`Incident`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["usd", "tokens", "input_tokens", "output_tokens", "llm_calls", "tool_calls"]
"""What a limit counts. Tokens are input and output together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Something that is wrong, with the numbers it rests on. Plain data: it can be pickled and sent."""

    kind: str
    """What is wrong: ``budget`` (refused), ``busy``, ``budget_warning``, ``idle_budget`` (it has covered no call of a run that is over),
    ``overshoot``, ``assumption``, ``loop``, ``guard`` (a guard of ours or of a plugin failed), ``ledger`` (it cannot be used), ``usage`` (a
    provider's report cannot be true), ``thread`` (nobody can tell whose a call is), ``stall``, ``spike``, ``crash`` (an exception that
    nobody caught), ``remote`` and ``paused`` (asked for from outside), or a plugin's own word."""
    message: str
    """What happened, what it means and what to do, in sentences."""
    agent: str = ""
    """The watched agent's name."""
    run_id: str = ""
    """The run it happened in."""
    at: float = 0.0
    """When, in seconds since 1970 (UTC)."""
    action: str = "warn"
    """What was done: ``raise``, ``warn``, ``dry_run`` (would have been stopped); ``halt`` or ``ask``, where the budget says so and a
    framework can end gracefully."""
    budget: str | None = None
    """The budget's name."""
    key: str | None = None
    """Whose account of that budget: the run's id, the thread's, the tag's value."""
    window: str | None = None
    """The window of that account, for example ``2026-11-23``."""
    unit: Unit | Literal["seconds"] | None = None
    """What the limit counts; the four amounts below are in it (US dollars for ``usd``)."""
    spent: float | None = None
    """Settled so far."""
    held: float | None = None
    """Held by calls in flight."""
    needed: float | None = None
    """What the call could have cost at most."""
    ceiling: float | None = None
    """The ceiling."""
    details: dict[str, object] = field(default_factory=dict)
    """What else a guard knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warn:
    """The call goes on; observers are told why it looks wrong."""

    incident: Incident


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The call must not be sent. Only ``Run`` turns this into an exception."""

    incident: Incident
    """Why. ``kind`` ``budget`` is raised as ``BudgetExceeded``, ``busy`` as ``BudgetBusy``, anything else as ``Stopped``."""


Verdict = Warn | Stop | None
