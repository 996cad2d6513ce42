"""Real processes that beat to a real receiver, and end in every way that processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

from clevagent.testing import HeartbeatReceiver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks as POSIX has them"),
]

WAIT_S = 60


@pytest.fixture
def receiver() -> Iterator[HeartbeatReceiver]:
    with HeartbeatReceiver() as receiver:
        yield receiver


class Child:
    """A Python process that runs a script with ClevAgent set up to beat to the receiver, every second."""

    def __init__(self, receiver: HeartbeatReceiver, code: str, folder: str, **settings: str) -> None:
        environment = {
            **os.environ,
            "CLEVAGENT_AGENT": "child",
            "CLEVAGENT_ENDPOINT": receiver.url,
            "CLEVAGENT_INTERVAL": "1",
            "CLEVAGENT_SPOOL": f"{folder}/spool.db",
            **{f"CLEVAGENT_{name.upper()}": value for name, value in settings.items()},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", textwrap.dedent(code).lstrip("\n")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def hear(self, line: str) -> None:
        heard = self.process.stdout.readline().strip()
        assert heard == line, self.process.stderr.read()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for its end; give its status, and what it wrote to its error output."""
        _, errors = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, errors


Start = Callable[..., Child]


@pytest.fixture
def start(receiver, tmp_path) -> Iterator[Start]:
    started: list[Child] = []

    def start(code: str, **settings: str) -> Child:
        started.append(Child(receiver, code, str(tmp_path), **settings))
        return started[-1]

    yield start
    for child in started:
        if child.process.poll() is None:
            child.process.kill()
            child.process.communicate()


def plain(code: str, number: int | None = None) -> tuple[int, str]:
    """Run the same script without ClevAgent doing anything: what it imports is blocked."""
    nothing = "import sys, types; sys.modules['clevagent'] = types.SimpleNamespace(init=lambda: None, ping=lambda: None, shutdown=lambda: None); "
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", nothing + textwrap.dedent(code).lstrip("\n")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if number is not None:
        assert child.stdout.readline().strip() == "ready"
        child.send_signal(number)
    _, errors = child.communicate(timeout=WAIT_S)
    return child.returncode, errors


def kinds(receiver, boot_id=None):
    return [beat["kind"] for beat in receiver.beats if boot_id in (None, beat["boot_id"])]


READY = """
import clevagent
clevagent.init()
clevagent.ping()
print("ready")
"""
WAITS = READY + "input()\n"


# -- ends -------------------------------------------------------------------------------------------------------------------


def test_a_clean_exit_is_told_by_a_last_beat(start, receiver):
    status, errors = start(READY).end()
    assert (status, errors) == (0, "")
    assert kinds(receiver)[-1] == "shutdown"
    assert [beat["seq"] for beat in receiver.beats] == list(range(1, len(receiver.beats) + 1))
    assert receiver.beats[-1]["totals"]["steps"] == 1
    assert {beat["agent"] for beat in receiver.beats} == {"child"}


@pytest.mark.parametrize("ends", ["import sys; sys.exit(3)", "raise SystemExit(3)"])
def test_an_exit_with_a_status_is_a_clean_one(start, receiver, ends):
    assert start(READY + ends).end() == (3, "")
    assert kinds(receiver)[-1] == "shutdown"
    assert "crash" not in kinds(receiver)


def test_a_killed_process_says_no_last_word(start, receiver):
    child = start(WAITS)
    child.hear("ready")
    assert receiver.wait_for(1)
    child.signal(signal.SIGKILL)
    assert child.end()[0] == -signal.SIGKILL
    assert set(kinds(receiver)) == {"liveness"}


def test_a_process_that_leaves_by_os_exit_says_no_last_word(start, receiver):
    child = start(WAITS + "import os; os._exit(0)")
    child.hear("ready")
    assert receiver.wait_for(1)
    assert child.process.communicate("\n", timeout=WAIT_S) == ("", "")
    assert set(kinds(receiver)) == {"liveness"}


def test_a_stopped_process_is_silent_and_goes_on_where_it_was(start, receiver):
    child = start(WAITS)
    child.hear("ready")
    assert receiver.wait_for(2)
    child.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED)
    before = len(receiver.beats)
    child.signal(signal.SIGCONT)
    assert receiver.wait_for(before + 2)
    child.process.communicate("\n", timeout=WAIT_S)
    assert len({beat["boot_id"] for beat in receiver.beats}) == 1
    assert [beat["seq"] for beat in receiver.beats] == list(range(1, len(receiver.beats) + 1))


