"""One request counts once, whoever sees it: a guarded model of LangChain's, its handler, a guarded client, and what is attached."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError, Watchdog
from clevagent.testing import Reply
from clevagent_core.money import PICO_PER_USD

from .conftest import LIMIT, PROMPT


@pytest.fixture
def model(provider):
    def make(kind="openai", **kw):
        if kind == "openai":
            kw = {"base_url": provider.openai_url} | kw
            return ChatOpenAI(**{"model": "gpt-4o", "api_key": "test", "max_tokens": 50} | kw)
        return ChatAnthropic(
            **{"model": "claude-sonnet-4-6", "api_key": "test", "base_url": provider.anthropic_url, "max_tokens": 50} | kw
        )

    return make


def counted(run, provider, calls):
    summary = run.summary()
    assert (summary.total.calls, provider.request_count) == (calls, calls)
    assert round(summary.total.cost_usd * PICO_PER_USD) == provider.billed_pico


INVOKE = ["invoke", "stream", "batch", "ainvoke", "astream"]


def call(model, how, aio):
    if how == "invoke":
        model.invoke("Hello")
    elif how == "stream":
        list(model.stream("Hello", stream_usage=True) if isinstance(model, ChatOpenAI) else model.stream("Hello"))
    elif how == "batch":
        model.batch(["Hello"])
    elif how == "ainvoke":
        aio(model.ainvoke("Hello"))
    else:

        async def read():
            stream = model.astream("Hello", stream_usage=True) if isinstance(model, ChatOpenAI) else model.astream("Hello")
            async for _ in stream:
                pass

        aio(read())


@pytest.mark.slow
@pytest.mark.parametrize("how", INVOKE)
@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("attached", [["openai", "anthropic"], ["langchain", "openai", "anthropic"]], ids=["clients", "all"])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_call_through_langchain_counts_once(provider, model, aio, how, kind, attached, guarded):
    clevagent.init(attach=attached)
    one = model(kind)
    if guarded:
        one = clevagent.guard(one)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        call(one, how, aio)
        counted(run, provider, 1)
        call(one, how, aio)
    counted(run, provider, 2)


@pytest.mark.parametrize("how", ["invoke", "stream", "batch"])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_guarded_client_inside_of_a_model_counts_once(provider, model, chat, aio, how, guarded):
    clevagent.init(attach=["langchain", "openai"])
    client = clevagent.guard(chat.client())
    one = model(client=client.chat.completions, root_client=client)
    if guarded:
        one = clevagent.guard(one)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        call(one, how, aio)
    counted(run, provider, 1)


def test_budgets_that_a_covered_client_could_not_hold_are_refused(provider, model, chat):
    clevagent.init(attach=["langchain"])
    client = clevagent.guard(chat.client(), budgets=[Budget(usd=1, name="own")])
    one = model(client=client.chat.completions, root_client=client)
    with pytest.raises(UsageError, match="budgets of its own \\('own'\\)"):
        one.invoke("Hello")
    assert provider.request_count == 0


def test_embeddings_of_langchain_are_seen_by_the_client(provider):
    clevagent.init(attach=["langchain", "openai"])
    embeddings = OpenAIEmbeddings(
        model="text-embedding-3-small", api_key="test", base_url=provider.openai_url, check_embedding_ctx_length=False
    )
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        embeddings.embed_query("Hello")
    counted(run, provider, 1)


# -- what is sent inside of a call that is counted already, and is another request ------------------------------------------


class Asking(BaseCallbackHandler):
    """Asks a raw client, in the middle of somebody else's call."""

    raise_error = True
    run_inline = True

    def __init__(self, ask, when):
        self._ask = ask
        self._when = when
        self.asked = 0

    def _now(self, when):
        if when == self._when and not self.asked:
            self.asked += 1
            self._ask()

    def on_chat_model_start(self, *args, **kwargs):
        self._now("start")

    def on_llm_new_token(self, *args, **kwargs):
        self._now("token")

    def on_llm_end(self, *args, **kwargs):
        self._now("end")


