"""Threads, pools and what else starts code elsewhere: whose the calls are that are made there."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.pool import ThreadPool

import pytest
from langchain_core.runnables import RunnableLambda, RunnableParallel

import clevagent
from clevagent import Budget, Stopped
from clevagent.testing import LoopbackProvider, Reply

from .conftest import COUNTS, LIMIT, TRIES, WAIT_S, Client, Model, Users, counted, in_threads, sent

NUMBERS = range(TRIES)


# -- raw threads ----------------------------------------------------------------------------------------------------------


def test_threads_started_in_a_run_count_in_it(users):
    def work(user):
        in_threads([lambda number=number: users.attempt(user, number) for number in NUMBERS])

    users.each_in_a_run(work)
    users.have_made()


def test_threads_of_threads_count_in_the_run_of_the_first(users):
    def work(user):
        for number in NUMBERS:
            in_threads([lambda number=number: in_threads([lambda: users.attempt(user, number)])])

    users.each_in_a_run(work)
    users.have_made()


def test_a_timer_counts_in_the_run_that_started_it(users):
    def work(user):
        timers = [threading.Timer(0, users.attempt, (user, number)) for number in NUMBERS]
        for timer in timers:
            timer.start()
        for timer in timers:
            timer.join(WAIT_S)

    users.each_in_a_run(work)
    users.have_made()


def test_a_subclass_of_thread_counts_in_the_run_that_started_it(users):
    class Worker(threading.Thread):
        def __init__(self, user, number):
            super().__init__()
            self.user, self.number = user, number

        def run(self):
            users.attempt(self.user, self.number)

    def work(user):
        for number in NUMBERS:
            worker = Worker(user, number)
            worker.start()
            worker.join(WAIT_S)

    users.each_in_a_run(work)
    users.have_made()


def test_a_thread_is_as_its_maker_left_it(users):
    """Target and run are the user's own, whatever is carried."""

    def target():
        pass

    def work(user):
        thread = threading.Thread(target=target)
        assert thread._target is target
        thread.start()
        assert "run" not in vars(thread)
        thread.join(WAIT_S)

    users.each_in_a_run(work)


def test_a_block_opened_in_a_thread_is_nested_in_the_run_that_started_it(caller):
    def inside():
        with clevagent.run() as nested:
            caller.ask("nested")
            runs.append(nested)

    runs = []
    with clevagent.run() as outer:
        in_threads([inside])
    assert (counted(runs[0]), counted(outer)) == (1, 1)
    assert runs[0].parent is outer


# -- pools of concurrent.futures -------------------------------------------------------------------------------------------

SUBMIT = {
    "submit": lambda pool, work: [one.result(WAIT_S) for one in [pool.submit(work, number) for number in NUMBERS]],
    "map": lambda pool, work: list(pool.map(work, NUMBERS)),
}


@pytest.mark.parametrize("how", SUBMIT)
def test_a_pool_made_in_a_run_counts_in_it(users, how):
    def work(user):
        with ThreadPoolExecutor(4) as pool:
            SUBMIT[how](pool, lambda number: users.attempt(user, number))

    users.each_in_a_run(work)
    users.have_made()


@pytest.mark.parametrize("how", SUBMIT)
def test_a_pool_that_all_share_counts_each_item_for_its_own_submitter(users, how):
    with ThreadPoolExecutor(2) as pool:
        users.each_in_a_run(lambda user: SUBMIT[how](pool, lambda number: users.attempt(user, number)))
    users.have_made()


@pytest.mark.parametrize("how", SUBMIT)
def test_a_pool_whose_workers_another_run_made_counts_for_the_submitter(caller, how):
    users = Users(1, caller)
    with ThreadPoolExecutor(1) as pool:
        with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as first:
            assert pool.submit(users.attempt, "first").result(WAIT_S) == "sent"
            with clevagent.outside_runs():
                users.each_in_a_run(lambda user: SUBMIT[how](pool, lambda number: users.attempt(user, number)))
    assert sent(caller.provider) == {"first": 1, "user0": LIMIT}
    assert counted(first) == 1
    assert counted(users.runs["user0"]) == LIMIT


