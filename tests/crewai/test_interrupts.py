"""A soft time limit (an exception of a signal handler) that lands where a call of CrewAI's is opened: nothing stays held or broken."""

from __future__ import annotations

import signal

import pytest
from crewai.events import event_context

import clevagent
from clevagent import Budget, Watchdog
from clevagent.testing import Reply
from clevagent_crewai import models
from clevagent_crewai.calls import Call
from clevagent_providers import failures


class TimeLimitError(BaseException):
    """As a handler may raise that wants to be heard."""


def raises(signum, frame):
    raise TimeLimitError


@pytest.fixture
def fire():
    before = signal.signal(signal.SIGUSR1, raises)
    yield lambda: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def after(method, fire, nth):
    """Let the signal come in as the method has returned for the ``nth`` time."""
    calls = []

    def called(self):
        result = method(self)
        calls.append(result)
        if len(calls) == nth:
            fire()
        return result

    return called


@pytest.mark.parametrize("watchdogs", [1, 2])
@pytest.mark.parametrize("nth", [1, 2], ids=["first", "repeated"])
def test_as_a_call_was_opened_it_is_given_back(provider, llm, monkeypatch, fire, nth, watchdogs):
    monkeypatch.setattr(failures, "wait_before_retry", lambda *_: 0.01)
    monkeypatch.setattr(Call, "open", after(Call.open, fire, nth))
    provider.reset([Reply(status=500), Reply()])
    seen = [clevagent.init(budgets=[Budget(usd=1, per="day")])]
    model = clevagent.guard(llm("openai"))
    if watchdogs > 1:
        seen.append(Watchdog(budgets=[Budget(usd=1, per="day")], attach=["crewai"]))
    with pytest.raises(TimeLimitError):
        model.call("hi")
    assert [watchdog.ledger.holds() for watchdog in seen] == [[]] * watchdogs
    assert provider.request_count == nth - 1
    for watchdog in seen[1:]:
        watchdog.shutdown()


def test_before_the_call_is_entered_the_context_stays_as_it_was(provider, llm, monkeypatch, fire):
    clevagent.init(budgets=[Budget(usd=1, per="day")])
    model = clevagent.guard(llm("openai"))
    before = event_context._event_id_stack.get()
    with monkeypatch.context() as patched:
        patched.setattr(models._Asking, "enter", lambda self, this: fire())
        with pytest.raises(TimeLimitError):
            model.call("hi")
    assert event_context._event_id_stack.get() == before
    assert model.call("hi")
