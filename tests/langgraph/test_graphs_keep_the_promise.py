"""The promise, for graphs: 50 calls are tried against a ceiling that fits 10, in every way a graph can call.

The provider bills one token for each byte and the whole output limit: a call costs what it reserves, but for the few tokens that
providers add to each message. What it has billed is compared with the ceiling and with what was recorded; and nothing stays held.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import operator
import subprocess
import sys
import textwrap
import weakref
from contextlib import contextmanager
from decimal import Decimal
from typing import Annotated

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import NodeTimeoutError
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, Send
from typing_extensions import TypedDict

import clevagent
from clevagent import Budget, BudgetExceeded, Stopped
from clevagent.testing import LoopbackProvider, Reply
from clevagent_core.money import PICO_PER_USD
from clevagent_langgraph import atop_up, monitored_node, stopped, top_up
from tests.langgraph.conftest import CALL, PROMPT, Texts, thread

TRIES = 50
CEILING = 10 * CALL + 9 * 50 * 2_500_000
"""What 10 calls can cost at most, and what they do cost: a few tokens less."""


def ceiling(name="ceiling", calls=10, **kw):
    return Budget(usd=Decimal(CEILING * calls // 10) / PICO_PER_USD, name=name, **kw)


@pytest.fixture(autouse=True)
def _quiet():
    # LangChain logs each exception of a callback that it raises all the same.
    logging.getLogger("langchain_core.callbacks.manager").setLevel(logging.CRITICAL)


@contextmanager
def accounts(provider, *, most=CEILING, least=0.9):
    """Afterwards: no more was billed than the ceiling, all of it is recorded, most of it used, nothing held."""
    watchdog = clevagent.init(wait_s=20)
    provider.reset()
    with clevagent.run() as run:
        yield run
    assert watchdog.ledger.holds() == []
    summary = run.summary()
    recorded = round(summary.total.cost_usd * PICO_PER_USD)
    assert provider.billed_pico <= most
    assert provider.billed_pico <= recorded <= most
    if not summary.calls_charged_at_bound:
        assert recorded == provider.billed_pico
    assert provider.billed_pico >= least * most


def fan(node, *, saved=True):
    builder = StateGraph(Texts).add_node("write", node)
    builder.add_conditional_edges(START, lambda state: [Send("write", state)] * TRIES, ["write"])
    return builder.compile(checkpointer=InMemorySaver() if saved else None)


def cycle(node, *, saved=True, **options):
    builder = StateGraph(Texts).add_node("write", node, **options)
    builder.add_edge(START, "write")
    builder.add_conditional_edges("write", lambda state: END if len(state["texts"]) >= TRIES else "write")
    return builder.compile(checkpointer=InMemorySaver() if saved else None)


def writing(model):
    def write(state):
        return {"texts": [model.invoke(PROMPT).text]}

    return write


def awriting(model):
    async def write(state):
        return {"texts": [(await model.ainvoke(PROMPT)).text]}

    return write


def careless(model):
    """A node that takes each refusal for an error like any other."""

    def write(state):
        try:
            return {"texts": [model.invoke(PROMPT).text]}
        except Exception as error:
            return {"texts": [repr(error)]}

    return write


ENDS = ["raise", "halt", "ask"]


@pytest.fixture(params=["guarded", "plain"])
def model(request, chat):
    return clevagent.guard(chat()) if request.param == "guarded" else chat()


def invoke(graph, aio=None):
    try:
        if aio is None:
            graph.invoke({"texts": []}, thread())
        else:
            aio(graph.ainvoke({"texts": []}, thread()))
    except Stopped:
        pass


@pytest.mark.parametrize("end", ENDS)
def test_one_after_the_other(model, provider, end):
    with accounts(provider):
        invoke(clevagent.guard(cycle(writing(model)), budgets=[ceiling()], on_exceed=end))
    assert provider.request_count == 10


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_nodes_that_catch_every_error(model, provider, end):
    with accounts(provider):
        invoke(clevagent.guard(cycle(careless(model)), budgets=[ceiling()], on_exceed=end))
    assert provider.request_count == 10


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_fan_out(model, provider, end):
    """More are in flight than fit: those that only wait for what others hold go on when it is settled."""
    with accounts(provider):
        invoke(clevagent.guard(fan(writing(model)), budgets=[ceiling()], on_exceed=end))
    assert provider.request_count == 10


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_asynchronous_fan_out(chat, provider, end, aio):
    with accounts(provider):
        invoke(clevagent.guard(fan(awriting(clevagent.guard(chat()))), budgets=[ceiling()], on_exceed=end), aio)
    assert provider.request_count == 10


@pytest.mark.slow
def test_asynchronous_fan_out_of_models_that_cannot_wait(chat, provider, aio):
    """A callback on an event loop cannot wait for what others hold: it refuses, and the others finish."""
    with accounts(provider):
        graph = clevagent.guard(fan(awriting(chat())), budgets=[ceiling()])
        with pytest.raises(BudgetExceeded):
            aio(graph.ainvoke({"texts": []}, thread()))
        while graph.get_state(thread()).next and provider.request_count < 10:
            with pytest.raises(BudgetExceeded):
                aio(graph.ainvoke(None, thread()))
    assert provider.request_count == 10


def test_streams_that_are_broken_off(chat, provider):
    """What was sent and not read to its end is charged what it could cost."""
    model = clevagent.guard(chat())

    def write(state):
        for _ in model.stream(PROMPT):
            break
        return {"texts": ["broken off"]}

    with accounts(provider) as run:
        invoke(clevagent.guard(cycle(write), budgets=[ceiling()]))
    assert run.summary().calls_charged_at_bound == 10


@pytest.mark.parametrize("mode", ["values", "updates", "messages"])
def test_graphs_whose_stream_is_broken_off(model, provider, mode, aio):
    graph = clevagent.guard(cycle(writing(model)), budgets=[ceiling()])
    with accounts(provider, most=3 * CALL + 3 * 50 * 2_500_000, least=0.3):
        stream = graph.stream({"texts": []}, thread(), stream_mode=mode)
        for _ in range(2):
            next(stream)
        stream.close()

    async def main():
        stream = graph.astream({"texts": []}, thread("b"), stream_mode=mode)
        for _ in range(2):
            await anext(stream)
        await stream.aclose()

    with accounts(provider, most=3 * CALL + 3 * 50 * 2_500_000, least=0.3):
        aio(main())


def test_streams_for_which_no_usage_is_told_are_charged(chat, provider):
    """`stream_mode="messages"` makes a stream of each `invoke`; behind a base URL of one's own it is not asked for usage."""
    with accounts(provider) as run, pytest.raises(BudgetExceeded):
        graph = clevagent.guard(cycle(writing(chat())), budgets=[ceiling()])
        list(graph.stream({"texts": []}, thread(), stream_mode="messages"))
    assert all(request.body["stream"] for request in provider.requests)
    assert run.summary().calls_charged_at_bound == provider.request_count == 10


