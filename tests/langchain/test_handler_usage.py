"""What a call is expected to cost at most, and what it is settled to: the handler reads, it never changes a request."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult, LLMResult
from langchain_core.tools import tool
from langchain_openai import OpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import BaseModel

from clevagent import Budget, LLMCall, Price, Usage, UsageError, hookimpl
from clevagent.testing import Reply
from clevagent_core.calls import UnusableUsage
from clevagent_langchain import ClevAgentCallbackHandler
from clevagent_langchain.usage import from_llm_output, from_metadata, is_cached
from clevagent_providers import requests

IN, OUT = 2_500_000, 10_000_000
"""What a token of gpt-4o costs, in pico-USD."""
MONEY = Budget(usd=1, per="lifetime")

both = pytest.mark.parametrize("is_async", [False, True])


class Watch:
    """Keeps the calls that were asked for, and what became of them."""

    def __init__(self):
        self.calls: list[LLMCall] = []
        self.outcomes = []

    @hookimpl
    def clevagent_before_call(self, run, call):
        self.calls.append(call)

    @hookimpl
    def clevagent_call_settled(self, run, call, outcome):
        self.outcomes.append(outcome)

    @hookimpl
    def clevagent_call_failed(self, run, call, outcome):
        self.outcomes.append(outcome)


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def one(watchdog, watch):
    return watchdog(budgets=[MONEY], plugins=[watch])


@pytest.fixture
def config(one):
    return {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}


def run(aio, is_async, target, value, config, **kwargs):
    return aio(target.ainvoke(value, config, **kwargs)) if is_async else target.invoke(value, config, **kwargs)


def read_stream(aio, is_async, target, value, config, **kwargs):
    async def read():
        return [part async for part in target.astream(value, config, **kwargs)]

    return aio(read()) if is_async else list(target.stream(value, config, **kwargs))


@tool
def lookup(word: str) -> str:
    """Look a word up."""
    return word


class Answer(BaseModel):
    """An answer."""

    text: str


# -- where usage is -------------------------------------------------------------------------------------------------------


@both
def test_cached_and_reasoning_tokens_are_told(aio, provider, chat, config, watch, is_async):
    provider.reset([Reply(input_tokens=100, output_tokens=9, cached_tokens=40, reasoning_tokens=5)])
    run(aio, is_async, chat(max_tokens=9), "Hello", config)
    usage = watch.outcomes[0].usage
    assert (usage.input_tokens, usage.cache_read_tokens, usage.output_tokens, usage.reasoning_tokens) == (100, 40, 9, 5)


@both
@pytest.mark.parametrize("kind", ["chat", "responses", "anthropic"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_recorded_is_billed(aio, provider, chat, anthropic, config, balance, one, is_async, kind, is_stream):
    model = {
        "chat": lambda: chat(max_tokens=9, stream_usage=True),
        "responses": lambda: chat(max_tokens=9, use_responses_api=True),
        "anthropic": lambda: anthropic(max_tokens=9),
    }[kind]()
    (read_stream if is_stream else run)(aio, is_async, model, "Hello", config)
    state = balance(one)
    assert (state.spent, state.held) == (provider.billed_pico, 0)
    assert provider.billed_pico > 0
    assert one.process_run.summary().calls_charged_at_bound == 0


def test_recorded_is_billed_for_text_completions(provider, watchdog, balance):
    one = watchdog(budgets=[MONEY], prices={"gpt-3.5-turbo-instruct": Price(input=1.00, output=4.00)})
    model = OpenAI(model="gpt-3.5-turbo-instruct", api_key="test", base_url=provider.openai_url, max_retries=0, max_tokens=9)
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    model.invoke("Hello", config)
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)


def test_several_prompts_at_a_text_completion_model_are_one_request(provider, watchdog, balance):
    """LangChain tells of two starts and sends one request; its usage is told with the first end only."""
    one = watchdog(budgets=[MONEY], prices={"gpt-3.5-turbo-instruct": Price(input=1.00, output=4.00)})
    model = OpenAI(model="gpt-3.5-turbo-instruct", api_key="test", base_url=provider.openai_url, max_retries=0, max_tokens=9)
    model.generate(["Hello", "Good bye"], callbacks=[ClevAgentCallbackHandler(watchdog=one)])
    assert provider.request_count == 1
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico


@both
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_provider_that_tells_no_usage_is_charged_the_bound(aio, provider, chat, config, balance, one, is_async, is_stream):
    provider.reset([Reply(usage=False)])
    (read_stream if is_stream else run)(aio, is_async, chat(max_tokens=9, stream_usage=True), "Hello", config)
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0
    assert one.process_run.summary().calls_charged_at_bound == 1


@both
def test_a_custom_base_url_tells_no_usage_in_a_stream(aio, provider, chat, config, balance, one, is_async):
    """LangChain asks for usage in streams only at the default base URL: without it, the bound counts, never nothing."""
    parts = read_stream(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert all(part.usage_metadata is None for part in parts)
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0
    assert one.process_run.summary().calls_charged_at_bound == 1


@both
def test_an_invoke_that_a_graph_turns_into_a_stream(aio, provider, chat, config, balance, one, is_async):
    """stream_mode="messages" streams what the node only invokes: without usage at a custom base URL."""
    model = chat(max_tokens=9)
    builder = StateGraph(MessagesState)
    builder.add_node("think", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_edge(START, "think")
    builder.add_edge("think", END)
    read_stream(aio, is_async, builder.compile(), {"messages": [HumanMessage("Hello")]}, config, stream_mode="messages")
    assert provider.requests[0].body["stream"] is True
    assert balance(one).held == 0
    assert balance(one).spent >= provider.billed_pico > 0


# -- usage that cannot be true --------------------------------------------------------------------------------------------


class Odd(BaseChatModel):
    """Answers with whatever usage a test wants."""

    model: str = "gpt-4o"
    usage: Any = None
    output: Any = None

    @property
    def _llm_type(self):
        return "odd"

    @property
    def _identifying_params(self):
        return {"model": self.model}

    def _get_ls_params(self, stop=None, **kwargs):
        return {"ls_provider": "openai", "ls_model_name": self.model, "ls_model_type": "chat"}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        message = AIMessage("ok")
        message.usage_metadata = self.usage
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output=self.output)


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": -5, "output_tokens": 3, "total_tokens": -2},
        {"input_tokens": 5, "output_tokens": -3, "total_tokens": 2},
        {"input_tokens": 5, "total_tokens": 5},
        {"output_tokens": 5, "total_tokens": 5},
        {"input_tokens": 5.5, "output_tokens": 3},
        {"input_tokens": "5", "output_tokens": 3},
        {"input_tokens": None, "output_tokens": 3},
        {"input_tokens": True, "output_tokens": 3},
        {},
    ],
)
def test_usage_that_cannot_be_true_is_told_and_charged_at_the_bound(one, config, balance, watch, usage):
    Odd(usage=usage).invoke("Hello", config)
    assert balance(one).held == 0
    assert balance(one).spent >= len("Hello") * IN + 4096 * OUT
    assert one.process_run.summary().calls_charged_at_bound == 1
    incidents = [incident for incident in one.recent if incident.kind == "usage"]
    assert len(incidents) == 1
    assert "gpt-4o" in incidents[0].message
    assert watch.outcomes[0].status == "charged"


@pytest.mark.parametrize("usage", [5, "many", [1], object()])
def test_usage_of_another_kind_altogether(one, config, balance, usage):
    Odd(usage=usage).invoke("Hello", config)
    assert balance(one).held == 0
    assert balance(one).spent >= 4096 * OUT


@pytest.mark.parametrize(
    "output",
    [
        {"token_usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}},
        {"usage": {"prompt_tokens": 5, "completion_tokens": 3}},
        {"usage": {"input_tokens": 5, "output_tokens": 3}},
    ],
)
def test_usage_that_stands_in_the_result_only(one, config, balance, output):
    Odd(output=output).invoke("Hello", config)
    assert (balance(one).spent, balance(one).held) == (5 * IN + 3 * OUT, 0)


@pytest.mark.parametrize(
    "output", [None, {}, {"token_usage": {}}, {"token_usage": None}, {"usage": "much"}, {"model_name": "gpt-4o"}]
)
def test_usage_that_stands_nowhere(one, config, balance, output):
    Odd(output=output).invoke("Hello", config)
    assert balance(one).held == 0
    assert balance(one).spent >= 4096 * OUT


def test_traps_of_usage_metadata():
    hour = {"cache_creation": 0, "ephemeral_1h_input_tokens": 30, "ephemeral_5m_input_tokens": 20, "cache_read": 10}
    assert from_metadata({"input_tokens": 100, "output_tokens": 1, "total_tokens": 101, "input_token_details": hour}) == Usage(
        input_tokens=100, output_tokens=1, cache_read_tokens=10, cache_write_tokens=50, cache_write_1h_tokens=30
    )
    tiered = {
        "input_tokens": 100,
        "output_tokens": 9,
        "input_token_details": {"priority_cache_read": 10},
        "output_token_details": {"flex_reasoning": 4},
    }
    assert from_metadata(tiered) == Usage(input_tokens=100, output_tokens=9, cache_read_tokens=10, reasoning_tokens=4)
    # xAI: reasoning is in the total only.
    assert from_metadata({"input_tokens": 10, "output_tokens": 5, "total_tokens": 115}) == Usage(input_tokens=10, output_tokens=105)
    # No detail is larger than what it is a part of.
    assert from_metadata({"input_tokens": 10, "output_tokens": 5, "input_token_details": {"cache_read": 99}}) == Usage(
        input_tokens=10, output_tokens=5, cache_read_tokens=10
    )
    assert from_metadata(None) is None
    assert from_llm_output(None) is None
    # A text completion that produced nothing leaves its output out.
    assert from_llm_output({"token_usage": {"prompt_tokens": 5}}) == Usage(input_tokens=5)
    with pytest.raises(UnusableUsage):
        from_llm_output({"token_usage": {"completion_tokens": 5}})
    assert is_cached({"total_cost": 0})
    assert not is_cached({"total_cost": 0.5})
    assert not is_cached(None)


def test_an_end_that_cannot_be_read_is_charged(one, config, balance, chat, provider):
    """Whatever stands in the result, the user's answer is not lost to our reading of it."""
    from uuid import uuid4

    handler, run_id = config["callbacks"][0], uuid4()
    handler.on_chat_model_start(
        {}, [[HumanMessage("Hello")]], run_id=run_id, metadata={"ls_model_name": "gpt-4o"}, invocation_params={}
    )
    handler.on_llm_end(LLMResult(generations=[[]]).model_copy(update={"generations": [None]}), run_id=run_id)
    assert balance(one).held == 0
    assert balance(one).spent >= 4096 * OUT


