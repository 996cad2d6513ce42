"""Exceptions that nobody catches are told, and what Python and the user's own hooks do about them stays exactly as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = """
import atexit, json
from clevagent_heartbeat.crashes import Crashes

class Watch:
    def __init__(self):
        self.crashes = Crashes(self.tell)
        self.told = []

    def tell(self, where, error):
        self.told.append((where, type(error).__name__))

watch = Watch()
watch.crashes.install()
watch.crashes.install()
atexit.register(lambda: print(json.dumps(watch.told), flush=True))
"""


@pytest.fixture
def run(tmp_path):
    """Run a program of its own, with or without us; the same file, so that tracebacks can be compared."""

    def run(code, ours=OURS):
        (tmp_path / "ours.py").write_text(ours)
        (tmp_path / "program.py").write_text(textwrap.dedent(code))
        environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(tmp_path / "program.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr, done.stdout

    return run


def of(where, *names):
    return [[where, name] for name in names]


ENDS = {
    "main": ("def work():\n    raise ValueError('no')\nwork()", of("main thread", "ValueError"), 1),
    "thread": (
        "import threading\nthread = threading.Thread(target=lambda: 1 / 0, name='worker')\nthread.start()\nthread.join()",
        of("thread 'worker'", "ZeroDivisionError"),
        0,
    ),
    "asyncio.run": (
        "import asyncio\nasync def work():\n    raise LookupError\nasyncio.run(work())",
        of("main thread", "LookupError"),
        1,
    ),
    "group": ("raise ExceptionGroup('both', [ValueError(1), KeyError(2)])", of("main thread", "ExceptionGroup"), 1),
    "cause": ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError from e", of("main thread", "KeyError"), 1),
    "interrupt": ("raise KeyboardInterrupt", [], -2),
    "exit": ("raise SystemExit(3)", [], 3),
    "exit with a word": ("import sys\nsys.exit('enough')", [], 1),
    "exit in a thread": ("import sys, threading\nt = threading.Thread(target=sys.exit)\nt.start()\nt.join()", [], 0),
    "nothing": ("print(end='')", [], 0),
    "a hook of the user's": (
        "import sys\nsys.excepthook = lambda *found: print('mine', found[0], file=sys.stderr)\nimport ours\n1 / 0",
        of("main thread", "ZeroDivisionError"),
        1,
    ),
    "a hook above ours": (
        """
        import sys
        before = sys.excepthook
        def mine(*found):
            print("mine", file=sys.stderr)
            before(*found)
        sys.excepthook = mine
        1 / 0
        """,
        of("main thread", "ZeroDivisionError"),
        1,
    ),
    "a hook above ours that keeps it": ("import sys\nsys.excepthook = lambda *found: print('mine', file=sys.stderr)\n1 / 0", [], 1),
    "a hook of threads": (
        """
        import sys, threading
        threading.excepthook = lambda found: print("mine", found.exc_type, found.thread.name, file=sys.stderr)
        import ours
        thread = threading.Thread(target=lambda: 1 / 0, name="worker")
        thread.start()
        thread.join()
        """,
        of("thread 'worker'", "ZeroDivisionError"),
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_a_crash_is_told_once_and_everything_else_is_as_without_us(run, how):
    code, told, status = ENDS[how]
    # A hook of the user's that is there first puts the import where it belongs.
    code = code if "import ours" in code else f"import ours\n{textwrap.dedent(code)}"
    with_us, without = run(code), run(code, ours="")
    assert with_us[:2] == without[:2]
    assert with_us[0] == status
    assert json.loads(with_us[2]) == told


TASK = """
import ours, asyncio, gc
async def fail():
    raise LookupError("nothing there")
async def main():
    asyncio.create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