@pytest.mark.parametrize("policy", [RetryPolicy, lambda **kw: RetryPolicy(retry_on=Exception, **kw)], ids=["default", "everything"])
def test_retried_nodes(model, provider, policy):
    """Each attempt of a node that fails after its call has been paid for."""

    class Broken(Exception):
        pass

    def write(state):
        model.invoke(PROMPT)
        raise Broken

    graph = cycle(write, retry_policy=policy(max_attempts=TRIES, initial_interval=0.001, max_interval=0.001, jitter=False))
    with accounts(provider), pytest.raises(BudgetExceeded):
        clevagent.guard(graph, budgets=[ceiling()]).invoke({"texts": []}, thread())
    assert provider.request_count == 10


@pytest.mark.slow
def test_fallbacks(chat, provider):
    both = clevagent.guard(chat()).with_fallbacks([chat(model="gpt-4o-mini")])
    with accounts(provider):
        invoke(clevagent.guard(cycle(careless(both)), budgets=[ceiling()]))
    assert provider.request_count == 10


@pytest.mark.slow
def test_fallbacks_of_models_that_are_not_guarded(chat, provider):
    both = chat().with_fallbacks([chat(model="gpt-4o")])
    with accounts(provider):
        invoke(clevagent.guard(cycle(careless(both)), budgets=[ceiling()]))
    assert provider.request_count == 10


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_subgraphs(model, provider, end):
    sub = fan(writing(model), saved=False)
    builder = StateGraph(Texts).add_node("sub", sub).add_edge(START, "sub")
    with accounts(provider):
        invoke(clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[ceiling()], on_exceed=end))
    assert provider.request_count == 10


