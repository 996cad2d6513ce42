"""What a scene of the demo came to, and how it is judged. Amounts are pico-USD."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Means = Literal["ceiling", "loop"]
"""What stops an agent: the ceiling of a budget, or the loop guard."""
Verdict = Literal["held", "PASSED", "DISAGREES", "NOTHING SENT", "NOT STOPPED"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What the provider received, and what it bills for that."""

    billed_pico: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedAct:
    """What ClevAgent says of the guarded act, once all of it is over."""

    ledger_pico: int
    """What the guard's own account has spent."""
    refused: int
    """Requests that were refused before they were sent, each repetition counted."""
    stopped_by: Means | None
    """What has stopped the work; ``None`` if nothing did."""
    held_pico: int = 0
    """What the account still holds, for calls that nobody makes any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneResult:
    """One scene, played twice: without a guard, and guarded by its ceiling."""

    title: str
    ceiling_pico: int
    tells_usage: bool
    """Whether the provider tells what each call used; if not, the ledger charges what a call can cost at most."""
    means: Means
    """What was to stop it."""
    unguarded: Bill
    guarded: Bill
    act: GuardedAct

    @property
    def overshoot_pico(self) -> int:
        """How much the provider billed past the ceiling; 0 when it held."""
        return max(0, self.guarded.billed_pico - self.ceiling_pico)

    @property
    def unguarded_share(self) -> float:
        """How many times the ceiling was billed without a guard."""
        return self.unguarded.billed_pico / self.ceiling_pico

    @property
    def agrees(self) -> bool:
        """Whether the ledger agrees with the bill: equal where usage is told; else never below it, nor above the ceiling.

        What is still held for calls that are over would be wrong in either case.
        """
        if self.act.held_pico:
            return False
        if self.tells_usage:
            return self.act.ledger_pico == self.guarded.billed_pico
        return self.guarded.billed_pico <= self.act.ledger_pico <= self.ceiling_pico

    @property
    def verdict(self) -> Verdict:
        """The scene in a word. To refuse everything is no way to hold a ceiling, and to be stopped by chance is none either."""
        if self.overshoot_pico:
            return "PASSED"
        if not self.agrees:
            return "DISAGREES"
        if not self.guarded.requests:
            return "NOTHING SENT"
        return "held" if self.act.stopped_by == self.means else "NOT STOPPED"


def exit_code(results: Iterable[SceneResult]) -> int:
    """Give 0 if every agent was stopped by what should, no ceiling was passed and every ledger agrees with the bill, else 1."""
    return 0 if all(result.verdict == "held" for result in results) else 1
