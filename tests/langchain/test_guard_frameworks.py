"""A guarded model is the user's model to everything that LangChain and LangGraph do with it, and each call is counted once."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import threading
from decimal import Decimal
from typing import Annotated, TypedDict

import httpx
import openai
import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_anthropic import ChatAnthropic
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumpd
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel, Field

import clevagent
from clevagent import Budget, BudgetExceeded, Price, UsageError
from clevagent.testing import Reply
from clevagent_core.money import PICO_PER_USD
from clevagent_langchain import ClevAgentCallbackHandler

pytestmark = [
    # LangChain's own: a parsed answer that is written back into the message, and counts that OpenAI's SDK leaves empty.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unexpected type for token usage:UserWarning"),
    pytest.mark.filterwarnings("ignore:astream_events version='v1' is deprecated"),
]

USD = "0.5"


@tool
def lookup(word: str) -> str:
    """Look a word up."""
    return word


class Answer(BaseModel):
    """An answer."""

    text: str


class State(TypedDict):
    messages: Annotated[list, add_messages]


@pytest.fixture
def counted(provider):
    """Run under a ceiling and count: every request that was billed is one call, recorded to the last unit."""
    watchdog = clevagent.init()

    def count(function, *, calls, usd=USD, budgets=(), charged=0):
        before = provider.request_count, provider.billed_pico
        with clevagent.run(budgets=[Budget(usd=usd, name="ceiling"), *budgets]) as run:
            result = function()
        assert watchdog.ledger.holds() == []
        summary = run.summary()
        billed = provider.billed_pico - before[1]
        assert summary.total.calls == calls == provider.request_count - before[0]
        assert billed <= Decimal(str(usd)) * PICO_PER_USD
        assert summary.calls_charged_at_bound == charged
        if not charged:
            assert round(summary.total.cost_usd * PICO_PER_USD) == billed
            assert round(summary.budgets[0].spent * PICO_PER_USD) == billed
        return result

    return count


async def collect(stream):
    return [chunk async for chunk in stream]


# -- every way to call ----------------------------------------------------------------------------------------------------


WAYS = {
    "invoke": (1, lambda model, aio: model.invoke("Hello")),
    "ainvoke": (1, lambda model, aio: aio(model.ainvoke("Hello"))),
    "stream": (1, lambda model, aio: list(model.stream("Hello"))),
    "astream": (1, lambda model, aio: aio(collect(model.astream("Hello")))),
    "batch": (5, lambda model, aio: model.batch(["Hello"] * 5)),
    "abatch": (5, lambda model, aio: aio(model.abatch(["Hello"] * 5))),
    "batch_as_completed": (5, lambda model, aio: list(model.batch_as_completed(["Hello"] * 5))),
    "generate": (2, lambda model, aio: model.generate([[HumanMessage("a")], [HumanMessage("b")]])),
    "agenerate": (2, lambda model, aio: aio(model.agenerate([[HumanMessage("a")], [HumanMessage("b")]]))),
    "astream_events v1": (1, lambda model, aio: aio(collect(model.astream_events("Hello", version="v1")))),
    "astream_events v2": (1, lambda model, aio: aio(collect(model.astream_events("Hello", version="v2")))),
    "chain": (1, lambda model, aio: (ChatPromptTemplate.from_template("{x}") | model | StrOutputParser()).invoke({"x": "Hi"})),
    "chain stream": (1, lambda model, aio: list((model | StrOutputParser()).stream("Hi"))),
    "chain astream": (1, lambda model, aio: aio(collect((model | StrOutputParser()).astream("Hi")))),
    "parallel": (3, lambda model, aio: RunnableParallel(a=model, b=model, c=model).invoke("Hi")),
    "lambda": (1, lambda model, aio: RunnableLambda(model.invoke).invoke("Hi")),
    "sync in a running loop": (1, lambda model, aio: aio(sync_in_loop(model))),
    "to_thread": (1, lambda model, aio: aio(asyncio.to_thread(model.invoke, "Hi"))),
    "streaming=True": (1, lambda model, aio: clevagent.guard(model).model_copy(update={"streaming": True}).invoke("Hi")),
    "bind": (1, lambda model, aio: model.bind(stop=["END"]).invoke("Hi")),
    "with_config": (1, lambda model, aio: model.with_config(tags=["x"]).invoke("Hi")),
    "with_retry": (1, lambda model, aio: model.with_retry(wait_exponential_jitter=False).invoke("Hi")),
}  # fmt: skip


async def sync_in_loop(model):
    return model.invoke("Hi")


@pytest.mark.parametrize("way", WAYS)
def test_each_call_is_counted_once(way, make, counted, aio):
    calls, call = WAYS[way]
    counted(lambda: call(clevagent.guard(make()), aio), calls=calls)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_call_is_counted_once_beside_a_handler(way, make, counted, aio):
    calls, call = WAYS[way]
    counted(lambda: call(clevagent.guard(make(callbacks=[ClevAgentCallbackHandler()])), aio), calls=calls)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_refused_and_sends_nothing(way, make, provider, aio):
    _, call = WAYS[way]
    clevagent.init()
    with clevagent.run(budgets=[Budget(usd="0.000001")]), pytest.raises(BudgetExceeded):
        call(clevagent.guard(make()), aio)
    assert provider.request_count == 0


@pytest.mark.slow
def test_an_attached_process_counts_guarded_calls_once(make, provider, aio):
    watchdog = clevagent.init(attach=["langchain"], budgets=[Budget(usd=USD, per="lifetime")])
    model = clevagent.guard(make())
    for calls, call in WAYS.values():
        before = watchdog.process_run.summary().total.calls
        with clevagent.run() as run:
            call(model, aio)
        assert run.summary().total.calls == calls
        assert watchdog.process_run.summary().total.calls == before
    plain = make()
    with clevagent.run() as run:
        plain.invoke("Hello")
        model.invoke("Hello")
    assert run.summary().total.calls == 2


def test_v3_events(chat, counted, aio):
    async def events(model):
        return await collect(await model.astream_events("Hello", version="v3"))

    model = clevagent.guard(chat(max_tokens=300))
    counted(lambda: list(model.stream_events("Hello", version="v3")), calls=1)
    counted(lambda: aio(events(model)), calls=1)


@pytest.mark.slow
@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(method, include_raw, chat, counted, provider, aio):
    provider.reset([Reply(text='{"text": "x"}', tool_calls=[("Answer", {"text": "x"})] if method == "function_calling" else ())])
    structured = clevagent.guard(chat(max_tokens=300)).with_structured_output(Answer, method=method, include_raw=include_raw)
    answer = counted(lambda: structured.invoke("Answer in JSON"), calls=1)
    assert (answer["parsed"] if include_raw else answer) == Answer(text="x")
    counted(lambda: aio(structured.ainvoke("Answer in JSON")), calls=1)
    counted(lambda: list(structured.stream("Answer in JSON")), calls=1)


@pytest.mark.parametrize("include_raw", [False, True])
def test_structured_output_of_anthropic(include_raw, anthropic, counted, provider, aio):
    provider.reset([Reply(text="", tool_calls=[("Answer", {"text": "x"})])])
    structured = clevagent.guard(anthropic(max_tokens=300)).with_structured_output(Answer, include_raw=include_raw)
    answer = counted(lambda: structured.invoke("Answer"), calls=1)
    assert (answer["parsed"] if include_raw else answer) == Answer(text="x")


def agent_replies(body):
    messages = body.get("messages") or body.get("input")
    asked = any(
        "tool" in str(message.get("role")) or "tool_result" in str(message) or message.get("type") == "function_call_output"
        for message in messages
    )
    return Reply(text="done") if asked else Reply(text="", tool_calls=[("lookup", {"word": "x"})])


@pytest.mark.slow
def test_agents(make, counted, provider, aio):
    provider.reset(agent_replies)
    agent = create_agent(clevagent.guard(make()), [lookup])
    asked = {"messages": [("human", "Hello")]}
    assert counted(lambda: agent.invoke(asked), calls=2)["messages"][-1].text == "done"
    assert counted(lambda: aio(agent.ainvoke(asked)), calls=2)["messages"][-1].text == "done"
    counted(lambda: list(agent.stream(asked, stream_mode="messages")), calls=2)
    counted(lambda: aio(collect(agent.astream(asked, stream_mode="messages"))), calls=2)
    counted(lambda: aio(collect(agent.astream_events(asked, version="v2"))), calls=2)


def test_graphs_and_nodes(make, counted, aio):
    model = clevagent.guard(make())

    def think(state):
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(State)
    builder.add_node("think", think)
    builder.add_edge(START, "think")
    builder.add_edge("think", END)
    graph = builder.compile()
    counted(lambda: graph.invoke({"messages": [("human", "Hi")]}), calls=1, budgets=[Budget(llm_calls=1, node="think")])
    counted(lambda: list(graph.stream({"messages": [("human", "Hi")]}, stream_mode="messages")), calls=1)
    with clevagent.run(budgets=[Budget(llm_calls=1, node="think")]) as run:
        graph.invoke({"messages": [("human", "Hi")]})
        with pytest.raises(BudgetExceeded):
            graph.invoke({"messages": [("human", "Hi")]})
    assert run.summary().by_node["think"].calls == 1


def test_raw_threads_within_a_run(make, counted):
    model = clevagent.guard(make())

    def work():
        threads = [threading.Thread(target=model.invoke, args=("Hi",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    counted(work, calls=8)


@pytest.mark.slow
def test_a_rate_limiter_is_asked_once_a_call(chat, counted):
    class Counting(InMemoryRateLimiter):
        asked = 0

        def acquire(self, *, blocking=True):
            self.asked += 1
            return super().acquire(blocking=blocking)

    limiter = Counting(requests_per_second=1000, max_bucket_size=10)
    model = clevagent.guard(chat(max_tokens=300, rate_limiter=limiter))
    counted(lambda: model.batch(["Hi"] * 3), calls=3)
    assert limiter.asked == 3


# -- usage of streams -----------------------------------------------------------------------------------------------------


def test_streams_ask_for_usage_behind_a_custom_base_url(chat, provider, counted):
    counted(lambda: list(clevagent.guard(chat(max_tokens=300)).stream("Hi")), calls=1)
    assert provider.requests[-1].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("no", [{"stream_usage": False}, {"model_kwargs": {"stream_options": {"include_usage": False}}}], ids=str)
def test_unless_the_user_has_said_no(no, chat, provider, counted):
    counted(lambda: list(clevagent.guard(chat(max_tokens=300, **no)).stream("Hi")), calls=1, charged=1)
    assert provider.requests[-1].body.get("stream_options") in (None, {"include_usage": False})
    counted(lambda: list(clevagent.guard(chat(max_tokens=300)).stream("Hi", stream_usage=False)), calls=1, charged=1)


# -- the model stays what it is -------------------------------------------------------------------------------------------


def test_the_class_holds_and_the_users_model_is_untouched(make, provider, aio):
    plain = make(max_retries=4)
    before, fields = dict(plain.__dict__), repr(plain)
    guarded = clevagent.guard(plain)
    assert isinstance(guarded, type(plain))
    assert type(guarded).__name__ == type(plain).__name__
    assert plain.__dict__ == before
    assert repr(plain) == fields
    assert plain.max_retries == 4
    assert "clevagent" not in str(plain.__pydantic_private__)
    provider.reset([Reply(status=500, headers={"retry-after-ms": "1"}), Reply()])
    clevagent.init()
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
        plain.invoke("Hi")  # its own SDK still retries, and nobody asks
        plain.invoke("Hi")
    assert provider.request_count == 3
    assert run.summary().total.calls == 0


def test_what_others_see_of_it_is_the_same(make):
    plain = make()
    guarded = clevagent.guard(plain)
    assert guarded.get_name() == plain.get_name()
    assert guarded._llm_type == plain._llm_type
    assert guarded.lc_id() == plain.lc_id()
    assert guarded._serialized == plain._serialized == dumpd(plain)
    assert guarded._get_ls_params() == plain._get_ls_params()
    assert guarded._get_llm_string(stop=None) == plain._get_llm_string(stop=None)
    assert guarded._identifying_params == plain._identifying_params
    assert guarded.profile == plain.profile
    assert guarded.get_input_schema().model_json_schema() == plain.get_input_schema().model_json_schema()
    assert str(guarded.bind_tools([lookup]).kwargs) == str(plain.bind_tools([lookup]).kwargs)


def test_anthropic_pickles(anthropic, provider, counted):
    clevagent.init()
    plain = anthropic(max_tokens=300, max_retries=2)
    guarded = clevagent.guard(plain, budgets=[Budget(llm_calls=2, per="lifetime")])
    guarded.temperature = 0.5
    guarded.invoke("Hi")  # its client cannot be pickled
    again = pickle.loads(pickle.dumps(guarded))  # noqa: S301 - our own
    assert isinstance(again, ChatAnthropic)
    assert again.temperature == 0.5
    assert pickle.loads(pickle.dumps(guarded.bind_tools([lookup]))).kwargs == guarded.bind_tools([lookup]).kwargs  # noqa: S301
    again.invoke("Hi")
    with pytest.raises(BudgetExceeded):
        again.invoke("Hi")
    provider.reset([Reply(status=500, headers={"retry-after-ms": "1"})])
    with pytest.raises(BudgetExceeded):
        pickle.loads(pickle.dumps(plain)) and again.invoke("Hi")  # noqa: S301


def test_retries_survive_pickling(anthropic, provider):
    clevagent.init()
    again = pickle.loads(pickle.dumps(clevagent.guard(anthropic(max_tokens=300, max_retries=2))))  # noqa: S301 - our own
    provider.reset([Reply(status=500, headers={"retry-after-ms": "1"})])
    with clevagent.run() as run, pytest.raises(Exception, match="500"):
        again.invoke("Hi")
    assert provider.request_count == 3
    assert run.summary().total.calls == 0


def test_openai_fails_to_pickle_as_it_does_itself(chat):
    with pytest.raises(Exception) as plain:
        pickle.dumps(chat())
    with pytest.raises(Exception) as guarded:
        pickle.dumps(clevagent.guard(chat()))
    assert type(guarded.value) is type(plain.value)
    assert str(guarded.value) == str(plain.value)


COPIES = {
    "model_copy": lambda model: model.model_copy(),
    "model_copy with update": lambda model: model.model_copy(update={"temperature": 0.5}),
    "copy": copy.copy,
    "bind": lambda model: model.bind(stop=["x"]),
    "with_config": lambda model: model.with_config(tags=["x"]),
    "guard again": clevagent.guard,
    "guard of the binding": lambda model: clevagent.guard(model.bind(stop=["x"])),
    "copy of the binding": lambda model: copy.copy(model.bind(stop=["x"])),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_stay_guarded(how, make, counted):
    clevagent.init()
    counted(lambda: COPIES[how](clevagent.guard(make())).invoke("Hi"), calls=1)


def test_deep_copies_stay_guarded(anthropic, counted):
    watchdog = clevagent.init()
    counted(lambda: copy.deepcopy(clevagent.guard(anthropic(max_tokens=300))).invoke("Hi"), calls=1)
    counted(lambda: copy.deepcopy(clevagent.guard(anthropic(max_tokens=300), watchdog=watchdog)).invoke("Hi"), calls=1)


def test_a_guarded_model_that_was_changed_is_guarded_as_it_is(chat, provider):
    clevagent.init()
    guarded = clevagent.guard(chat(max_tokens=300)).model_copy(update={"max_tokens": 20, "model_name": "gpt-4o-mini"})
    again = clevagent.guard(guarded, budgets=[Budget(llm_calls=1, per="lifetime")])
    again.invoke("Hi")
    assert provider.requests[-1].body["max_completion_tokens"] == 20
    assert provider.requests[-1].model == "gpt-4o-mini"
    with pytest.raises(BudgetExceeded):
        again.invoke("Hi")
    guarded.invoke("Hi")


# -- guard() itself -------------------------------------------------------------------------------------------------------


def test_guarding_twice_counts_once(make, counted):
    clevagent.init()
    model = clevagent.guard(clevagent.guard(make()))
    assert clevagent.guard(model) is model
    counted(lambda: model.invoke("Hi"), calls=1)


def test_budgets_of_a_guard_hold_beside_those_of_the_run(make, provider):
    clevagent.init()
    model = clevagent.guard(make(), budgets=[Budget(llm_calls=2, per="lifetime", name="own")])
    twice = clevagent.guard(model, budgets=[Budget(llm_calls=1, per="lifetime", name="more")])
    with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
        twice.invoke("Hi")
        with pytest.raises(BudgetExceeded, match="more"):
            twice.invoke("Hi")
        model.invoke("Hi")
        with pytest.raises(BudgetExceeded, match="own"):
            model.invoke("Hi")
    assert run.summary().total.calls == 2
    with clevagent.run(budgets=[Budget(llm_calls=1)]):
        clevagent.guard(make()).invoke("Hi")
        with pytest.raises(BudgetExceeded, match="1 llm_calls"):
            clevagent.guard(make()).invoke("Hi")
    assert provider.request_count == 3


def test_another_watchdog_guards_what_was_guarded(chat, watchdog, provider):
    clevagent.init()
    strict = watchdog(budgets=[Budget(llm_calls=1, per="lifetime")])
    model = clevagent.guard(clevagent.guard(chat(max_tokens=300)), watchdog=strict)
    model.invoke("Hi")
    with pytest.raises(BudgetExceeded):
        model.invoke("Hi")
    assert strict.process_run.summary().total.calls == 1


def test_bindings_are_guarded(make, counted):
    clevagent.init()
    counted(lambda: clevagent.guard(make().bind_tools([lookup])).invoke("Hi"), calls=1)
    counted(lambda: clevagent.guard(make().bind(stop=["x"])).invoke("Hi"), calls=1)
    counted(lambda: clevagent.guard(make().with_config(tags=["x"])).invoke("Hi"), calls=1)
    counted(lambda: clevagent.guard(make().with_retry()).invoke("Hi"), calls=1)
    counted(lambda: clevagent.guard(make().with_fallbacks([make()])).invoke("Hi"), calls=1)


@pytest.mark.parametrize(
    "build",
    [
        lambda model: model.with_structured_output(Answer, method="json_schema"),
        lambda model: model | StrOutputParser(),
        lambda model: RunnableParallel(a=model),
        lambda model: model.with_fallbacks([model | StrOutputParser()]),
    ],
    ids=["structured", "chain", "parallel", "fallbacks"],
)
def test_what_cannot_be_reached_into_is_refused_and_the_way_is_told(build, chat):
    clevagent.init()
    with pytest.raises(UsageError, match=r"Guard the\s+model first"):
        clevagent.guard(build(chat(max_tokens=300)))


def test_a_configurable_model_is_refused():
    clevagent.init()
    with pytest.raises(UsageError):
        clevagent.guard(init_chat_model())


def test_what_is_no_model_is_refused():
    clevagent.init()
    with pytest.raises(UsageError, match="does not know"):
        clevagent.guard(object())


# -- fallbacks that are chains --------------------------------------------------------------------------------------------


def test_a_fallback_chain_of_guarded_models_is_taken_as_it_is(chat, provider, counted):
    clevagent.init()
    provider.reset([Reply(status=400), Reply()])
    guarded = clevagent.guard(chat(max_tokens=300))
    other = clevagent.guard(chat(model="gpt-4o-mini", max_tokens=300))
    prompt = ChatPromptTemplate.from_template("{x}")
    chain = guarded.with_fallbacks([RunnableLambda(lambda prompt: {"x": "Hi"}) | prompt | other | StrOutputParser()])
    with clevagent.run() as run:
        assert chain.invoke("Hi") == "ok"
    assert set(run.summary().by_model) == {"gpt-4o-mini"}


def test_a_canned_answer_is_a_fallback(chat, provider):
    clevagent.init()
    chain = clevagent.guard(chat(max_tokens=300)).with_fallbacks([RunnableLambda(lambda _: AIMessage("Sorry."))])
    with clevagent.run(budgets=[Budget(usd="0.000001")]):
        assert chain.invoke("Hi").text == "Sorry."
    assert provider.request_count == 0


def test_a_fallback_chain_of_plain_models_is_refused_where_it_is_built(chat):
    clevagent.init()
    guarded, plain = clevagent.guard(chat(max_tokens=300)), chat()
    for fallback in (
        plain | StrOutputParser(),
        plain.with_structured_output(Answer, method="function_calling"),
        plain.with_structured_output(Answer, method="function_calling", include_raw=True),
        RunnableLambda(lambda text: plain.invoke(text + text)),
        RunnableLambda(lambda text: text) | guarded.with_fallbacks([plain]).fallbacks[0] | plain,
        create_agent(plain, []),
    ):
        with pytest.raises(UsageError, match="Guard the"):
            guarded.with_fallbacks([fallback])
    guarded.with_fallbacks([guarded.with_structured_output(Answer, method="function_calling", include_raw=True)])


@pytest.mark.parametrize("include_raw", [False, True])
def test_fallbacks_of_chains_that_begin_with_a_guarded_model(include_raw, chat, provider):
    clevagent.init()
    guarded, plain = clevagent.guard(chat(max_tokens=300)), chat()
    structured = guarded.with_structured_output(Answer, method="function_calling", include_raw=include_raw)
    for chain in (
        structured,
        structured.with_config(tags=["x"]),
        guarded | StrOutputParser(),
        guarded.bind(stop=["x"]) | StrOutputParser(),
    ):
        for fallback in (plain | StrOutputParser(), plain.with_structured_output(Answer, method="function_calling")):
            with pytest.raises(UsageError, match="Guard the"):
                chain.with_fallbacks([fallback])
        both = chain.with_fallbacks([plain, guarded | StrOutputParser()])
        with clevagent.run(budgets=[Budget(usd="0.000001")]), pytest.raises(BudgetExceeded):
            both.invoke("Hi")
    assert provider.request_count == 0


# -- models that build one method out of another --------------------------------------------------------------------------


USAGE = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}


class Base(BaseChatModel):
    model: str = "homemade"
    made: list = Field(default_factory=list)

    @property
    def _llm_type(self):
        return "homemade"

    def chunks(self):
        self.made.append(1)
        yield ChatGenerationChunk(message=AIMessageChunk("hi"))
        yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=USAGE))


class FromStream(Base):
    """``_generate`` out of ``_stream``."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        from langchain_core.language_models.chat_models import generate_from_stream

        return generate_from_stream(self._stream(messages, stop=stop, run_manager=run_manager, **kwargs))

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        yield from self.chunks()


