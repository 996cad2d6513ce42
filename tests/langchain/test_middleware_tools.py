"""An agent with ``BudgetMiddleware``: its tools, its loops, pauses for a person, and agents inside tools."""

from __future__ import annotations

import gc
import threading
from typing import Annotated

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, HumanInTheLoopMiddleware, hook_config
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt

import clevagent
from clevagent import Budget, BudgetBusy, BudgetExceeded, LoopDetected, LoopGuard, hookimpl
from clevagent.testing import Reply
from clevagent_langchain import BudgetMiddleware, ClevAgentCallbackHandler

HELLO = {"messages": [("user", "What did Ada write?")]}

both = pytest.mark.parametrize("is_async", [False, True])
handled = pytest.mark.parametrize("has_handler", [False, True])


class Runs:
    """Keeps the summary of every run that has ended, and every call that was settled."""

    def __init__(self):
        self.ended = []
        self.settled = []

    @hookimpl
    def clevagent_run_ended(self, run, summary):
        self.ended.append(summary)

    @hookimpl
    def clevagent_call_settled(self, run, call, outcome):
        self.settled.append((call, outcome))

    def tools(self):
        return [(call, outcome) for call, outcome in self.settled if isinstance(call, clevagent.ToolCall)]


@pytest.fixture
def runs():
    return Runs()


def calls(*asked):
    """An answer that asks for tools."""
    return Reply(text="", tool_calls=list(asked))


def find(query):
    return ("search", {"query": query})


def search(query: str) -> str:
    """Search the archive."""
    return f"nothing about {query}"


def is_closing(body):
    return "Answer now" in str(body["messages"][-1])


def run(aio, is_async, agent, value=HELLO, config=None):
    return aio(agent.ainvoke(value, config)) if is_async else agent.invoke(value, config)


def with_handler(has_handler, watchdog):
    return {"callbacks": [ClevAgentCallbackHandler(watchdog=watchdog)]} if has_handler else None


def assert_valid(messages):
    open_calls = set()
    for message in messages:
        if isinstance(message, ToolMessage):
            open_calls.remove(message.tool_call_id)
        else:
            assert not open_calls
            if isinstance(message, AIMessage):
                open_calls = {call["id"] for call in message.tool_calls}
    assert not open_calls
    assert isinstance(messages[-1], AIMessage)
    assert not messages[-1].tool_calls


def refusals(state):
    return [message.text for message in state["messages"] if isinstance(message, ToolMessage) and message.status == "error"]


# -- ceilings of tools ----------------------------------------------------------------------------------------------------


@both
@handled
def test_a_model_that_is_told_of_a_refused_tool_can_finish_without(aio, provider, chat, watchdog, runs, is_async, has_handler):
    provider.reset([calls(find("a")), calls(find("b")), Reply(text="Found a.")])
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1, tool="search")], watchdog=one)
    state = run(aio, is_async, create_agent(chat(), [search], middleware=[ours]), config=with_handler(has_handler, one))
    assert provider.request_count == 3
    assert_valid(state["messages"])
    [told] = refusals(state)
    assert "The tool 'search' was not run" in told
    assert "1 of 1 tool calls" in told
    assert state["messages"][-1].text == "Found a."
    assert "clevagent" not in state["messages"][-1].response_metadata
    assert (runs.ended[0].tool_calls, runs.ended[0].refusals) == (1, 1)


@both
@handled
def test_a_refused_tool_that_is_asked_for_again_ends_the_agent(aio, provider, chat, watchdog, runs, is_async, has_handler):
    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=2)], watchdog=one)
    state = run(aio, is_async, create_agent(chat(), [search], middleware=[ours]), config=with_handler(has_handler, one))
    assert provider.request_count == 4
    assert_valid(state["messages"])
    assert len(refusals(state)) == 2
    assert state["messages"][-1].response_metadata["clevagent"]["unit"] == "tool_calls"
    assert runs.ended[0].tool_calls == 2