@pytest.mark.parametrize("how", SUBMIT)
@pytest.mark.parametrize("is_over", [True, False])
def test_an_item_submitted_outside_every_run_counts_for_none(caller, how, is_over):
    """The pool's worker was made by a run under a ceiling, which is over, or goes on and is spent."""
    users = Users(1, caller)
    done, spent = threading.Event(), threading.Event()

    def work(pool):
        with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
            assert pool.submit(users.attempt, "first").result(WAIT_S) == "sent"
            if not is_over:
                spent.set()
                done.wait(WAIT_S)
        spent.set()
        assert counted(run) == 1

    with ThreadPoolExecutor(1) as pool:
        thread = threading.Thread(target=work, args=(pool,))
        thread.start()
        assert spent.wait(WAIT_S)
        # While it goes on, this thread could be anybody's.
        with nullcontext() if is_over else clevagent.outside_runs():
            answers = SUBMIT[how](pool, lambda number: users.attempt("nobody", number))
        done.set()
        thread.join(WAIT_S)
    assert answers == ["sent"] * TRIES
    assert sent(caller.provider) == {"first": 1, "nobody": TRIES}


def test_an_item_that_opens_a_block_counts_there_and_in_the_submitters_run(caller):
    def item():
        with clevagent.run() as nested:
            caller.ask("nested")
            return counted(nested)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result(WAIT_S)
        with clevagent.run() as outer:
            assert pool.submit(item).result(WAIT_S) == 1
        assert counted(outer) == 1
        # The worker has forgotten both.
        pool.submit(caller.ask, "nobody").result(WAIT_S)
    assert counted(outer) == 1


def test_what_an_item_raises_is_its_own(users):
    def fails(number):
        raise KeyError(number)

    with clevagent.run(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyError):
            pool.submit(fails, 1).result(WAIT_S)
        with pytest.raises(KeyError):
            list(pool.map(fails, [1]))


# -- pools of multiprocessing.pool -----------------------------------------------------------------------------------------

