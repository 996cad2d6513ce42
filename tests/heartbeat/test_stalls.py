"""The stall guard: what moves and what does not, and where it is stuck."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import subprocess
import sys
import textwrap
import threading

import pytest
from inline_snapshot import snapshot

from clevagent import LLMCall, Step, ToolCall, Usage
from clevagent_core.settings import Settings


def ping(run):
    run.step(Step(kind="ping", name="ok"))


def stalls(watchdog, listener):
    watchdog.flush()
    return listener.of_kind("stall")


class Stuck:
    """Runs a function in a thread, and tells when it stands where it should."""

    def __init__(self, function, *args):
        self.thread = threading.Thread(target=contextvars.copy_context().run, args=(function, *args))
        self.thread.start()

    def wait_until_in(self, name):
        """Wait until the thread's innermost Python frame is the function of that name."""
        while sys._current_frames()[self.thread.ident].f_code.co_name != name:
            pass


# -- when -------------------------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_move_is_told_after_stall_after_and_once(make, clock, listener):
    watchdog = make(stall_after=120)
    with watchdog.run() as run:
        clock.advance(119.99)
        assert stalls(watchdog, listener) == []
        clock.advance(0.01)
        (stall,) = stalls(watchdog, listener)
        assert (stall.run_id, stall.action, stall.details["seconds"]) == (run.run_id, "warn", 120)
        clock.advance(3600)
        assert stalls(watchdog, listener) == [stall]


def test_every_step_begins_the_time_anew_and_a_later_stall_is_told_again(make, clock, listener):
    watchdog = make(stall_after=120)
    with watchdog.run() as run:
        for _ in range(10):
            clock.advance(100)
            ping(run)
        assert stalls(watchdog, listener) == []
        clock.advance(120)
        assert len(stalls(watchdog, listener)) == 1
        ping(run)
        clock.advance(120)
        assert len(stalls(watchdog, listener)) == 2


def test_a_step_of_a_nested_run_moves_the_run_around_it(make, clock, listener):
    watchdog = make(stall_after=120)
    with watchdog.run():
        clock.advance(100)
        with watchdog.run() as nested:
            ping(nested)
        clock.advance(119)
        assert stalls(watchdog, listener) == []


def test_a_run_that_is_over_is_not_stalled(make, clock, listener):
    watchdog = make(stall_after=120)
    with watchdog.run():
        clock.advance(60)
    clock.advance(3600)
    assert stalls(watchdog, listener) == []


def test_one_of_several_runs_can_be_stalled(make, clock, listener):
    watchdog = make(stall_after=120)
    stuck = watchdog.start_run()
    busy = watchdog.start_run()
    for _ in range(3):
        clock.advance(50)
        ping(busy)
    assert [stall.run_id for stall in stalls(watchdog, listener)] == [stuck.run_id]


def test_a_process_that_waits_for_work_is_not_stalled(make, clock, listener):
    watchdog = make(stall_after=120)
    watchdog.process_run.open(ToolCall(tool="search")).settle()
    clock.advance(3600)
    assert stalls(watchdog, listener) == []


def test_a_program_that_pings_is_expected_to_go_on(make, clock, listener):
    watchdog = make(stall_after=120)
    for _ in range(3):
        ping(watchdog.process_run)
        clock.advance(100)
    assert stalls(watchdog, listener) == []
    clock.advance(200)
    assert [stall.run_id for stall in stalls(watchdog, listener)] == [watchdog.process_run.run_id]


def test_a_program_that_pings_slowly_keeps_its_own_time(make, clock, listener):
    watchdog = make(stall_after=120)
    ping(watchdog.process_run)
    for _ in range(3):
        clock.advance(600)
        ping(watchdog.process_run)
    clock.advance(1799)
    assert stalls(watchdog, listener) == []
    clock.advance(1)
    assert len(stalls(watchdog, listener)) == 1