@both
@pytest.mark.parametrize("is_around", [False, True])
def test_a_ceiling_that_covers_model_calls_too_ends_the_agent_with_the_first_refused_tool(
    aio, provider, chat, watchdog, is_async, is_around
):
    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    budgets = [Budget(tool_calls=1)] if is_around else [Budget(llm_calls=9, tool_calls=1)]
    one = watchdog(budgets=budgets if is_around else [])
    ours = BudgetMiddleware(budgets=[] if is_around else budgets, watchdog=one)
    state = run(aio, is_async, create_agent(chat(), [search], middleware=[ours]))
    assert provider.request_count == 2
    assert_valid(state["messages"])
    assert state["messages"][-1].response_metadata["clevagent"]["unit"] == "tool_calls"


@both
@pytest.mark.parametrize(("answer", "requests"), [("warn", 3), (None, 1)])
def test_a_callable_decides_for_its_budget(aio, provider, chat, watchdog, is_async, answer, requests):
    """It lets the agent go on past the ceiling, or not; not, the agent ends."""
    asked = []

    def decide(incident):
        asked.append(incident.unit)
        return answer

    provider.reset([calls(find("a")), calls(find("b")), Reply(text="Done.")])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=1, on_exceed=decide)], watchdog=watchdog())
    state = run(aio, is_async, create_agent(chat(), [search], middleware=[ours]))
    assert set(asked) == {"llm_calls"}
    assert (provider.request_count, state["messages"][-1].text == "Done.") == (requests, answer == "warn")
    assert_valid(state["messages"])


@both
def test_money_that_is_kept_pays_for_the_end_after_a_refused_tool(aio, provider, chat, watchdog, is_async):
    provider.reset(lambda body: Reply(text="No more.") if is_closing(body) else calls(find("x")))
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1), Budget(usd=1, keep_usd=0.1)], watchdog=watchdog())
    state = run(aio, is_async, create_agent(chat(max_tokens=99), [search], middleware=[ours]))
    assert provider.request_count == 4
    assert state["messages"][-1].text == "No more."
    assert_valid(state["messages"])


@both
@handled
def test_each_of_several_parallel_calls_is_answered(aio, provider, chat, watchdog, runs, is_async, has_handler):
    """Three at once with room for one: the others are refused, and the model has one more turn to do without."""
    provider.reset([calls(find("a"), find("b"), find("c")), Reply(text="One will do.")])
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1)], watchdog=one)
    state = run(aio, is_async, create_agent(chat(), [search], middleware=[ours]), config=with_handler(has_handler, one))
    assert provider.request_count == 2
    assert_valid(state["messages"])
    assert len(refusals(state)) == 2
    assert state["messages"][-1].text == "One will do."
    assert runs.ended[0].tool_calls == 1


@both
@handled
def test_on_request_a_refused_tool_raises(aio, provider, chat, watchdog, is_async, has_handler):
    provider.reset(lambda body: calls(find("x")))
    one = watchdog()
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1)], on_exceed="raise", watchdog=one)
    with pytest.raises(BudgetExceeded, match="search"):
        run(aio, is_async, create_agent(chat(), [search], middleware=[ours]), config=with_handler(has_handler, one))
    assert provider.request_count == 2


def test_a_tool_that_ends_the_agent_has_a_closing_message_when_it_is_refused(provider, chat, watchdog):
    @tool(return_direct=True)
    def final(query: str) -> str:
        """Answer the user."""
        return query

    one = watchdog(budgets=[Budget(tool_calls=1, per="lifetime")])
    provider.reset([calls(("final", {"query": "x"}))])
    agent = create_agent(chat(), [final], middleware=[BudgetMiddleware(watchdog=one)])
    assert isinstance(agent.invoke(HELLO)["messages"][-1], ToolMessage)
    state = agent.invoke(HELLO)
    assert_valid(state["messages"])
    assert state["messages"][-1].response_metadata["clevagent"]["unit"] == "tool_calls"
    assert provider.request_count == 2


