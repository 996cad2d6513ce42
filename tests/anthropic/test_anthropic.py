"""Every entry point of the Anthropic SDK, and what only its API has."""

from __future__ import annotations

import inspect
import json

import anthropic
import pytest
from pydantic import BaseModel

import clevagent
from clevagent import Budget, BudgetExceeded, Price, UsageError
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.money import PICO_PER_USD

# One SDK is built on httpx, the other on httpx2; the transports are alike.
http = inspect.getmodule(anthropic.DefaultHttpxClient.__mro__[2])
httpx = __import__(http.__name__.partition(".")[0])

MODEL = "claude-sonnet-4-6"
PARAMS = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}


class Answer(BaseModel):
    value: int


def create(client):
    return client.messages.create(**PARAMS)


def create_stream(client):
    return list(client.messages.create(**PARAMS, stream=True))


def stream(client):
    with client.messages.stream(**PARAMS) as stream:
        return stream.get_final_message()


def text_stream(client):
    with client.messages.stream(**PARAMS) as stream:
        return list(stream.text_stream)


def raw(client):
    return client.messages.with_raw_response.create(**PARAMS)


def streaming_response(client):
    with client.messages.with_streaming_response.create(**PARAMS) as response:
        return response.parse()


def beta(client):
    return client.beta.messages.create(**PARAMS, betas=["context-1m-2025-08-07"])


def beta_stream(client):
    with client.beta.messages.stream(**PARAMS) as stream:
        return stream.get_final_message()


def beta_parse(client):
    return client.beta.messages.parse(**PARAMS, output_format=Answer)


def with_options(client):
    return client.with_options(timeout=9).messages.create(**PARAMS)


def plain_post(client):
    return client.post("/v1/messages", body=PARAMS, cast_to=object)


ENTRY_POINTS = [
    create, create_stream, stream, text_stream, raw, streaming_response, beta, beta_stream, beta_parse, with_options, plain_post
]  # fmt: skip
if not hasattr(anthropic.Anthropic(api_key="test").beta.messages, "parse"):
    ENTRY_POINTS.remove(beta_parse)


@pytest.mark.parametrize("call", ENTRY_POINTS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("how", ["guarded", "attached"])
def test_every_entry_point_is_refused_before_it_is_sent(provider, client, call, how):
    if how == "attached":
        clevagent.init(attach=["anthropic"])
        client = anthropic.Anthropic(api_key="test", base_url=provider.anthropic_url)
    with clevagent.run(budgets=[Budget(usd="0.00000001")]) as run:
        for _ in range(3):
            with pytest.raises(BudgetExceeded):
                call(client)
    assert provider.request_count == 0
    assert run.summary().total.calls == 0


@pytest.mark.parametrize("call", ENTRY_POINTS, ids=lambda call: call.__name__)
def test_every_entry_point_is_counted_as_it_is_billed(provider, client, call):
    provider.reset([Reply(text='{"value": 1}')])
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        call(client)
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico > 0
    assert run.summary().calls_charged_at_bound == 0
    assert provider.request_count == 1


def test_the_async_stream_helper_is_refused_and_counted(provider, aio):
    async def main():
        async with clevagent.guard(anthropic.AsyncAnthropic(api_key="test", base_url=provider.anthropic_url)) as client:
            with clevagent.run(budgets=[Budget(usd="0.00000001")]), pytest.raises(BudgetExceeded):
                async with client.messages.stream(**PARAMS):
                    pass
            assert provider.request_count == 0
            with clevagent.run(budgets=[Budget(usd=5)]) as run:
                async with client.messages.stream(**PARAMS) as stream:
                    await stream.get_final_message()
            return run

    run = aio(main())
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico > 0


def test_counting_tokens_is_free(provider, client):
    with clevagent.run(budgets=[Budget(llm_calls=1, usd="0.00000001")]) as run:
        assert client.messages.count_tokens(model=MODEL, messages=PARAMS["messages"]).input_tokens == 5
    assert (provider.request_count, provider.billed_pico, run.summary().total.calls) == (1, 0, 0)


def test_a_batch_is_refused_under_a_ceiling_it_could_pass(provider, client):
    batch = [{"custom_id": "1", "params": PARAMS}]
    with clevagent.run(budgets=[Budget(usd=1)]), pytest.raises(UsageError, match="/v1/messages/batches"):
        client.messages.batches.create(requests=batch)
    assert provider.request_count == 0
    with clevagent.run(), pytest.raises(anthropic.NotFoundError):
        client.messages.batches.create(requests=batch)


def test_the_objects_of_an_answer_can_be_sent_back(provider, client):
    """As the SDK's own examples do; and what can be read once only is read once."""
    provider.reset([Reply(text="Hm", tool_calls=[("look", {"word": "moon"})])])
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        answer = client.messages.create(**PARAMS, tools=tools)
        history = [*PARAMS["messages"], {"role": "assistant", "content": answer.content}]
        client.messages.create(model=MODEL, max_tokens=50, tools=iter(tools), messages=(message for message in history))
    assert provider.requests[1].body["messages"][1]["content"][1]["input"] == {"word": "moon"}
    assert provider.requests[1].body["tools"] == tools
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "least"),
    [
        ({}, 256),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 1280),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}}, 2000),
        ({"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"}}, 256),
    ],
    ids=["text", "thinking", "forced tool", "tool"],
)
def test_a_limit_is_lowered_as_far_as_the_answer_is_of_use(provider, client, params, least):
    request = {**PARAMS, "max_tokens": 2000, **params}
    with clevagent.run(budgets=[Budget(output_tokens=least - 1)]), pytest.raises(BudgetExceeded):
        client.messages.create(**request)
    assert provider.request_count == 0
    with clevagent.run(budgets=[Budget(output_tokens=least)]):
        client.messages.create(**request)
    assert provider.requests[0].body["max_tokens"] == least


