"""Watchdogs of a test's own, with a model whose prices are easy to reckon with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clevagent import LLMCall, Price, Run, Usage, Watchdog, hookimpl
from clevagent.testing import FakeClock

Make = Callable[..., Watchdog]


@pytest.fixture
def make(clock: FakeClock) -> Iterator[Make]:
    """Make watchdogs that know one model, ``cent``: input is free, and each output token costs one cent."""
    made: list[Watchdog] = []

    def make(**settings: Any) -> Watchdog:
        prices = {"cent": Price(input=0, output=10_000, context_window=1000), "even": Price(input=1, output=1)}
        made.append(Watchdog(**{"clock": clock, "prices": prices, "wait_s": 0, **settings}))
        return made[-1]

    yield make
    for watchdog in made:
        watchdog.shutdown()


class Heard:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.incidents: list[Any] = []
        self.settled: list[Any] = []
        self.failed: list[Any] = []
        self.steps: list[Any] = []
        self.started: list[Any] = []
        self.ended: list[Any] = []

    @property
    def kinds(self) -> list[str]:
        return [incident.kind for incident in self.incidents]

    @hookimpl
    def clevagent_incident(self, incident):
        self.incidents.append(incident)

    @hookimpl
    def clevagent_call_settled(self, run, call, outcome):
        self.settled.append((call, outcome))

    @hookimpl
    def clevagent_call_failed(self, run, call, outcome):
        self.failed.append((call, outcome))

    @hookimpl
    def clevagent_step(self, run, step):
        self.steps.append(step)

    @hookimpl
    def clevagent_run_started(self, run):
        self.started.append(run)

    @hookimpl
    def clevagent_run_ended(self, run, summary):
        self.ended.append(summary)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def llm() -> Callable[..., LLMCall]:
    """Make calls that may write so many tokens: as many cents."""

    def llm(tokens: int | None = 1, *, model: str = "cent", **fields: Any) -> LLMCall:
        return LLMCall(model=model, input=["hello"], max_output_tokens=tokens, **fields)

    return llm


@pytest.fixture
def spend(llm: Callable[..., LLMCall]) -> Callable[..., None]:
    """Make a call that costs so many cents, in a run."""

    def spend(run: Run, cents: int = 1, **fields: Any) -> None:
        run.open(llm(cents, **fields)).settle(Usage(input_tokens=1, output_tokens=cents))

    return spend