# -- the cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _cache():
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("_cache")
@both
def test_a_cached_answer_costs_nothing(aio, provider, chat, config, balance, one, is_async):
    for _ in range(3):
        answer = run(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert answer.usage_metadata["total_cost"] == 0
    assert provider.request_count == 1
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)
    assert one.process_run.summary().total.calls == 1


@pytest.mark.usefixtures("_cache")
def test_a_stream_never_reads_the_cache(aio, provider, chat, config, balance, one):
    chat(max_tokens=9).invoke("Hello", config)
    list(chat(max_tokens=9, stream_usage=True).stream("Hello", config))
    assert provider.request_count == 2
    assert (balance(one).spent, balance(one).held) == (provider.billed_pico, 0)


# -- limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constructor", "call", "expected"),
    [
        ({"max_tokens": 50}, {}, 50),
        ({"max_tokens": 50}, {"max_tokens": 7}, 50),
        ({"max_tokens": 7}, {"max_completion_tokens": 700}, 700),
        ({"max_completion_tokens": 7}, {"max_tokens": 70}, 70),
        ({"max_tokens": 7, "extra_body": {"max_tokens": 700}}, {}, 700),
        ({"max_tokens": 7}, {"extra_body": {"max_completion_tokens": 700}}, 700),
        ({"max_tokens": 50, "use_responses_api": True}, {}, 50),
        ({"max_tokens": 50, "use_responses_api": True}, {"max_tokens": 70}, 70),
        ({}, {}, None),
    ],
)
@both
def test_the_largest_limit_of_all_keys_counts(aio, provider, chat, config, watch, constructor, call, expected, is_async):
    run(aio, is_async, chat(**constructor), "Hello", config, **call)
    assert watch.calls[0].max_output_tokens == expected
    billed = provider.requests[0].billed_output_tokens
    assert expected is None or billed <= expected


