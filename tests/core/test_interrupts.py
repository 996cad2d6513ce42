"""An exception of a signal handler that lands in our code: it leaves as itself, and what was held is given back or charged at once."""

from __future__ import annotations

import dis
import functools
import itertools
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import clevagent_core
from clevagent import Budget, BudgetExceeded, LLMCall, Stopped, Usage, hookimpl
from clevagent_core.attempts import Attempt, drive
from clevagent_core.coverage import cover, look_out, uncover
from clevagent_core.doors import LLMCallBlock, ToolCallBlock
from clevagent_core.interrupts import is_interrupt

MOST_PLACES = 2000
"""Two calls have some 450, and 650 with a file."""
OURS = str(Path(clevagent_core.__file__).parent)


class TimeLimitError(Exception):
    """As Celery's ``SoftTimeLimitExceeded``."""


def raises(signum, frame):
    raise TimeLimitError


@pytest.fixture(autouse=True)
def _handler():
    before = signal.signal(signal.SIGUSR1, raises)
    yield
    signal.signal(signal.SIGUSR1, before)


def fire():
    signal.raise_signal(signal.SIGUSR1)


# -- which exceptions are a handler's ---------------------------------------------------------------------------------------


def deep(number):
    if number:
        deep(number - 1)
    raise TimeLimitError


def asks_a_helper(signum, frame):
    deep(3)


def forgets_what_it_was_given(signum, frame):
    del signum, frame
    raise TimeLimitError


def steps_aside(signum, frame):
    """Puts the former handler back before it raises."""
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    raise TimeLimitError


def takes_anything(*args, **kwargs):
    raise TimeLimitError


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Handler:
    """Callable, with methods."""

    def __call__(self, *args):
        raise TimeLimitError

    def method(self, signum, frame):
        raise TimeLimitError

    @classmethod
    def of_the_class(cls, signum, frame):
        raise TimeLimitError

    @staticmethod
    def of_nothing(signum, frame):
        raise TimeLimitError


@pytest.mark.parametrize(
    "handler",
    [
        raises,
        asks_a_helper,
        forgets_what_it_was_given,
        steps_aside,
        takes_anything,
        decorated(raises),
        decorated(forgets_what_it_was_given),
        functools.partial(takes_anything, "first"),
        functools.partial(functools.partial(forgets_what_it_was_given)),
        Handler(),
        Handler().method,
        Handler.of_the_class,
        Handler.of_nothing,
        lambda signum, frame: (_ for _ in ()).throw(TimeLimitError()),
        lambda *_: deep(1),
    ],
    ids=lambda handler: getattr(handler, "__name__", type(handler).__name__),
)
def test_an_exception_is_known_by_its_handler(handler):
    signal.signal(signal.SIGUSR1, handler)

    def somebodys_code():
        fire()

    with pytest.raises(TimeLimitError) as caught:
        somebodys_code()
    assert is_interrupt(caught.value)


def test_what_code_raises_itself_is_its_own():
    def faulty(number, frame):
        raise TimeLimitError

    for error in (lambda: faulty(1, None), lambda: faulty(1, sys._getframe(1)), lambda: deep(5), lambda: {}["bug"]):
        with pytest.raises(Exception) as caught:
            error()
        assert not is_interrupt(caught.value)
    assert not is_interrupt(TimeLimitError())


def test_in_another_thread_no_handler_runs():
    def work():
        try:
            takes_anything()
        except TimeLimitError as error:
            found.append(is_interrupt(error))

    found = []
    signal.signal(signal.SIGUSR1, takes_anything)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == [False]


# -- in plugins, which fail open or closed ----------------------------------------------------------------------------------