@pytest.mark.parametrize("when", ["start", "token", "end"])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_raw_call_of_a_callback_counts_too(provider, model, messages, aio, when, is_async, guarded):
    """Of another model, it can be told from the call around it wherever it is made."""
    clevagent.init(attach=["langchain", "openai", "anthropic"])
    client = messages.client()
    asking = Asking(lambda: messages.ask(client, "Hi", 20), when)
    one = model(callbacks=[asking])
    if guarded:
        one = clevagent.guard(one)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        call(one, "astream" if is_async else "stream", aio)
    assert asking.asked == 1
    counted(run, provider, 2)


@pytest.mark.parametrize("when", ["token", "end"])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_raw_call_of_a_callback_to_the_same_model_counts_too(provider, model, chat, aio, when, guarded):
    clevagent.init(attach=["langchain", "openai"])
    client = chat.client()
    asking = Asking(lambda: chat.ask(client, "Hi", 20), when)
    one = model(callbacks=[asking])
    if guarded:
        one = clevagent.guard(one)
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        call(one, "stream", aio)
    counted(run, provider, 2)


def test_a_raw_call_of_a_tool_counts(provider, chat):
    clevagent.init(attach=["langchain", "openai"])
    client = chat.client()

    @tool
    def ask(question: str) -> str:
        """Ask."""
        return chat.ask(client, question, 20).choices[0].message.content

    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        ask.invoke({"question": "Hello"})
    assert run.summary().by_model["gpt-4o"].calls == provider.request_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wait_for", "timeout"])
@pytest.mark.parametrize("guarded", [False, True])
def test_raw_calls_after_a_cancelled_one_count(provider, model, chat, aio, how, guarded):
    """LangChain's handlers hear nothing of a cancelled ``ainvoke``: its ticket stays open, and covers nothing that comes later."""
    clevagent.init(attach=["langchain", "openai"])
    provider.reset(lambda body: Reply(hang=body["messages"][0]["content"] == "hang"))
    one = model(max_retries=0)
    if guarded:
        one = clevagent.guard(one)

    async def main():
        # One context for all: that of this task.
        async with chat.aclient() as client:
            with pytest.raises(TimeoutError):
                if how == "wait_for":
                    await asyncio.wait_for(one.ainvoke([HumanMessage("hang")]), 0.3)
                else:
                    async with asyncio.timeout(0.3):
                        await one.ainvoke([HumanMessage("hang")])
            for _ in range(3):
                await chat.ask(client, "Hi", 20)

    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        aio(main())
    gc.collect()
    summary = run.summary()
    assert provider.request_count == 4
    assert summary.total.calls == 4
    assert summary.total.cost_usd * PICO_PER_USD >= provider.billed_pico * 0.999


def test_several_messages_in_one_go_count_once_each(provider, model):
    """A handler is told of all of them before the first is sent."""
    clevagent.init(attach=["langchain", "anthropic"])
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        model("anthropic").generate([[HumanMessage("one")], [HumanMessage("two")], [HumanMessage("three")]])
    counted(run, provider, 3)


def test_a_refusal_leaves_through_langchain_as_itself(provider, model):
    clevagent.init(attach=["openai"])
    with clevagent.run(budgets=[Budget(usd=0.000001)]), pytest.raises(BudgetExceeded):
        model().invoke("Hello")
    assert provider.request_count == 0


def test_a_client_counts_for_each_of_two_watchdogs(provider, model, watchdog):
    """One of them is asked by the model, and covers its own request only."""
    first, second = watchdog(attach=["openai"]), watchdog(attach=["langchain", "openai"])
    model().invoke("Hello")
    for one in (first, second):
        assert one.process_run.summary().total.calls == provider.request_count == 1


