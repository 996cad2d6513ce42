"""Watchdogs of a test's own, whose beats are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clevagent import Beat, Incident, Price, Watchdog, hookimpl
from clevagent.testing import FakeClock

Make = Callable[..., Watchdog]


class Listener:
    """An observer that keeps the beats and the incidents it is told."""

    def __init__(self) -> None:
        self.beats: list[Beat] = []
        self.incidents: list[Incident] = []

    @hookimpl
    def clevagent_beat(self, beat: Beat) -> None:
        self.beats.append(beat)

    @hookimpl
    def clevagent_incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def of_kind(self, kind: str) -> list[Incident]:
        return [incident for incident in self.incidents if incident.kind == kind]


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def make(clock: FakeClock, listener: Listener) -> Iterator[Make]:
    """Make watchdogs that the listener hears, and that know one model, ``cent``: each output token costs one cent."""
    made: list[Watchdog] = []

    def make(**settings: Any) -> Watchdog:
        prices = {"cent": Price(input=0, output=10_000, context_window=1000)}
        plugins = [listener, *settings.pop("plugins", ())]
        made.append(Watchdog(**{"clock": clock, "prices": prices, "wait_s": 0, "plugins": plugins, **settings}))
        return made[-1]

    yield make
    for watchdog in made:
        watchdog.shutdown()