def test_a_dearer_mode_has_a_price_of_its_own(provider, client):
    fast = {"speed": "fast"}
    with clevagent.run(budgets=[Budget(usd=5)]), pytest.raises(UsageError, match="'speed=fast/claude-sonnet-4-6'"):
        client.messages.create(**PARAMS, extra_body=fast)
    assert provider.request_count == 0
    clevagent.shutdown()
    clevagent.init(prices={f"speed=fast/{MODEL}": Price(input=18, output=90)})
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        client.messages.create(**PARAMS, extra_body=fast)
    assert run.summary().total.cost_usd == 5 * 18e-6 + 50 * 90e-6


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"fallbacks": [{"model": "claude-opus-4-1", "max_tokens": 32_000}]}, "fallbacks"),
        ({"fallbacks": "default"}, "fallbacks"),
        ({"tools": [{"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-4-1"}]}, "an advisor"),
    ],
)
@pytest.mark.parametrize("budget", [Budget(usd=100), Budget(tokens=10**9)], ids=["usd", "tokens"])
def test_a_request_in_which_another_model_may_write_is_refused(provider, client, extra, name, budget):
    with clevagent.run(budgets=[budget]), pytest.raises(UsageError, match=f"/v1/messages with {name}"):
        client.messages.create(**PARAMS, extra_body=extra)
    assert provider.request_count == 0


WINDOW = 1000


@pytest.mark.parametrize(
    ("extra", "windows"),
    [
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, 1),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, 1),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]}, 4),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 99}]}, 10),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 10),
        ({"mcp_servers": [{"type": "url", "name": "a", "url": "https://example.org"}]}, 10),
    ],
)
def test_what_text_cannot_bound_counts_as_the_window_as_often_as_it_may_be_read(provider, client, extra, windows):
    clevagent.init(prices={MODEL: Price(input=3, output=15, context_window=WINDOW)})
    with clevagent.run(budgets=[Budget(input_tokens=WINDOW - 1)]), pytest.raises(BudgetExceeded) as stop:
        client.messages.create(**PARAMS, extra_body=extra)
    assert (stop.value.needed, provider.request_count) == (windows * WINDOW, 0)


def test_a_summary_that_the_provider_may_write_is_reserved_beside_the_answer(provider, client):
    with clevagent.run(budgets=[Budget(output_tokens=99)]), pytest.raises(BudgetExceeded):
        client.messages.create(**PARAMS, extra_body={"context_management": {"edits": [{"type": "compact_20260112"}]}})
    assert provider.request_count == 0


def test_a_history_is_bounded_anew_when_thinking_is_turned_on():
    """Without it the provider leaves the thoughts out of a history, so what it reported then says too little."""
    request = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 20_000}], "max_tokens": 2000}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with (
        LoopbackProvider(tokens_per_byte=0.02) as provider,
        anthropic.Anthropic(api_key="test", base_url=provider.anthropic_url) as plain,
    ):
        client = clevagent.guard(plain)
        with clevagent.run(budgets=[Budget(input_tokens=100_000)]):
            client.messages.create(**request)
        with clevagent.run(budgets=[Budget(input_tokens=10_000)]):
            client.messages.create(**request)
        with clevagent.run(budgets=[Budget(input_tokens=10_000)]), pytest.raises(BudgetExceeded):
            client.messages.create(**request, thinking=thinking)
        assert provider.request_count == 2