def ask_below(how, provider, chat, model, **options):
    """Send one request in the middle of a call that counts already, by an SDK that repeats by itself."""
    if how == "llm_call":
        client = clevagent.guard(chat.client(**options))
        with clevagent.llm_call(model="gpt-4o", input=PROMPT, max_output_tokens=LIMIT) as call:
            answer = chat.ask(client)
            call.settle(input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.completion_tokens)
    else:
        model(max_tokens=LIMIT, **options).invoke(PROMPT)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["llm_call", "langchain"])
def test_what_an_sdk_repeats_below_a_call_is_reserved_each_time(provider, chat, model, how):
    """Each request that timed out may be billed, and the call around it counts one."""
    provider.reset([Reply(hang=True), Reply(hang=True), Reply()])
    if how == "langchain":
        clevagent.init(attach=["langchain", "openai"])
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        ask_below(how, provider, chat, model, timeout=0.3, max_retries=2)
    assert provider.request_count == 3
    assert round(run.summary().total.cost_usd * PICO_PER_USD) >= provider.billed_pico
    assert run.summary().total.calls == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["llm_call", "langchain"])
def test_what_an_sdk_repeats_below_a_call_is_refused_where_it_does_not_fit(provider, chat, model, how):
    provider.reset([Reply(hang=True)] * 3)
    ceiling = chat.price() * 3 // 2
    if how == "langchain":
        clevagent.init(attach=["langchain", "openai"])
    with clevagent.run(budgets=[Budget(usd=ceiling / PICO_PER_USD)]) as run, pytest.raises(BudgetExceeded):
        ask_below(how, provider, chat, model, timeout=0.3, max_retries=2)
    assert provider.request_count == 1
    assert provider.billed_pico <= round(run.summary().total.cost_usd * PICO_PER_USD) <= ceiling


@pytest.mark.slow
def test_what_is_refused_unbilled_is_repeated_below_a_call_and_counts_once(provider, chat, model):
    provider.reset([Reply(status=429), Reply(status=429), Reply()])
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        ask_below("llm_call", provider, chat, model, max_retries=2)
    assert (provider.request_count, run.summary().total.calls) == (3, 1)
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico


def test_a_request_inside_a_block_writes_no_more_than_the_block_said(provider, chat):
    client = clevagent.guard(chat.client())
    with (
        clevagent.run(budgets=[Budget(usd=1)]) as run,
        clevagent.llm_call(model="gpt-4o", input=PROMPT, max_output_tokens=10) as call,
    ):
        answer = chat.ask(client, limit=5000)
        call.settle(input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.completion_tokens)
    assert provider.requests[0].body["max_tokens"] == 10
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico


def test_guards_of_two_watchdogs_around_one_client_both_hold(provider, chat):
    first, second = (Watchdog(budgets=[Budget(llm_calls=limit, per="lifetime")]) for limit in (2, 5))
    client = clevagent.guard(clevagent.guard(chat.client(), watchdog=first), watchdog=second)
    for _ in range(2):
        chat.ask(client)
    with pytest.raises(BudgetExceeded):
        chat.ask(client)
    assert (provider.request_count, first.process_run.summary().total.calls, second.process_run.summary().total.calls) == (2, 2, 2)
    for watchdog in (first, second):
        watchdog.shutdown()


def test_a_request_that_is_given_as_bytes_is_guarded_too(provider, chat):
    client = clevagent.guard(chat.client())
    if "content" not in inspect.signature(type(client).post).parameters:
        pytest.skip("older SDKs take no bytes")
    body = json.dumps(chat.params(limit=5000)).encode()
    with clevagent.run(budgets=[Budget(output_tokens=300)]) as run:
        client.post("/chat/completions", content=body, options={"headers": {"Content-Type": "application/json"}}, cast_to=object)
    assert provider.requests[0].body["max_tokens"] == 300
    assert run.summary().total.calls == 1