class FromGenerate(Base):
    """``_stream`` out of ``_generate``."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        from langchain_core.language_models.chat_models import generate_from_stream

        return generate_from_stream(self.chunks())

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        result = self._generate(messages, stop=stop, run_manager=run_manager, **kwargs)
        message = result.generations[0].message
        yield ChatGenerationChunk(message=AIMessageChunk(message.content, usage_metadata=message.usage_metadata))

    async def _astream(self, messages, stop=None, run_manager=None, **kwargs):
        result = await self._agenerate(messages, stop=stop, run_manager=None, **kwargs)
        message = result.generations[0].message
        yield ChatGenerationChunk(message=AIMessageChunk(message.content, usage_metadata=message.usage_metadata))


class InThread(FromStream):
    """``_agenerate`` in a thread of its own, without the context."""

    async def _agenerate(self, messages, stop=None, run_manager=None, **kwargs):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: FromGenerate._generate(self, messages, stop))


HOMEMADE = {"homemade": Price(input=1, output=2)}


@pytest.mark.parametrize("kind", [FromStream, FromGenerate, InThread])
def test_one_method_made_of_another_is_counted_once(kind, aio):
    clevagent.init(prices=HOMEMADE, assume_output_tokens=100)
    model = clevagent.guard(kind(made=[]))
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        model.invoke("Hi")
        aio(model.ainvoke("Hi"))
        list(model.stream("Hi"))
        aio(collect(model.astream("Hi")))
        model.batch(["Hi"] * 3)
    assert run.summary().total.calls == 7
    assert run.summary().total.cost_usd == pytest.approx(7 * 19e-6)
    assert run.watchdog.ledger.holds() == []


def test_a_callback_that_asks_the_same_model_is_a_call_of_its_own(chat, provider, aio):
    """Not taken for the inside of the call that it is told of: it would go out unchecked."""
    clevagent.init()
    model = clevagent.guard(chat(max_tokens=300, streaming=True))

    class Asks(BaseCallbackHandler):
        asked = False

        def on_llm_new_token(self, token, **kwargs):
            if not self.asked:
                self.asked = True
                model.invoke("What is that token?")

    class LeavesTasks(AsyncCallbackHandler):
        def __init__(self):
            self.tasks = []

        async def on_llm_new_token(self, token, **kwargs):
            if not self.tasks:
                self.tasks.append(asyncio.create_task(model.ainvoke("And that?")))

    with clevagent.run() as run:
        model.invoke("Hi", config={"callbacks": [Asks()]})
        assert run.summary().total.calls == provider.request_count == 2
        list(model.stream("Hi", config={"callbacks": [Asks()]}))
        assert run.summary().total.calls == provider.request_count == 4

        async def main():
            handler = LeavesTasks()
            await model.ainvoke("Hi", config={"callbacks": [handler]})
            await asyncio.gather(*handler.tasks)

        aio(main())
    assert run.summary().total.calls == provider.request_count == 6


def test_a_model_that_asks_itself_is_counted_for_each_question(aio):
    class Reflecting(FromStream):
        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            if len(messages) == 1:
                self.invoke([*messages, HumanMessage("Are you sure?")])
            return super()._generate(messages, stop, run_manager, **kwargs)

    clevagent.init(prices=HOMEMADE, assume_output_tokens=100)
    model = clevagent.guard(Reflecting(made=[]))
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        model.invoke("Hi")
    assert run.summary().total.calls == len(model.made) == 2


# -- ends of calls --------------------------------------------------------------------------------------------------------


class Cumulative(Base):
    """Tells what there is so far with every chunk, as some of OpenAI's imitators do."""

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        raise NotImplementedError

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        for count in range(1, 50):
            usage = {"input_tokens": 5 if count == 1 else 0, "output_tokens": 1, "total_tokens": 6 if count == 1 else 1}
            yield ChatGenerationChunk(message=AIMessageChunk("hi", usage_metadata=usage))


