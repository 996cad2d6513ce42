"""The bracket around a call, once for every adapter: it is asked for, sent, and ended by what became of it, in this order.

An adapter says how each of these is done (:class:`Attempt`), and what an error means to its retries (:class:`Failures`). What follows
what, and what holds whatever fails, at whichever line, is told here. It is written as code that waits; where nothing is to be waited
for, :func:`drive` runs the same code, so that sync and async calls cannot differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from clevagent_core.errors import ClevAgentError

Held = TypeVar("Held")
"""What an adapter has in hand while a call goes on: its ticket, or several."""
Answer = TypeVar("Answer")


class Failures(Protocol):
    """What errors mean to whoever would send a request again. The providers' rules are theirs, not the core's."""

    def is_transient(self, error: BaseException, /) -> bool:
        """Tell whether the SDK would have sent the request again."""
        ...

    def wait_before_retry(self, state: Any, /) -> float:
        """Tell how many seconds to wait before that; ``state`` is tenacity's."""
        ...


class Attempt(ABC, Generic[Held, Answer]):
    """One call of a guarded object, which is tried again as often as its SDK would have done, each time with a reservation of its own.

    An object is used for one call, in one thread or task.
    """

    retries = 0
    """How many times a failed attempt is repeated."""

    failures: Failures
    """What errors mean."""

    # -- what an adapter says

    @abstractmethod
    def open(self) -> Held:
        """Ask for one attempt. What it raises leaves as it is: nothing is held, and nothing was sent."""

    @abstractmethod
    async def aopen(self) -> Held:
        """Do what ``open`` does, waiting without blocking the event loop."""

    def enter(self, held: Held) -> None:
        """It is about to be sent: let what goes on further down know."""

    @abstractmethod
    def send(self, held: Held) -> Answer | Awaitable[Answer]:
        """Send it; of an async call, give what is awaited."""

    def leave(self, held: Held) -> None:
        """It was sent, or failed to be."""

    @abstractmethod
    def settle(self, held: Held, answer: Answer) -> None:
        """It was answered: tell what it used."""

    @abstractmethod
    def fail(self, held: Held, error: BaseException) -> None:
        """It failed, or was broken off at any line, also that of ``settle``: give back, or charge, unless it was ended before."""

    @abstractmethod
    def abandon(self) -> None:
        """Opening it was interrupted, so that nobody has what it may have held: give that back."""

    def adapts(self, error: Exception) -> bool:  # noqa: ARG002 - for those who do
        """Change what is sent, where the error says that it was refused for that; tell whether to send it at once."""
        return False

    # -- what is the same for all

    def call(self) -> Answer:
        """Make the call.

        Raises:
            Stopped: it was refused, and not sent. Whatever the last attempt failed with.

        """
        try:
            return drive(self._once(is_async=False))
        except Exception as error:  # whose code: the SDK's; raised again unless that would have tried once more
            if not self.failures.is_transient(error) or not self.retries:
                raise
            return drive(self._repeat(error, is_async=False))

    async def acall(self) -> Answer:
        """Do what ``call`` does, waiting without blocking the event loop."""
        try:
            return await self._once(is_async=True)
        except Exception as error:  # whose code: as above
            if not self.failures.is_transient(error) or not self.retries:
                raise
            return await self._repeat(error, is_async=True)

    async def _once(self, *, is_async: bool) -> Answer:
        try:
            held = await self.aopen() if is_async else self.open()
        except ClevAgentError:
            raise
        except BaseException:  # a signal handler's, or a cancelled task
            self.abandon()
            raise
        try:
            self.enter(held)
            try:
                sent = self.send(held)
                answer: Answer = await sent if is_async else sent  # type: ignore[misc,assignment]  # as is_async says
            finally:
                self.leave(held)
            self.settle(held, answer)
        except BaseException as error:
            try:
                self.fail(held, error)
            except BaseException:  # a signal handler's, once more: what it has left undone is done now
                self.fail(held, error)
                raise
            if not (isinstance(error, Exception) and self.adapts(error)):
                raise
        else:
            return answer
        return await self._once(is_async=is_async)

    async def _repeat(self, error: Exception, *, is_async: bool) -> Answer:
        """Make further attempts after the first, which failed with ``error``."""
        import tenacity  # noqa: PLC0415 - off the hot path: only a failed call comes here

        pending = [error]

        async def attempt() -> Answer:
            if pending:  # the attempt that was made already is the first that tenacity sees
                raise pending.pop()
            return await self._once(is_async=is_async)

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=self.failures.wait_before_retry,
            retry=tenacity.retry_if_exception(self.failures.is_transient),
            reraise=True,
        )
        return await (retrying if is_async else retrying.copy(sleep=_sleep))(attempt)


async def _sleep(seconds: float) -> None:
    import tenacity  # noqa: PLC0415 - as above

    tenacity.nap.sleep(seconds)


def drive(code: Coroutine[Any, Any, Answer]) -> Answer:
    """Run code that only waits for what is ready: the sync way through what is written once for both."""
    try:
        code.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # what the code returned
    except RuntimeError as error:
        # What a coroutine makes of a StopIteration; it is the user's, and leaves as itself, as from a function.
        stop = error.__cause__
        if not isinstance(stop, StopIteration) or error.args != _STOPPED:
            raise
    else:
        code.close()
        raise RuntimeError("sync code has waited for an event loop")
    raise stop


_STOPPED = ("coroutine raised StopIteration",)