class Lands:
    """A plugin in whose hooks the signal arrives."""

    fails_closed = True

    def __init__(self, where):
        self.where = where

    def _at(self, where):
        if where == self.where:
            fire()

    @hookimpl
    def clevagent_before_call(self, run, call):
        self._at("before_call")

    @hookimpl
    def clevagent_reserve(self, run, ticket, extra):
        self._at("reserve")

    @hookimpl
    def clevagent_call_settled(self, run, call, outcome):
        self._at("settled")

    @hookimpl
    def clevagent_call_failed(self, run, call, outcome):
        self._at("failed")

    @hookimpl
    def clevagent_step(self, run, step):
        self._at("step")

    @hookimpl
    def clevagent_price(self, model, provider, service_tier):
        self._at("price")

    @hookimpl
    def clevagent_bound(self, call):
        self._at("bound")

    @hookimpl
    def clevagent_run_started(self, run):
        self._at("run_started")

    @hookimpl
    def clevagent_run_ended(self, run, summary):
        self._at("run_ended")


HOOKS = ["before_call", "reserve", "settled", "failed", "step", "price", "bound", "run_started", "run_ended"]


@pytest.mark.parametrize("where", HOOKS)
def test_in_a_hook_it_leaves_as_itself_and_nothing_stays_held(make, llm, where):
    plugin = Lands("")
    watchdog = make(plugins=[plugin], budgets=[Budget(usd=1, per="day")])
    plugin.where = where
    with pytest.raises(TimeLimitError), watchdog.run() as run:
        block = LLMCallBlock(lambda: watchdog, model="even", input="hi", max_output_tokens=1, tools=(), clamp=False, answers=1,
                             provider=None, node=None, timeout_s=None)  # fmt: skip
        with block as call:
            if where != "failed":
                call.settle(input_tokens=1, output_tokens=1)
        run.open(llm(1, model="new")).release()
    plugin.where = ""
    assert watchdog.ledger.holds() == []
    with watchdog.run() as run:
        run.open(llm()).settle(Usage(output_tokens=1))


@pytest.mark.parametrize("where", ["settle", "charge", "release"])
def test_a_reservation_of_anybodys_is_ended_all_the_same(make, llm, where):
    class Held:
        max_output_tokens = None

        def end(self, how):
            if how == where and not ends:
                ends.append("interrupted")
                fire()
            ends.append(how)

        def settle(self, usage, cost_pico):
            self.end("settle")

        def charge(self):
            self.end("charge")

        def release(self):
            self.end("release")

    class Reserves:
        @hookimpl
        def clevagent_reserve(self, run, ticket, extra):
            return Held()

    ends = []
    watchdog = make(plugins=[Reserves()], budgets=[Budget(usd=1, per="day")])
    ticket = watchdog.process_run.open(llm(2))
    with pytest.raises(TimeLimitError):
        {"settle": lambda: ticket.settle(Usage(output_tokens=1)), "charge": ticket.charge, "release": ticket.release}[where]()
    assert ends == ["interrupted", where]
    assert watchdog.ledger.holds() == []
    spent = {"settle": 0.01, "charge": 0.02, "release": 0}[where]
    assert watchdog.process_run.summary().budgets[0].spent == spent
    assert watchdog.process_run.summary().total.cost_usd == spent


def test_in_a_callable_of_the_users_it_leaves_as_itself(make, llm, spend):
    def asked(incident):
        fire()

    watchdog = make(budgets=[Budget(usd="0.01", on_exceed=asked)])
    with watchdog.run() as run:
        spend(run)
        with pytest.raises(TimeLimitError):
            spend(run)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with pytest.raises(BudgetExceeded):
            spend(run)


# -- at every place where Python looks for signals ----------------------------------------------------------------------------

LOOKS_AFTER = {"RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD"}
"""The instructions at whose end CPython 3.11 looks whether a signal has come."""


@functools.cache
def looks_at(code):
    """Where the interpreter stands when it looks.

    Not at the begin of an ``__exit__``: a signal that comes in there finds nobody who could end the call. Its run does, or ``hold_s``.
    """
    found = set()
    for before, after in itertools.pairwise(dis.get_instructions(code)):
        if before.opname in LOOKS_AFTER and not (before.opname == "RESUME" and code.co_name in {"__exit__", "__aexit__"}):
            found.add(before.argval if before.opname == "JUMP_BACKWARD" else after.offset)
    return found