@pytest.mark.slow
def test_tasks(model, provider):
    @task
    def write(number: int) -> str:
        return model.invoke(PROMPT).text

    @entrypoint(checkpointer=InMemorySaver())
    def book(given: dict) -> list:
        return [future.result() for future in [write(number) for number in range(TRIES)]]

    with accounts(provider):
        invoke(clevagent.guard(book, budgets=[ceiling()]))
    assert provider.request_count == 10


@pytest.mark.slow
def test_many_graphs_at_once_under_one_ceiling(model, provider):
    graph = clevagent.guard(cycle(writing(model), saved=False))
    with accounts(provider) as run:
        run.budgets = (ceiling(),)
        graph.batch([{"texts": ["x"] * (TRIES - 1)}] * TRIES, return_exceptions=True)
    assert provider.request_count == 10


@pytest.mark.slow
def test_a_nodes_own_ceiling(model, provider):
    node = monitored_node("write", budgets=[ceiling()])(writing(model))
    with accounts(provider):
        invoke(clevagent.guard(fan(node)))
    assert provider.request_count == 10


# -- what is cancelled ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_cancelled_graph_holds_nothing_and_is_charged_what_it_sent(chat, provider, aio, guarded):
    provider.reset([Reply(hang=True)])
    model = clevagent.guard(chat()) if guarded else chat()
    graph = clevagent.guard(fan(awriting(model)), budgets=[ceiling()])
    watchdog = clevagent.init(wait_s=20)

    async def main():
        running = asyncio.create_task(graph.ainvoke({"texts": []}, thread()))
        await asyncio.to_thread(provider.wait_for_requests, 5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    with clevagent.run() as run:
        aio(main())
    assert watchdog.ledger.holds() == []
    assert provider.billed_pico <= round(run.summary().total.cost_usd * PICO_PER_USD) <= CEILING
    # Some were cancelled on their way: they may have been sent.
    assert run.summary().calls_charged_at_bound >= provider.request_count > 0


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_node_that_runs_out_of_time_is_charged(chat, provider, aio, guarded):
    provider.reset([Reply(hang=True)])
    model = clevagent.guard(chat()) if guarded else chat()
    builder = StateGraph(Texts).add_node("write", awriting(model), timeout=0.3).add_edge(START, "write")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[ceiling()])
    with clevagent.run() as run, pytest.raises(NodeTimeoutError):
        aio(graph.ainvoke({"texts": []}, thread()))
    assert clevagent.init().ledger.holds() == []
    assert run.summary().calls_charged_at_bound == provider.request_count == 1


# -- over resumptions -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "interrupted", "failed", "broken off"])
def test_a_run_goes_on_when_its_graph_is_resumed(chat, provider, how):
    """However it paused: its budget does not start from zero."""
    from langgraph.types import interrupt

    model, tried = chat(), []

    def write(state):
        text = model.invoke(PROMPT).text
        tried.append(1)
        if how == "failed" and len(tried) % 2:
            raise ZeroDivisionError
        if how == "interrupted":
            interrupt("go on?")
        return {"texts": [text]}

    graph = clevagent.guard(cycle(write), budgets=[ceiling()])
    with accounts(provider):
        given = {"texts": []}
        for _ in range(TRIES):
            try:
                if how == "broken off":
                    stream = graph.stream(given, thread(), stream_mode="updates")
                    next(stream, None)
                    stream.close()
                else:
                    graph.invoke(given, thread())
            except (ZeroDivisionError, Stopped):
                pass
            given = Command(resume="yes") if how == "interrupted" else None
    assert provider.request_count == 10


def test_a_static_breakpoint_is_a_pause_too(chat, provider, line):
    model = chat()
    nodes = [writing(model) for _ in range(3)]
    for number, node in enumerate(nodes):
        node.__name__ = f"write_{number}"
    graph = clevagent.guard(line(*nodes, interrupt_before=["write_1", "write_2"]), budgets=[Budget(llm_calls=2)])
    graph.invoke({"texts": []}, thread())
    graph.invoke(None, thread())
    with pytest.raises(BudgetExceeded):
        graph.invoke(None, thread())
    assert provider.request_count == 2