def test_usage_so_far_is_not_taken_for_the_bill_of_a_broken_stream():
    clevagent.init(prices=HOMEMADE, assume_output_tokens=100)
    model = clevagent.guard(Cumulative())
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        stream = model.stream("Hi")
        next(stream)
        stream.close()
    assert run.summary().calls_charged_at_bound == 1
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        list(model.stream("Hi"))
    assert run.summary().total.output_tokens == 49


def test_a_stream_left_after_its_report_costs_what_was_reported(make, provider):
    clevagent.init()
    with clevagent.run(budgets=[Budget(usd=USD)]) as run:
        for chunk in clevagent.guard(make()).stream("Hi"):
            if chunk.usage_metadata:
                break
    assert run.summary().calls_charged_at_bound == 0
    assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico


def test_no_connection_costs_nothing(chat, anthropic, aio):
    clevagent.init()
    for model in (chat(base_url="http://127.0.0.1:9/v1", max_tokens=300), anthropic(base_url="http://127.0.0.1:9", max_tokens=300)):
        guarded = clevagent.guard(model)
        with clevagent.run(budgets=[Budget(usd=USD)]) as run:
            with pytest.raises(Exception, match="onnect"):
                guarded.invoke("Hi")
            with pytest.raises(Exception, match="onnect"):
                aio(guarded.ainvoke("Hi"))
            with pytest.raises(Exception, match="onnect"):
                list(guarded.stream("Hi"))
        assert run.summary().total.calls == 0
        assert run.summary().calls_charged_at_bound == 0


