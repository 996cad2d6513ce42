"""The loop guard as users meet it: through ``tool_call``, ``llm_call`` and ``ping``, told once, stopped until it is forgiven."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import sys
import threading
import weakref
from collections import deque
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

import clevagent
from clevagent import Budget, BudgetExceeded, LoopDetected, LoopGuard, Price, UsageError
from clevagent.testing import FakeClock
from clevagent_core.calls import Step, ToolCall, Usage
from clevagent_core.guards import loop

from .loops.corpus import HEALTHY, LOOPS, Call

PRICES = {"even": Price(input=0, output=0), "cent": Price(input=0, output=10_000)}
BUILTIN = "clevagent_core.guards.loop"


@pytest.fixture
def init(clock):
    def init(**options):
        return clevagent.init(**{"clock": clock, "prices": PRICES, "wait_s": 0, **options})

    return init


def use(tool="search", arguments=None, *, result: object = "nothing found", error=None):
    """Make one tool call that says what came back."""
    with clevagent.tool_call(tool, arguments) as call:
        call.settle(result=result, error=error)


def ask(*messages, answer: object = "I do not know.", model="even", node=None):
    """Make one model call that says what was answered."""
    with clevagent.llm_call(model=model, input=list(messages), max_output_tokens=1, node=node) as call:
        call.settle(input_tokens=1, output_tokens=1, answer=answer)


def told(watchdog):
    return [incident for incident in watchdog.recent if incident.kind == "loop"]


def calls_of(run):
    """How many calls were let through, of tools and models."""
    summary = run.summary()
    return summary.tool_calls + summary.total.calls


def actions(watchdog):
    return [incident.action for incident in told(watchdog)]


def rules(watchdog):
    return [incident.details["rule"] for incident in told(watchdog)]


def message_of(function, *args, **kwargs):
    with pytest.raises(UsageError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def in_threads(count, function):
    """Run in raw threads that begin together; give back what they raised."""
    barrier, errors = threading.Barrier(count), []

    def work(number):
        barrier.wait(10)
        try:
            function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return errors


# -- what is done about a loop ----------------------------------------------------------------------------------------------


def test_by_default_a_loop_is_told_once_and_nothing_is_stopped(init):
    watchdog = init()
    with clevagent.run() as run:
        for _ in range(20):
            use()
    assert actions(watchdog) == ["warn"]
    assert told(watchdog)[0].run_id == run.run_id
    assert calls_of(run) == 20


def test_a_loop_is_told_at_the_fifth_time(init):
    watchdog = init()
    with clevagent.run():
        for _ in range(4):
            use()
        assert told(watchdog) == []
        use()
        assert len(told(watchdog)) == 1


def test_after_news_a_new_loop_is_told_again(init):
    watchdog = init()
    with clevagent.run():
        for _ in range(6):
            use()
        use(result="one hit")
        for _ in range(3):
            use()
        assert len(told(watchdog)) == 1
        for _ in range(6):
            use()
    assert len(told(watchdog)) == 2


def test_observers_hear_of_a_loop(init, heard):
    watchdog = init(plugins=[heard])
    with clevagent.run():
        for _ in range(6):
            use()
    assert watchdog.flush(5) == 0
    assert heard.kinds == ["loop"]


@pytest.mark.parametrize("where", ["init", "stop", "run"])
def test_a_loop_refuses_the_next_call_and_every_later_one(init, where):
    watchdog = init(**{"init": {"on_loop": "raise"}, "stop": {"on_loop": "stop"}, "run": {}}[where])
    with clevagent.run(guards=[LoopGuard()] if where == "run" else []) as run:
        for _ in range(5):
            use()
        assert actions(watchdog) == ["raise"]
        with pytest.raises(LoopDetected) as caught:
            use()
        for refused in (partial(use, "something_new", 1), partial(ask, "Hello"), partial(use, "another", result="news")):
            with pytest.raises(LoopDetected) as again:
                refused()
            assert again.value.incident == caught.value.incident
        # Swallowed, as frameworks do.
        for _ in range(5):
            with contextlib.suppress(Exception):
                use("another", 2)
    assert actions(watchdog) == ["raise"]
    assert calls_of(run) == 5
    assert run.summary().refusals == 9


def test_a_loop_of_model_calls_refuses_tools_too(init):
    init(on_loop="raise")
    with clevagent.run():
        for _ in range(5):
            ask("Give the totals as JSON.")
        with pytest.raises(LoopDetected):
            use()


def test_async_calls_are_refused_too(init):
    init(on_loop="raise")

    async def work():
        async with clevagent.run():
            for _ in range(9):
                async with clevagent.tool_call("search") as call:
                    call.settle(result=[])

    with pytest.raises(LoopDetected):
        asyncio.run(work())


def test_forgiven_a_run_goes_on_until_it_loops_again(init):
    watchdog = init(on_loop="raise")
    with clevagent.run() as run:
        for times in range(1, 4):
            for _ in range(5):
                use()
            with pytest.raises(LoopDetected):
                use()
            assert len(told(watchdog)) == times
            run.forgive_loops()
        use()


def test_a_nested_run_forgives_for_the_whole_tree(init):
    init(on_loop="raise")
    with clevagent.run():
        for _ in range(5):
            use()
        with clevagent.run() as inner:
            with pytest.raises(LoopDetected):
                use()
            inner.forgive_loops()
            use()
        use()


def test_wrap_up_passes_and_the_stop_holds_after_it(init):
    init(on_loop="raise")
    with clevagent.run() as run:
        for _ in range(5):
            use()
        with run.wrap_up():
            ask("Say what you have.")
            use("send_report")
        with pytest.raises(LoopDetected):
            use()


def test_a_new_run_is_not_stopped_by_the_loop_of_the_one_before(init):
    init(on_loop="raise")
    with clevagent.run():
        for _ in range(5):
            use()
    with clevagent.run():
        use()


def test_a_callable_is_asked_once_and_the_run_stays_stopped(init):
    asked = []
    watchdog = init(on_loop=asked.append)
    with clevagent.run() as run:
        for _ in range(5):
            use()
        assert asked == []
        for _ in range(3):
            with pytest.raises(LoopDetected):
                use()
    assert [(incident.kind, incident.run_id, incident.details["times"]) for incident in asked] == [("loop", run.run_id, 5)]
    assert actions(watchdog) == ["raise"]


def test_a_callable_lets_the_run_go_on_and_is_asked_about_the_next_loop(init):
    asked = []

    def decide(incident):
        asked.append(incident)
        return "warn" if len(asked) < 3 else "raise"

    watchdog = init(on_loop=decide)
    made = 0
    with clevagent.run(), pytest.raises(LoopDetected):
        for _ in range(30):
            use()
            made += 1
    assert len(asked) == 3
    assert made == 15
    assert actions(watchdog) == ["warn", "warn", "raise"]
    assert told(watchdog)[0].message.endswith("It goes on, because the on_loop callable said so.")


def test_a_callable_that_raises_leaves_the_run_stopped(init, caplog):
    def broken(incident):
        raise ZeroDivisionError

    watchdog = init(on_loop=broken)
    with clevagent.run():
        for _ in range(5):
            use()
        for _ in range(3):
            with pytest.raises(LoopDetected):
                use()
    assert actions(watchdog) == ["raise"]
    assert caplog.text.count("The on_loop callable failed; the run stays stopped.") == 1


def test_a_callable_that_calls_a_model_is_refused_and_not_asked_again(init):
    asked = []

    def decide(incident):
        asked.append(incident)
        ask("Is this a loop?")
        return "warn"

    init(on_loop=decide)
    with clevagent.run():
        for _ in range(5):
            use()
        with pytest.raises(LoopDetected):
            use()
    assert len(asked) == 1


def test_threads_that_meet_a_loop_at_once_ask_the_callable_once(init):
    asked = []
    init(on_loop=asked.append)
    with clevagent.run() as run:
        for _ in range(5):
            use()

        def work(_):
            with run.activate():
                use()

        errors = in_threads(8, work)
    assert [type(error) for error in errors] == [LoopDetected] * 8
    assert len(asked) == 1


def test_a_dry_run_tells_once_and_stops_nothing(init):
    watchdog = init(on_loop="raise", dry_run=True)
    with clevagent.run() as run:
        for _ in range(20):
            use()
    assert actions(watchdog) == ["dry_run"]
    assert run.summary().refusals == 0


def test_a_dry_run_asks_no_callable(init):
    asked = []
    watchdog = init(on_loop=asked.append)
    with clevagent.run(dry_run=True):
        for _ in range(9):
            use()
    assert (asked, actions(watchdog)) == ([], ["dry_run"])


def test_blocked_the_guard_says_nothing(init):
    watchdog = init(block=[BUILTIN])
    with clevagent.run():
        for _ in range(9):
            use()
            clevagent.ping()
    assert told(watchdog) == []


def test_to_stop_loops_with_the_guard_blocked_is_a_mistake(init):
    message = message_of(init, block=[BUILTIN], on_loop="raise")
    assert "the plugin that finds loops is blocked" in message
    assert "Take it out of block=[...]" in message


def test_a_tool_that_gave_back_none_has_told_so(init):
    init(on_loop="raise")
    with clevagent.run() as run, pytest.raises(LoopDetected):
        for _ in range(9):
            with clevagent.tool_call("close_window") as call:
                call.settle(result=None)
    assert run.summary().tool_calls == 5


# -- how it is set ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "action"), [("warn", "warn"), ("raise", "raise"), ("alert_only", "warn"), ("stop", "raise"), (print, print)]
)
def test_actions_go_by_two_names(init, given, action):
    assert init(on_loop=given).settings.on_loop == action
    assert LoopGuard(on_loop=given)._on_loop == action


def test_a_loop_guard_raises_unless_it_is_told_otherwise():
    assert LoopGuard()._on_loop == "raise"


def test_actions_that_need_a_framework_are_refused(init):
    assert message_of(init, on_loop="halt") == snapshot(
        "on_loop='halt' needs an attachment that can end a framework's work gracefully, which this is not, so nothing was set. Use 'raise' and catch clevagent.LoopDetected around the agent; for an agent of create_agent, BudgetMiddleware(on_loop='halt') ends it gracefully."
    )
    assert message_of(LoopGuard, on_loop="ask") == snapshot(
        "LoopGuard(on_loop='ask') needs an attachment that can end a framework's work gracefully, which this is not, so nothing was set. Use 'raise' and catch clevagent.LoopDetected around the agent; for an agent of create_agent, BudgetMiddleware(on_loop='halt') ends it gracefully."
    )


def test_what_is_no_action_is_refused(init):
    assert message_of(init, on_loop="explode").startswith("on_loop='explode' is no action")
    assert message_of(LoopGuard, on_loop=None).startswith("LoopGuard(on_loop=None) is no action")
    assert "is no action" in message_of(init, on_loop=["raise"])


def test_an_async_callable_is_refused(init):
    async def decide(incident):
        """Never called."""

    assert message_of(LoopGuard, on_loop=decide).partition("> ")[0].partition("<")[0] == "LoopGuard(on_loop="
    assert "is an async function" in message_of(init, on_loop=decide)
    assert "is an async function" in message_of(init, on_loop=partial(decide))

    class Decide:
        async def __call__(self, incident):
            return "warn"

    assert "is an async function" in message_of(init, on_loop=Decide())
    with pytest.raises(clevagent.UsageError, match="is an async function"):
        clevagent.Budget(usd=1, on_exceed=Decide())


def test_the_environment_sets_it(init, monkeypatch):
    monkeypatch.setenv("CLEVAGENT_ON_LOOP", "stop")
    init()
    with clevagent.run():
        for _ in range(5):
            use()
        with pytest.raises(LoopDetected):
            use()


def test_the_environment_cannot_set_what_is_no_action(init, monkeypatch):
    monkeypatch.setenv("CLEVAGENT_ON_LOOP", "explode")
    assert "'explode'" in message_of(init)


@pytest.mark.parametrize("action", ["warn", "raise"])
def test_a_guard_of_the_run_speaks_in_place_of_the_builtin_one(init, action):
    watchdog = init(on_loop="raise" if action == "warn" else "warn")
    with clevagent.run(guards=[LoopGuard(on_loop=action)]), contextlib.suppress(LoopDetected):
        for _ in range(9):
            use()
    assert actions(watchdog) == [action]


def test_a_guard_given_to_init_speaks_in_place_of_the_builtin_one(init):
    watchdog = init(plugins=[LoopGuard()])
    with clevagent.run(), pytest.raises(LoopDetected):
        for _ in range(9):
            use()
    assert actions(watchdog) == ["raise"]


def test_a_guard_of_a_nested_run_leaves_the_builtin_one_to_the_outer_run(init):
    watchdog = init()
    with clevagent.run():
        with clevagent.run(guards=[LoopGuard()]), contextlib.suppress(LoopDetected):
            for _ in range(6):
                use("inner")
        for _ in range(6):
            use("outer")
    assert [(incident.action, incident.details["calls"]) for incident in told(watchdog)] == [
        ("raise", ["tool 'inner'"]),
        ("warn", ["tool 'outer'"]),
    ]


def test_one_guard_serves_several_runs_apart(init):
    watchdog = init()
    guard = LoopGuard()
    for _ in range(3):
        with clevagent.run(guards=[guard]):
            for _ in range(4):
                use()
    assert told(watchdog) == []


def test_guards_of_nested_runs_count_apart(init):
    """The outer one has seen more calls than the inner one; parallel twins count for neither, and a loop for both."""
    watchdog = init()
    with clevagent.run(guards=[LoopGuard(on_loop="warn")]):
        for number in range(20):
            use("before", number, result=number)
        with clevagent.run(guards=[LoopGuard(on_loop="warn")]), contextlib.ExitStack() as stack:
            for call in [stack.enter_context(clevagent.tool_call("vote")) for _ in range(9)]:
                call.settle(result="10")
        assert told(watchdog) == []
        with clevagent.run(guards=[LoopGuard(on_loop="warn")]):
            for _ in range(9):
                use()
    assert rules(watchdog) == ["same call and result"] * 2


def test_two_watchdogs_share_nothing(make):
    one, other = make(), make(on_loop="raise")
    for watchdog in (one, other):
        with watchdog.run() as run:
            for _ in range(4):
                run.open(ToolCall(tool="search")).settle(result=[])
    assert told(one) == told(other) == []


# -- which calls belong together --------------------------------------------------------------------------------------------


def hand_over(number, **fields):
    """Let two agents feed each other."""
    mine = ("support", "billing")[number % 2]
    with clevagent.run(**fields):
        ask(f"You are {mine}. The other one said: please take over.", answer="Please take over.", node=mine)


def test_two_agents_of_one_tree_that_feed_each_other_are_found(init):
    watchdog = init()
    with clevagent.run():
        for number in range(12):
            hand_over(number)
    assert [(incident.details["rule"], incident.details["period"]) for incident in told(watchdog)] == [("cycle", 2)]


def test_two_agents_in_runs_of_their_own_are_not(init):
    watchdog = init()
    for number in range(12):
        hand_over(number)
    assert told(watchdog) == []


@pytest.mark.parametrize("nodes", [("support", "billing"), (None, None)])
def test_two_agents_with_growing_histories_that_feed_each_other_are_found(init, nodes):
    watchdog = init()
    histories = (["You are support.", "Hello"], ["You are billing.", "Hello"])
    with clevagent.run():
        for number in range(14):
            history, other = histories[number % 2], histories[1 - number % 2]
            ask(*history, answer="Please take over.", node=nodes[number % 2])
            history.append("Please take over.")
            other.append("Please take over.")
    assert rules(watchdog)[:1] in (["cycle"], ["same call and result"])


def test_greetings_of_many_people_are_no_loop_outside_of_runs(init):
    watchdog = init(on_loop="raise")
    for _ in range(30):
        ask("You are friendly.", "Hi!", answer="Hello! How can I help?")
        ask("Hi!", answer="Hello!")
    assert told(watchdog) == []


def test_the_same_short_conversation_with_many_people_is_no_loop_outside_of_runs(init):
    watchdog = init(on_loop="raise")
    for _ in range(30):
        ask("You are friendly.", "Hi!", answer="Hello!")
        ask("You are friendly.", "Hi!", "Hello!", "Thanks!", answer="You are welcome.")
    assert told(watchdog) == []


def test_a_conversation_that_turns_in_circles_is_found_outside_of_runs(init):
    watchdog = init()
    history = ["Book a room."]
    for number in range(8):
        ask(*history, answer="Which room?")
        history += ["Which room?", "The blue one."]
        if number < 4:
            assert told(watchdog) == []
    assert rules(watchdog) == ["same call and result"]


@pytest.mark.parametrize("first", [["Book a room."], ["You are helpful.", "Book a room."]])
def test_a_conversation_that_turns_in_circles_is_found_within_six_repetitions(init, first):
    watchdog = init()
    history = list(first)
    with clevagent.run():
        for _ in range(6):
            ask(*history, answer="Which room?")
            history += ["Which room?", "The blue one."]
    assert rules(watchdog) == ["same call and result"]


def test_a_conversation_in_which_something_new_is_said_is_no_loop(init):
    watchdog = init()
    history = ["Count."]
    with clevagent.run():
        for number in range(40):
            ask(*history, answer=f"{number}")
            history += [f"{number}", "Go on."]
    assert told(watchdog) == []


def test_a_prompt_to_which_more_is_written_each_time_is_looked_at_where_it_is_new(init):
    watchdog = init()
    scratchpad = "Question: how many people live in Oslo?\n"
    for _ in range(9):
        ask(scratchpad, answer="Action: search[Oslo]")
        scratchpad += "Action: search[Oslo]\nObservation: nothing found\n"
    assert rules(watchdog) == ["same call and result"]


def test_a_growing_prompt_with_new_observations_is_no_loop(init):
    watchdog = init()
    scratchpad = "Question: how many people live in Oslo?\n"
    with clevagent.run():
        for number in range(30):
            ask(scratchpad, answer="Action: next_page[]")
            scratchpad += f"Action: next_page[]\nObservation: page {number}\n"
    assert told(watchdog) == []


@pytest.mark.parametrize("in_run", [True, False])
def test_one_instruction_over_many_documents_is_no_loop(init, in_run):
    watchdog = init(on_loop="raise")
    with clevagent.run() if in_run else contextlib.nullcontext():
        for number in range(60):
            ask("Is this spam? Answer yes or no.", f"Document {number}", answer="no")
            ask(f"Is this spam? Answer yes or no.\n\nDocument {number}", answer="no")
            ask("Classify.", f"Document {number}", answer={"label": "ham"}, node="classify")
    assert told(watchdog) == []


def test_the_same_prompt_and_answer_again_within_one_run_is_a_loop(init):
    watchdog = init()
    with clevagent.run():
        for _ in range(5):
            ask("Give the totals as JSON.", answer="Sure! Here they are: 12, 19")
    assert rules(watchdog) == ["same call and result"]


def test_the_same_prompt_with_other_answers_is_no_loop(init):
    watchdog = init()
    with clevagent.run():
        for number in range(30):
            ask("Tell a joke.", answer=f"Joke number {number}")
    assert told(watchdog) == []


def test_votes_asked_for_side_by_side_are_no_loop(init):
    watchdog = init(on_loop="raise")
    with clevagent.run(), contextlib.ExitStack() as stack:
        calls = [stack.enter_context(clevagent.llm_call(model="even", input="How many?", max_output_tokens=1)) for _ in range(20)]
        for call in calls:
            call.settle(input_tokens=1, output_tokens=1, answer="10")
    assert told(watchdog) == []


def test_votes_of_tasks_side_by_side_are_no_loop(init):
    watchdog = init(on_loop="raise")

    async def vote(gate):
        async with clevagent.tool_call("vote", "How many?") as call:
            await gate.wait()
            call.settle(result="10")

    async def work():
        gate = asyncio.Event()
        async with clevagent.run(), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(vote(gate))
            await asyncio.sleep(0)
            gate.set()

    asyncio.run(work())
    assert told(watchdog) == []


@pytest.mark.parametrize(
    "made",
    [
        lambda number: {
            "role": "assistant",
            "tool_calls": [{"id": f"c-{number}-x", "type": "function", "function": {"name": "f"}}],
        },
        lambda number: {"role": "assistant", "content": [{"type": "tool_use", "id": f"tu {number:05}", "name": "f", "input": {}}]},
        lambda number: ("", [{"name": "f", "args": {"x": 1}, "id": f"call_{number}_0", "type": "tool_call"}]),
        lambda number: {"type": "function_call", "call_id": f"c{number:05}", "id": f"fc{number:05}", "arguments": "{}"},
        lambda number: [{"type": "text", "text": "Let me look.", "id": f"msg_{number:048x}"}],
    ],
    ids=["openai", "anthropic", "langchain", "responses", "block"],
)
@pytest.mark.parametrize(
    "answered",
    [
        lambda id_: {"role": "tool", "tool_call_id": id_, "content": "no hits"},
        lambda id_: {"role": "user", "content": [{"type": "tool_result", "tool_use_id": id_, "content": "no hits"}]},
        lambda id_: ("no hits", id_),
    ],
    ids=["openai", "anthropic", "langchain"],
)
def test_ids_made_anew_for_each_tool_call_do_not_hide_a_loop_of_the_model(init, made, answered):
    watchdog = init()
    history = ["Find it."]

    def id_in(value):
        if isinstance(value, dict):
            return value.get("id") or next(filter(None, map(id_in, value.values())), None)
        return next(filter(None, map(id_in, value)), None) if isinstance(value, (list, tuple)) else None

    with clevagent.run():
        for number in range(7):
            message = made(number)
            ask(*history, answer=message)
            history += [message, answered(id_in(message))]
    assert rules(watchdog) == ["same call and result"]


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda number: f"call_{number:024x}", True),
        (lambda number: f"toolu_vrtx_01{number:022x}", True),
        (lambda number: f"tooluse_Ab-_{number:018x}", True),
        (lambda number: f"chatcmpl-tool-{number:032x}", True),
        (lambda number: f"lc_{number:08x}-0000-4000-8000-000000000000", True),
        (lambda number: f"call_the_customer_about_invoice_{number:04}", False),
        (lambda number: f"{number:08x}-0000-4000-8000-000000000000", False),
    ],
)
def test_ids_that_providers_make_up_are_no_news_in_results(init, made, found):
    watchdog = init()
    with clevagent.run():
        for number in range(9):
            use("search", "x", result={"found": made(number)})
    assert bool(told(watchdog)) == found


def test_a_documents_id_is_news_to_a_model(init):
    watchdog = init()
    with clevagent.run():
        for number in range(20):
            ask([{"type": "text", "text": "Sum it up."}, {"type": "file", "id": f"file-{number:020}"}], answer="An invoice.")
    assert told(watchdog) == []


# -- what came back ---------------------------------------------------------------------------------------------------------


def play(calls):
    """Make calls as the corpus tells them; some begin before others have ended. Give back when each one had been told."""
    waiting = list(enumerate(calls))
    opened = {}
    for step, made in enumerate(calls):
        while waiting and (waiting[0][0] if waiting[0][1].began is None else waiting[0][1].began) <= step:
            number, one = waiting.pop(0)
            block = clevagent.tool_call(one.tool, one.arguments, node=one.node)
            opened[number] = block, block.__enter__()
        block, call = opened.pop(step)
        if isinstance(made.result, BaseException):
            call.settle(error=made.result)
        else:
            # A tool that tells nothing cannot be compared, so one that gives back nothing says so.
            result = "null" if made.result is None else made.result
            call.settle(result=result, error=RuntimeError(str(result)) if made.failed else None)
        block.__exit__(None, None, None)
        yield


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_the_corpus_is_found_through_the_door_within_six_repetitions(init, name):
    watchdog = init()
    made = LOOPS[name]()
    with clevagent.run():
        steps = [step for step, _ in enumerate(play(made.calls)) if told(watchdog)]
    assert len(told(watchdog)) == 1
    assert made.begins <= steps[0] < made.begins + 7 * made.period


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_of_the_corpus_is_left_alone_through_the_door(init, name):
    watchdog = init(on_loop="raise")
    with clevagent.run():
        deque(play(list(HEALTHY[name]())), maxlen=0)
    assert told(watchdog) == []


def test_what_is_not_told_is_not_compared(init):
    watchdog = init(on_loop="raise")
    with clevagent.run():
        for _ in range(30):
            with clevagent.tool_call("poll", 7):
                pass
            with clevagent.llm_call(model="even", input="Hello", max_output_tokens=1) as call:
                call.settle(input_tokens=1, output_tokens=1)
            with clevagent.llm_call(model="even", input="Hello", max_output_tokens=1):
                pass
    assert told(watchdog) == []


@pytest.mark.parametrize("kind", ["tool", "model"])
def test_the_same_exception_out_of_a_block_is_a_loop(init, kind):
    watchdog = init()
    with clevagent.run():
        for number in range(6):
            block = (
                clevagent.tool_call("get_order", 7)
                if kind == "tool"
                else clevagent.llm_call(model="even", input="Hello", max_output_tokens=1)
            )
            with contextlib.suppress(ConnectionError), block:
                raise ConnectionError(f"503 Service Unavailable (request 7f3{number})")
    assert [(one.details["rule"], one.details["times"]) for one in told(watchdog)] == [("same call and result", 5)]
    assert "failed in the same way" in told(watchdog)[0].message


def test_a_growing_conversation_whose_last_call_fails_again_and_again_is_found_outside_of_runs(init):
    watchdog = init()
    ask("Hello", answer="Hi!")
    for _ in range(6):
        with contextlib.suppress(ConnectionError):
            with clevagent.llm_call(model="even", input=["Hello", "Hi!", "How are you?"], max_output_tokens=1):
                raise ConnectionError("503 Service Unavailable")
    assert rules(watchdog) == ["same call and result"]


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_is_cancelled_tells_nothing(init, error):
    watchdog = init(on_loop="raise")
    with clevagent.run():
        for _ in range(20):
            with contextlib.suppress(BaseException), clevagent.tool_call("search", 7):
                raise error
            with contextlib.suppress(BaseException), clevagent.llm_call(model="even", input="Hello", max_output_tokens=1):
                raise error
    assert told(watchdog) == []


def test_failures_in_other_words_between_do_not_tell_the_same_ones_again(init):
    watchdog = init()
    with clevagent.run():
        for number in range(60):
            words = "syntax error" if number < 7 or number % 2 else f"other words {'x' * number}"
            use("bash", number, result=None, error=RuntimeError(words))
        assert rules(watchdog) == ["same failure"]
        use("bash", "ls", result="a file")
        for number in range(100, 107):
            use("bash", number, result=None, error=RuntimeError("syntax error"))
    assert rules(watchdog) == ["same failure", "same failure"]


def test_a_call_that_was_charged_and_is_settled_later_counts_once(init, llm):
    watchdog = init()
    with clevagent.run() as run:
        for _ in range(4):
            ticket = run.open(llm(1, model="even"))
            ticket.charge(TimeoutError("timed out"))
            ticket.settle(Usage(), result="an answer")
        assert told(watchdog) == []
        run.open(llm(1, model="even")).charge(TimeoutError("timed out"))
    assert rules(watchdog) == ["same call and result"]


def test_a_retry_that_succeeds_is_no_loop(init):
    watchdog = init()
    with clevagent.run():
        for city in ("Oslo", "Rome", "Bonn", "Nice", "Lyon"):
            for _ in range(3):
                use("weather", city, result=None, error=TimeoutError("timed out"))
            use("weather", city, result=f"sunny in {city}")
    assert told(watchdog) == []


def test_a_released_call_tells_nothing(init):
    watchdog = init()
    with clevagent.run():
        for _ in range(20):
            with clevagent.tool_call("search") as call:
                call.release()
    assert told(watchdog) == []


# -- pings ------------------------------------------------------------------------------------------------------------------


def ping(clock, times, *, every_s=0.5, **fields):
    for _ in range(times):
        clevagent.ping("step_complete", **fields)
        clock.advance(every_s)


def test_the_fiftieth_identical_ping_within_thirty_seconds_is_a_loop_and_is_told_once(init, clock):
    watchdog = init()
    with clevagent.run():
        ping(clock, 49)
        assert told(watchdog) == []
        ping(clock, 1)
        assert len(told(watchdog)) == 1
        ping(clock, 1)
        ping(clock, 200)
    assert rules(watchdog) == ["same ping"]


@pytest.mark.parametrize(("last_s", "found"), [(5.499, True), (5.5, True), (5.501, False)])
def test_pings_count_within_thirty_seconds(init, clock, last_s, found):
    watchdog = init()
    with clevagent.run():
        ping(clock, 49)
        clock.advance(last_s)
        ping(clock, 1)
    assert bool(told(watchdog)) == found


def test_slow_pings_are_no_loop(init, clock):
    watchdog = init()
    with clevagent.run():
        ping(clock, 500, every_s=0.62)
    assert told(watchdog) == []


def test_pings_that_say_something_new_are_no_loop(init, clock):
    watchdog = init()
    done = []
    with clevagent.run():
        for number in range(120):
            done.append(number)
            ping(clock, 1, every_s=0, message=f"page {number}")
        for number in range(120):
            ping(clock, 1, every_s=0, meta={"page": number})
        for number in range(120):
            # The same list, with more in it each time.
            done.append(number)
            ping(clock, 1, every_s=0, meta={"done": done})
    assert told(watchdog) == []


def test_pings_with_the_same_message_and_meta_are_a_loop(init, clock):
    watchdog = init()
    with clevagent.run():
        for _ in range(50):
            ping(clock, 1, message="page 1", meta={"page": 1, "of": [1, 2]})
    assert rules(watchdog) == ["same ping"]


def test_a_ping_whose_meta_cannot_be_compared_is_no_fault(init, caplog):
    class Grumpy:
        def __eq__(self, other):
            raise TypeError("no")

        __hash__ = None

    watchdog = init()
    with clevagent.run():
        for _ in range(60):
            clevagent.ping(meta={"what": Grumpy()})
    assert "failed" not in caplog.text
    assert rules(watchdog) == ["same ping"]


@pytest.mark.parametrize(
    "call",
    [
        use,
        partial(ask, "Hello"),
        lambda: clevagent.tool_call("poll").__enter__(),
        lambda: clevagent.llm_call(model="even", input="x", max_output_tokens=1).__enter__(),
    ],
)
@pytest.mark.parametrize("in_run", [True, False])
def test_a_call_between_pings_begins_their_count_anew(init, clock, call, in_run):
    watchdog = init()
    with clevagent.run() if in_run else contextlib.nullcontext():
        ping(clock, 49, every_s=0)
        call()
        ping(clock, 49, every_s=0)
    assert told(watchdog) == []


def test_one_ping_each_of_many_runs_side_by_side_is_no_loop(init):
    watchdog = init()
    with clevagent.run():
        for _ in range(60):
            with clevagent.run():
                clevagent.ping("started")
    assert told(watchdog) == []


def test_pings_that_repeat_are_told_also_where_no_call_will_meet_the_stop(init, clock):
    watchdog = init(on_loop="raise")
    with clevagent.run():
        ping(clock, 60)
    assert actions(watchdog) == ["raise"]


def test_pings_that_repeat_stop_the_next_call(init, clock):
    init(on_loop="raise")
    with clevagent.run() as run:
        ping(clock, 50)
        with pytest.raises(LoopDetected):
            use()
        run.forgive_loops()
        use()


def test_other_steps_are_no_pings(init):
    watchdog = init()
    with clevagent.run() as run:
        for _ in range(100):
            run.step(Step(kind="node", name="think"))
    assert told(watchdog) == []


# -- what is told -----------------------------------------------------------------------------------------------------------


def incident_of(init, function):
    watchdog = init(agent="research", on_loop="raise")
    with clevagent.run() as run, contextlib.suppress(LoopDetected):
        for number in range(40):
            function(number)
    (incident,) = told(watchdog)
    assert incident.run_id == run.run_id
    assert incident.agent == "research"
    return incident


def test_what_is_told_of_one_call(init, clock):
    def work(_):
        use("search", {"q": "a secret"})
        clock.advance(2)
        clevagent.log_cost(cost_usd=0.07)

    incident = incident_of(init, work)
    assert incident.message == snapshot(
        "The run repeats itself: the tool 'search' was called with the same arguments 5 times, and gave the same result. That began at 00:00:00 UTC, 8 s ago, and has cost $0.28 since. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )
    assert incident.details == snapshot(
        {
            "rule": "same call and result",
            "period": 1,
            "times": 5,
            "since": 1767225600.0,
            "calls": ["tool 'search'"],
            "cost_usd": 0.28,
        }
    )
    assert incident.at == FakeClock().wall() + 8


def test_what_is_told_of_a_call_that_fails(init):
    assert incident_of(init, lambda _: use("search", error=TimeoutError("timed out"), result=None)).message == snapshot(
        "The run repeats itself: the tool 'search' was called with the same arguments 5 times, and failed in the same way. That began at 00:00:00 UTC, 0 s ago, and has cost $0.00 since. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )


def test_what_is_told_of_a_model(init):
    assert incident_of(init, lambda _: ask("a secret")).message == snapshot(
        "The run repeats itself: the model 'even' was asked the same 5 times, and gave the same answer. That began at 00:00:00 UTC, 0 s ago, and has cost $0.00 since. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )


def test_what_is_told_of_a_round(init):
    incident = incident_of(init, lambda number: use(f"tool{number % 3}"))
    assert incident.message == snapshot(
        "The run repeats itself: a round of 3 calls (tool 'tool0', tool 'tool1', tool 'tool2') came 3 times with the same results. That began at 00:00:00 UTC, 0 s ago, and has cost $0.00 since. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )
    assert incident.details == snapshot(
        {
            "rule": "cycle",
            "period": 3,
            "times": 3,
            "since": 1767225600.0,
            "calls": ["tool 'tool0'", "tool 'tool1'", "tool 'tool2'"],
            "cost_usd": 0.0,
        }
    )


def test_what_is_told_of_calls_in_changing_order(init):
    order = "abccabbacacb" * 4
    incident = incident_of(init, lambda number: use(order[number]))
    assert incident.message == snapshot(
        "The run repeats itself: the same 3 calls (tool 'a', tool 'b', tool 'c') came again and again, about 3 times each, with the same results. That began at 00:00:00 UTC, 0 s ago, and has cost $0.00 since. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )
    assert incident.details["rule"] == "nothing new"


def test_what_is_told_of_the_same_failure(init):
    incident = incident_of(init, lambda number: use("bash", f"words {number}", result=None, error=OSError("syntax error")))
    assert incident.message == snapshot(
        "The run repeats itself: the tool 'bash' failed 7 times in the same words, whatever it was asked. That began at 00:00:00 UTC, 0 s ago, and has cost $0.00 since. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )
    assert incident.details == snapshot(
        {
            "rule": "same failure",
            "period": 1,
            "times": 7,
            "since": 1767225600.0,
            "calls": ["tool 'bash'"],
            "cost_usd": 0.0,
        }
    )


def test_what_is_told_of_pings(init, clock):
    def work(_):
        ping(clock, 50)
        use()

    incident = incident_of(init, work)
    assert incident.message == snapshot(
        "The run repeats itself: the same ping ('step_complete') came 50 times within 25 s, with no call between. Every later call of this run is refused before it is sent, until run.forgive_loops()."
    )
    assert incident.details == snapshot(
        {
            "rule": "same ping",
            "period": 1,
            "times": 50,
            "since": 1767225600.0,
            "calls": ["ping 'step_complete'"],
            "cost_usd": 0.0,
        }
    )


def test_what_is_told_in_a_dry_run_and_as_a_warning(init):
    watchdog = init()
    for dry_run in (False, True):
        with clevagent.run(dry_run=dry_run):
            for _ in range(5):
                use()
    assert [incident.message.partition("since. ")[2] for incident in told(watchdog)] == snapshot(
        [
            "Nothing was stopped, because loops are only warned of: clevagent.init(on_loop='raise') stops them, or guards=[clevagent.LoopGuard()] of clevagent.run().",
            "Nothing was stopped, because this is a dry run.",
        ]
    )


def test_a_loop_has_cost_what_the_run_has_spent_since_it_began(init):
    watchdog = init()
    with clevagent.run():
        clevagent.log_cost(cost_usd=5)
        use()
        for _ in range(4):
            with clevagent.run():
                clevagent.log_cost(cost_usd=0.01)
            ask("Think.", answer=None, model="cent")
            use()
    assert told(watchdog)[0].details["cost_usd"] == 0.08


def test_a_charge_that_is_corrected_meanwhile_makes_no_loop_cost_less_than_nothing(init, llm):
    watchdog = init(prices={"cent": Price(input=0, output=10_000, context_window=1000)}, budgets=[Budget(usd=9)])
    with clevagent.run() as run:
        ticket = run.open(llm(100))
        ticket.charge()
        for number in range(5):
            use()
            if number == 2:
                ticket.settle(Usage(input_tokens=1, output_tokens=1))
    assert told(watchdog)[0].details["cost_usd"] == 0


def test_the_error_survives_pickling(init):
    init(on_loop="raise")
    with clevagent.run(), pytest.raises(LoopDetected) as caught:
        for _ in range(9):
            use()
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (type(copy), copy.incident, copy.run_id, str(copy)) == (
        LoopDetected,
        caught.value.incident,
        caught.value.run_id,
        str(caught.value),
    )


def test_nothing_of_what_was_asked_or_answered_is_told(init):
    watchdog = init()
    secret = "hunter2"  # noqa: S105 - to search for
    with clevagent.run():
        for _ in range(6):
            use("log_in", {"password": secret}, result=f"welcome {secret}")
            use("log_in", {"password": secret}, result=None, error=ValueError(secret))
        for number in range(8):
            use("log_in", {"password": f"{secret}{number}"}, result=None, error=ValueError(secret))
        for _ in range(6):
            ask(secret, answer=secret)
        for _ in range(60):
            clevagent.ping(message=secret, meta={secret: secret})
    assert len(told(watchdog)) == 4
    assert not any(secret.encode() in pickle.dumps(incident) for incident in told(watchdog))


# -- threads, memory, forks -------------------------------------------------------------------------------------------------


@pytest.fixture
def restless():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
def test_a_loop_of_many_threads_is_told_once(init, restless, caplog):
    watchdog = init()
    with clevagent.run() as run:

        def work(number):
            history = ["Hello"]
            with run.activate():
                for _ in range(200):
                    use()
                    ask(*history, answer="Hi", node=str(number))
                    history += ["Hi", "Hi"]
                    clevagent.ping()

        assert in_threads(8, work) == []
    # Each thread's conversation begins with news for the models' loop, not for the tools'.
    assert [incident.details["calls"] for incident in told(watchdog)].count(["tool 'search'"]) == 1
    assert 2 <= len(told(watchdog)) <= 10
    assert "failed" not in caplog.text


@pytest.mark.slow
def test_different_calls_of_many_threads_are_no_loop(init, restless, caplog):
    watchdog = init(on_loop="raise")
    with clevagent.run() as run:

        def work(number):
            with run.activate():
                for step in range(300):
                    use("search", (number, step), result=(number, step))
                    ask("Sum it up.", f"Document {number}/{step}", answer="fine")

        assert in_threads(8, work) == []
    assert told(watchdog) == []
    assert "failed" not in caplog.text


@pytest.mark.slow
def test_threads_that_forgive_and_loop_at_once_break_nothing(init, restless, caplog):
    init(on_loop="raise")
    with clevagent.run() as run:

        def work(number):
            with run.activate():
                for _ in range(300):
                    try:
                        use()
                    except LoopDetected:
                        run.forgive_loops()

        assert in_threads(8, work) == []
    assert "failed" not in caplog.text


def test_loops_are_told_without_holding_the_lock(init):
    """A log handler that waits for another thread's call must not wait for ever."""
    init()
    done = []

    class Handler(logging.Handler):
        def emit(self, record):
            with clevagent.run():
                done.extend(in_threads(1, lambda _: use("other")))

    handler = Handler()
    logging.getLogger("clevagent").addHandler(handler)
    try:
        with clevagent.run():
            for _ in range(5):
                use()
            for _ in range(50):
                clevagent.ping()
    finally:
        logging.getLogger("clevagent").removeHandler(handler)
    assert done == []