@both
def test_what_a_tool_calls_counts_against_the_tool(aio, provider, chat, watchdog, runs, is_async):
    """Guarded or not, models inside a tool are covered by its budget."""
    one = watchdog(plugins=[runs])
    guarded, plain = clevagent.guard(chat(max_tokens=9), watchdog=one), chat(model="gpt-4o-mini", max_tokens=9)

    @tool
    async def ask_async(query: str) -> str:
        """Ask."""
        return (await guarded.ainvoke(query)).text + (await plain.ainvoke(query)).text

    @tool
    def ask(query: str) -> str:
        """Ask."""
        return guarded.invoke(query).text + plain.invoke(query).text

    asked = ask_async if is_async else ask
    provider.reset(
        [calls((asked.name, {"query": "x"})), Reply(), Reply(), calls((asked.name, {"query": "y"})), Reply(text="Done.")]
    )
    ours = BudgetMiddleware(budgets=[Budget(tool="ask*", llm_calls=2)], watchdog=one)
    state = run(aio, is_async, create_agent(chat(max_tokens=9), [asked], middleware=[ours]))
    assert provider.request_count == 5
    assert state["messages"][-1].text == "Done."
    assert len(refusals(state)) == 1
    [summary] = runs.ended
    assert summary.by_tool[asked.name].calls == 2
    assert summary.total.calls == 5
    assert summary.total.cost_usd == pytest.approx(float(provider.billed_usd))


def test_a_raw_thread_of_a_tool_counts_against_the_run(provider, chat, watchdog, runs):
    one = watchdog(plugins=[runs])
    guarded = clevagent.guard(chat(max_tokens=9), watchdog=one)

    @tool
    def ask(query: str) -> str:
        """Ask."""
        thread = threading.Thread(target=guarded.invoke, args=(query,))
        thread.start()
        thread.join()
        return "asked"

    provider.reset([calls(("ask", {"query": "x"})), Reply(), Reply(text="Done.")])
    create_agent(chat(max_tokens=9), [ask], middleware=[BudgetMiddleware(watchdog=one)]).invoke(HELLO)
    assert [summary.total.calls for summary in runs.ended] == [3]


@both
def test_room_that_is_only_held_is_raised_out_of_a_tool(aio, provider, chat, watchdog, is_async):
    provider.reset([calls(find("a"))])
    one = watchdog(budgets=[Budget(tool_calls=1, per="lifetime")], wait_s=0)
    held = one.process_run.open(clevagent.ToolCall(tool="search"))
    agent = create_agent(chat(), [search], middleware=[BudgetMiddleware(watchdog=one)])
    with pytest.raises(BudgetBusy):
        run(aio, is_async, agent)
    held.release()


# -- tools as without us --------------------------------------------------------------------------------------------------


@both
@handled
def test_a_tool_that_raises_raises_as_ever(aio, provider, chat, watchdog, runs, is_async, has_handler):
    def broken(query: str) -> str:
        """Break."""
        raise ValueError("broken")

    provider.reset([calls(("broken", {"query": "x"}))])
    one = watchdog(plugins=[runs])
    agent = create_agent(chat(), [broken], middleware=[BudgetMiddleware(budgets=[Budget(tool_calls=9)], watchdog=one)])
    with pytest.raises(ValueError, match="broken"):
        run(aio, is_async, agent, config=with_handler(has_handler, one))
    [(call, outcome)] = runs.tools()
    assert (call.tool, call.arguments, call.node) == ("broken", {"query": "x"}, "tools")
    assert isinstance(outcome.error, ValueError)


@both
@handled
def test_arguments_that_do_not_fit_are_answered_as_ever(aio, provider, chat, watchdog, runs, is_async, has_handler):
    provider.reset([calls(("search", {"question": "x"})), calls(("unheard_of", {})), Reply(text="Sorry.")])
    one = watchdog(plugins=[runs])
    agent = create_agent(chat(), [search], middleware=[BudgetMiddleware(budgets=[Budget(tool_calls=9)], watchdog=one)])
    state = run(aio, is_async, agent, config=with_handler(has_handler, one))
    assert [text[:30] for text in refusals(state)] == ["Error invoking tool 'search' w", "Error: unheard_of is not a val"]
    assert [outcome.error is not None for _, outcome in runs.tools()] == [True]
    assert_valid(state["messages"])


@both
def test_a_tool_may_return_a_command(aio, provider, chat, watchdog, runs, is_async):
    @tool
    def note(text: str, tool_call_id: Annotated[str, InjectedToolCallId]) -> Command:
        """Take a note."""
        return Command(update={"messages": [ToolMessage(f"noted {text}", tool_call_id=tool_call_id)]})

    provider.reset([calls(("note", {"text": "a"})), Reply(text="Done.")])
    one = watchdog(plugins=[runs])
    state = run(aio, is_async, create_agent(chat(), [note], middleware=[BudgetMiddleware(watchdog=one)]))
    assert [message.text for message in state["messages"][-2:]] == ["noted a", "Done."]
    [(call, outcome)] = runs.tools()
    assert call.arguments == {"text": "a"}
    assert "noted a" in str(outcome.result)
    assert "call_1_0" not in str(outcome.result), "what is made anew for each call would look like news"


