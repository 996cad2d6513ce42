"""The agent's own past: what its runs usually cost, and what its beats usually have.

Robust, so that one runaway does not become the rule: the median, and the median distance from it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from clevagent_core.interrupts import is_interrupt

if TYPE_CHECKING:
    from clevagent_core.clock import Clock
    from clevagent_core.ledger.account import Ledger

logger = logging.getLogger("clevagent")

LEARNING = 10
"""From how many samples on there is a baseline."""
KEPT = 100
"""How many samples are kept of a series: the latest."""
_FRESH_S = 60.0
"""How long samples are taken as read: other processes may have added some to a ledger that they share."""
_MOST = 2**63 - 1
"""What a ledger can hold; nothing is usual above that."""
SERIES = ("run_cost", "beat_tokens")
"""What is remembered: pico-USD of a whole run, tokens of one beat."""


class Baseline(NamedTuple):
    """What is usual. Amounts are in the unit of the series."""

    median: float
    spread: float
    """1.4826 times the median absolute deviation, which for normal samples estimates their standard deviation (Rousseeuw and Croux,
    Journal of the American Statistical Association 88, 1993)."""
    samples: int

    def limit(self, multiple: float, floor: int) -> int:
        """Give the amount that is ``multiple`` times the usual: of the median, or of the spread above it where that is more; at least ``floor``."""
        return max(int(multiple * self.median), int(self.median + multiple * self.spread), floor)


def baseline_of(values: list[int]) -> Baseline | None:
    """Work out the baseline of samples; ``None`` while there are too few."""
    if len(values) < LEARNING:
        return None
    middle = median(values)
    return Baseline(float(middle), 1.4826 * median(abs(value - middle) for value in values), len(values))


class Baselines:
    """The baselines of one agent, kept in its ledger. Safe from any thread. Fails open: what cannot be read is not known."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        """Read nothing yet."""
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.RLock()
        self._known: dict[str, tuple[float, Baseline | None]] = {}
        self._told: dict[str, Baseline] = {}

    def of(self, series: str) -> Baseline | None:
        """Give what is usual: by the agent's own samples, or while those are too few by what the monitor told."""
        now = self._clock.monotonic()
        with self._lock:
            known = self._known.get(series)
            if known is None or now >= known[0]:
                known = self._known[series] = now + _FRESH_S, self._read(series)
            return known[1] or self._told.get(series)

    def remember(self, series: str, value: int) -> None:
        """Add a sample."""
        try:
            self._ledger.remember(series, value, self._clock.wall())
        except Exception as error:  # whose code: the ledger's; a baseline is an observation, and stops nothing
            if is_interrupt(error):
                raise
            logger.warning("A sample of %s could not be kept, so the baseline does not know it.", series, exc_info=True)
        with self._lock:
            self._known.pop(series, None)

    def tell(self, given: object) -> None:
        """Take what the monitor says is usual: ``{"run_cost": {"median": ..., "spread": ..., "samples": ...}}``, money in pico-USD."""
        if not isinstance(given, Mapping):
            return
        for series in SERIES:
            found: Any = given.get(series)
            try:
                baseline = Baseline(float(found["median"]), float(found["spread"]), int(found["samples"]))
            except (TypeError, KeyError, ValueError, OverflowError):
                continue
            if baseline.samples >= LEARNING and 0 <= baseline.median <= _MOST and 0 <= baseline.spread <= _MOST:
                self._told[series] = baseline

    def after_fork(self) -> None:
        """Be usable in a forked child: a thread of the parent may have held the lock."""
        self._lock = threading.RLock()

    def _read(self, series: str) -> Baseline | None:
        try:
            return baseline_of(self._ledger.samples(series))
        except Exception as error:  # whose code: as above
            if is_interrupt(error):
                raise
            logger.warning("The samples of %s cannot be read, so there is no baseline.", series, exc_info=True)
            return None
