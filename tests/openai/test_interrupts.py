"""A soft time limit (an exception of a signal handler) that lands in a guarded client."""

from __future__ import annotations

import signal

import pytest

import clevagent
from clevagent import Budget
from clevagent_clients import metering


class TimeLimitError(Exception):
    """As Celery's ``SoftTimeLimitExceeded``."""


def raises(signum, frame):
    raise TimeLimitError


@pytest.fixture
def fire():
    before = signal.signal(signal.SIGUSR1, raises)
    yield lambda *args, **kwargs: signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def watchdog():
    yield clevagent.init(budgets=[Budget(usd=1, per="lifetime")])
    clevagent.shutdown()


@pytest.mark.parametrize("is_stream", [False, True])
def test_where_usage_is_read_the_call_is_charged_at_once(api, watchdog, monkeypatch, fire, is_stream):
    """The SDK may put an error of its own around it, as it would where no client is guarded."""
    client = clevagent.guard(api.client(max_retries=0))
    monkeypatch.setattr(metering.json, "loads", fire)
    with pytest.raises(Exception) as caught:
        answer = api.ask(client, **({"stream": True} if is_stream else {}))
        list(answer)
    assert isinstance(caught.value, TimeLimitError) or isinstance(caught.value.__cause__, TimeLimitError)
    assert watchdog.ledger.holds() == []
    assert watchdog.process_run.summary().calls_charged_at_bound == 1
