"""The spike guard: tells when a run, or a beat, is far above what is usual for this agent. ``Budget(baseline_multiple=...)`` stops.

It looks at every beat and at the end of every run, so it costs calls nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clevagent_core.baselines import Baseline
from clevagent_core.hookspecs import hookimpl
from clevagent_core.money import PICO_PER_USD, format_usd
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.summaries import RunSummary
    from clevagent_core.watchdog import Watchdog
    from clevagent_wire.beats import Beat

MULTIPLE = 5
"""How many times the usual is told."""
RUN_FLOOR = PICO_PER_USD // 20
"""Below five cents no run is a spike, and no ceiling by a baseline is lower."""
BEAT_FLOOR = 10_000
"""Below so many tokens no beat is."""


class SpikeGuard:
    """Compares what runs cost, and how many tokens beats have, with the agent's own past, and adds to it."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._watchdog: Watchdog | None = None
        self._told: set[Run] = set()

    @hookimpl
    def clevagent_configure(self, watchdog: Watchdog) -> None:
        """Know whose past it is."""
        self._watchdog = watchdog

    @hookimpl
    def clevagent_beat(self, beat: Beat) -> None:
        """Look at the runs that go on, and at the beat."""
        watchdog = self._watchdog
        if watchdog is None:
            return  # plugins are configured one by one: beats may begin before this one is
        for run in watchdog.roots():
            self._look(run, watchdog)
        tokens = beat.amounts.tokens
        if not tokens:
            return
        baselines = watchdog.baselines
        usual = baselines.of("beat_tokens")
        if usual is not None and tokens > usual.limit(MULTIPLE, BEAT_FLOOR):
            limit = usual.limit(MULTIPLE, BEAT_FLOOR)
            what = f"{tokens:,} tokens were used within {beat.interval_s:g} s, and {usual.median:,.0f} are usual (median of {usual.samples} such times)"
            self._tell("beat_tokens", what, tokens, usual, limit, watchdog.process_run, "Budget(tokens=..., per='hour')")
        baselines.remember("beat_tokens", tokens)

    @hookimpl
    def clevagent_run_ended(self, run: Run, summary: RunSummary) -> None:
        """Compare the run, and add it to the past, however it ended: of a hundred runs, those that were stopped do not move the median."""
        watchdog = run.watchdog
        if run.parent is None and run is not watchdog.process_run and summary.total.calls:
            self._look(run, watchdog)
            watchdog.baselines.remember("run_cost", run.cost_pico)
        self._told.discard(run)

    def _look(self, run: Run, watchdog: Watchdog) -> None:
        if run is watchdog.process_run or run in self._told or run.cost_pico <= RUN_FLOOR:
            return
        usual = watchdog.baselines.of("run_cost")
        if usual is None or run.cost_pico <= usual.limit(MULTIPLE, RUN_FLOOR):
            return
        self._told.add(run)
        limit = usual.limit(MULTIPLE, RUN_FLOOR)
        what = f"The run has cost {format_usd(run.cost_pico)}, and {format_usd(int(usual.median))} is usual (median of {usual.samples} runs)"
        self._tell("run_cost", what, run.cost_pico, usual, limit, run, f"Budget(baseline_multiple={MULTIPLE})")

    def _tell(self, series: str, what: str, value: int, usual: Baseline, limit: int, run: Run, advice: str) -> None:
        watchdog = run.watchdog
        watchdog.tell(
            Incident(
                kind="spike",
                message=f"{what}. That is more than {MULTIPLE} times as much. Nothing was stopped; {advice} stops it.",
                agent=watchdog.settings.agent,
                run_id=run.run_id,
                at=watchdog.clock.wall(),
                details={
                    "series": series,
                    "value": value,
                    "median": usual.median,
                    "spread": usual.spread,
                    "samples": usual.samples,
                    "limit": limit,
                    "multiple": MULTIPLE,
                },
            )
        )


def plugin() -> SpikeGuard:
    """Make the built-in plugin of this module."""
    return SpikeGuard()