APPLY = {
    "apply": lambda pool, work: [pool.apply(work, (number,)) for number in NUMBERS],
    "apply_async": lambda pool, work: [one.get(WAIT_S) for one in [pool.apply_async(work, (number,)) for number in NUMBERS]],
    "map": lambda pool, work: pool.map(work, NUMBERS),
    "map_async": lambda pool, work: pool.map_async(work, NUMBERS, chunksize=2).get(WAIT_S),
    "starmap": lambda pool, work: pool.starmap(work, [(number,) for number in NUMBERS]),
    "imap": lambda pool, work: list(pool.imap(work, NUMBERS)),
    "imap in chunks": lambda pool, work: list(pool.imap(work, NUMBERS, chunksize=4)),
    "imap_unordered": lambda pool, work: list(pool.imap_unordered(work, NUMBERS)),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", APPLY)
def test_a_thread_pool_that_all_share_counts_each_item_for_its_own_submitter(users, how):
    with ThreadPool(2) as pool:
        users.each_in_a_run(lambda user: APPLY[how](pool, lambda number: users.attempt(user, number)))
    users.have_made()


@pytest.mark.slow
@pytest.mark.parametrize("how", APPLY)
def test_a_thread_pool_made_in_a_run_counts_nothing_for_it_that_another_submits(caller, how):
    users = Users(1, caller)
    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as first:
        pool = ThreadPool(1)
    with pool:
        users.each_in_a_run(lambda user: APPLY[how](pool, lambda number: users.attempt(user, number)))
        answers = APPLY[how](pool, lambda number: users.attempt("nobody", number))
    assert answers == ["sent"] * TRIES
    assert sent(caller.provider) == {"user0": LIMIT, "nobody": TRIES}
    assert counted(users.runs["user0"]) == LIMIT
    assert counted(first) == 0


# -- workers that were there before ----------------------------------------------------------------------------------------


class Worker:
    """A thread made before every run, which takes work from a queue."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Callable[[], object], Future] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._queue.get(timeout=WAIT_S * 3)) is not None:
            work, answer = item
            try:
                answer.set_result(work())
            except BaseException as error:
                answer.set_exception(error)

    def do(self, work):
        answer: Future = Future()
        self._queue.put((work, answer))
        return answer.result(WAIT_S)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(WAIT_S)


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def at_work(worker, users):
    """Each user has the one worker make all its calls; tell what became of them."""
    answers = {}

    def work(user):
        answers[user] = [worker.do(lambda number=number: users.attempt(user, number)) for number in NUMBERS]

    def run():
        users.each_in_a_run(work)
        return answers

    return run


def test_a_worker_that_was_there_before_counts_in_the_only_run(caller, worker):
    users = Users(1, caller)
    users.each_in_a_run(lambda user: [worker.do(lambda n=number: users.attempt(user, n)) for number in NUMBERS])
    users.have_made()


def test_a_worker_counts_in_the_innermost_of_nested_runs(caller, worker):
    with clevagent.run() as outer, clevagent.run(budgets=[Budget(llm_calls=1)]) as inner:
        worker.do(lambda: caller.ask("one"))
    assert (counted(inner), counted(outer)) == (1, 1)


def test_a_worker_counts_in_the_run_around_all_that_are_active(users, worker):
    """The runs inside share it: no call may be free, and none is counted in the wrong one."""
    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as outer:
        # Threads carry the run around them, so that those of the users are nested in it.
        users.each_in_a_run(lambda user: worker.do(lambda: users.attempt(user)))
    assert sum(sent(users.caller.provider).values()) == min(LIMIT, len(users.names)) == counted(outer)
    assert all(counted(run) == 0 for run in users.runs.values())


def test_a_worker_is_refused_while_several_runs_have_ceilings(users, at_work):
    """Nobody can tell whose the call is: it is not sent."""
    answers = at_work()
    assert sent(users.caller.provider) == {}
    assert "sent" not in {answer for each in answers.values() for answer in each}


def test_the_refusal_names_the_ways_out(users, worker):
    errors = []

    def work(user):
        try:
            worker.do(lambda: users.caller.ask(user))
        except Stopped as stop:
            errors.append(str(stop))

    users.each_in_a_run(work)
    assert len(errors) == len(users.names)
    for way in ("run.activate()", "clevagent.outside_runs()"):
        assert way in errors[0]


def test_a_worker_is_refused_nothing_while_only_the_process_has_a_ceiling(caller, worker):
    """Which holds wherever the call counts."""
    watchdog = clevagent.init(budgets=[Budget(llm_calls=1, per="day")])
    users = Users(2, caller)
    users.block = clevagent.run
    users.each_in_a_run(lambda user: worker.do(lambda: users.attempt(user)))
    assert len(caller.provider.requests) == counted(watchdog.process_run) == 1


def test_a_worker_is_refused_while_the_process_has_a_ceiling_for_each_run(caller, worker):
    clevagent.init(budgets=[Budget(usd=5)])
    users = Users(2, caller)
    users.block = clevagent.run
    users.each_in_a_run(lambda user: worker.do(lambda: users.attempt(user)))
    assert sent(caller.provider) == {}


def test_a_worker_is_refused_nothing_where_nobody_has_a_ceiling(caller, worker):
    users = Users(2, caller)
    users.block = clevagent.run
    users.each_in_a_run(lambda user: worker.do(lambda: users.attempt(user)))
    assert sent(caller.provider) == {"user0": 1, "user1": 1}
    assert {counted(run) for run in users.runs.values()} == {0}


def test_the_setting_lets_a_worker_count_for_the_process(users, worker):
    watchdog = clevagent.init(unattributed="process")
    users.each_in_a_run(lambda user: worker.do(lambda: users.attempt(user)))
    assert sent(users.caller.provider) == dict.fromkeys(users.names, 1)
    assert all(counted(run) == 0 for run in users.runs.values())
    assert counted(watchdog.process_run) == len(users.names)


def test_the_process_keeps_its_own_ceiling_then(users, worker):
    clevagent.init(unattributed="process", budgets=[Budget(llm_calls=1, per="day")])
    users.each_in_a_run(lambda user: worker.do(lambda: users.attempt(user)))
    assert sum(sent(users.caller.provider).values()) == 1


def test_a_worker_that_activates_a_run_counts_in_it(users, worker):
    def activated(user, number):
        with users.runs[user].activate():
            return users.attempt(user, number)

    users.each_in_a_run(lambda user: [worker.do(lambda n=number: activated(user, n)) for number in NUMBERS])
    users.have_made()


def test_a_worker_outside_runs_counts_for_the_process_alone(users, worker):
    watchdog = clevagent.init()

    def outside(user, number):
        with clevagent.outside_runs():
            return users.attempt(user, number)

    users.each_in_a_run(lambda user: [worker.do(lambda n=number: outside(user, n)) for number in NUMBERS])
    assert sent(users.caller.provider) == dict.fromkeys(users.names, TRIES)
    assert all(counted(run) == 0 for run in users.runs.values())
    assert counted(watchdog.process_run) == TRIES * len(users.names)


def test_outside_runs_holds_in_a_run_too_and_ends_with_its_block(users):
    def work(user):
        with clevagent.outside_runs():
            assert [users.attempt("nobody") for _ in NUMBERS] == ["sent"] * TRIES
        for number in NUMBERS:
            users.attempt(user, number)

    users.each_in_a_run(work)
    made = sent(users.caller.provider)
    assert made.pop("nobody") == TRIES * len(users.names)
    assert made == dict.fromkeys(users.names, LIMIT)
    assert {counted(run) for run in users.runs.values()} == {LIMIT}


def test_what_outside_runs_starts_is_outside_too(users):
    def work(user):
        with clevagent.outside_runs(), ThreadPoolExecutor(1) as pool:
            in_threads([lambda: users.attempt("nobody")])
            assert pool.submit(users.attempt, "nobody").result(WAIT_S) == "sent"

    users.each_in_a_run(work)
    assert sent(users.caller.provider) == {"nobody": 2 * len(users.names)}
    assert {counted(run) for run in users.runs.values()} == {0}


def test_a_run_opened_outside_runs_is_a_run_of_its_own(caller):
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as outer:
        with clevagent.outside_runs(), clevagent.run() as inner:
            caller.ask("inner")
            caller.ask("inner")
    assert (counted(outer), counted(inner)) == (0, 2)


# -- asyncio and anyio -----------------------------------------------------------------------------------------------------


async def _in_an_executor(function, *args):
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def _in_an_anyio_thread(function, *args):
    import anyio.to_thread

    return await anyio.to_thread.run_sync(function, *args)


@pytest.mark.parametrize("start", [asyncio.to_thread, _in_an_executor, _in_an_anyio_thread])
def test_threads_of_an_event_loop_count_in_the_run_that_asked_for_them(users, in_loop, start):
    async def work(user):
        await asyncio.gather(*(start(users.attempt, user, number) for number in NUMBERS))

    in_loop(users.aeach_in_a_run(work))
    users.have_made()


@pytest.mark.parametrize("start", [asyncio.to_thread, _in_an_executor, _in_an_anyio_thread])
@pytest.mark.parametrize("is_over", [True, False])
def test_threads_that_a_run_made_count_nothing_for_it_that_is_asked_outside(caller, in_loop, start, is_over):
    """The event loop's threads are used again: the next one to use them may be in no run."""
    users = Users(1, caller)

    async def first(spent, done):
        with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
            assert await start(users.attempt, "first") == "sent"
            if not is_over:
                spent.set()
                await done.wait()
        spent.set()
        assert counted(run) == 1

    async def main():
        spent, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(spent, done))
        await asyncio.wait_for(spent.wait(), WAIT_S)
        answers = [await start(users.attempt, "nobody", number) for number in NUMBERS]
        done.set()
        await task
        return answers

    assert in_loop(main()) == ["sent"] * TRIES
    assert sent(caller.provider) == {"first": 1, "nobody": TRIES}