@contextmanager
def at_place(number):
    """Have the signal come in at the ``number``-th place of the core where Python looks for one. Gives the places that were passed."""
    places, have_called = [], set()

    def trace(frame, event, arg):
        code = frame.f_code
        if event == "call":
            have_called.add(frame.f_back)  # after a function in Python it does not look
        if not code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        if event != "opcode":
            return trace
        has_called = frame in have_called
        have_called.discard(frame)
        if not has_called and frame.f_lasti in looks_at(code):
            places.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
            if len(places) == number:
                fire()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield places
    finally:
        sys.settrace(before)


def one_call(watchdog):
    block = LLMCallBlock(lambda: watchdog, model="even", input="hi", max_output_tokens=9, tools=(), clamp=False, answers=1,
                         provider=None, node="n", timeout_s=None)  # fmt: skip
    with block as call:
        call.settle(input_tokens=2, output_tokens=2, answer="ok")
    with ToolCallBlock(lambda: watchdog, name="search", arguments={}, node=None, timeout_s=None) as call:
        call.settle(result="ok")


class Asking(Attempt):
    """What an adapter makes of a call, in as few words as can be."""

    def __init__(self, watchdog, fails=()):
        self.run = watchdog.process_run
        self.asks = LLMCall(model="even", input=["hi"], max_output_tokens=9)
        self.failures = self
        self.fails = list(fails)
        self.retries = len(self.fails)

    def is_transient(self, error):
        return isinstance(error, ConnectionError)

    def wait_before_retry(self, state):
        return 0

    def open(self):
        return self.run.open(self.asks)

    async def aopen(self):
        return await self.run.aopen(self.asks)

    def abandon(self):
        self.run.abandon(self.asks)

    def enter(self, held):
        cover(held)

    def send(self, held):
        if self.fails:
            raise self.fails.pop()
        return "ok"

    def leave(self, held):
        uncover(held)

    def settle(self, held, answer):
        held.settle(Usage(input_tokens=2, output_tokens=2), result=answer)

    def fail(self, held, error):
        held.charge(error)


class Waiting(Asking):
    async def send(self, held):
        return super().send(held)


def one_attempt(watchdog):
    Asking(watchdog).call()
    drive(Waiting(watchdog).acall())


def a_repeated_attempt(watchdog):
    Asking(watchdog, [ConnectionError()]).call()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="a trace function stands for no signal at the end of a round there")
@pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")  # a coroutine that it lands in front of
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # this warning, where pytest collects it
@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("one_call", [one_call, one_attempt, a_repeated_attempt])
def test_wherever_it_lands_it_leaves_as_itself_and_nothing_stays_held(make, one_call, kind, tmp_path):
    ledger = "memory" if kind == "memory" else f"sqlite:///{tmp_path / 'ledger.db'}"
    budgets = [
        Budget(usd=100, llm_calls=10**6, per="day", name="a"),
        Budget(tokens=10**9, name="b"),
        Budget(tool_calls=10**6, name="c"),
    ]
    watchdog = make(budgets=budgets, ledger=ledger)
    look_out()  # as where an SDK's client is guarded: what each call covers is noted in the context, too
    one_call(watchdog)
    wrong = []
    for number in itertools.count(1):
        with at_place(number) as places:
            try:
                one_call(watchdog)
            except TimeLimitError:
                got = "itself"
            except Stopped as error:
                got = repr(error)
            else:
                got = "lost"
        if number > len(places):
            break
        assert number < MOST_PLACES, "each exception leaves something behind that the next call has to look past"
        held = [account.held for account in watchdog.process_run.used.values() if watchdog.ledger.balance(account).held]
        if got != "itself" or watchdog.ledger.holds() or held or watchdog.process_run.open_work:
            wrong.append((number, places[-1], got, len(watchdog.ledger.holds()), held, len(watchdog.process_run.open_work)))
            watchdog.process_run.open_work.clear()
            for hold in watchdog.ledger.holds():
                watchdog.ledger.release(hold)
    assert not wrong, f"{len(wrong)} of {len(places)}: {wrong[:20]}"
    assert len(places) > 100