@pytest.mark.slow
def test_what_the_caller_was_handling_does_not_make_a_timeout_free(chat, provider):
    clevagent.init()
    provider.reset([Reply(hang=True)])
    model = clevagent.guard(chat(max_tokens=300, timeout=0.3))
    with clevagent.run(budgets=[Budget(usd=USD)]) as run:
        try:
            raise httpx.ConnectError("no vector store")
        except httpx.ConnectError:
            with pytest.raises(openai.APITimeoutError):
                model.invoke("Hi")
    assert run.summary().calls_charged_at_bound == 1


def test_a_client_of_the_users_own_loses_its_retries_too(provider):
    clevagent.init()
    client = openai.OpenAI(api_key="test", base_url=provider.openai_url, max_retries=1)
    async_client = openai.AsyncOpenAI(api_key="test", base_url=provider.openai_url, max_retries=1)
    plain = ChatOpenAI(
        model="gpt-4o", api_key="test", max_tokens=300, client=client.chat.completions, async_client=async_client.chat.completions
    )
    provider.reset([Reply(status=504, headers={"retry-after-ms": "1"})])
    with clevagent.run(budgets=[Budget(usd=USD)]) as run, pytest.raises(openai.APIStatusError):
        clevagent.guard(plain).invoke("Hi")
    assert provider.request_count == 2 == run.summary().calls_charged_at_bound
    assert client.max_retries == 1
    client.close()