def test_tasks_and_groups_count_in_the_run_that_made_them(users, in_loop):
    async def work(user):
        async with asyncio.TaskGroup() as group:
            for number in NUMBERS:
                group.create_task(asyncio.wait_for(users.aattempt(user, number), WAIT_S))

    in_loop(users.aeach_in_a_run(work))
    users.have_made()


def test_a_task_outside_every_run_counts_for_none_while_runs_are_active(users, in_loop):
    """On an event loop a task that has no run is known to have none."""

    async def main():
        other = asyncio.create_task(users.aeach_in_a_run(users.aattempt))
        answers = [await users.aattempt("nobody", number) for number in NUMBERS]
        await other
        return answers

    assert in_loop(main()) == ["sent"] * TRIES
    assert sent(users.caller.provider) == {"nobody": TRIES, **dict.fromkeys(users.names, 1)}
    assert {counted(run) for run in users.runs.values()} == {1}


# -- LangChain's own threads and tasks -------------------------------------------------------------------------------------


@pytest.fixture(params=COUNTS)
def readers(request, provider):
    """Users of LangChain's models: the ways below are LangChain's own."""
    return Users(request.param, Model(provider))


def _batch(users, user):
    # With one call too many the batch raises; what it had sent counts.
    with pytest.raises(Stopped):
        users.caller.guarded.batch([f"{user} {number}" for number in NUMBERS], {"max_concurrency": 2})