@both
@handled
def test_what_came_back_is_told_to_observers(aio, provider, chat, watchdog, runs, is_async, has_handler):
    provider.reset([calls(find("a")), Reply()])
    one = watchdog(plugins=[runs])
    config = {**(with_handler(has_handler, one) or {}), "configurable": {"thread_id": "t1"}}
    run(aio, is_async, create_agent(chat(), [search], middleware=[BudgetMiddleware(watchdog=one)]), config=config)
    [(call, outcome)] = runs.tools()
    assert (call.tool, call.arguments, call.node, call.thread_id) == ("search", {"query": "a"}, "tools", "t1")
    assert outcome.result == "nothing about a"


# -- loops ----------------------------------------------------------------------------------------------------------------


def asks_the_same(body):
    return Reply(text="Nothing.") if is_closing(body) else calls(find("the same"))


def notes(provider):
    return [request.number for request in provider.requests if "You repeat yourself" in str(request.body["messages"][-1])]


@pytest.mark.slow
@both
@handled
def test_a_loop_is_told_to_the_model_once_and_ends_the_agent_the_second_time(
    aio, provider, chat, watchdog, runs, is_async, has_handler
):
    """Five rounds, the note with the sixth request, five rounds more, and no request after that."""
    provider.reset(asks_the_same)
    one = watchdog(plugins=[runs])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=one)])
    state = run(aio, is_async, agent, config=with_handler(has_handler, one))
    assert notes(provider) == [6]
    assert provider.request_count == 10
    told = provider.requests[5].body["messages"][-1]
    assert "tool 'search' was called 5 times" in told["content"]
    assert not any("You repeat yourself" in message.text for message in state["messages"])
    assert_valid(state["messages"])
    last = state["messages"][-1]
    assert "it repeats itself" in last.text
    assert last.response_metadata["clevagent"]["kind"] == "loop"
    assert runs.ended[0].total.calls == 10


@pytest.mark.slow
@both
def test_a_model_that_heeds_the_note_goes_on(aio, provider, chat, watchdog, is_async):
    def answer(body):
        return Reply(text="You are right.") if "You repeat yourself" in str(body["messages"][-1]) else calls(find("the same"))

    provider.reset(answer)
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=watchdog())])
    state = run(aio, is_async, agent)
    assert provider.request_count == 6
    assert state["messages"][-1].text == "You are right."


@pytest.mark.slow
def test_a_note_on_a_loop_is_one_that_anthropic_takes(provider, anthropic, watchdog):
    """No system message in the middle, and no two of the same role in a row."""
    provider.reset(asks_the_same)
    create_agent(anthropic(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=watchdog())]).invoke(HELLO)
    assert (notes(provider), provider.request_count) == ([6], 10)
    roles = [message["role"] for message in provider.requests[5].body["messages"]]
    assert roles == ["user", *["assistant", "user"] * 5]


@pytest.mark.slow
def test_money_that_is_kept_pays_for_the_end_after_a_loop(provider, chat, watchdog):
    provider.reset(asks_the_same)
    ours = BudgetMiddleware(budgets=[Budget(usd=1, keep_usd=0.1)], watchdog=watchdog())
    state = create_agent(chat(max_tokens=9), [search], middleware=[ours]).invoke(HELLO)
    assert provider.request_count == 11
    assert state["messages"][-1].text == "Nothing."


@pytest.mark.slow
@both
def test_on_request_a_loop_that_was_told_raises(aio, provider, chat, watchdog, is_async):
    provider.reset(asks_the_same)
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(on_loop="raise", watchdog=watchdog())])
    with pytest.raises(LoopDetected):
        run(aio, is_async, agent)
    assert (notes(provider), provider.request_count) == ([6], 10)


@pytest.mark.slow
def test_on_request_loops_are_only_logged(provider, chat, watchdog):
    provider.reset([calls(find("the same"))] * 8 + [Reply(text="done")])
    one = watchdog()
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(on_loop="warn", watchdog=one)])
    assert agent.invoke(HELLO)["messages"][-1].text == "done"
    assert (notes(provider), provider.request_count) == ([], 9)
    assert {(incident.kind, incident.action) for incident in one.recent} == {("loop", "warn")}