def sizes(value, seen):
    """Count the entries of every container within."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, dict):
        return len(value) + sum(sizes(part, seen) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return len(value) + sum(sizes(part, seen) for part in value)
    names = (
        [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        if "loop" in type(value).__module__
        else []
    )
    names += ["_calls", "_outcomes", "_recent", "_different", "_failing"] if type(value).__name__ == "Repetition" else []
    names += ["_new", "_old"] if type(value).__name__ == "_Memory" else []
    return sum(sizes(getattr(value, name), seen) for name in names if hasattr(value, name))


@pytest.mark.slow
def test_a_long_run_is_kept_in_bounded_memory(init):
    watchdog = init(block=["clevagent_core.guards.budget"])
    most = 0
    with clevagent.run() as run:
        for step in range(50_000):
            run.open(ToolCall(tool=f"tool{step % 100}", arguments=step)).settle(result=step)
            ask("Sum it up.", f"Document {step}", answer="fine", node=str(step % 1000))
            if step % 4999 == 0:
                (guard,) = run.state
                most = max(most, sizes(run.state[guard], set()))
    assert told(watchdog) == []
    assert 1000 < most < 12_000


@pytest.mark.slow
def test_a_run_is_let_go_of_when_it_has_ended(init):
    init(on_loop="raise")
    with clevagent.run() as outer:
        with clevagent.run() as inner, contextlib.suppress(LoopDetected):
            for _ in range(9):
                use()
                ask("Hello")
                clevagent.ping()
        references = [weakref.ref(outer), weakref.ref(inner)]
        outer.forgive_loops()
        del inner
    del outer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.slow
def test_what_was_asked_and_answered_is_let_go_of(init):
    class Big:
        """What somebody's tool takes and gives."""

    init()
    with clevagent.run():
        big = Big()
        references = [weakref.ref(big)]
        for _ in range(6):
            use("paint", big, result=big)
            ask(big, "Hello", answer=big)
            clevagent.ping(meta={"big": big})
        del big
        gc.collect()
        assert [reference() for reference in references] == [None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent(init):
    init()
    use()
    held, done = threading.Event(), threading.Event()

    def hold():
        with loop._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    pid = os.fork()
    if pid == 0:
        import signal

        signal.alarm(10)  # ends it, if it waits
        use()
        clevagent.ping()
        os._exit(7)
    done.set()
    thread.join(10)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_loop_beside_a_budget_is_refused_by_whichever_comes_first(init):
    init(on_loop="raise")
    with clevagent.run(budgets=[Budget(tool_calls=3)]), pytest.raises(BudgetExceeded):
        for _ in range(9):
            use()
    with clevagent.run(budgets=[Budget(tool_calls=8)]) as run, pytest.raises(LoopDetected):
        for _ in range(9):
            use()
    assert calls_of(run) == 5


# -- any run ----------------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
made_calls = st.builds(
    Call,
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([None, 1, "x"]),
    st.sampled_from(["r", "s", 0, {}]),
    failed=st.booleans(),
)
in_one_process = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.mark.slow
@in_one_process
@given(st.lists(st.tuples(st.integers(0, 10**6), values), max_size=40, unique_by=lambda pair: pair[0]))
def test_calls_that_are_all_different_never_warn(make, made):
    watchdog = make(on_loop="raise")
    with watchdog.run() as run:
        for number, value in made:
            run.open(ToolCall(tool="tool", arguments=[number, value])).settle(result=[number, value])
    assert told(watchdog) == []
    watchdog.shutdown()


@pytest.mark.slow
@in_one_process
@given(st.lists(made_calls, max_size=25), st.lists(made_calls, min_size=1, max_size=7))
def test_a_cycle_walked_six_times_always_warns_whatever_came_before(make, before, cycle):
    watchdog = make()
    with watchdog.run() as run:
        for made in [*before, *cycle * 6]:
            error = RuntimeError(str(made.result)) if made.failed else None
            run.open(ToolCall(tool=made.tool, arguments=made.arguments)).settle(result=made.result, error=error)
    assert told(watchdog) != []
    watchdog.shutdown()