def test_a_process_that_was_stopped_as_a_whole_is_not_stalled(start, receiver):
    """Its calls have not had the time for which it stood still."""
    code = textwrap.dedent(
        """
        import threading, clevagent
        from clevagent_heartbeat import stall
        stall._LATE_S = 0.5
        looked, look = threading.Event(), stall.StallGuard.look
        def look_and_say_so(guard):
            answer = look(guard)
            looked.set()
            return answer
        stall.StallGuard.look = look_and_say_so
        watchdog = clevagent.init(stall_after=1)
        with clevagent.run(), clevagent.tool_call("index", timeout_s=2):
            print("working", flush=True)
            input()
            looked.clear()
            looked.wait()
        watchdog.flush()
        print([incident.kind for incident in watchdog.recent], flush=True)
        """
    )
    child = start(code)
    child.hear("working")
    child.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED)
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(2.5)  # longer than the call may take
    child.signal(signal.SIGCONT)
    child.process.stdin.write("\n")
    child.process.stdin.flush()
    child.hear("[]")
    assert child.end()[0] == 0


# -- signals ----------------------------------------------------------------------------------------------------------------


def test_sigterm_without_a_handler_ends_the_process_as_without_us(start, receiver):
    child = start(WAITS)
    child.hear("ready")
    assert receiver.wait_for(1)
    child.signal(signal.SIGTERM)
    assert child.end() == plain(WAITS, signal.SIGTERM) == (-signal.SIGTERM, "")
    assert "shutdown" not in kinds(receiver)


def test_sigterm_with_a_handler_of_the_user_is_a_clean_exit(start, receiver):
    code = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + WAITS
    child = start(code)
    child.hear("ready")
    child.signal(signal.SIGTERM)
    assert child.end() == plain(code, signal.SIGTERM) == (143, "")
    assert kinds(receiver)[-1] == "shutdown"


def test_shutdown_can_be_called_in_a_signal_handler(start, receiver):
    code = (
        "import os, signal\nimport clevagent\n"
        "signal.signal(signal.SIGTERM, lambda *_: (clevagent.shutdown(), os._exit(0)))\n" + WAITS
    )
    child = start(code)
    child.hear("ready")
    child.signal(signal.SIGTERM)
    assert child.end() == (0, "")
    assert kinds(receiver)[-1] == "shutdown"


