"""A soft time limit (an exception of a signal handler) that lands in what is attached to LangChain."""

from __future__ import annotations

import signal

import pytest

import clevagent
from clevagent import Budget
from clevagent_langchain import ClevAgentCallbackHandler, attempts, handler

MONEY = Budget(usd=1, per="lifetime")


class TimeLimitError(Exception):
    """As Celery's ``SoftTimeLimitExceeded``."""


def raises(signum, frame):
    raise TimeLimitError


@pytest.fixture
def fire():
    before = signal.signal(signal.SIGUSR1, raises)
    yield lambda *args, **kwargs: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("where", ["_usage_of", "_describe"])
def test_in_a_guarded_model_it_leaves_as_itself(chat, provider, watchdog, monkeypatch, fire, where):
    one = watchdog(budgets=[MONEY])
    model = clevagent.guard(chat(max_tokens=9, max_retries=2), watchdog=one)
    monkeypatch.setattr(attempts, where, fire)
    with pytest.raises(TimeLimitError):
        model.invoke("Hello")
    assert one.ledger.holds() == []
    sent = where == "_usage_of"
    assert provider.request_count == sent
    assert (one.process_run.summary().total.cost_usd > 0) == sent
    assert one.process_run.summary().calls_charged_at_bound == sent


def test_in_the_stream_of_a_guarded_model_it_leaves_as_itself(chat, provider, watchdog, monkeypatch, fire):
    one = watchdog(budgets=[MONEY])
    model = clevagent.guard(chat(max_tokens=9, max_retries=2), watchdog=one)
    monkeypatch.setattr(attempts.Streaming, "note", fire)
    with pytest.raises(TimeLimitError):
        list(model.stream("Hello"))
    assert one.ledger.holds() == []
    assert (provider.request_count, one.process_run.summary().calls_charged_at_bound) == (1, 1)


@pytest.mark.parametrize(("where", "sent"), [("_reported", 1), ("answer_of", 1)])
def test_in_the_handler_it_leaves_as_itself(chat, provider, watchdog, monkeypatch, fire, where, sent):
    one = watchdog(budgets=[MONEY])
    monkeypatch.setattr(handler, where, fire)
    with pytest.raises(TimeLimitError):
        chat(max_tokens=9).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert one.ledger.holds() == []
    assert (provider.request_count, one.process_run.summary().calls_charged_at_bound) == (sent, sent)