def test_an_open_call_outside_of_every_run_is_watched(make, clock, listener):
    watchdog = make(stall_after=120)
    ticket = watchdog.process_run.open(ToolCall(tool="search"))
    clock.advance(120)
    assert [stall.details["in"] for stall in stalls(watchdog, listener)] == ["search"]
    ticket.settle()
    clock.advance(3600)
    assert len(stalls(watchdog, listener)) == 1


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (ToolCall(tool="crawl_page"), 900),
        (ToolCall(tool="search"), 60),
        (ToolCall(tool="search", timeout_s=300), 300),
        (ToolCall(tool="search", timeout_s=5), 60),
        (LLMCall(model="cent", max_output_tokens=1), 600),
        (LLMCall(model="cent", max_output_tokens=1, timeout_s=90), 90),
        (LLMCall(model="cent", max_output_tokens=1, timeout_s=1800), 1800),
    ],
)
def test_a_call_is_allowed_its_timeout_and_what_was_set_for_its_tool(make, clock, listener, call, allowed):
    watchdog = make(stall_after={"*": 60, "crawl*": 900})
    with watchdog.run() as run:
        run.open(call)
        clock.advance(allowed - 0.1)
        assert stalls(watchdog, listener) == []
        clock.advance(0.1)
        assert [stall.details["in"] for stall in stalls(watchdog, listener)] == [call.tool or call.model]


def test_a_node_is_allowed_what_was_set_for_it(make, clock, listener):
    watchdog = make(stall_after={"*": 60, "plan": 900})
    with watchdog.run() as run:
        work = run.begin("plan")
        clock.advance(899)
        assert stalls(watchdog, listener) == []
        run.finish(work)
        clock.advance(60)
        assert [stall.details["in"] for stall in stalls(watchdog, listener)] == [None]


def test_a_stream_that_flows_is_not_stalled(make, clock, listener):
    watchdog = make(stall_after=60)
    with watchdog.run() as run:
        ticket = run.open(LLMCall(model="cent", max_output_tokens=1, timeout_s=60))
        for _ in range(20):
            clock.advance(50)
            ticket.touch()
        assert stalls(watchdog, listener) == []
        clock.advance(60)
        assert len(stalls(watchdog, listener)) == 1


def test_without_the_plugin_nothing_is_stalled(make, clock, listener):
    watchdog = make(block=["clevagent_heartbeat.stall"])
    with watchdog.run():
        clock.advance(3600)
        assert stalls(watchdog, listener) == []


# -- where ------------------------------------------------------------------------------------------------------------------


def call_api(connection):
    return connection.recv(1)


def take(lock):
    with lock:
        pass


def test_a_socket_that_never_answers_is_told_with_its_line(make, clock, listener):
    watchdog = make(stall_after=120)
    ours, theirs = socket.socketpair()
    with watchdog.run() as run, ours, theirs:

        def work():
            ticket = run.open(ToolCall(tool="fetch"))
            call_api(ours)
            ticket.settle()

        stuck = Stuck(work)
        stuck.wait_until_in("call_api")
        clock.advance(120)
        theirs.send(b"x")
        stuck.thread.join(10)
        (stall,) = stalls(watchdog, listener)
    line = call_api.__code__.co_firstlineno + 1
    assert stall.details["where"] == f"heartbeat/test_stalls.py:{line} in call_api"
    assert stall.message.replace(f":{line} ", ":LINE ") == snapshot(
        "Nothing has moved in 'fetch' for 120 s: no call, node or task was finished, and no ping came. It is blocked in heartbeat/test_stalls.py:LINE in call_api. If that is as long as it takes, say so: clevagent.init(stall_after={'*': 120, 'name of the node or tool': 900}), or clevagent.ping() on the way. on_stall='exit' ends the process for a supervisor to start it again."
    )
    assert stall.details["stack"][-1].endswith(f"test_stalls.py:{line} in call_api")


def test_a_deadlocked_lock_is_told_with_its_line(make, clock, listener):
    watchdog = make(stall_after=120)
    lock = threading.Lock()
    with watchdog.run() as run, lock:

        def work():
            ping(run)
            take(lock)

        stuck = Stuck(work)
        stuck.wait_until_in("take")
        clock.advance(120)
        (stall,) = stalls(watchdog, listener)
    stuck.thread.join(10)
    assert f"test_stalls.py:{take.__code__.co_firstlineno + 1} in take" in stall.message


