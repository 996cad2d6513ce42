"""What is sent: the output limit is lowered to what is left, wherever the user has put it, and never to something useless."""

from __future__ import annotations

from decimal import Decimal
from functools import partial

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from pydantic import BaseModel, Field

import clevagent
from clevagent import Budget, BudgetExceeded, Price
from clevagent.testing import Reply
from clevagent_core.money import PICO_PER_USD

LONG = "x" * 50_000
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}


@tool
def lookup(word: str) -> str:
    """Look a word up."""
    return word


class Answer(BaseModel):
    """An answer."""

    text: str


class Leaf(BaseModel):
    """A leaf with a long description, over and over."""

    name: str = Field(default="", description="what the leaf is called by those who call it" * 3)
    colour: str = ""


class Twig(BaseModel):
    one: Leaf = Field(description="the first")
    two: Leaf = Field(description="the second")
    three: Leaf = Field(description="the third")


class Branch(BaseModel):
    one: Twig = Field(description="the first")
    two: Twig = Field(description="the second")
    three: Twig = Field(description="the third")


@pytest.fixture
def under(provider):
    """Call under a ceiling in US dollars, of which never more may be billed; give what was sent last."""
    clevagent.init()

    def call(usd, function, **settings):
        clevagent.shutdown()
        watchdog = clevagent.init(wait_s=1, **settings)
        before = provider.billed_pico
        try:
            with clevagent.run(budgets=[Budget(usd=usd)]) as run:
                function()
        finally:
            assert watchdog.ledger.holds() == []
            assert provider.billed_pico - before <= Decimal(str(usd)) * PICO_PER_USD
            assert run.summary().overshoot_usd == 0
        return provider.requests[-1].body

    return call


def limits(body):
    keys = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    return {key: body[key] for key in keys if key in body}


# -- where the limit goes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 50_000])
def test_openai_chat(own, chat, under):
    body = under("0.05", lambda: clevagent.guard(chat(max_tokens=own)).invoke("Hello"))
    # Half of what is left where nobody asked for a limit, all that is left where one was asked for.
    assert limits(body) == {"max_completion_tokens": 4096 if own is None else 4992}


@pytest.mark.parametrize("own", [None, 50_000])
def test_openai_responses(own, chat, under):
    model = clevagent.guard(chat(max_tokens=own, use_responses_api=True))
    body = under("0.05", lambda: model.invoke("Hello"))
    assert limits(body) == {"max_output_tokens": 4096 if own is None else 4992}


@pytest.mark.parametrize("own", [None, 50_000])
def test_anthropic(own, anthropic, under):
    model = clevagent.guard(anthropic(**({} if own is None else {"max_tokens": own})))
    body = under("0.1", lambda: model.invoke("Hello"))
    limit = limits(body)["max_tokens"]
    assert 6600 < limit < 6667 if own else limit == 4096


def test_a_limit_that_fits_is_sent_as_it_is(chat, anthropic, provider, under):
    assert limits(under(1, lambda: clevagent.guard(chat(max_tokens=300)).invoke("Hello"))) == {"max_completion_tokens": 300}
    assert limits(under(1, lambda: clevagent.guard(anthropic(max_tokens=300)).invoke("Hello"))) == {"max_tokens": 300}


@pytest.mark.slow
def test_without_a_ceiling_the_request_is_the_plain_one(chat, anthropic, provider):
    clevagent.init()
    for plain in (chat(), chat(max_tokens=7), chat(use_responses_api=True), anthropic(), anthropic(max_tokens=9)):
        plain.invoke("Hello")
        clevagent.guard(plain).invoke("Hello")
        list(clevagent.guard(plain).stream("Hello"))
        first, second, stream = (dict(request.body) for request in provider.requests[-3:])
        assert second == first
        stream.pop("stream_options", None)
        assert stream == {**first, "stream": True}


@pytest.mark.parametrize("budget", [Budget(llm_calls=5), Budget(input_tokens=5000), Budget(usd=1, on_exceed="warn")])
def test_where_nothing_limits_the_output_no_limit_is_sent(budget, chat, provider):
    clevagent.init()
    with clevagent.run(budgets=[budget]):
        clevagent.guard(chat()).invoke("Hello")
    assert limits(provider.requests[-1].body) == {}


@pytest.mark.parametrize("budget", [Budget(output_tokens=1000), Budget(tokens=1100)])
def test_token_budgets_clamp_too(budget, chat, provider):
    clevagent.init()
    with clevagent.run(budgets=[budget]) as run:
        clevagent.guard(chat()).invoke("Hello")
    assert provider.requests[-1].billed_output_tokens in {1000, 1100 - 16 - 8 - 5}
    assert run.summary().budgets[0].overshoot == 0


