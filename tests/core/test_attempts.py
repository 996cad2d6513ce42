"""The bracket of every adapter, by itself: sync code that runs what is written for both."""

from __future__ import annotations

import asyncio

import pytest

from clevagent_core.attempts import drive


async def gives(value):
    return value


async def fails(error):
    raise error


@pytest.mark.parametrize("value", [None, 1, (1, 2), StopIteration(3)])
def test_what_it_returns_is_given(value):
    assert drive(gives(value)) is value


@pytest.mark.parametrize(
    "error",
    [
        StopIteration(),
        StopIteration(1),
        StopAsyncIteration(),
        ValueError("x"),
        RuntimeError("y"),
        KeyboardInterrupt(),
        GeneratorExit(),
    ],
)
def test_what_it_raises_leaves_as_itself(error):
    with pytest.raises(type(error)) as caught:
        drive(fails(error))
    assert caught.value is error
    assert (error.__context__, error.__cause__) == (None, None)


def test_also_through_two_of_them():
    async def outer():
        return drive(fails(StopIteration(1)))

    with pytest.raises(StopIteration) as caught:
        drive(outer())
    assert caught.value.value == 1


def test_a_runtime_error_with_such_a_cause_is_the_users():
    error = RuntimeError("mine")
    error.__cause__ = StopIteration()
    with pytest.raises(RuntimeError, match="mine") as caught:
        drive(fails(error))
    assert caught.value is error


def test_code_that_does_wait_is_closed_and_told():
    closed = []

    async def waits():
        try:
            await asyncio.sleep(1)
        finally:
            closed.append(True)

    async def main():
        with pytest.raises(RuntimeError, match="waited for an event loop"):
            drive(waits())

    asyncio.run(main())
    assert closed == [True]