def test_extra_body_is_billed_and_counted(provider, chat, config, balance, one):
    provider.reset([Reply(usage=False)])
    chat(max_tokens=7, extra_body={"max_tokens": 700}).invoke("Hello", config)
    assert provider.requests[0].billed_output_tokens == 700
    assert balance(one).spent >= provider.billed_pico


@both
def test_a_large_limit_at_the_call_is_refused_before_it_is_sent(aio, provider, chat, watchdog, is_async):
    from clevagent import BudgetExceeded

    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(usd="0.001", per="lifetime")]))]}
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, chat(max_tokens=7), "Hello", config, max_completion_tokens=700)
    assert provider.request_count == 0


@pytest.mark.parametrize("how", ["constructor", "call", "extra_body", "bind"])
def test_n_multiplies_the_output(provider, chat, config, watch, balance, one, how):
    model = chat(max_tokens=9, **({"n": 2} if how == "constructor" else {"extra_body": {"n": 2}} if how == "extra_body" else {}))
    if how == "bind":
        model = model.bind(n=2)
    provider.reset([Reply(usage=False)])
    model.invoke("Hello", config, **({"n": 2} if how == "call" else {}))
    assert watch.calls[0].answers == 2
    assert provider.requests[0].billed_output_tokens == 18
    assert balance(one).spent >= provider.billed_pico


