import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest

from clevagent.testing import FakeClock
from clevagent_core.clock import Clock
from clevagent_core.errors import UsageError


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


def test_it_is_a_clock():
    clock: Clock = FakeClock()
    assert clock.monotonic() == 0


def test_it_begins_at_its_start():
    assert FakeClock(datetime(2026, 3, 1, 12, 30, tzinfo=UTC)).wall() == datetime(2026, 3, 1, 12, 30, tzinfo=UTC).timestamp()


def test_it_begins_in_2026_by_default(clock):
    assert clock.wall() == datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def test_advancing_moves_both_times(clock):
    wall = clock.wall()
    clock.advance(1.5)
    assert (clock.monotonic(), clock.wall() - wall) == (1.5, 1.5)


def test_ten_tenths_of_a_second_are_a_second(clock):
    for _ in range(10):
        clock.advance(0.1)
    assert clock.monotonic() == 1


def test_setting_jumps_the_wall_time_only(clock):
    clock.advance(5)
    clock.set(datetime(2025, 1, 1, tzinfo=timezone(timedelta(hours=1))))
    assert (clock.monotonic(), clock.wall()) == (5, datetime(2024, 12, 31, 23, tzinfo=UTC).timestamp())


def test_a_naive_time_is_refused(clock):
    with pytest.raises(UsageError, match="no time zone"):
        clock.set(datetime(2026, 1, 1))  # noqa: DTZ001 - what is tested
    with pytest.raises(UsageError, match="no time zone"):
        FakeClock(datetime(2026, 1, 1))  # noqa: DTZ001 - what is tested


@pytest.mark.parametrize("seconds", [-0.001, float("inf"), float("nan")])
def test_time_that_does_not_move_forward_is_refused(clock, seconds):
    with pytest.raises(UsageError, match="would not move time forward"):
        clock.advance(seconds)
    assert clock.monotonic() == 0


def test_a_set_event_is_not_waited_for(clock):
    event = threading.Event()
    event.set()
    assert clock.wait(event, 10)


@pytest.mark.parametrize("timeout_s", [0, -1])
def test_no_time_to_wait_is_no_wait(clock, timeout_s):
    assert not clock.wait(threading.Event(), timeout_s)


def test_a_wait_ends_at_its_deadline_and_not_before(clock, pool):
    waiting = pool.submit(clock.wait, threading.Event(), 10)
    assert clock.wait_for_waiters()
    clock.advance(9.999)
    with pytest.raises(TimeoutError):
        waiting.result(timeout=0.02)
    clock.advance(0.001)
    assert waiting.result(timeout=5) is False
    assert clock.waiting == 0


def test_a_wait_ends_when_its_event_is_set(clock, pool):
    event = threading.Event()
    waiting = pool.submit(clock.wait, event, 10)
    assert clock.wait_for_waiters()
    event.set()
    assert waiting.result(timeout=5) is True
    assert clock.monotonic() == 0


def test_a_deadline_counts_from_when_the_wait_began(clock, pool):
    clock.advance(100)
    waiting = pool.submit(clock.wait, threading.Event(), 1)
    assert clock.wait_for_waiters()
    clock.advance(1)
    assert waiting.result(timeout=5) is False


def test_setting_the_wall_time_ends_no_wait(clock, pool):
    event = threading.Event()
    waiting = pool.submit(clock.wait, event, 1)
    assert clock.wait_for_waiters()
    clock.set(datetime(2030, 1, 1, tzinfo=UTC))
    assert clock.waiting == 1
    event.set()
    assert waiting.result(timeout=5)


def test_one_advance_ends_every_wait_that_is_due(clock):
    with ThreadPoolExecutor(20) as pool:
        waits = [pool.submit(clock.wait, threading.Event(), 1 + i % 2) for i in range(20)]
        assert clock.wait_for_waiters(20)
        clock.advance(1)
        assert [wait.result(timeout=5) for wait in waits[::2]] == [False] * 10
        clock.advance(1)
        assert [wait.result(timeout=5) for wait in waits[1::2]] == [False] * 10


def test_no_time_is_lost_when_many_threads_advance(clock):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(clock.advance, [0.25] * 800))
    assert clock.monotonic() == 200


def test_time_stands_where_what_is_repeated_fails(clock):
    clock.repeat(lambda: 1 / 0, 1)
    with pytest.raises(ZeroDivisionError):
        clock.advance(10)
    assert clock.monotonic() == 1
    clock.advance(1)
    assert clock.monotonic() == 2


def test_nobody_waiting_is_told(clock):
    assert not clock.wait_for_waiters(timeout_s=0)


def test_a_task_waits_without_blocking_the_loop(clock):
    async def main():
        waiting = asyncio.create_task(clock.wait_async(asyncio.Event(), 10))
        assert await asyncio.to_thread(clock.wait_for_waiters)
        clock.advance(9.999)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        clock.advance(0.001)
        assert await asyncio.wait_for(waiting, 5) is False

    asyncio.run(main())


def test_a_task_wakes_when_another_thread_advances(clock):
    def advance():
        assert clock.wait_for_waiters(3)
        clock.advance(1)

    async def main():
        waits = [clock.wait_async(asyncio.Event(), 1) for _ in range(3)]
        results = await asyncio.wait_for(asyncio.gather(asyncio.to_thread(advance), *waits), 5)
        assert results == [None, False, False, False]

    asyncio.run(main())


def test_a_task_wakes_when_its_event_is_set(clock):
    async def main():
        event = asyncio.Event()
        waiting = asyncio.create_task(clock.wait_async(event, 10))
        assert await asyncio.to_thread(clock.wait_for_waiters)
        event.set()
        assert await asyncio.wait_for(waiting, 5) is True

    asyncio.run(main())
    assert clock.waiting == 0


def test_an_event_that_is_set_at_the_deadline_counts(clock):
    async def main():
        event = asyncio.Event()
        waiting = asyncio.create_task(clock.wait_async(event, 10))
        assert await asyncio.to_thread(clock.wait_for_waiters)
        clock.advance(10)
        event.set()
        assert await asyncio.wait_for(waiting, 5) is True

    asyncio.run(main())


def test_a_cancelled_task_waits_no_longer(clock):
    async def main():
        waiting = asyncio.create_task(clock.wait_async(asyncio.Event(), 10))
        assert await asyncio.to_thread(clock.wait_for_waiters)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert clock.waiting == 0
        clock.advance(10)

    asyncio.run(main())


def test_advancing_itself_a_wait_takes_its_time_at_once():
    clock = FakeClock(auto_advance=True)
    wall = clock.wall()
    assert clock.wait(threading.Event(), 2.5) is False
    assert asyncio.run(clock.wait_async(asyncio.Event(), 0.5)) is False
    assert (clock.monotonic(), clock.wall() - wall) == (3, 3)


def test_advancing_itself_a_set_event_takes_no_time():
    clock = FakeClock(auto_advance=True)
    event = threading.Event()
    event.set()
    assert clock.wait(event, 2.5)
    assert clock.monotonic() == 0


def test_advancing_itself_a_loop_of_waits_lets_other_tasks_run():
    clock = FakeClock(auto_advance=True)

    async def main():
        event = asyncio.Event()
        asyncio.get_running_loop().call_soon(event.set)
        while not await clock.wait_async(event, 1):
            pass

    asyncio.run(asyncio.wait_for(main(), 5))
