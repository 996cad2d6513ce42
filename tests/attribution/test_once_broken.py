"""Ways in which the rules were broken once, from closed event loops to destructors: each holds now."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import clevagent
from clevagent import Budget, BudgetExceeded, UsageError, hookimpl
from clevagent_core import frames

from .conftest import LIMIT, TRIES, WAIT_S, Model, Users, counted, sent

NUMBERS = range(TRIES)


@pytest.fixture
def user(caller):
    return Users(1, caller)


@pytest.fixture
def model(provider):
    return Model(provider).guarded


def within(user, name, ceiling=LIMIT):
    with clevagent.run(budgets=[Budget(llm_calls=ceiling)]) as run:
        return [user.attempt(name) for _ in NUMBERS], run


@pytest.mark.filterwarnings("ignore:coroutine method 'aclose':RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_generator_whose_loop_was_closed_covers_nothing_and_its_run_ends(user):
    """CPython frees it without closing its block, and gives its identity to others."""
    begun = []

    async def answers():
        with clevagent.run(budgets=[Budget(llm_calls=2)]) as run:
            begun.append(run)
            while True:
                yield user.attempt("first")

    async def first():
        async for answer in answers():
            return answer
        return None

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    loop.close()
    gc.collect()
    results = []
    thread = threading.Thread(target=lambda: results.append(within(user, "second", 9)))
    thread.start()
    thread.join(WAIT_S)
    assert results[0][0] == ["sent"] * TRIES
    assert user.attempt("third") == "sent"
    assert begun[0].ended_at is not None
    assert not frames._openers


def test_a_run_that_is_over_cannot_be_made_the_current_one_again_for_free(user):
    answers, run = within(user, "in it")
    with run.activate():
        with pytest.raises(BudgetExceeded) as raised:
            user.caller.ask("late")
        assert raised.value.reason == "run_over"
    assert sent(user.caller.provider) == {"in": answers.count("sent")}


def test_code_after_a_block_is_not_its_runs_while_a_stream_of_it_waits(user, model):
    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as run:
        stream = model.stream("stream")
    assert [user.attempt("after") for _ in NUMBERS] == ["sent"] * TRIES
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(user.attempt, "after").result(WAIT_S) == "sent"
    assert (counted(run), run.ended_at) == (0, None)
    list(stream)
    assert counted(run) == 1
    assert run.ended_at is not None


@pytest.mark.parametrize(
    "put",
    [
        lambda model: model.bind(stop=["x"]),
        lambda model: model.with_config(tags=["x"]),
        lambda model: model.with_retry(),
        lambda model: model.with_fallbacks([model]),
    ],
    ids=["bind", "with_config", "with_retry", "with_fallbacks"],
)
def test_streams_of_what_a_model_was_put_into_belong_to_the_run_they_were_made_in(model, provider, put):
    with clevagent.run(budgets=[Budget(llm_calls=1)]) as run:
        streams = [put(model).stream("Hello") for _ in range(3)]
    refused = 0
    for stream in streams:
        try:
            list(stream)
        except BudgetExceeded:
            refused += 1
    assert (provider.request_count, refused, counted(run)) == (1, 2, 1)


def test_the_decorator_is_refused_where_a_generator_is_only_entered_and_left(user):
    @contextlib.contextmanager
    @clevagent.run(budgets=[Budget(llm_calls=1)])
    def request():
        yield

    with pytest.raises(UsageError, match="stepped as a context manager"):
        request().__enter__()

    @contextlib.asynccontextmanager
    @clevagent.run(budgets=[Budget(llm_calls=1)])
    async def arequest():
        yield

    with pytest.raises(UsageError, match="Open the block inside it"):
        asyncio.run(arequest().__aenter__())


@pytest.mark.parametrize("is_over", [True, False])
def test_a_loop_that_one_run_has_started_for_everybody_belongs_to_nobody(caller, is_over):
    """What is handed to it brings a context of its own."""
    user = Users(1, caller)
    loop = asyncio.new_event_loop()

    def ask(name):
        return asyncio.run_coroutine_threadsafe(user.aattempt(name), loop).result(WAIT_S)

    with contextlib.ExitStack() as stack:
        run = stack.enter_context(clevagent.run(budgets=[Budget(llm_calls=1)]))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        assert [ask("inside") for _ in range(2)] == ["sent", "BudgetExceeded"]
        if is_over:
            stack.close()
        with clevagent.outside_runs() if not is_over else contextlib.nullcontext():
            assert ask("outside") == "sent"
    assert counted(run) == 1
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()


def test_a_thread_that_runs_one_coroutine_is_its_starters(user):
    async def main():
        await asyncio.gather(*(user.aattempt("thread", number) for number in NUMBERS))

    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as run:
        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        thread.join(WAIT_S)
    assert sent(user.caller.provider) == {"thread": LIMIT}
    assert counted(run) == LIMIT


def test_one_block_that_is_open_in_several_dependencies_leaves_the_one_that_is_left():
    block = clevagent.run()

    @contextlib.contextmanager
    def dependency():
        with block as run:
            yield run

    first, second = dependency(), dependency()
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first.__enter__).result(WAIT_S), pool.submit(second.__enter__).result(WAIT_S)
        pool.submit(first.__exit__, None, None, None).result(WAIT_S)
        assert (one.ended_at is None, two.ended_at is None) == (False, True)
        pool.submit(second.__exit__, None, None, None).result(WAIT_S)
    assert two.ended_at is not None


def test_work_that_begins_the_next_from_inside_the_last_keeps_none_of_them():
    alive = []

    async def main():
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def tick(number):
            with clevagent.run() as run:
                alive.append(weakref.ref(run))
                if number:
                    loop.call_soon(tick, number - 1)
                else:
                    done.set_result(None)

        tick(50)
        await done
        gc.collect()
        return sum(reference() is not None for reference in alive)

    assert asyncio.run(main()) < 5


def test_a_stream_that_the_collector_drops_waits_for_nobody(model):
    """Observers of a run's end may take a lock, which whoever makes objects may hold."""
    threads = []

    class Observer:
        @hookimpl
        def clevagent_run_ended(self, run, summary):
            threads.append(gc.isenabled())

    clevagent.init(plugins=[Observer()])

    class Cycle:
        """Only the collector finds it."""

    with clevagent.run():
        cycle = Cycle()
        cycle.me, cycle.stream = cycle, model.stream("Hello")
    del cycle
    gc.disable()
    try:
        gc.collect()
        assert threads == []
    finally:
        gc.enable()
    with clevagent.run():
        assert threads == [True]


def test_blocks_decorate_async_functions_and_refuse_generators(user):
    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as run:

        @clevagent.outside_runs()
        async def outside():
            return await user.aattempt("outside")

        async def main():
            return [await outside() for _ in NUMBERS]

        assert asyncio.run(main()) == ["sent"] * TRIES
    assert counted(run) == 0

    def steps():
        yield 1

    with pytest.raises(UsageError, match="cannot decorate the generator steps"):
        run.activate()(steps)


def test_a_thread_that_takes_no_attributes_is_started_all_the_same(user):
    class Strict(threading.Thread):
        def __setattr__(self, name, value):
            if name.startswith("_clevagent"):
                raise AttributeError(name)
            super().__setattr__(name, value)

    with clevagent.run(budgets=[Budget(llm_calls=LIMIT)]) as run:
        thread = Strict(target=lambda: [user.attempt("thread") for _ in NUMBERS])
        thread.start()
        thread.join(WAIT_S)
    assert counted(run) == LIMIT
