"""Where a thread, or a task, is stuck: the line in the user's own code, however deep what it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import threading

import anyio
import pytest

from clevagent_heartbeat.stacks import MOST_FRAMES, Frame, Stack, from_exception, task_stack, thread_stack


async def stuck(future):
    return await future


def look_until(is_there, look, thread):
    """Look at a thread until it has got to where it waits: nothing tells that a thread is blocked."""
    while not is_there(stack := look()):
        thread.join(0.001)
        assert thread.is_alive()
    return stack


async def gathers(future):
    await asyncio.gather(asyncio.sleep(0), stuck(future))


async def groups(future):
    async with asyncio.TaskGroup() as group:
        group.create_task(stuck(future))


async def nests(future):
    await asyncio.create_task(stuck(future))


async def shields(future):
    await asyncio.shield(stuck(future))


async def limits(future):
    async with asyncio.timeout(3600):
        await stuck(future)


async def waits_for(future):
    await asyncio.wait_for(stuck(future), 3600)


async def waits(future):
    await asyncio.wait([asyncio.create_task(stuck(future))])


async def groups_by_anyio(future):
    async with anyio.create_task_group() as group:
        group.start_soon(stuck, future)


async def gathers_gathers(future):
    await asyncio.gather(asyncio.sleep(0), asyncio.gather(stuck(future)))


async def enters(future):
    @contextlib.asynccontextmanager
    async def manager():
        await stuck(future)
        yield

    async with manager():
        pass


async def awaits_its_own(future):
    class Own:
        def __await__(self):
            return (yield from stuck(future).__await__())

    await Own()


async def awaits_what_wraps_a_coroutine(future):
    class Request:
        def __await__(self):
            return stuck(future).__await__()

    await Request()


async def takes_the_next(future):
    async def numbers():
        await stuck(future)
        yield 1

    await anext(numbers(), None)


async def generates(future):
    async def numbers():
        yield 1
        await stuck(future)

    async for _ in numbers():
        pass


@pytest.mark.parametrize(
    "how",
    [
        stuck,
        gathers,
        gathers_gathers,
        groups,
        groups_by_anyio,
        nests,
        shields,
        limits,
        waits_for,
        waits,
        generates,
        enters,
        awaits_its_own,
        awaits_what_wraps_a_coroutine,
        takes_the_next,
    ],
)
def test_a_task_is_followed_to_the_line_that_nobody_answers(how):
    async def main():
        future = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(how(future))
        for _ in range(5):
            await asyncio.sleep(0)
        stack = task_stack(task)
        future.set_result(None)
        await task
        return stack, task_stack(task)

    stack, over = asyncio.run(main())
    assert stack.where == f"heartbeat/test_stacks.py:{stuck.__code__.co_firstlineno + 1} in stuck"
    assert stack.frames[0].function == how.__name__
    assert over is None


@pytest.mark.parametrize("what", ["queue", "lock", "event"])
def test_what_a_task_waits_for_in_a_library_is_told_beside_the_users_line(what):
    async def take(queue, lock, event):
        await {"queue": queue.get, "lock": lock.acquire, "event": event.wait}[what]()

    async def main():
        queue, lock, event = asyncio.Queue(), asyncio.Lock(), asyncio.Event()
        await lock.acquire()
        task = asyncio.create_task(take(queue, lock, event))
        await asyncio.sleep(0)
        stack = task_stack(task)
        task.cancel()
        return stack

    where = asyncio.run(main()).where
    assert where.startswith("heartbeat/test_stacks.py:")
    assert " in take (waiting in asyncio/" in where


def test_a_blocking_call_in_async_code_is_told_as_the_thread_stands():
    ours, theirs = socket.socketpair()

    def call_api():
        ours.recv(1)

    async def work():
        call_api()

    async def main():
        task = asyncio.create_task(work())
        told.append(task)
        await task

    told = []
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    stack = look_until(
        lambda stack: stack is not None and stack.frames[-1].function == "call_api",
        lambda: task_stack(told[0]) if told else None,
        thread,
    )
    theirs.send(b"x")
    thread.join()
    ours.close()
    theirs.close()
    assert " in call_api" in stack.where
    assert any(frame.function == "work" for frame in stack.frames)


@pytest.fixture
def library(tmp_path):
    """A module of an installed package that calls back from deep inside."""
    path = tmp_path / "site-packages" / "library.py"
    path.parent.mkdir()
    path.write_text("def dive(depth, then):\n    return then() if depth == 0 else dive(depth - 1, then)\n")
    spec = importlib.util.spec_from_file_location("library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_users_line_is_told_however_many_frames_of_libraries_lie_around_it(library):
    released = threading.Event()

    def node():
        library.dive(60, block_in_library)

    def block_in_library():
        return library.dive(60, released.wait)

    thread = threading.Thread(target=lambda: library.dive(60, node))
    thread.start()
    stack = look_until(
        lambda stack: stack.frames[-1].function == "wait" and "threading" in stack.frames[-1].file,
        lambda: thread_stack(thread.ident),
        thread,
    )
    released.set()
    thread.join()
    assert stack.where.startswith(
        f"heartbeat/test_stacks.py:{block_in_library.__code__.co_firstlineno + 1} in block_in_library (waiting in "
    )
    assert not any(frame.function == "block_in_library" for frame in stack.frames)


def test_a_thread_that_waits_for_a_lock_is_told_with_the_users_line():
    lock = threading.Lock()

    def take():
        with lock:
            pass

    lock.acquire()
    thread = threading.Thread(target=take)
    thread.start()
    stack = look_until(lambda stack: stack.frames[-1].function == "take", lambda: thread_stack(thread.ident), thread)
    lock.release()
    thread.join()
    assert stack.where == f"heartbeat/test_stacks.py:{take.__code__.co_firstlineno + 1} in take"


class _Strange:
    """A future of somebody's own, which knows no other attribute."""

    _asyncio_future_blocking = False

    def __init__(self):
        self.loop = asyncio.get_running_loop()

    def get_loop(self):
        return self.loop

    def add_done_callback(self, callback, *, context=None):
        self.callback = callback

    def result(self):
        return None

    def cancel(self, msg=None):
        return False

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __await__(self):
        self._asyncio_future_blocking = True
        yield self


