"""The promise, with real SDKs and a provider that bills: what is billed never passes the ceiling, and what fits is let through.

Every way is tried 50 times against a ceiling that fits 10 calls. The provider bills one token for each byte and the whole output
limit, so a call costs what it reserves, but for the few tokens that are added to each message.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from decimal import Decimal

import pytest
from crewai import Agent, Crew, Process, Task

import clevagent
from clevagent import Budget
from clevagent.testing import Reply
from clevagent_core.money import PICO_PER_USD
from clevagent_providers import failures

TRIES, FITS = 50, 10
PROMPT = "Write me a poem about the sea and the moon. " * 10
LIMIT = 400


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr(failures, "wait_before_retry", lambda *_: 0.01)


class Setting:
    """A ceiling that fits ten calls, and what has to be true afterwards."""

    def __init__(self, provider, one):
        self.provider, self.one = provider, one
        self.watchdog = clevagent.init(wait_s=20)

    @property
    def ceiling(self):
        return FITS * self.one + self.one // 10

    @contextmanager
    def run(self):
        with clevagent.run(budgets=[Budget(usd=Decimal(self.ceiling) / PICO_PER_USD, name="ceiling")]) as run:
            yield run
        summary = run.summary()
        recorded = round(summary.total.cost_usd * PICO_PER_USD)
        assert self.provider.billed_pico <= recorded <= self.ceiling
        assert summary.overshoot_usd == 0
        assert self.watchdog.ledger.holds() == []
        if not summary.calls_charged_at_bound:
            assert recorded == self.provider.billed_pico

    @property
    def utilisation(self):
        return self.provider.billed_pico / self.ceiling


def swallow(call):
    try:
        return call()
    except Exception:  # what careless callers do
        return None


async def aswallow(awaitable):
    try:
        return await awaitable
    except Exception:  # what careless callers do
        return None


def in_threads(call):
    threads = [threading.Thread(target=swallow, args=(call,)) for _ in range(TRIES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- models that are called directly --------------------------------------------------------------------------------------


def sequential(model, aio):
    for _ in range(TRIES):
        swallow(lambda: model.call(PROMPT))


def threads(model, aio):
    in_threads(lambda: model.call(PROMPT))


def tasks(model, aio):
    async def main():
        await asyncio.gather(*(aswallow(model.acall(PROMPT)) for _ in range(TRIES)))

    aio(main())


@pytest.fixture(params=["openai", "anthropic", "litellm", "custom"])
def kind(request):
    return request.param


@pytest.fixture(params=[LIMIT, None], ids=["limit_set", "limit_unset"])
def direct(request, kind, llm, provider):
    if kind == "custom" and request.param is None:
        pytest.skip("how a model of the user's own takes a limit is not known")
    rates = (3_000_000, 15_000_000) if kind == "anthropic" else (2_500_000, 10_000_000)
    setting = Setting(provider, len(PROMPT) * rates[0] + (request.param or 4096) * rates[1])
    setting.make = lambda **kw: llm(kind, **({"max_tokens": request.param} if request.param else {}), **kw)
    return setting


@pytest.mark.parametrize("call", [sequential, threads, tasks], ids=lambda call: call.__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_models(direct, kind, call, aio, stream):
    if kind == "custom" and stream:
        pytest.skip("it does not stream")
    with direct.run():
        call(clevagent.guard(direct.make(**({"stream": True} if stream else {}))), aio)
    assert direct.utilisation >= 0.9


@pytest.mark.parametrize(
    "fault",
    [Reply(drop="before"), Reply(drop="middle"), Reply(status=429), Reply(status=500)],
    ids=["drop", "middle", "429", "500"],
)
@pytest.mark.parametrize("call", [threads, tasks], ids=lambda call: call.__name__)
def test_models_whose_requests_fail_now_and_then(direct, kind, call, aio, fault, fast_retries, monkeypatch):
    if importlib.util.find_spec("crewai.llms.retry") is not None:
        monkeypatch.setattr("crewai.llms.retry.get_retry_delay_seconds", lambda **kw: 0.01)
    direct.provider.reset([fault, Reply(), fault, fault, Reply()] * 100)
    with direct.run():
        call(clevagent.guard(direct.make()), aio)
    assert direct.provider.billed_pico > 0.3 * direct.ceiling


# -- crews ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_task(llm):
    """Make a crew that makes one call."""

    def make(**kw):
        agent = Agent(role="writer", goal="help", backstory="old", llm=llm(max_tokens=LIMIT))
        return Crew(agents=[agent], tasks=[Task(description=PROMPT, expected_output="text", agent=agent)], **kw)

    return make


@pytest.fixture
def crews(provider, one_task):
    one_task().kickoff()
    setting = Setting(provider, provider.billed_pico)
    provider.reset()
    return setting


def kicked_off_one_by_one(make, aio):
    guarded = clevagent.guard(make())
    for _ in range(TRIES):
        swallow(guarded.kickoff)


def kicked_off_in_threads(make, aio):
    in_threads(lambda: clevagent.guard(make()).kickoff())


def akicked_off(make, aio):
    async def main():
        await asyncio.gather(*(aswallow(clevagent.guard(make()).akickoff()) for _ in range(TRIES)))

    aio(main())


def for_each(make, aio):
    swallow(lambda: clevagent.guard(make()).kickoff_for_each(inputs=[{}] * TRIES))


def for_each_at_once(make, aio):
    aio(aswallow(clevagent.guard(make()).kickoff_for_each_async(inputs=[{}] * TRIES)))


def afor_each(make, aio):
    aio(aswallow(clevagent.guard(make()).akickoff_for_each(inputs=[{}] * TRIES)))


def streams_that_are_broken_off(make, aio):
    guarded = clevagent.guard(make(stream=True))

    def one():
        stream = guarded.kickoff()
        for _ in stream:
            break
        stream.close()

    for _ in range(TRIES):
        swallow(one)


def halted(make, aio):
    guarded = clevagent.guard(make(), on_exceed="halt")
    for _ in range(TRIES):
        guarded.kickoff()


WAYS = [kicked_off_one_by_one, kicked_off_in_threads, akicked_off, for_each, for_each_at_once, afor_each, halted]


SLOW = {kicked_off_in_threads, akicked_off}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if way in SLOW else [], id=way.__name__) for way in WAYS]
)
def test_crews(crews, one_task, aio, way):
    with crews.run():
        way(one_task, aio)
    assert crews.utilisation >= 0.9


def test_streams_that_are_broken_off(crews, one_task, aio):
    crews.provider.reset([Reply(text="one two three four", chunks=4, chunk_delay_s=0.002)])
    with crews.run():
        streams_that_are_broken_off(one_task, aio)
    assert crews.utilisation >= 0.8


@pytest.mark.slow
def test_an_attached_crew_is_as_tight(crews, one_task, aio, provider):
    clevagent.shutdown()
    crews.watchdog = clevagent.init(attach=["crewai"], wait_s=20)
    with crews.run():
        in_threads(lambda: one_task().kickoff())
    assert crews.utilisation >= 0.9


def test_a_hierarchical_crew(provider, llm):
    """The manager delegates each time that it is asked; its prompt grows, so calls do not all cost the same."""

    def delegating(body):
        if any(tool["function"]["name"].startswith("delegate") for tool in body.get("tools", ())):
            arguments = {"task": PROMPT, "context": "none", "coworker": "writer"}
            return Reply(tool_calls=[("delegate_work_to_coworker", arguments)])
        return Reply()

    provider.reset(delegating)
    agent = Agent(role="writer", goal="help", backstory="old", llm=llm(max_tokens=LIMIT))
    task = Task(description=PROMPT, expected_output="text")
    guarded = clevagent.guard(
        Crew(agents=[agent], tasks=[task], process=Process.hierarchical, manager_llm=llm(max_tokens=LIMIT)), on_exceed="halt"
    )
    setting = Setting(provider, 9_000_000_000)
    with setting.run():
        assert not guarded.kickoff().is_complete
        for _ in range(4):
            guarded.kickoff()
    assert provider.request_count > 3
    assert setting.utilisation >= 0.9


@pytest.mark.slow
def test_processes_share_one_ceiling_in_a_file(provider, tmp_path):
    one = len(PROMPT) * 2_500_000 + LIMIT * 10_000_000
    script = textwrap.dedent(f"""
        import os
        os.environ.update(CREWAI_DISABLE_TELEMETRY="true", OTEL_SDK_DISABLED="true", CREWAI_DISABLE_VERSION_CHECK="true")
        import clevagent
        from crewai import LLM
        budget = clevagent.Budget(usd={(FITS * one + one // 10) / PICO_PER_USD!r}, per="day", name="ceiling")
        clevagent.init(ledger="sqlite:///{tmp_path}/ledger.db", budgets=[budget])
        model = clevagent.guard(LLM(model="openai/gpt-4o", api_key="test", base_url={provider.openai_url!r}, max_tokens={LIMIT}))
        for _ in range(20):
            try:
                model.call({PROMPT!r})
            except clevagent.BudgetExceeded:
                pass
    """)
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert provider.request_count == FITS