@pytest.mark.parametrize("kind", ["AnthropicVertex", "AsyncAnthropicVertex"])
def test_a_client_for_vertex_keeps_its_region(kind):
    client = getattr(anthropic, kind)(region="us-east5", project_id="p", access_token="t")
    assert clevagent.guard(client).region == "us-east5"


def test_what_is_marked_for_the_cache_is_reserved_at_the_price_of_writing_it(client):
    needed = []
    for mark in ({}, {"cache_control": {"type": "ephemeral"}}):
        content = [{"type": "text", "text": "x" * 10_000, **mark}]
        with clevagent.run(budgets=[Budget(usd="0.00001")]), pytest.raises(BudgetExceeded) as stop:
            client.messages.create(model=MODEL, max_tokens=10, messages=[{"role": "user", "content": content}])
        needed.append(stop.value.needed)
    assert needed[1] > 1.9 * needed[0]


USAGE = {
    "input_tokens": 10,
    "cache_read_input_tokens": 100,
    "cache_creation_input_tokens": 1000,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 1000},
    "output_tokens": 7,
}
START = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}


def served(handle):
    return anthropic.Anthropic(
        api_key="test", http_client=anthropic.DefaultHttpxClient(transport=httpx.MockTransport(handle)), max_retries=0
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_cached_tokens_are_counted_at_their_price(is_stream):
    """In a stream the start tells the input, and the end only what has changed."""
    events = [
        {"type": "message_start", "message": START | {"usage": USAGE | {"output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 7}},
        {"type": "message_stop"},
    ]

    def handle(request):
        if not is_stream:
            return httpx.Response(200, json=START | {"usage": USAGE, "stop_reason": "end_turn"})
        # With the other line ends that the format allows.
        body = "".join(f"event: {event['type']}\r\ndata: {json.dumps(event)}\r\n\r\n" for event in events)
        return httpx.Response(200, content=body.encode(), headers={"content-type": "text/event-stream; charset=utf-8"})

    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        answer = clevagent.guard(served(handle)).messages.create(**PARAMS, stream=is_stream)
        if is_stream:
            assert [event.type for event in answer] == [event["type"] for event in events]
    total = run.summary().total
    assert (total.input_tokens, total.output_tokens) == (1110, 7)
    assert total.cost_usd == pytest.approx(10 * 3e-6 + 100 * 0.3e-6 + 1000 * 6e-6 + 7 * 15e-6)


def test_what_was_used_on_the_way_is_counted_beside_the_totals():
    """A summary of a context that grew too long is no part of the totals; an iteration of the model itself is."""
    part = {"input_tokens": 1000, "output_tokens": 50, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    usage = {**USAGE, "iterations": [{**part, "type": "compaction"}, {**part, "type": "message", "input_tokens": 10}]}

    def handle(request):
        return httpx.Response(200, json=START | {"usage": usage, "stop_reason": "end_turn"})

    with clevagent.run(budgets=[Budget(tokens=100_000)]) as run:
        clevagent.guard(served(handle)).messages.create(**PARAMS)
    total = run.summary().total
    assert (total.input_tokens, total.output_tokens) == (2110, 57)


def test_usage_that_cannot_be_true_is_charged_at_the_bound():
    def handle(request):
        return httpx.Response(200, json=START | {"usage": {"input_tokens": -5, "output_tokens": 7}})

    watchdog = clevagent.init()
    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        clevagent.guard(served(handle)).messages.create(**PARAMS)
    assert run.summary().calls_charged_at_bound == 1
    assert [incident.kind for incident in watchdog.recent] == ["usage"]


def test_the_old_text_completions_tell_nothing_and_are_charged():
    def handle(request):
        body = {"type": "completion", "id": "c", "completion": "Hi", "model": "claude-2.1", "stop_reason": "stop_sequence"}
        return httpx.Response(200, json=body)

    with clevagent.run(budgets=[Budget(usd=5)]) as run:
        # Newer SDKs have no method for it.
        body = {"model": MODEL, "prompt": "\n\nHuman: Hello\n\nAssistant:", "max_tokens_to_sample": 300}
        clevagent.guard(served(handle)).post("/v1/complete", body=body, cast_to=object)
    assert run.summary().calls_charged_at_bound == 1


def test_a_client_of_another_cloud_is_guarded_for_free():
    """The base class is the same. Google's sends the same JSON, to another address."""
    from anthropic import AnthropicVertex

    client = clevagent.guard(AnthropicVertex(region="us-east5", project_id="p", access_token="test"))
    with clevagent.run(budgets=[Budget(usd="0.00000001")]), pytest.raises(BudgetExceeded):
        client.messages.create(**PARAMS | {"model": "claude-sonnet-4@20250514"})