def test_what_a_strange_future_answers_is_no_error_of_ours():
    async def waits_for_it(strange):
        await strange

    async def main():
        strange = _Strange()
        task = asyncio.create_task(waits_for_it(strange))
        await asyncio.sleep(0)
        stack = task_stack(task)
        asyncio.get_running_loop().call_soon(strange.callback, strange)
        await task
        return stack

    assert asyncio.run(main()).frames[0].function == "waits_for_it"


def test_tasks_that_wait_for_each_other_are_told_and_not_followed_for_ever():
    async def first():
        await tasks[1]

    async def second():
        await tasks[0]

    async def main():
        tasks.extend([asyncio.create_task(first()), asyncio.create_task(second())])
        await asyncio.sleep(0)
        return task_stack(tasks[0])

    tasks = []
    loop = asyncio.new_event_loop()
    stack = loop.run_until_complete(main())
    assert [frame.function for frame in stack.frames] == ["first", "second"]
    for task in tasks:  # nobody can cancel a ring of them
        task._log_destroy_pending = False
        task.get_coro().close()
    loop.close()


def test_a_thread_that_has_ended_stands_nowhere():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread_stack(thread.ident) is None


def test_of_a_deep_stack_the_middle_is_left_out_and_that_shows():
    def dive(depth):
        return thread_stack(threading.get_ident()) if depth == 0 else dive(depth - 1)

    frames = dive(200).frames
    assert len(frames) == MOST_FRAMES + 1
    assert "frames left out" in frames[MOST_FRAMES // 2].function
    assert frames[-2].function == "dive"


def test_an_exception_is_told_from_where_it_was_caught_to_where_it_was_raised():
    def fail():
        raise ValueError("secret")

    try:
        fail()
    except ValueError as error:
        stack = from_exception(error)
    assert [frame.function for frame in stack.frames] == [
        "test_an_exception_is_told_from_where_it_was_caught_to_where_it_was_raised",
        "fail",
    ]
    assert "secret" not in str(stack)


def test_nothing_is_nowhere():
    assert Stack(()).where == "unknown"
    assert Stack((Frame("/usr/lib/elsewhere.py", 3, "go"),)).where == "lib/elsewhere.py:3 in go"


def test_of_an_exception_its_causes_are_told_without_their_texts():
    def fail():
        raise ValueError("secret")

    try:
        try:
            fail()
        except ValueError as cause:
            raise KeyError("secret") from cause
    except KeyError as error:
        stack = from_exception(error)
    place = f"heartbeat/test_stacks.py:{fail.__code__.co_firstlineno + 1} in fail"
    assert stack.causes == (f"Caused by builtins.ValueError at {place}",)
    assert "secret" not in str(stack)


def test_of_a_group_each_exception_is_told_up_to_a_few_and_a_ring_ends():
    error = ExceptionGroup("secret", [ValueError(number) for number in range(1000)])
    assert 1 <= len(from_exception(error).causes) <= 10
    ring = KeyError()
    ring.__cause__ = ValueError()
    ring.__cause__.__cause__ = ring
    assert len(from_exception(ring).causes) == 1


def test_an_exception_that_was_raised_from_none_tells_no_cause():
    try:
        try:
            raise ValueError
        except ValueError:
            raise KeyError from None
    except KeyError as error:
        assert from_exception(error).causes == ()
