"""What swallows a refusal, repeats it or turns to another model sends nothing more."""

from __future__ import annotations

import asyncio

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    ToolRetryMiddleware,
    before_model,
    hook_config,
    wrap_model_call,
)
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import RetryPolicy

from clevagent import Budget, BudgetExceeded
from clevagent.testing import Reply
from clevagent_langchain import ClevAgentCallbackHandler

HELLO = {"messages": [HumanMessage("Hello")]}
SPENT = Budget(llm_calls=1, per="lifetime")


@pytest.fixture
def config(watchdog, provider, chat):
    """Callbacks whose budget is used up, by one call that was sent."""
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(budgets=[SPENT]))]}
    chat(max_tokens=9).invoke("Hello", config)
    provider.reset()
    return config


def run(aio, is_async, target, value, config):
    return aio(target.ainvoke(value, config)) if is_async else target.invoke(value, config)


def ran_tool():
    ran = []

    @tool
    def act(word: str) -> str:
        """Act."""
        ran.append(word)
        return word

    return ran, act


both = pytest.mark.parametrize("is_async", [False, True])


@both
def test_with_retry_tries_in_vain(aio, provider, chat, config, is_async):
    target = chat(max_tokens=9).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, target, "Hello", config)
    assert provider.request_count == 0


@both
def test_with_retry_of_a_call_that_does_not_fit_into_what_is_left(aio, provider, chat, watchdog, is_async):
    """The first refusal latches: a smaller call would fit, and is refused all the same. Another run goes on."""
    provider.reset([Reply(output_tokens=100)])
    one = watchdog(budgets=[Budget(usd="0.01", per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    with one.run() as first:
        run(aio, is_async, chat(max_tokens=100), "Hello", config)
        many = chat(max_tokens=950).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
        for target, reason in ((many, "latched"), (chat(max_tokens=1), "latched")):
            with pytest.raises(BudgetExceeded) as caught:
                run(aio, is_async, target, "Hello", config)
            assert caught.value.reason == reason
    assert provider.request_count == 1
    with one.run():
        run(aio, is_async, chat(max_tokens=1), "Hello", config)
        assert provider.request_count == 2
    first.top_up(usd="0.01")
    with first.activate():
        run(aio, is_async, chat(max_tokens=1), "Hello", config)
    assert provider.request_count == 3


@both
def test_a_call_that_is_too_large_is_refused_alone(aio, provider, chat, watchdog, is_async):
    one = watchdog(budgets=[Budget(usd="0.01", per="day")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    with one.run():
        with pytest.raises(BudgetExceeded) as caught:
            run(
                aio,
                is_async,
                chat(max_tokens=5000).with_retry(stop_after_attempt=3, wait_exponential_jitter=False),
                "Hello",
                config,
            )
        assert caught.value.reason == "too_large"
        run(aio, is_async, chat(max_tokens=9), "Hello", config)
    assert provider.request_count == 1


@both
def test_a_failure_under_with_retry_is_asked_for_each_time(aio, provider, chat, watchdog, is_async):
    provider.reset([Reply(status=500)])
    one = watchdog(budgets=[Budget(usd=1, per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    target = chat(max_tokens=9).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    with pytest.raises(Exception, match="500"):
        run(aio, is_async, target, "Hello", config)
    assert provider.request_count == 3
    assert one.process_run.summary().total.calls == 0
    assert one.ledger.holds() == []


@both
def test_with_fallbacks_asks_for_every_fallback(aio, provider, chat, anthropic, config, is_async):
    target = chat(max_tokens=9).with_fallbacks([chat(model="gpt-4o-mini", max_tokens=9), anthropic(max_tokens=9)])
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, target, "Hello", config)
    assert provider.request_count == 0


@both
def test_with_fallbacks_turns_to_a_cheaper_model_only_under_budgets_that_do_not_cover_it(aio, provider, chat, watchdog, is_async):
    """The money of the run is latched; a budget for one model stops that model only."""
    one = watchdog(budgets=[Budget(llm_calls=1, model="gpt-4o", per="lifetime"), Budget(llm_calls=3, per="lifetime")])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    target = chat(max_tokens=9).with_fallbacks([chat(model="gpt-4o-mini", max_tokens=9)])
    for _ in range(3):
        run(aio, is_async, target, "Hello", config)
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, target, "Hello", config)
    assert [request.model for request in provider.requests] == ["gpt-4o", "gpt-4o-mini", "gpt-4o-mini"]


@both
def test_langchain_bypasses_a_handler_on_the_primary_model_only(aio, provider, chat, watchdog, is_async):
    """Attach to the whole with config (above), guard the model, or attach to the process: then the fallback is asked for too."""
    one = watchdog(budgets=[SPENT])
    primary = chat(max_tokens=9, callbacks=[ClevAgentCallbackHandler(watchdog=one)])
    primary.invoke("Hello")
    run(aio, is_async, primary.with_fallbacks([chat(model="gpt-4o-mini", max_tokens=9)]), "Hello", None)
    assert provider.request_count == 2
    # Narrowing what is caught keeps the refusal a refusal.
    narrow = primary.with_fallbacks([chat(max_tokens=9)], exceptions_to_handle=(ConnectionError,))
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, narrow, "Hello", None)
    assert provider.request_count == 2


@both
@pytest.mark.parametrize("on_failure", ["continue", "error"])
def test_model_retry_middleware(aio, provider, chat, config, is_async, on_failure):
    middleware = ModelRetryMiddleware(max_retries=3, initial_delay=0, jitter=False, on_failure=on_failure)
    agent = create_agent(chat(max_tokens=9), [], middleware=[middleware])
    # Whatever it is told to do with errors: it would make something of one that reads like an answer.
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, agent, HELLO, config)
    assert provider.request_count == 0


@both
def test_model_fallback_middleware(aio, provider, chat, config, is_async):
    agent = create_agent(
        chat(max_tokens=9), [], middleware=[ModelFallbackMiddleware(chat(model="gpt-4o-mini", max_tokens=9), chat(max_tokens=9))]
    )
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, agent, HELLO, config)
    assert provider.request_count == 0


@both
def test_tool_retry_middleware(aio, provider, chat, watchdog, is_async):
    """It repeats a tool call that fails, then turns the error into a message for the model; not a refusal, which leaves."""
    ran, act = ran_tool()
    provider.reset([Reply(tool_calls=[("act", {"word": "a"})])])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(tool_calls=1)]))]}
    agent = create_agent(
        chat(max_tokens=9),
        [act],
        middleware=[ToolRetryMiddleware(max_retries=2, initial_delay=0, jitter=False, on_failure="continue")],
    )
    with pytest.raises(BudgetExceeded, match=r"call of the tool 'act'"):
        run(aio, is_async, agent, HELLO, config)
    assert (len(ran), provider.request_count) == (1, 2)