def test_a_run_that_came_to_its_end_is_forgotten_and_the_next_starts_from_zero(chat, provider, line):
    watchdog = clevagent.init()
    graph = clevagent.guard(line(writing(chat())), budgets=[Budget(llm_calls=1)])
    for _ in range(5):
        graph.invoke({"texts": []}, thread())
    assert provider.request_count == 5
    assert watchdog.ledger._accounts == {}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_was_edited_goes_on_in_the_same_run(chat, provider, aio, asynchronous):
    model = chat()

    def write(state):
        return {"texts": [model.invoke(PROMPT).text]}

    builder = StateGraph(Texts).add_node("write", write).add_edge(START, "write").add_edge("write", "write")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[Budget(llm_calls=3)])

    def go(given):
        with pytest.raises(BudgetExceeded):
            aio(graph.ainvoke(given, thread())) if asynchronous else graph.invoke(given, thread())

    def more():
        aio(atop_up(graph, thread(), llm_calls=2)) if asynchronous else top_up(graph, thread(), llm_calls=2)

    go({"texts": []})
    graph.update_state(thread(), {"texts": ["edited"]}, as_node="write")
    graph.update_state(thread(), {"texts": ["edited once more"]}, as_node="write")
    go(None)
    assert provider.request_count == 3
    graph.update_state(thread(), {"texts": ["edited"]}, as_node="write")
    more()
    go(None)
    assert provider.request_count == 5
    for state in list(graph.get_state_history(thread())):
        with pytest.raises(BudgetExceeded):
            graph.invoke(None, state.config)
    assert provider.request_count == 5


@pytest.mark.slow
def test_runs_that_wait_do_not_keep_a_watchdog_alive(chat, provider, line):
    model = chat()

    def write_two(state):
        return {"texts": [model.invoke(PROMPT).text, model.invoke(PROMPT).text]}

    def leave_one_waiting():
        graph = clevagent.guard(line(write_two), budgets=[Budget(llm_calls=1)], on_exceed="halt")
        graph.invoke({"texts": []}, thread())
        assert provider.request_count == 1
        found = weakref.ref(clevagent.init())
        clevagent.shutdown()
        return found

    watchdog = contextvars.copy_context().run(leave_one_waiting)
    gc.collect()
    assert watchdog() is None


@pytest.mark.parametrize("end", ["hands over", "fails"])
def test_graphs_inside_that_do_not_end_by_themselves_leave_no_account_once_the_outer_one_has(chat, provider, line, end):
    watchdog, model = clevagent.init(), chat()

    def write(state):
        model.invoke(PROMPT)
        if end == "fails":
            raise ValueError
        return Command(goto="other", graph=Command.PARENT)

    inner = clevagent.guard(line(write, saved=False), budgets=[Budget(llm_calls=2, name="inner")])

    def talk(state):
        try:
            return inner.invoke(state)
        except ValueError:
            return {"texts": ["failed"]}

    def other(state):
        return {"texts": ["done"]}

    builder = StateGraph(Texts).add_node("talk", talk, destinations=("other",)).add_node("other", other).add_edge(START, "talk")
    graph = clevagent.guard(builder.compile(checkpointer=InMemorySaver()), budgets=[Budget(llm_calls=9)])
    for number in range(3):
        graph.invoke({"texts": []}, thread(str(number)))
    assert provider.request_count == 3
    assert watchdog.ledger._accounts == {}


@pytest.mark.slow
def test_runs_that_nobody_resumes_do_not_fill_the_memory(chat, provider, line):
    watchdog = clevagent.init()
    graph = clevagent.guard(line(writing(chat())), budgets=[Budget(llm_calls=1, name="one"), Budget(usd="0.000001", name="none")])
    for number in range(1010):
        with pytest.raises(BudgetExceeded):
            graph.invoke({"texts": []}, thread(str(number)))
    assert provider.request_count == 0
    assert len(watchdog.ledger._accounts) <= 2 * 1000


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_conversation_counts_over_invocations_and_time_travel(chat, provider, aio, asynchronous):
    """`per="thread"`: whatever is run again on it is paid for again, and counts again."""
    graph = clevagent.guard(cycle(writing(chat())), budgets=[Budget(llm_calls=10, per="thread")], on_exceed="halt")

    def invoke(given, config):
        return aio(graph.ainvoke(given, config)) if asynchronous else graph.invoke(given, config)

    assert len(invoke({"texts": ["x"] * 46}, thread())["texts"]) == 50
    first = next(state for state in graph.get_state_history(thread()) if state.next and len(state.values["texts"]) == 47)
    assert len(invoke(None, first.config)["texts"]) == 50
    assert provider.request_count == 7
    for _ in range(5):
        invoke({"texts": ["x"]}, thread())
    assert provider.request_count == 10
    assert len(invoke({"texts": []}, thread("other"))["texts"]) == 10
    assert provider.request_count == 20
    if not asynchronous:
        top_up(graph, thread("other"), llm_calls=2)
        assert len(invoke(None, thread("other"))["texts"]) == 12
        assert provider.request_count == 22