def test_a_model_whose_own_maximum_nobody_knows_is_sent_no_absurd_limit(chat, under):
    model = clevagent.guard(chat(model="my-own"))
    body = under(100, lambda: model.invoke("Hello"), prices={"my-own": Price(input=1, output=4)})
    assert limits(body) == {"max_completion_tokens": 4096}


def test_the_models_own_maximum_is_not_passed(chat, under):
    assert limits(under(100, lambda: clevagent.guard(chat()).invoke("Hello"))) == {"max_completion_tokens": 16_384}


CALL_TIME = [
    {"max_tokens": 9000},
    {"max_completion_tokens": 9000},
    {"max_tokens": None},
    {"max_completion_tokens": None},
    {"max_tokens": 10, "max_completion_tokens": 9000},
    {"extra_body": {"max_tokens": 9000}},
    {"extra_body": {"max_completion_tokens": 9000}},
    {"extra_body": {"max_tokens": 9000, "max_completion_tokens": 8000, "x": 1}},
    {"max_tokens": 10, "extra_body": {"max_tokens": 9000}},
]


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"max_tokens": 300}, {"max_tokens": 300, "extra_body": {"max_tokens": 9000}}])
@pytest.mark.parametrize("asked", CALL_TIME, ids=str)
def test_openai_limits_of_a_call_hold_the_ceiling(own, asked, chat, under):
    model = clevagent.guard(chat(**own))
    body = under("0.05", lambda: model.invoke("Hello", **asked))
    assert 0 < body["max_completion_tokens"] < 5000
    assert "max_tokens" not in body
    under("0.05", lambda: list(model.stream("Hello", **asked)))
    under("0.05", lambda: model.bind(**asked).invoke("Hello"))


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"max_tokens": 300}, {"extra_body": {"max_output_tokens": 9000}}])
@pytest.mark.parametrize("asked", [*CALL_TIME, {"max_output_tokens": 9000}, {"extra_body": {"max_output_tokens": 9000}}], ids=str)
def test_responses_limits_of_a_call_hold_the_ceiling(own, asked, chat, under):
    model = clevagent.guard(chat(use_responses_api=True, **own))
    body = under("0.05", lambda: model.invoke("Hello", **asked))
    assert 0 < body["max_output_tokens"] < 5000
    under("0.05", lambda: list(model.stream("Hello", **asked)))


@pytest.mark.parametrize("own", [{}, {"max_tokens": 300}, {"model_kwargs": {"extra_body": {"max_tokens": 9000}}}])
@pytest.mark.parametrize("asked", [{"max_tokens": 9000}, {"max_tokens": None}, {"extra_body": {"max_tokens": 9000}}], ids=str)
def test_anthropic_limits_of_a_call_hold_the_ceiling(own, asked, anthropic, under):
    model = clevagent.guard(anthropic(**own))
    body = under("0.05", lambda: model.invoke("Hello", **asked))
    assert 0 < body["max_tokens"] < 3333
    under("0.05", lambda: list(model.stream("Hello", **asked)))


@pytest.mark.slow
def test_a_limit_is_sent_unchanged_however_it_was_given(chat, anthropic, provider, under):
    for model, asked, limit in (
        (chat(max_tokens=300), {"max_tokens": 20}, 20),
        (chat(max_tokens=20), {"max_completion_tokens": 300}, 300),
        (chat(model_kwargs={"user": "me"}), {"extra_body": {"max_tokens": 30}}, 30),
        (anthropic(), {"max_tokens": 40}, 40),
    ):
        body = under(1, partial(clevagent.guard(model).invoke, "Hello", **asked))
        assert list(limits(body).values()) == [limit]
    assert "extra_body" not in body


# -- the floor ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 4000])
def test_refused_rather_than_cut_to_a_stub(own, chat, under, provider):
    with pytest.raises(BudgetExceeded):
        under("0.0025", lambda: clevagent.guard(chat(max_tokens=own)).invoke("Hello"))
    assert provider.request_count == 0
    assert limits(under("0.0030", lambda: clevagent.guard(chat(max_tokens=own)).invoke("Hello")))["max_completion_tokens"] >= 256


def test_a_small_limit_of_ones_own_is_no_stub(chat, under):
    assert limits(under("0.0003", lambda: clevagent.guard(chat(max_tokens=10)).invoke("Hello"))) == {"max_completion_tokens": 10}