def _parallel(users, user):
    branches = {f"branch{number}": RunnableLambda(lambda _, n=number: users.attempt(user, n)) for number in NUMBERS}
    RunnableParallel(branches).invoke("go")


def _parallel_models(users, user):
    branches = {f"branch{number}": users.caller.guarded for number in NUMBERS}
    with pytest.raises(Stopped):
        RunnableParallel(branches).invoke(f"{user} all")


@pytest.mark.slow
@pytest.mark.parametrize("way", [_batch, _parallel, _parallel_models])
def test_langchains_threads_count_in_the_run_that_started_them(readers, way):
    readers.each_in_a_run(lambda user: way(readers, user))
    readers.have_made()


async def _abatch(users, user):
    with pytest.raises(Stopped):
        await users.caller.guarded.abatch([f"{user} {number}" for number in NUMBERS])


async def _aparallel(users, user):
    branches = {f"branch{number}": users.caller.guarded for number in NUMBERS}
    with pytest.raises(Stopped):
        await RunnableParallel(branches).ainvoke(f"{user} all")


async def _sync_step_of_an_async_chain(users, user):
    """LangChain runs a plain function of an async chain in a thread."""
    chain = RunnableLambda(lambda number: users.attempt(user, number))
    await asyncio.gather(*(chain.ainvoke(number) for number in NUMBERS))


@pytest.mark.slow
@pytest.mark.parametrize("way", [_abatch, _aparallel, _sync_step_of_an_async_chain])
def test_langchains_tasks_count_in_the_run_that_started_them(readers, aio, way):
    aio(readers.aeach_in_a_run(lambda user: way(readers, user)))
    # What a batch had under way when one was refused is cancelled, sent or not.
    readers.have_passed_no_ceiling()


# -- greenlets, processes, trio --------------------------------------------------------------------------------------------