def test_a_guard_that_the_user_gave_elsewhere_raises_where_loops_are_only_logged(provider, chat, watchdog):
    provider.reset(asks_the_same)
    one = watchdog(plugins=[LoopGuard()])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(on_loop="warn", watchdog=one)])
    with pytest.raises(LoopDetected):
        agent.invoke(HELLO)
    assert provider.request_count == 5


@both
def test_a_loop_that_is_found_between_parallel_tools_is_told_as_their_answer(aio, provider, chat, watchdog, is_async):
    """The guard speaks while a turn of tools goes on: each is answered, and the model hears of it from there."""

    class Repeating:
        """Finds a loop at the third tool call, in place of the real guard."""

        left = 2

        @hookimpl
        def clevagent_before_call(self, run, call):
            if isinstance(call, clevagent.ToolCall):
                self.left -= 1
            if run.root.forgiven == 0 and self.left < 0:
                return clevagent.Stop(incident=INCIDENT)
            return None

    provider.reset([calls(find("a"), find("b"), find("c"), find("d")), Reply(text="Understood.")])
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=watchdog(plugins=[Repeating()]))])
    state = run(aio, is_async, agent)
    assert_valid(state["messages"])
    assert provider.request_count == 2
    assert state["messages"][-1].text == "Understood."
    assert refusals(state)
    assert all("You repeat yourself" in text for text in refusals(state))


def test_a_guard_that_does_not_forgive_ends_the_agent(provider, chat, watchdog):
    class Stubborn:
        @hookimpl
        def clevagent_before_call(self, run, call):
            return clevagent.Stop(incident=INCIDENT)

    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=watchdog(plugins=[Stubborn()]))])
    assert "it repeats itself" in agent.invoke(HELLO)["messages"][-1].text
    assert provider.request_count == 0


def test_what_another_guard_stops_ends_the_agent_too(provider, chat, watchdog):
    class Closed:
        @hookimpl
        def clevagent_before_call(self, run, call):
            return clevagent.Stop(incident=clevagent.Incident(kind="hours", message="Closed until nine.", details={"at": {1, 2}}))

    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=watchdog(plugins=[Closed()]))])
    last = agent.invoke(HELLO)["messages"][-1]
    assert "Closed until nine" in last.text
    assert last.response_metadata["clevagent"]["kind"] == "hours"
    assert provider.request_count == 0


INCIDENT = clevagent.Incident(kind="loop", message="again", details={"calls": ["tool 'search'"], "times": 3})


@pytest.mark.slow
def test_many_agents_that_do_the_same_are_no_loop(provider, chat, watchdog):
    """What one invocation does tells nothing of the next, also within one run."""
    one = watchdog()
    agent = create_agent(chat(max_tokens=9), [search], middleware=[BudgetMiddleware(watchdog=one)])
    with one.run():
        for _ in range(12):
            provider.reset([calls(find("the same")), Reply(text="done")])
            assert agent.invoke(HELLO)["messages"][-1].text == "done"


# -- pauses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
@handled
def test_an_agent_that_waited_for_a_person_goes_on_in_the_same_run(aio, provider, chat, watchdog, runs, is_async, has_handler):
    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=one)
    agent = create_agent(
        chat(max_tokens=9),
        [search],
        middleware=[HumanInTheLoopMiddleware(interrupt_on={"search": True}), ours],
        checkpointer=InMemorySaver(),
    )
    config = {**(with_handler(has_handler, one) or {}), "configurable": {"thread_id": "t1"}}
    state = run(aio, is_async, agent, config=config)
    for _ in range(3):
        assert "__interrupt__" in state
        gc.collect()
        assert not one._active, "who waits must not draw the calls of others"
        assert len(ours._invocations._resumable) == 1
        state = run(aio, is_async, agent, Command(resume={"decisions": [{"type": "approve"}]}), config)
    assert provider.request_count == 3
    assert_valid(state["messages"])
    assert not ours._invocations._resumable
    summary = runs.ended[-1] if not has_handler else next(one for one in runs.ended if one.tool_calls == 3)
    assert (summary.total.calls, summary.tool_calls) == (3, 3)


