"""Where a thread, or a task, is stuck: the line in the user's own code, however deep what it waits for."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from clevagent_core.heartbeat.stacks import MOST_FRAMES, Frame, Stack, from_exception, task_stack, thread_stack


async def stuck(future):
    return await future


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


async def generates(future):
    async def numbers():
        yield 1
        await stuck(future)

    async for _ in numbers():
        pass


@pytest.mark.parametrize("how", [stuck, gathers, groups, nests, shields, limits, waits_for, waits, generates])
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
    while not told or (stack := task_stack(told[0])) is None or stack.frames[-1].function != "call_api":
        time.sleep(0)
    theirs.send(b"x")
    thread.join()
    ours.close()
    theirs.close()
    assert " in call_api" in stack.where
    assert any(frame.function == "work" for frame in stack.frames)


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
