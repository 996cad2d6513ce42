"""What a heartbeat says: the amounts since the beat before, the totals of this boot, and how long ago the last step was.

A beat is fixed once it has its number: ``(boot_id, seq)`` makes a repeat harmless. Totals are cumulative, so a beat that is lost
loses no money. The fields of :class:`Beat` are the whole list of what leaves the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

_PICO_PER_USD = 10**12

BeatKind = Literal["liveness", "crash", "stall", "shutdown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What was used and done: since the beat before, or since this boot began."""

    input_tokens: int = 0
    """Input tokens of settled model calls, cached ones included."""
    output_tokens: int = 0
    """Output tokens of settled model calls, reasoning included."""
    cost_pico: int = 0
    """What it did cost, in pico-USD ($1 = 10^12), with what was charged at its upper bound. On the wire ``cost_usd``, in US dollars."""
    llm_calls: int = 0
    """Model calls that were settled or charged."""
    tool_calls: int = 0
    """Tool calls."""
    steps: int = 0
    """Signs of progress: finished calls, nodes and tasks, and pings."""
    loops: int = 0
    """Loops that were found."""
    refusals: int = 0
    """Calls that a guard refused."""

    @property
    def tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens

    @property
    def cost_usd(self) -> float:
        """What it did cost, in US dollars."""
        return self.cost_pico / _PICO_PER_USD

    def since(self, told: Amounts) -> Amounts:
        """Give what came since ``told``; never negative: what a correction takes back is taken off what comes later."""
        return Amounts(**{name: max(0, value - getattr(told, name)) for name, value in asdict(self).items()})

    def __add__(self, other: Amounts) -> Amounts:
        """Add both."""
        return Amounts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


INCIDENT_FIELDS = (
    "kind", "message", "run_id", "at", "action", "budget", "key", "window", "unit", "spent", "held", "needed", "ceiling", "details",
)  # fmt: skip
"""The fields of an incident that are sent."""

_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One heartbeat. Never changes once it is made."""

    agent: str
    """The watched agent's name."""
    boot_id: str
    """Which process this is: new for each start, and for each forked child."""
    seq: int
    """The number of the beat in this boot, from 1. With ``boot_id`` it tells a repeat."""
    sent_at: float
    """When it was made, in seconds since 1970 (UTC); the same however late it arrives."""
    kind: BeatKind = "liveness"
    """Why it was made: ``liveness`` (time for it, or something to tell at once), ``crash`` (an exception that nobody caught), ``stall`` (the
    process is about to end itself because it is stuck), ``shutdown`` (the last one: this process ends as it should)."""
    status: str = "ok"
    """``ok``, ``warning``, ``error``, ``shutdown``, or the user's own word of the latest ``ping()``."""
    message: str = ""
    """The message of the latest ``ping()``."""
    run_id: str | None = None
    """The run that moved last."""
    progress_age_s: float | None = None
    """How many seconds ago the last step was; ``None`` before the first."""
    interval_s: float = 30.0
    """How many seconds after this beat the next one comes at the latest."""
    amounts: Amounts = field(default_factory=Amounts)
    """What came since the beat before. On the wire ``tokens_used``, ``cost_usd``, ``tool_calls``, ``llm_calls``, ``steps``, ``loops``,
    ``refusals``."""
    totals: Amounts = field(default_factory=Amounts)
    """What came since this boot began. On the wire an object with the names of ``Amounts``, and ``tokens``."""
    dropped: int = 0
    """How many beats of this boot were lost on the way so far: what they said is in ``totals`` all the same."""
    iteration_count: int | None = None
    """How far a loop of the user's is, by ``ping()`` or ``log_iteration()``."""
    memory_mb: float | None = None
    """Resident memory of the process in megabytes, or what the latest ``ping()`` said."""
    incidents: Sequence[Mapping[str, object]] = ()
    """What went wrong since the beat before: the fields of ``Incident``."""
    meta: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    """What the latest ``ping()`` gave in ``custom`` and ``meta``."""
    host: str = ""
    """The machine's name."""
    pid: int = 0
    """The process's id."""

    def to_wire(self) -> dict[str, Any]:
        """Give the JSON object that is sent."""
        amounts, totals = self.amounts, self.totals
        return {
            "agent": self.agent,
            "status": self.status,
            "message": self.message,
            "tokens_used": amounts.tokens,
            "cost_usd": amounts.cost_usd,
            "tool_calls": amounts.tool_calls,
            "llm_calls": amounts.llm_calls,
            "steps": amounts.steps,
            "loops": amounts.loops,
            "refusals": amounts.refusals,
            "iteration_count": self.iteration_count,
            "memory_mb": self.memory_mb,
            "meta": dict(self.meta),
            "run_id": self.run_id,
            "boot_id": self.boot_id,
            "seq": self.seq,
            "sent_at": self.sent_at,
            "kind": self.kind,
            "progress_age_s": self.progress_age_s,
            "interval_s": self.interval_s,
            "totals": {
                "tokens": totals.tokens,
                "input_tokens": totals.input_tokens,
                "output_tokens": totals.output_tokens,
                "cost_usd": totals.cost_usd,
                "llm_calls": totals.llm_calls,
                "tool_calls": totals.tool_calls,
                "steps": totals.steps,
                "loops": totals.loops,
                "refusals": totals.refusals,
            },
            "dropped": self.dropped,
            "incidents": [dict(incident) for incident in self.incidents],
            "host": self.host,
            "pid": self.pid,
        }