@pytest.mark.slow
@both
def test_an_agent_that_is_resumed_inside_another_block_counts_there_too(aio, provider, chat, watchdog, is_async):
    """Its own ceiling goes on, and so does that of each request's block."""
    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    one = watchdog()
    agent = create_agent(
        chat(max_tokens=9),
        [search],
        middleware=[
            HumanInTheLoopMiddleware(interrupt_on={"search": True}),
            BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=one),
        ],
        checkpointer=InMemorySaver(),
    )
    config, approve = {"configurable": {"thread_id": "t1"}}, Command(resume={"decisions": [{"type": "approve"}]})
    with one.run() as first:
        run(aio, is_async, agent, config=config)
    with one.run(budgets=[Budget(tool_calls=1), Budget(usd=1)]) as second:
        run(aio, is_async, agent, approve, config)
    run(aio, is_async, agent, approve, config)
    with one.run(budgets=[Budget(llm_calls=9)]) as third:
        state = run(aio, is_async, agent, approve, config)
    assert provider.request_count == 3
    assert [(block.summary().total.calls, block.summary().tool_calls) for block in (first, second, third)] == [
        (1, 0),
        (1, 1),
        (0, 1),
    ]
    assert state["messages"][-1].response_metadata["clevagent"]["budget"] == "3 llm_calls per run"


@both
def test_a_block_around_a_resumed_agent_stops_it(aio, provider, chat, watchdog, is_async):
    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    one = watchdog()
    hitl = HumanInTheLoopMiddleware(interrupt_on={"search": True})
    agent = create_agent(
        chat(max_tokens=9), [search], middleware=[hitl, BudgetMiddleware(watchdog=one)], checkpointer=InMemorySaver()
    )
    config, approve = {"configurable": {"thread_id": "t1"}}, Command(resume={"decisions": [{"type": "approve"}]})
    run(aio, is_async, agent, config=config)
    with one.run(budgets=[Budget(llm_calls=1)]):
        run(aio, is_async, agent, approve, config)
        state = run(aio, is_async, agent, approve, config)
    assert provider.request_count == 2
    assert_valid(state["messages"])


@both
def test_a_tool_that_asks_a_person_is_counted_once(aio, provider, chat, watchdog, runs, is_async):
    @tool
    def ask(query: str) -> str:
        """Ask a person."""
        return str(interrupt(query))

    provider.reset([calls(("ask", {"query": "May I?"})), Reply(text="Thanks.")])
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(tool_calls=1)], watchdog=one)
    agent = create_agent(chat(max_tokens=9), [ask], middleware=[ours], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "t1"}}
    assert "__interrupt__" in run(aio, is_async, agent, config=config)
    state = run(aio, is_async, agent, Command(resume="yes"), config)
    assert [message.text for message in state["messages"][-2:]] == ["yes", "Thanks."]
    [summary] = runs.ended
    assert (summary.total.calls, summary.tool_calls, summary.refusals) == (2, 1, 0)


def let_go(middleware):
    """Wait until nothing refers to a graph that waits: the thread of a tool may still have its context in hand."""
    for _ in range(1000):
        gc.collect()
        if all(one.seat is None or one.seat() is None for one in middleware._invocations._resumable.values()):
            return
        threading.Event().wait(0.01)


@pytest.mark.slow
@both
def test_a_run_that_nobody_resumed_ends_with_the_next_of_its_conversation(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(lambda body: calls(find("x")))
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=one)
    hitl = HumanInTheLoopMiddleware(interrupt_on={"search": True})
    agent = create_agent(chat(max_tokens=9), [search], middleware=[hitl, ours], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "t1"}}
    run(aio, is_async, agent, config=config)
    let_go(ours)
    assert not runs.ended
    run(aio, is_async, agent, config=config)
    assert len(runs.ended) == 1
    assert len(ours._invocations._resumable) == 1