def test_a_thinking_budget_is_not_cut_into(anthropic, under, provider):
    model = clevagent.guard(anthropic(max_tokens=8000, thinking={"type": "enabled", "budget_tokens": 2000}))
    body = under("0.06", lambda: model.invoke("Hello"))
    assert 2256 <= body["max_tokens"] < 4000
    provider.reset()
    with pytest.raises(BudgetExceeded):
        under("0.03", lambda: model.invoke("Hello"))
    assert provider.request_count == 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_keeps_its_limit_or_is_refused(method, chat, under, provider):
    provider.reset([Reply(text='{"text": "x"}', tool_calls=[("Answer", {"text": "x"})])])
    structured = clevagent.guard(chat(max_tokens=2000)).with_structured_output(Answer, method=method)
    assert limits(under("0.05", partial(structured.invoke, "Hello"))) == {"max_completion_tokens": 2000}
    provider.reset()
    with pytest.raises(BudgetExceeded):
        under("0.02", partial(structured.invoke, "Hello"))
    assert provider.request_count == 0


@pytest.mark.slow
def test_structured_output_without_a_limit_gets_room(chat, anthropic, under, provider):
    provider.reset([Reply(text="", tool_calls=[("Answer", {"text": "x"})])])
    for model in (chat(), anthropic()):
        structured = clevagent.guard(model).with_structured_output(Answer, method="function_calling")
        assert next(iter(limits(under("0.05", partial(structured.invoke, "Hello"))).values())) >= 1024
        count = provider.request_count
        with pytest.raises(BudgetExceeded):
            under("0.01", partial(structured.invoke, "Hello"))
        assert provider.request_count in {0, count}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["lookup", "any", True])
def test_a_tool_that_must_be_called_keeps_its_limit(choice, chat, anthropic, under, provider):
    provider.reset([Reply(text="", tool_calls=[("lookup", {"word": "x"})])])
    for model in (chat(max_tokens=2000), anthropic(max_tokens=2000)):
        if choice is True and not hasattr(model, "root_client"):
            continue
        bound = clevagent.guard(model).bind_tools([lookup], tool_choice=choice)
        assert list(limits(under("0.1", partial(bound.invoke, "Hello"))).values()) == [2000]
        with pytest.raises(BudgetExceeded):
            under("0.02", partial(bound.invoke, "Hello"))


# -- n answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["own", "call", "extra_body", "model_kwargs"])
def test_n_multiplies(where, chat, under, provider):
    own = {"own": {"n": 3}, "extra_body": {"extra_body": {"n": 3}}}.get(where, {})
    asked = {"n": 3} if where in {"call", "model_kwargs"} else {}
    model = clevagent.guard(chat(max_tokens=9000, **own))
    body = under("0.05", lambda: model.invoke("Hello", **asked))
    assert body["n"] == 3
    assert 1500 < body["max_completion_tokens"] <= 5000 // 3
    assert provider.billed_pico > Decimal("0.9") * 50_000_000_000


# -- what else a request may carry ----------------------------------------------------------------------------------------


def history(arguments):
    calls = [{"name": "lookup", "args": arguments, "id": "1"}]
    return [HumanMessage("Hello"), AIMessage("", tool_calls=calls), ToolMessage("ok", tool_call_id="1")]


def smuggled():
    message = AIMessage("x")
    message.additional_kwargs["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "lookup", "arguments": LONG}}]
    return [HumanMessage("Hello"), message, ToolMessage("ok", tool_call_id="1")]


OPENAI_TEXT = {
    "extra messages": ({}, "Hello", {"extra_body": {"messages": [{"role": "user", "content": LONG}]}}),
    "extra tools": ({}, "Hello", {"extra_body": {"tools": [{"type": "function", "function": {"name": "x", "description": LONG}}]}}),
    "own extra tools": ({"extra_body": {"tools": [{"type": "function", "function": {"name": "x", "description": LONG}}]}}, "Hello", {}),
    "instructions": ({"use_responses_api": True}, "Hello", {"instructions": LONG}),
    "own instructions": ({"use_responses_api": True, "model_kwargs": {"instructions": LONG}}, "Hello", {}),
    "quotes in arguments": ({}, history({"a": ['"' * 10_000, "\\" * 10_000]}), {}),
    "control characters in arguments": ({}, history({"a": "\x01" * 10_000}), {}),
    "many small arguments": ({}, history({str(n): 1 for n in range(3000)}), {}),
    "lists of lists in arguments": ({}, history({"a": [[], {}] * 5000}), {}),
    "unicode in arguments": ({}, history({"é": ["\ufdfa" * 1000, "😀" * 1000]}), {}),
    "tool calls put in afterwards": ({}, smuggled(), {}),
    "unicode": ({}, "\ufdfa" * 5000, {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPENAI_TEXT)
def test_all_that_openai_bills_as_input_is_bounded(name, chat, under, provider):
    own, messages, asked = OPENAI_TEXT[name]
    model = clevagent.guard(chat(max_tokens=300, **own))
    with pytest.raises(BudgetExceeded):
        under("0.02", lambda: model.invoke(messages, **asked))
    assert provider.request_count == 0
    under(2, lambda: model.invoke(messages, **asked))
    # What was held must have been enough, whatever the ceiling: held + 256 tokens is more than was billed.
    held = model_bound(model, messages, asked)
    assert provider.requests[-1].billed_input_tokens <= held


def model_bound(model, messages, asked):
    """The input tokens that are reserved for a call that was never made before."""
    watchdog = clevagent.Watchdog()
    bounds = []

    class Spy:
        @clevagent.hookimpl
        def clevagent_reserve(self, run, ticket, extra):
            bounds.append(watchdog.plugins.bound(ticket.call))

    with watchdog.run(guards=[Spy()]):
        clevagent.guard(model, watchdog=watchdog).invoke(messages, **asked)
    watchdog.shutdown()
    return bounds[0]


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"use_responses_api": True}])
def test_a_strict_schema_is_bounded_as_it_is_sent(own, chat, under, provider):
    leaf = '{"one": {}, "two": {}, "three": {}}'
    provider.reset([Reply(text=f'{{"one": {leaf}, "two": {leaf}, "three": {leaf}}}')])
    structured = clevagent.guard(chat(max_tokens=300, **own)).with_structured_output(Branch, method="json_schema")
    with pytest.raises(BudgetExceeded):
        under("0.01", partial(structured.invoke, "Hello"))
    assert provider.request_count == 0
    structured.invoke("Hello")
    billed = provider.requests[-1].billed_input_tokens
    held = model_bound(clevagent.guard(chat(max_tokens=300, **own)), "Hello", {"response_format": Branch})
    assert billed <= held <= 1.5 * billed


