"""Commands: what the monitor asks of an agent, in its answer to a beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COMMANDS = ("stop", "pause", "resume")
"""Every command there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of the monitor."""

    id: str
    """By which it is known when it is repeated."""
    command: Literal["stop", "pause", "resume"]
    """``stop`` refuses every later call; ``pause`` makes them wait; ``resume`` ends both."""
    by: str = ""
    """Who gave it."""
    reason: str = ""
    """Why."""
    run_id: str | None = None
    """The run that is meant; ``None``: the whole agent."""