def test_a_thread_of_the_process_can_be_topped_up(chat, provider, line):
    """Also where nothing but the model is guarded."""
    watchdog = clevagent.init(budgets=[Budget(llm_calls=1, per="thread", name="talk")])
    graph = line(writing(clevagent.guard(chat(), budgets=[Budget(llm_calls=2, name="model")])))
    with clevagent.run() as run:
        graph.invoke({"texts": []}, thread())
        with pytest.raises(BudgetExceeded):
            graph.invoke({"texts": []}, thread())
        run.top_up(llm_calls=5, thread_id="t1")
        graph.invoke({"texts": []}, thread())
        with pytest.raises(BudgetExceeded) as caught:
            graph.invoke({"texts": []}, thread())
        assert caught.value.budget == "model"
        run.top_up(llm_calls=1, budget="model")
        graph.invoke({"texts": []}, thread())
        with pytest.raises(clevagent.UsageError, match="found no budget per thread named 'model'"):
            run.top_up(llm_calls=1, budget="model", thread_id="t1")
    assert provider.request_count == 3
    assert watchdog.ledger.holds() == []


# -- processes ------------------------------------------------------------------------------------------------------------

PROGRAM = """
    import sys
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Command
    import clevagent
    from clevagent import Budget, Stopped
    from clevagent_langgraph import top_up
    from tests.langgraph.conftest import PROMPT, LIMIT, Texts, thread

    url, folder, per, on_exceed, what, name = sys.argv[1:]
    clevagent.init(ledger=f"sqlite:///{folder}/ledger.db", wait_s=20)
    model = ChatOpenAI(model="gpt-4o", api_key="test", base_url=url, max_retries=0, max_tokens=LIMIT)

    def write(state):
        return {"texts": [model.invoke(PROMPT).text]}

    builder = StateGraph(Texts).add_node("write", write).add_edge(START, "write")
    builder.add_conditional_edges("write", lambda state: END if len(state["texts"]) >= 50 else "write")
    with SqliteSaver.from_conn_string(f"{folder}/checkpoints.db") as saver:
        budgets = [Budget(llm_calls=10, per=per, name="ceiling")]
        graph = clevagent.guard(builder.compile(checkpointer=saver), budgets=budgets, on_exceed=on_exceed)
        given = {"new": {"texts": []}, "on": None, "more": Command(resume={"llm_calls": 5}), "top_up": None}[what]
        if what == "top_up":
            top_up(graph, thread(name), llm_calls=5)
        try:
            print(len(graph.invoke(given, thread(name))["texts"]))
        except Stopped as stop:
            print(type(stop).__name__)
"""


@pytest.fixture
def program(tmp_path, provider):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))

    def start(*arguments):
        command = [sys.executable, str(path), provider.openai_url, str(tmp_path), *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=".", env={**__import__("os").environ, "PYTHONPATH": "."}
        )

    def run(*arguments):
        with start(*arguments) as process:
            printed = process.communicate()[0]
            assert process.returncode == 0
            return printed.strip()

    run.start = start
    return run


@pytest.mark.slow
@pytest.mark.parametrize("per", ["run", "thread"])
def test_a_graph_goes_on_in_another_process_where_it_stopped(program, provider, per):
    assert program(per, "raise", "new", "a") == "BudgetExceeded"
    assert provider.request_count == 10
    assert program(per, "raise", "on", "a") == "BudgetExceeded"
    assert provider.request_count == 10, "another process, and the same account"
    assert program(per, "raise", "top_up", "a") == "BudgetExceeded"
    assert provider.request_count == 15


@pytest.mark.slow
def test_a_question_is_answered_in_another_process(program, provider):
    assert program("run", "ask", "new", "a") == "10"
    assert program("run", "ask", "more", "a") == "15"
    assert provider.request_count == 15


@pytest.mark.slow
def test_processes_share_a_ceiling(program, provider, tmp_path):
    """Five of them, each with a thread of its own, under one ceiling for all."""
    running = [program.start("lifetime", "halt", "new", str(number)) for number in range(5)]
    assert sum(int(process.communicate()[0]) for process in running) == 10
    assert provider.request_count == 10