@both
def test_an_agent_that_failed_and_is_invoked_again_from_its_checkpoint_goes_on_in_the_same_run(
    aio, provider, chat, watchdog, runs, is_async
):
    provider.reset([calls(find("a")), Reply(status=400), calls(find("b")), calls(find("c"))])
    one = watchdog(plugins=[runs])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=2)], watchdog=one)
    agent = create_agent(chat(max_tokens=9), [search], middleware=[ours], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "t1"}}
    with pytest.raises(Exception, match="400"):
        run(aio, is_async, agent, config=config)
    state = run(aio, is_async, agent, None, config)
    assert_valid(state["messages"])
    assert [request.status for request in provider.requests] == [200, 400, 200]
    assert [summary.total.calls for summary in runs.ended] == [2]


@pytest.mark.slow
def test_an_agent_that_another_process_began_is_held_to_its_budget_from_there(provider, chat, watchdog, runs):
    """What it had spent is not known here; a budget per thread, in a ledger that both share, would know."""
    saver, config = InMemorySaver(), {"configurable": {"thread_id": "t1"}}
    hitl = HumanInTheLoopMiddleware(interrupt_on={"ask": True})

    @tool
    def ask(query: str) -> str:
        """Ask."""
        return "no"

    def here(**settings):
        ours = BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=watchdog(**settings))
        return create_agent(chat(max_tokens=9), [ask, search], middleware=[hitl, ours], checkpointer=saver)

    provider.reset([calls(*[("ask", {"query": query}) for query in "xyz"])])
    here().invoke(HELLO, config)
    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    state = here(plugins=[runs]).invoke(Command(resume={"decisions": [{"type": "approve"}] * 3}), config)
    assert provider.request_count == 3
    assert_valid(state["messages"])
    assert [(summary.total.calls, summary.tool_calls) for summary in runs.ended] == [(3, 6)]


@pytest.mark.slow
def test_those_that_wait_are_bounded(monkeypatch, provider, chat, watchdog, runs):
    import clevagent_langchain.invocations

    monkeypatch.setattr(clevagent_langchain.invocations, "_RESUMABLE", 3)
    provider.reset(lambda body: calls(find("x")))
    ours = BudgetMiddleware(watchdog=watchdog(plugins=[runs]))
    hitl = HumanInTheLoopMiddleware(interrupt_on={"search": True})
    agent = create_agent(chat(max_tokens=9), [search], middleware=[hitl, ours], checkpointer=InMemorySaver())
    for number in range(5):
        agent.invoke(HELLO, {"configurable": {"thread_id": str(number)}})
        gc.collect()
    assert (len(ours._invocations._resumable), len(runs.ended)) == (3, 2)


@both
def test_a_conversation_has_a_ceiling_across_invocations(aio, provider, chat, watchdog, is_async):
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=2, per="thread"), Budget(tool_calls=1, per="thread")], watchdog=watchdog())
    agent = create_agent(chat(max_tokens=9), [search], middleware=[ours], checkpointer=InMemorySaver())
    for thread in ("a", "a", "a", "b"):
        state = run(aio, is_async, agent, config={"configurable": {"thread_id": thread}})
        assert ("clevagent" in state["messages"][-1].response_metadata) == (
            provider.request_count == 2 and len(state["messages"]) > 4
        )
    assert provider.request_count == 3


def test_middleware_that_jumps_past_the_beginning_changes_nothing(provider, chat, watchdog, runs):
    class Jumping(AgentMiddleware):
        @hook_config(can_jump_to=["model"])
        def before_agent(self, state, runtime):
            return {"jump_to": "model"}

    provider.reset(lambda body: calls(find(f"page {len(body['messages'])}")))
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=3)], watchdog=watchdog(plugins=[runs]))
    state = create_agent(chat(max_tokens=9), [search], middleware=[Jumping(), ours]).invoke(HELLO)
    assert provider.request_count == 3
    assert_valid(state["messages"])
    assert [summary.total.calls for summary in runs.ended] == [3]


# -- agents inside tools --------------------------------------------------------------------------------------------------


def agent_in_a_tool(inner, is_async):
    @tool
    async def delegate_async(question: str) -> str:
        """Delegate."""
        return (await inner.ainvoke({"messages": [("user", question)]}))["messages"][-1].text

    @tool
    def delegate(question: str) -> str:
        """Delegate."""
        return inner.invoke({"messages": [("user", question)]})["messages"][-1].text

    return delegate_async if is_async else delegate


