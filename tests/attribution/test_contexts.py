"""What a context is handed on to, and what it is put back to: by threads, loops and pools, and by what somebody else closes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import anyio.to_thread
import pytest
from langchain_core.language_models import GenericFakeChatModel

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError
from clevagent_core import frames

from .conftest import COUNTS, LIMIT, TRIES, WAIT_S, Client, Users, counted, sent

NUMBERS = range(TRIES)
ALLOWED = ["sent"] * LIMIT + ["BudgetExceeded"] * (TRIES - LIMIT)


@pytest.fixture(params=COUNTS)
def users(request, caller):
    return Users(request.param, caller)


@pytest.fixture
def user(caller):
    return Users(1, caller)


@pytest.fixture
def served():
    """An event loop that a thread runs for whoever hands it something."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()


def on_a_thread(function):
    """Call ``function`` on a thread that is started here; give what it gives."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(WAIT_S)
    return results[0]


def on_a_pool(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(WAIT_S)


# -- to other loops -------------------------------------------------------------------------------------------------------


def as_a_coroutine(loop, make):
    return asyncio.run_coroutine_threadsafe(make(), loop).result(WAIT_S)


def as_a_task_of_a_callback(loop, make):
    done = Future()

    async def work():
        done.set_result(await make())

    tasks = []
    loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(work())))
    return done.result(WAIT_S)


def in_a_copy(loop, make):
    return contextvars.copy_context().run(as_a_coroutine, loop, make)


@pytest.mark.parametrize("hand_over", [as_a_coroutine, as_a_task_of_a_callback, in_a_copy])
@pytest.mark.parametrize("begin", [on_a_thread, on_a_pool, lambda function: function()], ids=["thread", "pool", "here"])
def test_what_a_thread_hands_to_a_loop_of_others_counts_in_the_threads_run(users, served, hand_over, begin):
    def work(user):
        for number in NUMBERS:
            begin(lambda: hand_over(served, lambda: users.aattempt(user, number)))  # noqa: B023 - called at once

    users.each_in_a_run(work)
    users.have_made()


class OwnLoop(asyncio.SelectorEventLoop):
    """As uvloop and nest_asyncio: it runs until something is complete in code of its own."""

    def run_until_complete(self, future):
        future = asyncio.ensure_future(future, loop=self)
        future.add_done_callback(lambda _: self.stop())
        self.run_forever()
        return future.result()


def until_stopped(loop, work):
    task = loop.create_task(work)
    task.add_done_callback(lambda _: loop.stop())
    loop.run_forever()


@pytest.mark.parametrize("make", [asyncio.new_event_loop, OwnLoop])
@pytest.mark.parametrize("run", [until_stopped, lambda loop, work: loop.run_until_complete(work)], ids=["forever", "complete"])
@pytest.mark.parametrize("kind", [Client], indirect=False)
def test_a_loop_of_a_threads_own_counts_in_the_run_that_the_thread_was_started_in(users, provider, make, run):
    def work(user):
        async def tries():
            client = Client(provider)  # each loop needs one of its own
            for number in NUMBERS:
                with contextlib.suppress(BudgetExceeded):
                    await client.aask(f"{user} {number}")
            await client.aguarded.close()

        def serve():
            with contextlib.closing(make()) as loop:
                run(loop, tries())

        on_a_thread(serve)

    users.each_in_a_run(work)
    users.have_made()


# -- workers keep nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["submit", "run_in_executor"])
def test_a_worker_on_which_a_generator_was_stepped_is_the_next_users_alone(user, begin):
    with ThreadPoolExecutor(1) as pool:

        def on_the_pool(function, *args):
            if begin == "submit":
                return pool.submit(function, *args).result(WAIT_S)

            async def ask():
                return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

            return asyncio.run(ask())

        def steps(name):
            with user.block():
                while True:
                    yield user.attempt(name)

        another = steps("another")
        next(another)  # any generator with an open block
        first = steps("first")
        with clevagent.run(budgets=[Budget(llm_calls=99)]) as first_run:
            assert on_the_pool(next, first) == "sent"
        with user.block() as run:
            assert [on_the_pool(user.attempt, "second") for _ in NUMBERS] == ALLOWED
        assert (counted(run), counted(first_run)) == (LIMIT, 1)
        first.close()
        another.close()
        with user.block():
            assert [on_the_pool(user.attempt, "third") for _ in NUMBERS] == ALLOWED


def test_a_block_that_is_opened_on_a_worker_and_closed_elsewhere_covers_nobody_elses_work(user):
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        session = pool.submit(stack.enter_context, clevagent.run(budgets=[Budget(llm_calls=99)])).result(WAIT_S)
        with user.block():
            assert [pool.submit(user.attempt, "beside").result(WAIT_S) for _ in NUMBERS] == ALLOWED
        stack.close()
        with user.block():
            assert [pool.submit(user.attempt, "after").result(WAIT_S) for _ in NUMBERS] == ALLOWED
        with user.block():
            assert pool.submit(lambda: asyncio.run(user.aattempt("loop"))).result(WAIT_S) == "sent"
        assert counted(session) == 0


def test_a_callback_of_a_future_is_whoevers_who_added_it(users):
    with ThreadPoolExecutor(1) as pool:

        def work(user):
            for number in NUMBERS:
                done, go = threading.Event(), threading.Event()
                future = pool.submit(go.wait, WAIT_S)
                future.add_done_callback(lambda _: (users.attempt(user, number), done.set()))  # noqa: B023 - called at once
                go.set()
                assert done.wait(WAIT_S)

        users.each_in_a_run(work)
    users.have_made()


@pytest.mark.slow
def test_the_threads_of_a_process_pool_are_not_those_of_the_run_that_used_it_first(user):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with clevagent.run(budgets=[Budget(llm_calls=99)]) as first:
            assert pool.submit(abs, -1).result(WAIT_S) == 1
        answers = []
        with user.block() as run:
            for _ in NUMBERS:
                done = threading.Event()
                pool.submit(abs, -1).add_done_callback(lambda _: (answers.append(user.attempt("second")), done.set()))  # noqa: B023 - called at once
                assert done.wait(WAIT_S)
        assert (answers, counted(run), counted(first)) == (ALLOWED, LIMIT, 0)


# -- what somebody else closes --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_task_that_is_collected_while_another_user_works_changes_nothing_for_that_one(user, in_loop):
    @clevagent.run()
    async def steps():
        await asyncio.get_running_loop().create_future()  # nobody else holds it
        yield 1

    async def read():
        async for _ in steps():
            pass

    async def first():
        with clevagent.run(budgets=[Budget(llm_calls=99)]) as run:
            asyncio.create_task(read())  # noqa: RUF006 - nobody holds it: that is the case
            await collected.wait()
            return counted(run)

    async def second():
        with user.block():
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            gc.collect()
            answers = [await user.aattempt("second") for _ in NUMBERS]
            collected.set()
            return answers

    async def main():
        return await asyncio.gather(first(), second())

    collected = asyncio.Event()
    gc.disable()
    try:
        assert in_loop(main()) == [0, ALLOWED]
    finally:
        gc.enable()


class Waits(GenericFakeChatModel):
    """A model whose answer never comes."""

    async def _astream(self, *args, **kwargs):
        await asyncio.get_running_loop().create_future()
        yield


@pytest.mark.parametrize("step_in", [contextvars.Context, contextvars.copy_context], ids=["another context", "a copy"])
def test_a_coroutine_that_is_closed_in_another_users_block_leaves_that_alone(user, in_loop, step_in):
    model = clevagent.guard(Waits(messages=iter([])))

    async def read():
        with clevagent.run(budgets=[Budget(llm_calls=99)]):
            stream = model.astream("slow")
        async for _ in stream:
            pass

    async def second(coroutine):
        with user.block():
            with contextlib.suppress(RuntimeError):  # LangChain awaits something on its way out
                coroutine.close()
            return [await user.aattempt("second") for _ in NUMBERS]

    async def main():
        coroutine = read()
        step_in().run(coroutine.send, None)  # once, by hand, as a trampoline does
        return await asyncio.create_task(second(coroutine))

    assert in_loop(main()) == ALLOWED
    assert sent(user.caller.provider) == {"second": LIMIT}


def test_no_python_code_of_ours_runs_in_the_garbage_collector():
    """What a signal handler raises there nobody would hear of."""
    ran = []

    def profile(python, event, arg):
        if event == "call":
            ran.append(python.f_code.co_filename)

    gc.collect()  # what others have left
    sys.setprofile(profile)
    try:
        gc.collect()
    finally:
        sys.setprofile(None)
    assert [name for name in ran if "clevagent_core" in name] == []
    assert not frames._is_collecting()


# -- generators and their consumers ---------------------------------------------------------------------------------------


def test_a_generator_that_yields_in_a_wrap_up_does_not_cover_its_consumer(user):
    def closing():
        with clevagent.run(budgets=[Budget(llm_calls=9)]) as run:
            begun.append(run)
            yield 0
            with run.wrap_up():
                yield user.attempt("body")
                yield user.attempt("body")

    begun = []
    items = closing()
    assert next(items) == 0
    with user.block() as mine:
        for _ in range(2):
            assert next(items) == "sent"
            answers = [user.attempt("consumer") for _ in range(2)]
        assert answers == ["sent", "BudgetExceeded"]
        assert counted(mine) == LIMIT
    assert counted(begun[0]) == 2
    items.close()


def progress(items):
    """Any generator around another: a progress bar, a formatter of server-sent events, a filter."""
    yield from items


def filtered(items):
    for item in items:
        if item:
            yield item


def step(items):
    return next(items, None)


@pytest.mark.parametrize(
    "around", [progress, filtered, lambda items: iter(functools.partial(step, items), None)], ids=["yield from", "for", "helper"]
)
def test_whoever_steps_a_generator_through_something_else_is_outside_of_its_run_too(users, around):
    def work(user):
        def steps():
            with clevagent.run(budgets=[Budget(llm_calls=2)]):
                for number in range(4):
                    yield users.attempt(f"{user}-body", number)

        bodies, mine = [], []
        for answer in around(steps()):
            bodies.append(answer)
            mine.append(users.attempt(user))
        assert bodies == ["sent", "sent", "BudgetExceeded", "BudgetExceeded"]
        assert mine == ["sent"] * 4

    users.each(work)


def test_a_generator_that_is_left_early_and_still_held_covers_nothing(user):
    def steps():
        with user.block() as run:
            begun.append(run)
            while True:
                yield user.attempt("body")

    begun = []
    items = steps()
    assert step(items) == "sent"
    assert [user.attempt("after") for _ in NUMBERS] == ["sent"] * TRIES
    assert counted(begun[0]) == 1
    items.close()


def test_what_is_begun_after_a_generator_was_left_has_not_outlived_its_run(user, in_loop):
    async def steps():
        with user.block():
            while True:
                yield await user.aattempt("body")

    async def main():
        async for _ in steps():
            break
        await asyncio.sleep(0.05)  # the loop has closed it meanwhile
        return [
            *await asyncio.gather(user.aattempt("gather"), user.aattempt("gather")),
            await asyncio.wait_for(user.aattempt("wait_for"), WAIT_S),
            await asyncio.to_thread(user.attempt, "to_thread"),
        ]

    assert in_loop(main()) == ["sent"] * 4
    assert sent(user.caller.provider) == {"body": 1, "gather": 2, "wait_for": 1, "to_thread": 1}


def test_but_a_task_that_its_body_began_has(user, in_loop):
    async def steps():
        with user.block():
            tasks.append(asyncio.create_task(late()))
            yield await user.aattempt("body")

    async def late():
        await over.wait()
        with pytest.raises(BudgetExceeded) as raised:
            await user.caller.aask("late")
        return raised.value.reason

    async def main():
        async for _ in steps():
            pass
        over.set()
        return await tasks[0]

    tasks, over = [], asyncio.Event()
    assert in_loop(main()) == "run_over"
    assert sent(user.caller.provider) == {"body": 1}


def test_blocks_that_are_closed_in_the_order_they_were_opened_leave_nothing_behind(user):
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(user.block())
    second.enter_context(user.block())
    first.close()
    second.close()
    assert user.attempt("here") == "sent"
    assert asyncio.run(user.aattempt("loop")) == "sent"

    async def main():
        return await asyncio.to_thread(user.attempt, "thread")

    assert asyncio.run(main()) == "sent"


def test_a_servers_thread_on_which_a_stream_was_begun_and_dropped_is_the_next_requests_alone(user, in_loop):
    def steps():
        with user.block() as run:
            begun.append(run)
            while True:
                yield user.attempt("stream")

    async def first():
        items = steps()
        await anyio.to_thread.run_sync(next, items)
        left.append(items)  # by a server whose client has gone away

    async def second():
        return [await anyio.to_thread.run_sync(user.attempt, "endpoint") for _ in NUMBERS]

    async def main():
        await asyncio.create_task(first())
        return await asyncio.create_task(second())

    begun, left = [], []
    assert in_loop(main()) == ["sent"] * TRIES
    assert counted(begun[0]) == 1
    left.pop().close()


# -- the decorator --------------------------------------------------------------------------------------------------------


class Callable_:  # noqa: N801 - what it is
    def __init__(self, function):
        self.function = function


class Async(Callable_):
    async def __call__(self):
        return await self.function()


class Generator(Callable_):
    def __call__(self):
        yield from self.function()


class AsyncGenerator(Callable_):
    async def __call__(self):
        async for item in self.function():
            yield item


def drive(in_loop, begun):
    """Carry out what a function has begun; give what comes of it."""
    if hasattr(begun, "__anext__"):

        async def read():
            return [item async for item in begun]

        return in_loop(read())
    return list(begun) if hasattr(begun, "__next__") else in_loop(begun)


def ways(user):
    async def asks():
        return [await user.aattempt("it") for _ in NUMBERS]

    def steps():
        for _ in NUMBERS:
            yield user.attempt("it")

    async def asteps():
        for _ in NUMBERS:
            yield await user.aattempt("it")

    return asks, steps, asteps


@pytest.mark.parametrize("which", [0, 1, 2], ids=["coroutine", "generator", "async generator"])
@pytest.mark.parametrize("form", ["object", "lambda", "partial"])
def test_the_decorator_covers_whatever_is_called_like_a_function(user, in_loop, which, form):
    function = ways(user)[which]
    given = {
        "object": (Async, Generator, AsyncGenerator)[which](function),
        "lambda": lambda: function(),  # noqa: PLW0108 - what is called is no generator function
        "partial": functools.partial(function),
    }[form]
    decorated = clevagent.run(budgets=[Budget(llm_calls=LIMIT)])(given)
    assert drive(in_loop, decorated()) == ALLOWED
    assert drive(in_loop, decorated()) == ALLOWED


def test_a_function_whose_result_is_carried_out_later_is_not_told_to_cover_nothing(user, in_loop, caplog):
    asks = ways(user)[0]
    drive(in_loop, clevagent.run(budgets=[Budget(llm_calls=LIMIT)])(lambda: asks())())  # noqa: PLW0108 - as above
    assert not [record for record in caplog.records if "no call" in record.getMessage()]


def test_a_partial_is_named_where_it_cannot_be_decorated():
    def steps():
        yield

    with pytest.raises(UsageError, match=r"generator steps\(\)"):
        clevagent.outside_runs()(functools.partial(steps))


def stubborn():
    try:
        yield 1
    except GeneratorExit:
        yield 2


def answering():
    try:
        yield 1
    except (GeneratorExit, ValueError):
        return "r"


def raising():
    try:
        yield 1
    finally:
        raise LookupError("at the end")


def outcome(generator, how):
    next(generator)
    try:
        return how(generator)
    except BaseException as error:  # what is compared
        return type(error), getattr(error, "value", None), str(error)


@pytest.mark.parametrize("function", [stubborn, answering, raising])
@pytest.mark.parametrize(
    "how",
    [lambda g: g.close(), lambda g: g.throw(GeneratorExit()), lambda g: g.throw(ValueError("x")), lambda g: g.send("y")],
    ids=["close", "throw GeneratorExit", "throw", "send"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_decorated_generator_ends_as_the_plain_one_does(function, how):
    assert outcome(clevagent.run()(function)(), how) == outcome(function(), how)