@both
def test_tool_retry_middleware_around_a_tool_whose_model_is_refused(aio, provider, chat, watchdog, is_async):
    inner = chat(model="gpt-4o-mini", max_tokens=9)

    @tool
    def act(word: str) -> str:
        """Act."""
        return inner.invoke(word).text

    provider.reset(lambda body: Reply(tool_calls=[("act", {"word": "a"})]) if body.get("tools") else Reply())
    one = watchdog(budgets=[Budget(llm_calls=2)])
    agent = create_agent(
        chat(max_tokens=9),
        [act],
        middleware=[ToolRetryMiddleware(max_retries=2, initial_delay=0, jitter=False, on_failure="continue")],
    )
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, agent, HELLO, {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert provider.request_count == 2
    assert one.ledger.holds() == []


@both
def test_tool_node_that_handles_errors(aio, provider, chat, watchdog, is_async):
    """Any other error of a tool becomes a message ("fix your mistakes") that the model is paid to read; a refusal leaves."""
    ran, act = ran_tool()
    provider.reset([Reply(tool_calls=[("act", {"word": "a"})])])
    model = chat(max_tokens=9).bind_tools([act])

    def think(state):
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("think", think)
    builder.add_node("tools", ToolNode([act], handle_tool_errors=True))
    builder.add_edge(START, "think")
    builder.add_conditional_edges("think", tools_condition)
    builder.add_edge("tools", "think")
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog(budgets=[Budget(tool_calls=1)]))]}
    with pytest.raises(BudgetExceeded, match=r"call of the tool 'act'"):
        run(aio, is_async, builder.compile(), HELLO, config)
    assert (len(ran), provider.request_count) == (1, 2)


