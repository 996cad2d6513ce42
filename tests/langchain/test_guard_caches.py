"""What Anthropic keeps in its cache costs up to twice as much: it is reserved for where a request asks for it, and only there."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage as Said
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage

import clevagent
from clevagent import Budget, hookimpl

MARK = {"type": "ephemeral", "ttl": "1h"}
BLOCK = {"type": "text", "text": "Hello"}
TOOL = {"name": "find", "description": "Find it.", "input_schema": {"type": "object", "properties": {}}}
ASKED = Said("", tool_calls=[{"name": "find", "args": {}, "id": "1"}])


class Reserved:
    """Notes what is asked for."""

    def __init__(self):
        self.asks = []

    @hookimpl
    def clevagent_before_call(self, run, call):
        self.asks.append(call.writes_cache)


@pytest.fixture
def asks(anthropic, watchdog):
    """Send messages through a guarded model; tell whether writing to the cache was reckoned with."""

    def send(messages, kwargs=None, **fields):
        seen = Reserved()
        model = clevagent.guard(anthropic(max_tokens=50, **fields), watchdog=watchdog(plugins=[seen]))
        model.invoke(messages, **(kwargs or {}))
        return seen.asks == [True]

    return send


@pytest.mark.parametrize(
    "messages",
    [
        [SystemMessage([{**BLOCK, "cache_control": MARK}]), HumanMessage("Hello")],
        [HumanMessage([BLOCK, {**BLOCK, "cache_control": MARK}])],
        [HumanMessage("Hello"), ASKED, ToolMessage([{**BLOCK, "cache_control": MARK}], tool_call_id="1")],
    ],
    ids=["system", "user", "tool result"],
)
def test_a_marked_message_is_reckoned_with(asks, messages):
    assert asks(messages)


def test_a_marked_tool_is_reckoned_with(asks):
    assert asks([HumanMessage("Hello")], {"tools": [{**TOOL, "cache_control": MARK}]})


def test_a_mark_on_the_request_is_reckoned_with(asks):
    assert asks([HumanMessage("Hello")], {"cache_control": MARK})
    assert asks([HumanMessage("Hello")], model_kwargs={"extra_body": {"cache_control": MARK}})


def test_a_request_without_a_mark_is_reserved_at_the_plain_rate(asks):
    assert not asks([SystemMessage("Be kind."), HumanMessage([BLOCK])], {"tools": [TOOL]})
    assert not asks([HumanMessage("Say cache_control.")])


@pytest.mark.slow
def test_what_is_charged_at_its_bound_uses_the_whole_ceiling(anthropic, provider):
    """Streams that are broken off tell no usage: ten of them fit a ceiling for ten."""
    call = len(b"Hello there") * 3_000_000 + 50 * 15_000_000
    with clevagent.run(budgets=[Budget(usd=12 * call / 1e12)]) as run:
        model = clevagent.guard(anthropic(max_tokens=50))
        for _ in range(30):
            try:
                next(iter(model.stream("Hello there")))
            except clevagent.BudgetExceeded:
                break
    assert provider.billed_pico <= 12 * call
    assert provider.billed_pico >= 0.8 * 12 * call
    assert run.summary().overshoot_usd == 0