@pytest.mark.parametrize("where", ["call", "own", "extra_body"])
def test_a_system_prompt_beside_the_messages_is_bounded(where, anthropic, under, provider):
    own = {"model_kwargs": {"system": LONG}} if where == "own" else {}
    asked = {"call": {"system": LONG}, "extra_body": {"extra_body": {"system": LONG}}}.get(where, {})
    with pytest.raises(BudgetExceeded):
        under("0.05", lambda: clevagent.guard(anthropic(max_tokens=300, **own)).invoke("Hello", **asked))
    assert provider.request_count == 0


@pytest.mark.parametrize("asked", [{"model": "gpt-4o"}, {"extra_body": {"model": "gpt-4o"}}], ids=str)
def test_the_model_that_is_billed_is_the_one_that_is_sent(asked, chat, under, provider):
    model = clevagent.guard(chat(model="gpt-4o-mini", max_tokens=300))
    with pytest.raises(BudgetExceeded):
        under("0.001", lambda: model.invoke("Hello", **asked))
    assert provider.request_count == 0
    under(1, lambda: model.invoke("Hello", **asked))
    assert provider.billed_pico == 5 * 2_500_000 + 300 * 10_000_000


@pytest.mark.slow
def test_an_image_counts_as_the_context_window(chat, under, provider):
    model = clevagent.guard(chat(max_tokens=300))
    message = HumanMessage([{"type": "text", "text": "Look"}, IMAGE])
    with pytest.raises(BudgetExceeded):
        under("0.2", lambda: model.invoke([message]))
    assert provider.request_count == 0
    under(1, lambda: model.invoke([message]))
    body = [{"role": "user", "content": [IMAGE]}]
    with pytest.raises(BudgetExceeded):
        under("0.2", lambda: model.invoke("Hello", extra_body={"messages": body}))


# -- models that cannot be clamped ----------------------------------------------------------------------------------------


class Homemade(BaseChatModel):
    model: str = "homemade"
    sent: list = Field(default_factory=list)

    @property
    def _llm_type(self):
        return "homemade"

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.sent.append(kwargs)
        usage = {"input_tokens": 5, "output_tokens": 7, "total_tokens": 12}
        return ChatResult(generations=[ChatGeneration(message=AIMessage("hi", usage_metadata=usage))])


def test_an_unknown_model_is_metered_and_told_but_not_clamped(caplog):
    clevagent.init(prices={"homemade": Price(input=1, output=2)}, assume_output_tokens=100)
    plain = Homemade()
    guarded = clevagent.guard(plain)
    assert "not known" in caplog.text
    with clevagent.run(budgets=[Budget(usd="0.00025")]) as run:
        guarded.invoke("Hello")
        with pytest.raises(BudgetExceeded):
            for _ in range(10):
                guarded.invoke("Hello")
    assert all("max_tokens" not in kwargs for kwargs in plain.sent)
    # 205 are held for a call that costs 19: the fourth does not fit into 250.
    assert run.summary().total.calls == len(plain.sent) == 3
    assert run.summary().total.cost_usd == pytest.approx(3 * 19e-6)