@both
def test_the_retry_policy_of_a_node_does_not_repeat_a_refusal(aio, provider, chat, config, is_async):
    tried = []
    model = chat(max_tokens=9)

    def think(state):
        tried.append(1)
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("think", think, retry_policy=RetryPolicy(initial_interval=0.001, max_attempts=3))
    builder.add_edge(START, "think")
    builder.add_edge("think", END)
    with pytest.raises(BudgetExceeded):
        run(aio, is_async, builder.compile(), HELLO, config)
    assert (len(tried), provider.request_count) == (1, 0)


@both
def test_an_agent_that_ends_itself_with_middleware(aio, provider, chat, config, is_async):
    """create_agent halts without an exception where middleware turns the refusal into an answer, sync and async."""

    @before_model
    def note(state, runtime):
        return None

    @wrap_model_call
    def answer(request, handler):
        try:
            return handler(request)
        except BudgetExceeded as error:
            return AIMessage(str(error))

    @wrap_model_call
    async def answer_async(request, handler):
        try:
            return await handler(request)
        except BudgetExceeded as error:
            return AIMessage(str(error))

    agent = create_agent(chat(max_tokens=9), [], middleware=[note, answer_async if is_async else answer])
    assert "refused" in run(aio, is_async, agent, HELLO, config)["messages"][-1].text
    assert provider.request_count == 0


def test_langchain_refuses_sync_only_middleware_in_async_calls(aio, provider, chat, config):
    @wrap_model_call
    def answer(request, handler):
        return handler(request)

    with pytest.raises(NotImplementedError):
        aio(create_agent(chat(max_tokens=9), [], middleware=[answer]).ainvoke(HELLO, config))
    assert provider.request_count == 0


@pytest.mark.parametrize("can_jump", [False, True])
def test_a_jump_to_the_end_that_is_not_declared_goes_on_and_the_budget_still_holds(provider, chat, watchdog, can_jump):
    def halt(state, runtime):
        return {"jump_to": "end", "messages": [AIMessage("halted")]}

    middleware = before_model(hook_config(can_jump_to=["end"])(halt) if can_jump else halt)
    one = watchdog(budgets=[Budget(llm_calls=2)])
    _, act = ran_tool()
    provider.reset([Reply(tool_calls=[("act", {"word": "a"})])])
    agent = create_agent(chat(max_tokens=9), [act], middleware=[middleware])
    config = {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]}
    if can_jump:
        assert agent.invoke(HELLO, config)["messages"][-1].text == "halted"
    else:
        with pytest.raises(BudgetExceeded):
            agent.invoke(HELLO, config)
    assert provider.request_count == (0 if can_jump else 2)


def test_a_batch_that_returns_exceptions_goes_on_for_nobody(aio, provider, chat, config):
    answers = chat(max_tokens=9).batch(["Hello"] * 5, config, return_exceptions=True)
    assert {type(answer) for answer in answers} == {BudgetExceeded}
    answers = aio(chat(max_tokens=9).abatch(["Hello"] * 5, config, return_exceptions=True))
    assert {type(answer) for answer in answers} == {BudgetExceeded}
    assert provider.request_count == 0


def test_the_sdks_own_retries_are_one_call_to_a_handler(provider, chat, watchdog, balance):
    """Three requests, one reservation: why max_retries=0, or guard(model), is asked for."""
    provider.reset(
        [Reply(status=500, headers={"retry-after-ms": "1"}), Reply(status=500, headers={"retry-after-ms": "1"}), Reply()]
    )
    one = watchdog(budgets=[Budget(usd=1, per="lifetime")])
    chat(max_tokens=9, max_retries=2).invoke("Hello", {"callbacks": [ClevAgentCallbackHandler(watchdog=one)]})
    assert provider.request_count == 3
    assert one.process_run.summary().total.calls == 1
    assert balance(one).spent == provider.billed_pico


def test_gather_after_a_refusal(aio, provider, chat, config):
    async def work():
        model = chat(max_tokens=9)
        return await asyncio.gather(*(model.ainvoke("Hello", config) for _ in range(20)), return_exceptions=True)

    assert {type(answer) for answer in aio(work())} == {BudgetExceeded}
    assert provider.request_count == 0
