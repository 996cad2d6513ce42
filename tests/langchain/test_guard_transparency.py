"""A guarded model is a guest that nobody notices: what is written of it, what its streams tell, and what it is put into."""

from __future__ import annotations

import contextlib
import json

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField, RunnableLambda

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent.testing import Reply

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")

both = pytest.mark.parametrize("is_async", [False, True])


@pytest.fixture(autouse=True)
def _watchdog(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "test")
    clevagent.init()
    yield
    clevagent.shutdown()


def spend(model, provider, *, calls=5):
    """Call it more often than a ceiling of one call allows; give how many requests were sent."""
    before = provider.request_count
    with clevagent.run(budgets=[Budget(llm_calls=1)]):
        for _ in range(calls):
            with contextlib.suppress(clevagent.ClevAgentError):
                model.invoke("Hello")
    return provider.request_count - before


# -- what is written of it ------------------------------------------------------------------------------------------------


WRITTEN = {
    "dumps": lambda model: loads(dumps(model), allowed_objects="all"),
    "dumpd": lambda model: load(dumpd(model), allowed_objects="all"),
    "in a chain": lambda model: loads(dumps(model | StrOutputParser()), allowed_objects="all"),
    "bound": lambda model: loads(dumps(model.bind(stop=["x"])), allowed_objects="all"),
    "twice": lambda model: loads(dumps(loads(dumps(model), allowed_objects="all")), allowed_objects="all"),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_loaded_from_the_json_of_a_guarded_model_is_guarded(make, provider, written):
    assert spend(WRITTEN[written](clevagent.guard(make(max_retries=2))), provider) == 1


def test_the_json_of_a_guarded_model_is_that_of_the_plain_one_and_its_mark(make):
    plain = make(max_retries=2)
    written = json.loads(dumps(clevagent.guard(plain)))
    assert written.pop("clevagent_guarded") == []
    assert written == json.loads(dumps(plain))


def test_a_loaded_model_repeats_as_often_as_the_one_that_was_written(chat, provider):
    provider.reset([Reply(status=500)] * 2 + [Reply()])
    loaded = loads(dumps(clevagent.guard(chat(max_retries=2))), allowed_objects="all")
    assert loaded.invoke("Hello").content
    assert provider.request_count == 3


def test_budgets_of_its_own_do_not_stand_in_json_and_are_not_forgotten_either(make, provider):
    guarded = clevagent.guard(make(), budgets=[Budget(llm_calls=1, per="lifetime", name="mine")])
    loaded = loads(dumps(guarded), allowed_objects="all")
    with pytest.raises(UsageError, match=r"'mine'.*Give them again"):
        loaded.invoke("Hello")
    with pytest.raises(UsageError, match="'mine'"):
        loads(dumps(loaded), allowed_objects="all").invoke("Hello")
    assert provider.request_count == 0
    again = clevagent.guard(loaded, budgets=[Budget(llm_calls=1, per="lifetime", name="again")])
    again.invoke("Hello")
    with pytest.raises(BudgetExceeded):
        again.invoke("Hello")
    assert provider.request_count == 1


def test_what_was_never_guarded_is_loaded_as_it_was(make, provider):
    clevagent.guard(make())
    assert spend(loads(dumps(make()), allowed_objects="all"), provider) == 5


def test_callbacks_see_what_they_see_of_the_plain_model(make):
    class Sees(BaseCallbackHandler):
        def on_chat_model_start(self, serialized, messages, *, metadata, **kwargs):
            self.seen = json.loads(json.dumps(serialized)), {**metadata}, kwargs["invocation_params"]

    plain, guarded = Sees(), Sees()
    make().invoke("Hello", {"callbacks": [plain]})
    clevagent.guard(make()).invoke("Hello", {"callbacks": [guarded]})
    assert guarded.seen == plain.seen


# -- what it is put into --------------------------------------------------------------------------------------------------

LLM = ConfigurableField(id="llm")
OTHER = {"llm": "other"}


def chosen(model):
    return model.with_config(configurable=OTHER)


ALTERNATIVES = {
    "a model": lambda guarded, plain: guarded.configurable_alternatives(LLM, other=plain),
    "what makes one": lambda guarded, plain: guarded.configurable_alternatives(LLM, other=lambda: plain),
    "a bound one": lambda guarded, plain: guarded.configurable_alternatives(LLM, other=plain.bind(stop=["x"])),
    "with options": lambda guarded, plain: guarded.configurable_alternatives(
        LLM, default_key="first", prefix_keys=True, other=plain
    ),
    "with a fallback": lambda guarded, plain: guarded.configurable_alternatives(LLM, other=plain).with_fallbacks([plain]),
    "in a chain with a fallback": lambda guarded, plain: (
        guarded.configurable_alternatives(LLM, other=plain) | StrOutputParser()
    ).with_fallbacks([plain]),
}


@pytest.mark.parametrize("made", ALTERNATIVES)
@pytest.mark.parametrize("choice", [chosen, lambda model: model], ids=["other", "default"])
def test_alternatives_are_guarded_too(make, provider, made, choice):
    assert spend(choice(ALTERNATIVES[made](clevagent.guard(make()), make())), provider) == 1


def test_alternatives_hold_the_budgets_of_the_guard(make, provider):
    guarded = clevagent.guard(make(), budgets=[Budget(llm_calls=1, per="lifetime")])
    other = chosen(guarded.configurable_alternatives(LLM, other=make()))
    guarded.invoke("Hello")
    with pytest.raises(BudgetExceeded):
        other.invoke("Hello")
    assert provider.request_count == 1


def test_an_alternative_that_cannot_be_looked_into_is_refused_with_the_way_that_works(make):
    with pytest.raises(UsageError, match="Guard the model first"):
        clevagent.guard(make()).configurable_alternatives(LLM, other=make() | StrOutputParser())


class Broken(GenericFakeChatModel):
    messages: object = ()

    def _generate(self, *args, **kwargs):
        raise RuntimeError("broken")


def making(make, budgets=()):
    """Fall back to a function that makes a model when it is called."""
    return clevagent.guard(Broken(), budgets=budgets).with_fallbacks([RunnableLambda(lambda text: make().invoke(text))])


def test_a_model_that_a_fallback_makes_when_it_is_called_is_asked_for(make, provider):
    with clevagent.run(budgets=[Budget(llm_calls=3)]) as run:
        making(make).invoke("Hello")
        with pytest.raises(RuntimeError, match="broken"):  # LangChain raises what the first model did
            making(make).invoke("Hello")
    assert run.summary().total.calls == 3
    assert provider.request_count == 1


def test_and_the_guards_own_budgets_cover_it(make, provider):
    model = making(make, budgets=[Budget(llm_calls=3, per="lifetime")])
    model.invoke("Hello")
    with pytest.raises(RuntimeError, match="broken"):
        model.invoke("Hello")
    assert provider.request_count == 1


def test_a_fallback_that_says_something_itself_costs_nothing(make, aio):
    model = clevagent.guard(Broken()).with_fallbacks([RunnableLambda(lambda _: "sorry", name="says")])
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
        assert model.invoke("Hello") == "sorry"
    with clevagent.run(budgets=[Budget(llm_calls=1)]):
        assert aio(model.ainvoke("Hello")) == "sorry"
    assert run.summary().total.calls == 1


# -- what its streams tell ------------------------------------------------------------------------------------------------


def read(aio, is_async, model, **kwargs):
    async def chunks():
        return [(chunk.content, chunk.usage_metadata) async for chunk in model.astream("Hello", **kwargs)]

    return aio(chunks()) if is_async else [(chunk.content, chunk.usage_metadata) for chunk in model.stream("Hello", **kwargs)]


@both
@pytest.mark.parametrize("asks", [{}, {"stream_usage": True}, {"stream_usage": False}], ids=str)
def test_a_stream_has_the_chunks_that_the_plain_model_gives(aio, chat, provider, is_async, asks):
    provider.reset([Reply(text="hello", chunks=2)] * 2)
    plain = read(aio, is_async, chat(max_tokens=9, **asks))
    assert read(aio, is_async, clevagent.guard(chat(max_tokens=9, **asks))) == plain


@both
def test_the_usage_that_nobody_sees_is_counted(aio, chat, provider, is_async):
    with clevagent.run() as run:
        read(aio, is_async, clevagent.guard(chat(max_tokens=9)))
    assert run.summary().total.cost_usd == float(provider.billed_usd)
    assert run.summary().calls_charged_at_bound == 0


def refuses_the_question(body):
    if "stream_options" in body:
        return Reply(status=400, error_message="Unrecognized request argument supplied: stream_options")
    return Reply(text="hello", chunks=2)


@both
def test_a_server_that_does_not_know_the_question_for_usage_is_asked_without_it(aio, chat, provider, is_async):
    provider.reset(refuses_the_question)
    plain = read(aio, is_async, chat(max_tokens=9))
    provider.reset(refuses_the_question)
    guarded = clevagent.guard(chat(max_tokens=9))
    with clevagent.run(budgets=[Budget(usd=1)]) as run:
        assert read(aio, is_async, guarded) == plain
        assert provider.request_count == 2
        read(aio, is_async, guarded)
    # From then on it is not asked again.
    assert provider.request_count == 3
    assert (run.summary().total.calls, run.summary().calls_charged_at_bound) == (2, 2)
    assert run.summary().total.cost_usd >= provider.billed_usd


@both
def test_a_stream_whose_user_asked_for_usage_gets_the_servers_refusal(aio, chat, provider, is_async):
    provider.reset(refuses_the_question)
    with pytest.raises(Exception, match="stream_options"):
        read(aio, is_async, clevagent.guard(chat(max_tokens=9, stream_usage=True, max_retries=0)))
    assert provider.request_count == 1


# -- what has no price ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["handler", "guard"])
def test_where_models_without_a_price_are_allowed_so_are_their_images(how):
    clevagent.shutdown()
    clevagent.init(
        attach=["langchain"] if how == "handler" else [],
        budgets=[Budget(usd=1_000_000, per="day"), Budget(llm_calls=9, per="day")],
        unknown_price="allow",
    )
    image = HumanMessage([{"type": "image", "url": "https://example.com/a.png"}])
    model = GenericFakeChatModel(messages=iter(["ok"]))
    assert (clevagent.guard(model) if how == "guard" else model).invoke([image]).content == "ok"


def test_a_ceiling_in_tokens_still_needs_the_window_of_a_model_that_is_sent_an_image():
    clevagent.shutdown()
    clevagent.init(budgets=[Budget(tokens=1_000_000, per="day")], unknown_price="allow")
    image = HumanMessage([{"type": "image", "url": "https://example.com/a.png"}])
    with pytest.raises(UsageError, match="cannot be bounded"):
        clevagent.guard(GenericFakeChatModel(messages=iter(["ok"]))).invoke([image])


def test_an_iterator_that_is_used_up_inside_a_model_is_seen_as_with_the_plain_one(watchdog):
    """``StopIteration``, which coroutines turn into something else."""
    one = watchdog(budgets=[Budget(llm_calls=5, per="lifetime")], unknown_price="allow")

    def told(guard):
        model = guard(GenericFakeChatModel(messages=iter(["one"])))
        assert model.invoke("Hi").content == "one"
        with pytest.raises(StopIteration) as caught:
            model.invoke("Hi")
        return caught.value.args, caught.value.__context__, caught.value.__cause__

    assert told(lambda model: model) == told(lambda model: clevagent.guard(model, watchdog=one)) == ((), None, None)
    assert (one.ledger.holds(), one.process_run.summary().total.calls) == ([], 2)