def test_a_future_that_never_comes_is_told_with_its_line(make, clock, listener):
    watchdog = make(stall_after=120)

    async def answer_of(future):
        return await future

    async def main():
        future = asyncio.get_running_loop().create_future()
        with watchdog.run() as run:

            async def work():
                ticket = await run.aopen(ToolCall(tool="ask"))
                await answer_of(future)
                ticket.settle()

            task = asyncio.create_task(work())
            for _ in range(5):
                await asyncio.sleep(0)
            clock.advance(120)
            future.set_result(None)
            await task

    asyncio.run(main())
    (stall,) = stalls(watchdog, listener)
    assert f"test_stalls.py:{answer_of.__code__.co_firstlineno + 1} in answer_of" in stall.message


def test_a_slow_but_healthy_call_is_not_told(make, clock, listener):
    watchdog = make(stall_after=120)
    with watchdog.run() as run:
        ticket = run.open(LLMCall(model="cent", max_output_tokens=1, timeout_s=600))
        clock.advance(500)
        ticket.settle(Usage(output_tokens=1))
        clock.advance(100)
        assert stalls(watchdog, listener) == []


# -- what is done -----------------------------------------------------------------------------------------------------------


def test_a_callable_gets_the_incident_on_a_thread_of_its_own(make, clock, listener):
    got = []
    watchdog = make(stall_after=120, on_stall=lambda incident: got.append((incident, threading.current_thread().name)))
    with watchdog.run():
        clock.advance(120)
        (stall,) = stalls(watchdog, listener)
    assert got == [(stall, "clevagent-incidents")]


def test_a_callable_that_fails_is_told_in_the_log_and_breaks_nothing(make, clock, listener, caplog):
    def fail(incident):
        raise RuntimeError("no pager")

    watchdog = make(stall_after=120, on_stall=fail)
    with watchdog.run() as run:
        clock.advance(120)
        assert len(stalls(watchdog, listener)) == 1
        ping(run)
    assert "no pager" in caplog.text


EXIT = textwrap.dedent(
    """
    import socket, clevagent
    from clevagent import hookimpl

    class Listener:
        @hookimpl
        def clevagent_incident(self, incident):
            print(incident.kind, incident.action, incident.details["in"], flush=True)

        @hookimpl
        def clevagent_beat(self, beat):
            print(beat.kind, beat.status, flush=True)

    clevagent.init(stall_after=1, on_stall="exit", plugins=[Listener()], DRY)
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT)
    try:
        with clevagent.run(), clevagent.tool_call("fetch"):
            ours.recv(1)
    except TimeoutError:
        print("went on")
    """
)


@pytest.mark.slow
def test_exit_tells_and_ends_the_process_with_a_status_of_its_own():
    ended = subprocess.run(
        [sys.executable, "-c", EXIT.replace("DRY", "").replace("WAIT", "None")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 75
    assert ended.stdout.splitlines() == ["stall exit fetch", "stall warning"]
    assert "Nothing has moved in 'fetch' for" in ended.stderr
    assert "The process is ended with status 75" in ended.stderr


@pytest.mark.slow
def test_exit_in_a_dry_run_only_tells():
    code = EXIT.replace("DRY", "dry_run=True").replace("WAIT", "2")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "stall dry_run fetch" in ended.stdout
    assert "went on" in ended.stdout


# -- settings ---------------------------------------------------------------------------------------------------------------


def test_how_long_each_may_take_can_be_set_in_the_environment():
    assert Settings.resolve({}, {"CLEVAGENT_STALL_AFTER": "90"}).stall_after == 90
    assert Settings.resolve({}, {"CLEVAGENT_STALL_AFTER": "*=120 crawl=900"}).stall_after == {"*": 120, "crawl": 900}


@pytest.mark.parametrize("wrong", [0, -1, "soon", True, float("nan"), {"crawl": 0}, {5: 60}, None.__class__])
def test_what_is_no_time_is_refused(make, wrong):
    with pytest.raises(Exception, match="stall_after"):
        make(stall_after=wrong)


@pytest.mark.parametrize("wrong", ["raise", "halt", 5])
def test_what_cannot_be_done_about_a_stall_is_refused(make, wrong):
    with pytest.raises(Exception, match="A thread that is stuck cannot be made to raise"):
        make(on_stall=wrong)