def delegating(body):
    """The outer agent delegates once and ends; the inner one searches for ever."""
    names = {offered["function"]["name"] for offered in body.get("tools", [])}
    if "search" in names:
        return calls(find(f"page {len(body['messages'])}"))
    if body["messages"][-1]["role"] == "tool":
        return Reply(text="Delegated.")
    return calls((next(iter(names)), {"question": "Find it"}))


@pytest.mark.slow
@both
@handled
@pytest.mark.parametrize("is_shared", [False, True])
def test_an_agent_inside_a_tool_is_a_run_inside_the_run(aio, provider, chat, watchdog, runs, is_async, has_handler, is_shared):
    """It ends at its own ceiling, gracefully, and the outer agent goes on."""
    provider.reset(delegating)
    one = watchdog(plugins=[runs])
    outer_budget = BudgetMiddleware(budgets=[Budget(llm_calls=5, name="each")], watchdog=one)
    inner_budget = outer_budget if is_shared else BudgetMiddleware(budgets=[Budget(llm_calls=3, name="inner")], watchdog=one)
    inner = create_agent(chat(max_tokens=9), [search], middleware=[inner_budget])
    outer = create_agent(chat(max_tokens=9), [agent_in_a_tool(inner, is_async)], middleware=[outer_budget])
    state = run(aio, is_async, outer, config=with_handler(has_handler, one))
    assert_valid(state["messages"])
    inner_summary, outer_summary = runs.ended[:2]
    # Shared, the inner agent stops at what the outer one has left: 5 in all.
    assert inner_summary.total.calls == (4 if is_shared else 3)
    assert outer_summary.total.calls == provider.request_count == 5
    assert outer_summary.tool_calls == inner_summary.tool_calls + 1
    assert outer_summary.total.cost_usd == pytest.approx(float(provider.billed_usd))
    assert ("clevagent" in state["messages"][-1].response_metadata) == is_shared


@both
def test_an_agent_inside_a_tool_without_middleware_counts_against_the_outer_one(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(delegating)
    one = watchdog(plugins=[runs])
    inner = create_agent(chat(max_tokens=9), [search])
    ours = BudgetMiddleware(budgets=[Budget(llm_calls=4)], watchdog=one)
    outer = create_agent(chat(max_tokens=9), [agent_in_a_tool(inner, is_async)], middleware=[ours])
    state = run(aio, is_async, outer)
    assert provider.request_count == 4
    assert_valid(state["messages"])
    assert "clevagent" in state["messages"][-1].response_metadata
    assert [summary.total.calls for summary in runs.ended] == [4]


@both
def test_an_agent_inside_a_tool_that_raises_at_its_ceiling_is_a_refused_tool(aio, provider, chat, watchdog, is_async):
    provider.reset(delegating)
    one = watchdog()
    strict = BudgetMiddleware(budgets=[Budget(llm_calls=2)], on_exceed="raise", watchdog=one)
    inner = create_agent(chat(max_tokens=9), [search], middleware=[strict])
    outer = create_agent(chat(max_tokens=9), [agent_in_a_tool(inner, is_async)], middleware=[BudgetMiddleware(watchdog=one)])
    state = run(aio, is_async, outer)
    assert provider.request_count == 4
    assert len(refusals(state)) == 1
    assert state["messages"][-1].text == "Delegated."


@pytest.mark.slow
@both
def test_an_agent_inside_a_tool_that_waits_for_a_person_goes_on_in_its_run(aio, provider, chat, watchdog, runs, is_async):
    provider.reset(delegating)
    one = watchdog(plugins=[runs])
    hitl = HumanInTheLoopMiddleware(interrupt_on={"search": True})
    inner = create_agent(
        chat(max_tokens=9), [search], middleware=[hitl, BudgetMiddleware(budgets=[Budget(llm_calls=2)], watchdog=one)]
    )
    outer = create_agent(
        chat(max_tokens=9),
        [agent_in_a_tool(inner, is_async)],
        middleware=[BudgetMiddleware(watchdog=one)],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "t1"}}
    state = run(aio, is_async, outer, config=config)
    for _ in range(2):
        assert "__interrupt__" in state
        state = run(aio, is_async, outer, Command(resume={"decisions": [{"type": "approve"}]}), config)
    assert provider.request_count == 4
    assert_valid(state["messages"])
    assert [(summary.total.calls, summary.tool_calls) for summary in runs.ended] == [(2, 2), (4, 3)]