def test_anthropic_always_tells_a_limit(provider, anthropic, watchdog, watch):
    """The most that the model can write, where none was set: that is what is held for the call."""
    one = watchdog(budgets=[Budget(usd=5, per="lifetime")], plugins=[watch])
    anthropic().invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert watch.calls[0].max_output_tokens == provider.requests[0].body["max_tokens"]


@pytest.mark.parametrize("how", ["call", "bind", "with_config"])
def test_a_model_named_at_the_call_is_the_one_that_is_priced(provider, chat, config, watch, balance, one, how):
    model = chat(max_tokens=9)
    if how == "bind":
        model = model.bind(model="gpt-4o-mini")
    elif how == "with_config":
        model = model.configurable_fields(model_name=_field()).with_config(configurable={"model": "gpt-4o-mini"})
    model.invoke("Hello", config, **({"model": "gpt-4o-mini"} if how == "call" else {}))
    assert provider.requests[0].model == "gpt-4o-mini"
    assert watch.calls[0].model == "gpt-4o-mini"
    assert list(one.process_run.summary().by_model) == ["gpt-4o-mini"]
    assert balance(one).spent == provider.billed_pico


def _field():
    from langchain_core.runnables import ConfigurableField

    return ConfigurableField(id="model")


def test_a_call_without_a_limit_is_told_once(provider, chat, config, watch, one):
    for _ in range(3):
        chat().invoke("Hello", config)
    told = [incident for incident in one.recent if incident.kind == "assumption"]
    assert len(told) == 1
    assert "4,096" in told[0].message
    assert watch.calls[0].max_output_tokens is None


def test_a_call_with_a_limit_is_not_told(provider, chat, config, one):
    chat(max_tokens=9).invoke("Hello", config)
    assert [incident.kind for incident in one.recent] == []


def test_what_is_assumed_can_be_set(provider, chat, watchdog, balance):
    one = watchdog(budgets=[MONEY], assume_output_tokens=100)
    provider.reset([Reply(usage=False)])
    chat().invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert 100 * OUT <= balance(one).spent < 200 * OUT


def test_tools_and_response_formats_are_a_part_of_the_input(provider, chat, config, watch):
    provider.reset([Reply(text='{"text": "ok"}')])
    chat(max_tokens=9).bind_tools([lookup]).invoke("Hello", config)
    chat(max_tokens=9).with_structured_output(Answer, method="json_schema").invoke("Hello", config)
    assert watch.calls[0].tools[0]["function"]["name"] == "lookup"
    assert "text" in str(watch.calls[1].tools[0])