def test_an_answer_that_cannot_be_read_is_charged(chat, provider, monkeypatch):
    """It comes as an error with status 200: the provider has done its work."""
    clevagent.init()
    model = clevagent.guard(chat(max_tokens=300))

    def unreadable(self, *args, **kwargs):
        response = httpx.Response(200, request=httpx.Request("POST", provider.openai_url))
        raise openai.APIResponseValidationError(response=response, body=None)

    monkeypatch.setattr(openai.resources.chat.completions.Completions, "with_raw_response", property(unreadable))
    with clevagent.run(budgets=[Budget(usd=USD)]) as run, pytest.raises(openai.APIResponseValidationError):
        model.invoke("Hi")
    assert run.summary().calls_charged_at_bound == 1


def test_usage_that_cannot_be_true_is_charged_at_the_bound_and_told(caplog):
    class Lying(FromStream):
        def chunks(self):
            yield ChatGenerationChunk(message=AIMessageChunk("hi"))
            message = AIMessageChunk("")
            message.usage_metadata = {"input_tokens": -5, "output_tokens": 7, "total_tokens": 2}
            yield ChatGenerationChunk(message=message)

        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            message = AIMessage("hi")
            message.usage_metadata = {"input_tokens": -5, "output_tokens": 7, "total_tokens": 2}
            return ChatResult(generations=[{"message": message}])

    clevagent.init(prices=HOMEMADE, assume_output_tokens=100)
    model = clevagent.guard(Lying())
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        model.invoke("Hi")
        list(model.stream("Hi"))
    assert run.summary().calls_charged_at_bound == 2
    assert "cannot be a token count" in caplog.text


def test_usage_that_cannot_be_read_does_not_disturb_the_agent(caplog):
    class Odd(FromStream):
        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            message = AIMessage("hi")
            message.usage_metadata = "plenty"
            return ChatResult(generations=[{"message": message}])

    clevagent.init(prices=HOMEMADE, assume_output_tokens=100)
    with caplog.at_level(logging.ERROR), clevagent.run(budgets=[Budget(usd=1)]) as run:
        assert clevagent.guard(Odd()).invoke("Hi").text == "hi"
    assert run.summary().calls_charged_at_bound == 1
