"""What is put around threads and pools while a watchdog is there, and taken away after it."""

from __future__ import annotations

import functools
import gc
import multiprocessing.pool
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest

import clevagent
from clevagent_core import carrying, frames

PLACES = [(threading.Thread, "start"), (ThreadPoolExecutor, "submit"), (ThreadPool, "apply_async"), (ThreadPool, "imap")]


@pytest.fixture
def make():
    """Make watchdogs; no other is there, whatever ran before."""
    for left in list(carrying._watchdogs):
        left.shutdown()
    made = []

    def one(**settings):
        made.append(clevagent.Watchdog(**settings))
        return made[-1]

    yield one
    for watchdog in made:
        watchdog.shutdown()


def standing():
    return [vars(kind).get(name) for kind, name in PLACES]


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_it_is_there_as_long_as_any_watchdog_is(make):
    before = standing()
    one, two = make(), make()
    assert all(now is not then for now, then in zip(standing(), before, strict=True))
    one.shutdown()
    assert all(now is not then for now, then in zip(standing(), before, strict=True))
    two.shutdown()
    assert standing() == before
    assert "apply_async" not in vars(ThreadPool)


def test_it_can_be_blocked(make):
    before = standing()
    watchdog = make(block=["clevagent_core.carrying"])
    assert standing() == before
    watchdog.start_run()
    with watchdog.run() as run:
        assert in_a_thread(watchdog.current_run) is not run


def test_a_thread_of_a_program_that_wraps_threads_too_is_carried_to_and_left_as_it_was(make, monkeypatch):
    original = threading.Thread.start
    first = make()

    @functools.wraps(threading.Thread.start)
    def start(self):
        return inner(self)

    inner = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with first.run() as run:
        assert in_a_thread(first.current_run) is run
    first.shutdown()
    assert threading.Thread.start is start
    second = make()
    with second.run() as run:
        assert in_a_thread(second.current_run) is run
    second.shutdown()
    assert threading.Thread.start is start
    monkeypatch.undo()
    monkeypatch.setattr(threading.Thread, "start", original)


def test_pools_take_their_function_in_every_way_they_did(make):
    watchdog = make()
    with watchdog.run() as run, ThreadPool(1) as pool, ThreadPoolExecutor(1) as executor:

        def found(*args, **kwargs):
            return watchdog.current_run() is run, args, kwargs

        assert pool.apply(found, (1,), {"a": 2}) == (True, (1,), {"a": 2})
        assert pool.apply_async(func=found, args=(1,)).get(10) == (True, (1,), {})
        assert pool.map(found, [1, 2]) == [(True, (1,), {}), (True, (2,), {})]
        assert pool.starmap(found, [(1, 2)]) == [(True, (1, 2), {})]
        assert list(pool.imap(found, [1])) == list(pool.imap_unordered(func=found, iterable=[1])) == [(True, (1,), {})]
        assert executor.submit(found, 1, a=2).result(10) == (True, (1,), {"a": 2})
        with pytest.raises(TypeError):
            executor.submit()


def test_what_goes_wrong_in_a_piece_of_work_is_its_own(make):
    watchdog = make()

    def fail():
        raise KeyError("x")

    with watchdog.run(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyError):
            pool.submit(fail).result(10)
        assert pool.submit(lambda: frames._here.below is not None).result(10)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(watchdog.current_run).result(10) is watchdog.process_run


def test_a_thread_keeps_no_run_alive(make):
    """It may go on for ever; and a run may be large."""
    watchdog = make()
    done = threading.Event()
    with watchdog.run() as run:
        gone = weakref.ref(run)
        thread = threading.Thread(target=done.wait, args=(10,))
        thread.start()
    del run
    gc.collect()
    assert gone() is None
    done.set()
    thread.join()


def test_processes_are_not_touched(make):
    make()
    assert "apply_async" in vars(multiprocessing.pool.ThreadPool)
    assert vars(multiprocessing.pool.Pool)["apply_async"].__module__ == "multiprocessing.pool"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there, the collector does not run while an object is made")
def test_what_the_collector_closes_leaves_the_context_as_it_is(make):
    """It may run inside of ``ContextVar.set``, whose mapping a second ``set`` would free."""
    watchdog = make()

    class Cycle:
        """Only the collector finds it."""

    def steps(cycle):
        with watchdog.run() as run:
            yield run

    cycle = Cycle()
    cycle.steps = steps(cycle)
    run = next(cycle.steps)
    top = frames._current.get()
    del cycle
    gc.collect()
    assert run.ended_at is not None
    assert frames._current.get() is top
    assert not frames._openers
    with watchdog.run() as following:
        assert following.parent is None
        assert watchdog.current_run() is following
    assert watchdog.current_run() is watchdog.process_run