asyncio.run(main())
print(end="")
"""


@pytest.mark.slow
def test_a_task_that_nobody_awaits_is_told_and_still_written_to_stderr_by_the_handler_of_last_resort(run):
    with_us, without = run(TASK), run(TASK, ours="")
    assert with_us[:2] == without[:2]
    assert "Task exception was never retrieved" in with_us[1]
    assert json.loads(with_us[2]) == of("asyncio task", "LookupError")


@pytest.mark.slow
def test_what_else_is_logged_by_asyncio_is_no_crash_and_reaches_its_handlers(run):
    code = """
    import ours, logging
    log = logging.getLogger("asyncio")
    log.error("Slow: %s", "callback", exc_info=(ValueError, ValueError(), None))
    log.error("Task exception was never retrieved")
    log.handle(logging.makeLogRecord({"msg": "Task exception was never retrieved", "levelno": 40, "exc_info": 1, "exc_text": "?"}))
    """
    with_us, without = run(code), run(code, ours="")
    assert with_us[:2] == without[:2]
    assert with_us[1].splitlines()[0] == "Slow: callback"
    assert json.loads(with_us[2]) == []


def test_a_record_that_cannot_be_formatted_is_no_error_of_who_logs(run):
    code = "import ours, logging\nlogging.raiseExceptions = False\nlogging.getLogger('asyncio').error('%d', 'x', exc_info=(OSError, OSError(), None))"
    assert run(code)[0] == 0


def test_a_fault_of_ours_does_not_hide_the_users_traceback(run):
    fails = OURS.replace("self.told.append((where, type(error).__name__))", "raise RuntimeError('ours')")
    status, errors, _ = run("import ours\n1 / 0", fails)
    assert status == 1
    assert "could not be told" in errors
    assert errors.endswith(run("\n1 / 0", ours="")[1])


def test_an_exception_is_pickled_by_a_hook_of_the_users_as_before(run):
    code = """
    import sys, pickle
    def mine(kind, error, traceback):
        print(pickle.loads(pickle.dumps(error)), file=sys.stderr)
    sys.excepthook = mine
    import ours
    raise ValueError("sent on")
    """
    assert run(code)[:2] == (1, "sent on\n")


def test_an_exception_that_takes_no_attributes_is_told_all_the_same(run):
    code = """
    import ours
    class Odd(Exception):
        @property
        def __dict__(self):
            raise RuntimeError
    raise Odd
    """
    _status, errors, told = run(code)
    assert json.loads(told) == of("main thread", "Odd")
    assert "could not be told" not in errors


def test_each_of_several_is_told_once_and_they_go_in_any_order(run):
    code = """
    import sys, threading, logging
    before = sys.excepthook, threading.excepthook, list(logging.getLogger("asyncio").filters)
    import ours
    others = [ours.Watch(), ours.Watch()]
    for other in others:
        other.crashes.install()
    error = ValueError()
    for _ in range(2):
        ours.watch.crashes.hear("here", error), others[0].crashes.hear("here", error)
    assert len(ours.watch.told) == len(others[0].told) == 1
    ours.watch.crashes.uninstall()
    ours.watch.crashes.uninstall()
    others[1].crashes.uninstall()
    assert (sys.excepthook, threading.excepthook) != before[:2]
    others[0].crashes.uninstall()
    assert (sys.excepthook, threading.excepthook, logging.getLogger("asyncio").filters) == before
    """
    assert run(code)[:2] == (0, "")


def test_a_hook_that_the_user_put_above_ours_stays_and_none_piles_up(run):
    code = """
    import sys, ours
    before, calls = sys.excepthook, []
    def mine(*found):
        calls.append(found)
        before(*found)
    sys.excepthook = mine
    for _ in range(100):
        ours.watch.crashes.uninstall()
        assert sys.excepthook is mine
        ours.watch.crashes.install()
    ours.watch.crashes.uninstall()
    assert before.before is sys.__excepthook__
    ours.watch.crashes.install()
    1 / 0
    """
    status, errors, told = run(code)
    assert (status, errors.count("Traceback")) == (1, 1)
    assert json.loads(told) == of("main thread", "ZeroDivisionError")


def test_a_watchdog_that_nobody_names_any_more_goes_and_hears_nothing(run):
    code = """
    import gc, weakref, ours
    other = ours.Watch()
    other.crashes.install()
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    1 / 0
    """
    status, errors, told = run(code)
    assert "AssertionError" not in errors
    assert (status, json.loads(told)) == (1, of("main thread", "ZeroDivisionError"))


def test_a_child_that_was_forked_while_hooks_were_put_can_take_them_off(run):
    code = """
    import os, signal, threading, ours
    from clevagent_heartbeat import crashes
    held, go_on = threading.Event(), threading.Event()
    def hold():
        with crashes._lock:
            held.set()
            go_on.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        ours.watch.crashes.uninstall()
        os._exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    go_on.set()
    thread.join()
    raise SystemExit(status)
    """
    assert run(code)[0] == 7