@pytest.mark.parametrize("is_bound", [False, True])
def test_the_bound_is_no_less_than_what_is_billed_by_the_byte(provider, chat, watchdog, balance, is_bound):
    """One token a byte is the worst that a byte-level tokenizer can do. Nothing is told, so the bound is charged."""
    one = watchdog(budgets=[MONEY])
    provider.reset([Reply(usage=False, text='{"text": "ok"}')])
    model = chat(max_tokens=9)
    model = model.bind_tools([lookup, Answer]) if is_bound else model.with_structured_output(Answer, method="json_schema")
    history = [
        HumanMessage("Grüße, 你好, ﷺ " * 5),
        AIMessage("", tool_calls=[{"name": "lookup", "args": {"word": "ü" * 40}, "id": "call_1"}]),
        HumanMessage([{"type": "text", "text": "more"}, {"type": "text", "text": "and more"}]),
    ]
    model.invoke(history, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert balance(one).spent >= provider.billed_pico > 0


def test_an_image_is_bounded_by_the_context_window(provider, chat, config, balance, one, watch):
    provider.reset([Reply(usage=False)])
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    chat(max_tokens=9).invoke([HumanMessage([{"type": "text", "text": "What is it?"}, image])], config)
    assert watch.calls[0].opaque
    assert balance(one).spent >= 128_000 * IN


def test_an_image_without_a_known_window_is_refused(provider, chat, watchdog):
    one = watchdog(budgets=[MONEY], prices={"mine": Price(input=1, output=4)})
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(UsageError, match="context window"):
        chat(model="mine", max_tokens=9).invoke([HumanMessage([image])], {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert provider.request_count == 0


@pytest.mark.parametrize(
    ("params", "is_unbounded"),
    [
        ({"previous_response_id": "r"}, True),
        ({"prompt": {"id": "p"}}, True),
        ({"tools": [{"type": "web_search"}]}, True),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, True),
        ({"tools": [{"type": "function", "function": {}}]}, False),
        ({"tools": [{"name": "lookup", "input_schema": {}}]}, False),
        ({"tools": [{"title": "Answer", "type": "object", "properties": {}}]}, False),
        (
            {"tools": [{"type": "namespace", "name": "crm", "tools": [{"type": "function", "name": "f"}, {"type": "custom"}]}]},
            False,
        ),
        ({"tools": [{"type": "namespace", "name": "crm", "tools": [{"type": "function"}, {"type": "web_search"}]}]}, True),
        ({"tools": [{"type": "namespace", "name": "crm"}]}, True),
        ({}, False),
    ],
)
def test_what_refers_to_text_that_is_not_in_the_request(params, is_unbounded):
    assert requests.is_unbounded(params) is is_unbounded


@pytest.mark.parametrize(
    ("params", "limit"),
    [
        ({"max_tokens": None, "max_completion_tokens": None}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": "9"}, None),
        ({"options": {"num_predict": 9}}, 9),
        ({"generation_config": {"max_output_tokens": 9}, "max_tokens": 5}, 9),
        ({"extra_body": {"max_tokens": 3}, "model_kwargs": {"max_tokens": 4}}, 4),
    ],
)
def test_limits_of_other_providers(params, limit):
    assert requests.largest_limit(params) == limit


# -- a handler cannot change a request ------------------------------------------------------------------------------------


def test_a_handler_leaves_the_request_as_it_is(provider, chat, config):
    model = chat(max_tokens=9, temperature=0.5)
    model.invoke("Hello", config)
    model.invoke("Hello")
    with_handler, without = (request.body for request in provider.requests)
    assert with_handler == without


# -- nothing dials out ----------------------------------------------------------------------------------------------------


def test_nothing_is_dialled_but_the_provider(aio, provider, chat, anthropic, config, monkeypatch):
    """An estimator that uses tiktoken would download its vocabulary; ours counts bytes."""
    import tiktoken

    def refuse(*args, **kwargs):
        raise AssertionError("tiktoken was asked")

    looked_up = []
    getaddrinfo = socket.getaddrinfo

    def look_up(host, *args, **kwargs):
        looked_up.append(host)
        return getaddrinfo(host, *args, **kwargs)

    for name in ("get_encoding", "encoding_for_model"):
        monkeypatch.setattr(tiktoken, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    chat(max_tokens=9).bind_tools([lookup]).invoke("Hello", config)
    chat().invoke("Hello", config)
    anthropic(max_tokens=9).invoke("Hello", config)
    aio(chat(max_tokens=9).ainvoke("Hello", config))
    assert provider.request_count == 4
    assert set(looked_up) <= {"127.0.0.1", b"127.0.0.1"}


def test_service_tiers_are_told(provider, chat, config, watch):
    chat(max_tokens=9, service_tier="flex").invoke("Hello", config)
    assert watch.calls[0].service_tier == "flex"


def test_a_model_without_a_name_is_refused_under_a_budget_in_dollars(one, config):
    from langchain_core.language_models import FakeListChatModel

    with pytest.raises(UsageError, match="FakeListChatModel"):
        FakeListChatModel(responses=["a"]).invoke("Hello", config)


def test_a_model_without_a_name_counts_as_a_call(watchdog, watch, balance):
    from langchain_core.language_models import FakeListChatModel

    one = watchdog(budgets=[Budget(llm_calls=5, per="lifetime")], plugins=[watch])
    FakeListChatModel(responses=["a"]).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert balance(one).spent == 1
    assert one.process_run.summary().calls_charged_at_bound == 1
    assert watch.outcomes[0].cost_pico is None