# -- any graph ------------------------------------------------------------------------------------------------------------


class Anything(TypedDict):
    done: Annotated[list[str], operator.add]
    rounds: Annotated[int, operator.add]


@st.composite
def graphs(draw):
    """Nodes one after the other, side by side and in circles: what each is, in order."""
    shapes = draw(st.lists(st.sampled_from(["node", "careless", "fan", "sub", "monitored"]), min_size=1, max_size=4))
    return {
        "shapes": shapes,
        "width": draw(st.integers(2, 6)),
        "rounds": draw(st.integers(1, 3)),
        "calls": draw(st.integers(1, 3)),
        "limits": [draw(st.sampled_from([20, 100, 400])) for _ in shapes],
        "models": [draw(st.sampled_from(["gpt-4o", "gpt-4o-mini", "claude-sonnet-4-6"])) for _ in shapes],
        "guarded": [draw(st.booleans()) for _ in shapes],
        "end": draw(st.sampled_from(ENDS)),
        "usd": draw(st.sampled_from(["0.0005", "0.002", "0.01", "0.05"])),
        "node_usd": draw(st.sampled_from(["0.0005", "0.005"])),
        "resumes": draw(st.integers(0, 2)),
        "is_async": draw(st.booleans()),
    }


def built(drawn, chat):
    builder = StateGraph(Anything)
    names, before = [], START
    for number, shape in enumerate(drawn["shapes"]):
        name = f"{shape}_{number}"
        plain = chat(model=drawn["models"][number], max_tokens=drawn["limits"][number])
        model = clevagent.guard(plain) if drawn["guarded"][number] else plain

        def call(state, model=model, name=name):
            for _ in range(drawn["calls"]):
                model.invoke("word " * 20)
            return {"done": [name]}

        def careless(state, call=call):
            try:
                return call(state)
            except Exception:  # what careless nodes do
                return {"done": ["refused"]}

        if shape == "sub":
            inner = StateGraph(Anything).add_node("inner", call).add_edge(START, "inner")
            builder.add_node(name, inner.compile())
        elif shape == "monitored":
            own = Budget(usd=drawn["node_usd"])
            builder.add_node(name, monitored_node(name, budgets=[own])(call))
        else:
            builder.add_node(name, careless if shape == "careless" else call)
        if shape == "fan":
            builder.add_conditional_edges(before, lambda state, name=name: [Send(name, state)] * drawn["width"], [name])
        else:
            builder.add_edge(before, name)
        names.append(name)
        before = name
    builder.add_node("round", lambda state: {"rounds": 1})
    builder.add_edge(before, "round")
    first, is_fan = names[0], drawn["shapes"][0] == "fan"

    def again(state):
        if state["rounds"] >= drawn["rounds"]:
            return END
        return [Send(first, state)] * drawn["width"] if is_fan else first

    builder.add_conditional_edges("round", again, [first, END])
    return builder.compile(checkpointer=InMemorySaver())


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=graphs())
def test_no_graph_passes_its_ceiling_and_all_that_it_was_billed_is_recorded(drawn, aio):
    """Whatever its shape, its nodes, its models, its end, and however often it is resumed with nothing more."""
    from langchain_openai import ChatOpenAI

    with LoopbackProvider() as provider:

        def chat(**kw):
            return ChatOpenAI(api_key="test", base_url=provider.openai_url, max_retries=0, **kw)

        clevagent.shutdown()
        watchdog = clevagent.init(wait_s=20)
        graph = clevagent.guard(built(drawn, chat), budgets=[Budget(usd=drawn["usd"], name="graph")], on_exceed=drawn["end"])
        with clevagent.run() as run:
            given_now = {"done": [], "rounds": 0}
            for _ in range(1 + drawn["resumes"]):
                try:
                    if drawn["is_async"]:
                        aio(graph.ainvoke(given_now, thread()))
                    else:
                        graph.invoke(given_now, thread())
                except Stopped as stop:
                    assert stop.incident.budget is not None
                if not graph.get_state(thread()).next:
                    break
                given_now = None
        assert watchdog.ledger.holds() == []
        assert provider.billed_usd <= Decimal(drawn["usd"])
        assert round(run.summary().total.cost_usd * PICO_PER_USD) == provider.billed_pico
        assert run.summary().calls_charged_at_bound == 0
        if graph.get_state(thread()).next:
            assert stopped(graph, thread()) is not None