def test_sigint_without_a_handler_is_a_keyboard_interrupt_and_no_crash(start, receiver):
    child = start(WAITS)
    child.hear("ready")
    # Not while HTTP is still being imported: what Python executes then makes it forget why it ends.
    assert receiver.wait_for(1)
    child.signal(signal.SIGINT)
    status, errors = child.end()
    assert (status, errors.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    assert plain(WAITS, signal.SIGINT)[0] == status
    assert kinds(receiver)[-1] == "shutdown"
    assert "crash" not in kinds(receiver)


def test_no_handler_of_a_signal_is_touched(start):
    code = """
    import signal
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    import clevagent
    clevagent.init()
    clevagent.ping()
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before
    """
    assert start(code).end() == (0, "")


# -- crashes ----------------------------------------------------------------------------------------------------------------

CRASH = READY + "def work(prompt):\n    raise ValueError(prompt)\nwork('the secret prompt')\n"


def crashes(receiver):
    return [incident for beat in receiver.beats for incident in beat["incidents"] if incident["kind"] == "crash"]


def test_an_exception_that_nobody_catches_is_told_with_its_line_and_without_its_text(start, receiver):
    status, errors = start(CRASH).end()
    assert (status, errors) == plain(CRASH)
    assert (status, errors.splitlines()[-1]) == (1, "ValueError: the secret prompt")
    (crash,) = crashes(receiver)
    assert crash["details"]["type"] == "builtins.ValueError"
    assert crash["details"]["stack"][-1] == "<string>:6 in work"
    assert "secret" not in str(receiver.beats)
    assert kinds(receiver).count("crash") == 1
    assert kinds(receiver)[-1] == "shutdown"


def test_the_text_of_an_exception_is_told_where_it_is_asked_for(start, receiver):
    start(CRASH, capture="exception_messages").end()
    (crash,) = crashes(receiver)
    assert "ValueError: the secret prompt" in crash["message"]


def test_an_exception_that_cannot_say_what_it_is_is_told_all_the_same(start, receiver):
    code = READY + "class Mute(Exception):\n    def __str__(self): raise OSError\nraise Mute\n"
    start(code, capture="exception_messages").end()
    (crash,) = crashes(receiver)
    assert "(its text cannot be written: OSError)" in crash["message"]


def test_an_exception_of_a_thread_is_told_and_the_process_goes_on(start, receiver):
    code = (
        READY
        + "import threading\nworker = threading.Thread(target=lambda: 1 / 0, name='worker')\nworker.start()\nworker.join()\nprint('on')\n"
    )
    child = start(code)
    child.hear("ready")
    child.hear("on")
    assert child.end()[0] == 0
    (crash,) = crashes(receiver)
    assert crash["details"]["type"] == "builtins.ZeroDivisionError"
    assert "worker" in crash["details"]["where"]
    assert kinds(receiver)[-1] == "shutdown"


def test_an_exception_of_a_task_that_nobody_awaits_is_told(start, receiver):
    code = READY + textwrap.dedent(
        """
        import asyncio, gc

        async def fail():
            raise LookupError("nothing there")

        async def main():
            task = asyncio.create_task(fail(), name="search")
            await asyncio.sleep(0)
            del task
            gc.collect()

        asyncio.run(main())
        """
    )
    assert start(code).end()[0] == 0
    (crash,) = crashes(receiver)
    assert crash["details"]["type"] == "builtins.LookupError"
    assert crash["details"]["stack"][-1].endswith("in fail")


# -- forks ------------------------------------------------------------------------------------------------------------------


def boots(receiver):
    """The beats of each process, by its id."""
    found = {}
    for beat in receiver.beats:
        found.setdefault(beat["pid"], []).append(beat)
    return found


def test_a_forked_child_beats_under_an_id_of_its_own_from_its_first_step(start, receiver):
    code = READY + textwrap.dedent(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            clevagent.ping("child")
            clevagent.ping("child")
            sys.exit(0)
        os.waitpid(child, 0)
        clevagent.ping()
        """
    )
    status, errors = start(code).end()
    assert (status, errors) == (0, "")
    parent, child = boots(receiver).values()
    if parent[0]["totals"]["steps"] == 2 and parent[0]["status"] == "child":
        parent, child = child, parent
    assert {beat["boot_id"] for beat in parent}.isdisjoint(beat["boot_id"] for beat in child)
    assert (parent[-1]["totals"]["steps"], child[-1]["totals"]["steps"]) == (2, 2)
    assert [beats[-1]["kind"] for beats in (parent, child)] == ["shutdown", "shutdown"]
    assert [beat["seq"] for beat in child] == list(range(1, len(child) + 1))


def test_a_fork_waits_until_openssl_is_set_up_for_the_first_beat(start):
    """A child that is forked in the middle of it would wait for OpenSSL's locks for ever."""
    code = textwrap.dedent(
        """
        import os, ssl, threading, warnings
        import clevagent
        warnings.simplefilter("ignore")
        begun, forks, done = threading.Event(), threading.Event(), threading.Event()
        make = ssl.create_default_context

        def make_while_somebody_forks(*args, **kwargs):
            begun.set()
            forks.wait()
            context = make(*args, **kwargs)
            done.set()
            return context

        ssl.create_default_context = make_while_somebody_forks
        clevagent.init()
        begun.wait()
        os.register_at_fork(before=forks.set)
        child = os.fork()
        if child == 0:
            os._exit(0 if done.is_set() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    child = start(code)
    child.hear("0")
    assert child.end() == (0, "")


def test_a_forked_child_that_does_nothing_of_ours_says_nothing(start, receiver):
    code = (
        READY
        + "import os, sys, warnings\nwarnings.simplefilter('ignore')\nchild = os.fork()\nif child == 0: sys.exit(0)\nos.waitpid(child, 0)\n"
    )
    assert start(code).end() == (0, "")
    assert len(boots(receiver)) == 1


def test_a_fork_while_locks_are_held_and_beats_wait_hinders_neither(start, receiver):
    """The parent forks again and again while its threads ping, and while a receiver that is slow keeps beats queued."""
    receiver.react(delay_s=1, times=1)
    code = READY + textwrap.dedent(
        """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore")
        done = threading.Event()

        def pings():
            number = 0
            while not done.is_set():
                number += 1
                clevagent.ping(f"status {number}")

        threads = [threading.Thread(target=pings) for _ in range(4)]
        for thread in threads: thread.start()
        children = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                clevagent.ping("child")
                clevagent.shutdown()
                os._exit(7)
            children.append(child)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        done.set()
        for thread in threads: thread.join()
        """
    )
    child = start(code, flush_s="20")
    child.hear("ready")
    child.hear(str([7] * 10))
    assert child.end()[0] == 0
    ends = [beats[-1]["kind"] for beats in boots(receiver).values()]
    assert ends == ["shutdown"] * 11


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_end_as_they_should(start, receiver, tmp_path, method):
    script = tmp_path / "program.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, warnings
            import clevagent

            def work(number):
                clevagent.ping(f"child {{number}}")

            if __name__ == "__main__":
                warnings.simplefilter("ignore")
                clevagent.init()
                clevagent.ping("parent")
                context = multiprocessing.get_context("{method}")
                children = [context.Process(target=work, args=(number,)) for number in range(3)]
                for child in children: child.start()
                for child in children: child.join()
                print([child.exitcode for child in children])
            """
        )
    )
    child = start(
        f"import runpy, sys\nsys.argv = [{str(script)!r}]\nsys.path.insert(0, {str(tmp_path)!r})\nrunpy.run_path({str(script)!r}, run_name='__main__')",
        flush_s="20",
    )
    child.hear("[0, 0, 0]")
    assert child.end()[0] == 0
    said = sorted(beats[0]["status"] if len(beats) == 1 else beats[-1]["kind"] for beats in boots(receiver).values())
    assert len(boots(receiver)) == 4
    assert {beats[-1]["kind"] for beats in boots(receiver).values()} == {"shutdown"}, said


def test_the_workers_of_a_pre_forking_server_are_processes_of_their_own(start, receiver):
    code = READY + textwrap.dedent(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        workers = []
        for number in range(3):
            ours, theirs = os.pipe()
            worker = os.fork()
            if worker == 0:
                clevagent.ping(f"worker {number}")
                os.read(ours, 1)
                sys.exit(0)
            workers.append((worker, theirs))
        print(*[worker for worker, _ in workers])
        input()
        for worker, pipe in workers: os.write(pipe, b"!")
        for worker, _ in workers: os.waitpid(worker, 0)
        """
    )
    child = start(code)
    child.hear("ready")
    pids = [int(word) for word in child.process.stdout.readline().split()]
    count = 1
    while not set(pids) <= set(boots(receiver)):
        assert receiver.wait_for(count, timeout_s=WAIT_S)
        count = len(receiver.beats) + 1
    os.kill(pids[0], signal.SIGKILL)
    _, errors = child.process.communicate("\n", timeout=WAIT_S)
    assert (child.process.returncode, errors) == (0, "")
    ends = {pid: beats[-1]["kind"] for pid, beats in boots(receiver).items()}
    assert ends == {pids[0]: "liveness", pids[1]: "shutdown", pids[2]: "shutdown", child.process.pid: "shutdown"}


# -- a receiver that never answers -----------------------------------------------------------------------------------------


def test_a_receiver_that_never_answers_delays_the_end_by_the_flush_deadline_and_what_is_left_is_told(start, receiver, tmp_path):
    receiver.react(hang=True)
    status, errors = start(READY, flush_s="1").end()
    assert status == 0
    assert "spool" in errors
    receiver.recover()
    second = start(READY)
    assert second.end()[0] == 0
    assert [beats[-1]["kind"] for beats in boots(receiver).values()] == ["shutdown", "shutdown"]


def test_without_a_spool_what_is_lost_is_told(start, receiver):
    receiver.react(hang=True)
    status, errors = start(READY, flush_s="1", spool="off").end()
    assert status == 0
    assert "lost" in errors


def test_without_a_receiver_the_agent_works_and_ends_at_once(start, receiver):
    receiver.react(drop=True)
    status, _ = start(READY + "print('worked')\n").end()
    assert status == 0