def _run_program(tmp_path, text, provider, *args):
    """Run a program of its own, and give what it printed."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text))
    command = [sys.executable, str(path), provider.openai_url, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S * 6, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


GREENLETS = """
    from gevent import monkey

    monkey.patch_all()
    import sys
    import threading
    from concurrent.futures import ThreadPoolExecutor

    import gevent
    from openai import OpenAI

    import clevagent

    url, how, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    client = clevagent.guard(OpenAI(api_key="test", base_url=url))
    started = []
    all_started = threading.Event()

    def attempt(user):
        try:
            client.chat.completions.create(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": f"{user} x"}])
        except clevagent.Stopped:
            pass

    def activated(run, user):
        with run.activate():
            attempt(user)

    def work(run, user):
        if how == "own":
            for _ in range(6):
                attempt(user)
        elif how == "threads":
            for _ in range(6):
                thread = threading.Thread(target=attempt, args=(user,))
                thread.start()
                thread.join()
        elif how == "pool":
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(attempt, [user] * 6))
        elif how == "greenlets":
            gevent.joinall([gevent.spawn(attempt, user) for _ in range(6)])
        elif how == "activated":
            gevent.joinall([gevent.spawn(activated, run, user) for _ in range(6)])

    def job(user):
        with clevagent.run(budgets=[clevagent.Budget(llm_calls=3)]) as run:
            started.append(user)
            if len(started) == count:
                all_started.set()
            all_started.wait(20)
            work(run, user)
            started.remove(user)
            while started:
                gevent.sleep(0.001)
        return run.summary().total.calls

    print(*[one.get() for one in [gevent.spawn(job, f"user{number}") for number in range(count)]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("how", ["own", "threads", "pool", "activated"])
def test_gevents_threads_count_in_the_run_that_started_them(tmp_path, provider, how, count):
    calls = _run_program(tmp_path, GREENLETS, provider, how, str(count))
    assert sent(provider) == {f"user{number}": LIMIT for number in range(count)}
    assert calls == [str(LIMIT)] * count


@pytest.mark.slow
def test_greenlets_count_in_the_only_run(tmp_path, provider):
    """A greenlet inherits nothing from the one that spawned it."""
    calls = _run_program(tmp_path, GREENLETS, provider, "greenlets", "1")
    assert sent(provider) == {"user0": LIMIT}
    assert calls == [str(LIMIT)]


@pytest.mark.slow
def test_greenlets_are_refused_while_several_runs_have_ceilings(tmp_path, provider):
    calls = _run_program(tmp_path, GREENLETS, provider, "greenlets", "2")
    assert sent(provider) == {}
    assert calls == ["0", "0"]


PROCESSES = """
    import sys

    import loky

    import clevagent

    url = sys.argv[1]

    def ask(user):
        from openai import OpenAI

        import clevagent

        client = clevagent.guard(OpenAI(api_key="test", base_url=url))
        with clevagent.run(budgets=[clevagent.Budget(llm_calls=1)]) as run:
            client.chat.completions.create(model="gpt-4o", max_tokens=20, messages=[{"role": "user", "content": f"{user} x"}])
        return run.summary().total.calls

    if __name__ == "__main__":
        with clevagent.run(budgets=[clevagent.Budget(llm_calls=1)]) as run:
            pool = loky.get_reusable_executor(max_workers=1)
            print(*pool.map(ask, ["child", "child"]))
            print(ask("parent"))
        print(run.summary().total.calls)
        pool.shutdown(wait=True)
"""


@pytest.mark.slow
def test_processes_of_loky_count_for_themselves(tmp_path, provider):
    """What another process calls is its own; nothing breaks where its pool is used in a run."""
    assert _run_program(tmp_path, PROCESSES, provider) == ["1", "1", "1", "1"]
    assert sent(provider) == {"child": 2, "parent": 1}


def _trio():
    return pytest.importorskip("trio")


def test_a_clients_calls_on_trio_count_in_their_run_and_stop_at_its_ceiling(provider):
    trio = _trio()
    users = Users(2, Client(provider))

    async def job(user):
        with users.block() as run:
            users.runs[user] = run
            for number in NUMBERS:
                await users.aattempt(user, number)

    async def main():
        async with trio.open_nursery() as nursery:
            for user in users.names:
                nursery.start_soon(job, user)
        await users.caller.aguarded.close()

    trio.run(main)
    users.have_made()


@pytest.mark.parametrize("with_anyio", [False, True], ids=["trio", "anyio"])
def test_threads_of_trio_count_in_the_run_that_asked_for_them(caller, with_anyio):
    trio = _trio()
    users = Users(2, caller)

    async def job(user):
        import anyio.to_thread

        start = anyio.to_thread.run_sync if with_anyio else trio.to_thread.run_sync
        with users.block() as run:
            users.runs[user] = run
            for number in NUMBERS:
                await start(users.attempt, user, number)

    async def main():
        async with trio.open_nursery() as nursery:
            for user in users.names:
                nursery.start_soon(job, user)

    trio.run(main)
    users.have_made()


def test_a_call_on_trio_that_waits_for_held_money_is_refused_in_our_own_words():
    trio = _trio()
    errors = []
    arrived, release = threading.Event(), threading.Event()

    def answer(body):
        arrived.set()
        release.wait(WAIT_S)
        return Reply()

    with LoopbackProvider(answer) as provider:
        client = Client(provider)

        async def one():
            try:
                await client.aask("one")
            except Exception as error:
                errors.append(error)
                release.set()

        async def main():
            with clevagent.run(budgets=[Budget(llm_calls=1)]):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one)
                    await trio.to_thread.run_sync(arrived.wait, WAIT_S)
                    nursery.start_soon(one)
            await client.aguarded.close()

        trio.run(main)
        assert provider.request_count == 1
    assert [isinstance(error, Stopped) for error in errors] == [True]


def test_what_is_carried_by_hand_counts_as_before(users):
    """The old way of carrying a context still says whose the calls are."""

    def work(user):
        contexts = [contextvars.copy_context() for _ in NUMBERS]
        in_threads([lambda n=n, context=context: context.run(users.attempt, user, n) for n, context in enumerate(contexts)])

    users.each_in_a_run(work)
    users.have_made()
