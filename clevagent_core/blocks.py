"""``with clevagent.run(...)`` and its decorator."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import isasyncgen, isasyncgenfunction, iscoroutine, iscoroutinefunction, isgenerator, isgeneratorfunction
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from clevagent_core.budgets import Budget, as_budgets, check_actions
from clevagent_core.errors import UsageError
from clevagent_core.frames import (
    Frame,
    Standing,
    block_here,
    finish,
    frame_of,
    is_split,
    leave,
    left_by,
    name_of,
    open_block,
    stands,
)
from clevagent_core.runs import Run

P = ParamSpec("P")
R = TypeVar("R")


class Starter(Protocol):
    """A watchdog, as far as blocks need it."""

    process_run: Run

    def start_run(
        self,
        *,
        budgets: Sequence[Budget],
        tags: Mapping[str, str] | None,
        parent: Run | None,
        dry_run: bool,
        guards: Sequence[object],
        is_block: bool,
        inherited: bool,
    ) -> Run:
        """Begin a run."""
        ...


class RunBlock:
    """``with clevagent.run(...) as run:``, its async twin, and the decorator of the same name.

    One block can be entered many times, also at once: each time is a run of its own.
    """

    def __init__(
        self,
        watchdog: Callable[[], Starter],
        *,
        budgets: Sequence[Budget],
        guards: Sequence[object],
        tags: Mapping[str, str] | None,
        dry_run: bool,
    ) -> None:
        """Made by ``run()``."""
        self._watchdog = watchdog
        self._budgets = as_budgets(budgets)
        check_actions(self._budgets, where="run(budgets=[...])")
        self._guards = tuple(guards)
        if not isinstance(tags or {}, Mapping):
            raise UsageError(
                f"tags={tags!r} is no mapping, so no Budget(by=...) could find a value in it. Write tags={{'tenant': 'acme'}}."
            )
        self._tags = dict(tags or {})
        self._dry_run = dry_run
        self._frames: list[Frame] = []

    def __enter__(self) -> Run:
        """Begin a run."""
        run = self._start()
        try:
            self._frames.append(open_block(run.watchdog, run, begins=True))
        except BaseException:  # also a signal handler's
            run.end()
            raise
        return run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the run; what was raised goes on."""
        frame = left_by(self._frames)
        self._frames.remove(frame)
        leave(frame)
        run: Run = frame.run
        run.end()

    async def __aenter__(self) -> Run:
        """Begin a run."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the run; what was raised goes on."""
        self.__exit__(kind, error, traceback)

    def __del__(self) -> None:
        """A generator whose event loop was closed goes away, and does not leave its block."""
        for frame in self.__dict__.get("_frames", ()):
            if frame.block is not None and frame.block.opener:
                finish(frame)
                frame.watchdog.end_soon(frame.run)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Make each call of ``function`` a run of its own: sync or async, a generator or not.

        The run of a generator is in force while its body runs, and nowhere between the steps, whoever steps it; it ends with the
        generator.
        """
        if _is(isasyncgenfunction, function):
            return cast("Callable[P, R]", self._over_asteps(function))
        if _is(isgeneratorfunction, function):
            return cast("Callable[P, R]", self._over_steps(cast("Callable[..., Generator[Any, Any, Any]]", function)))
        if _is(iscoroutinefunction, function):

            @wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self:
                    return await cast("Awaitable[Any]", function(*args, **kwargs))

            return cast("Callable[P, R]", run_async)

        @wraps(function)
        def run_sync(*args: P.args, **kwargs: P.kwargs) -> R:
            with self as run:
                result = function(*args, **kwargs)
                later = self._later(result)
                # It has made no call yet, and that is nothing to tell.
                run.is_asked = run.is_asked or later is not None
            return result if later is None else cast("R", later)

        return run_sync

    def _later(self, result: Any) -> Any:
        """Make what a function has begun, and left to its caller to carry out, a run of its own; ``None`` if it is nothing such."""
        if iscoroutine(result):
            return self._awaited(result)
        if isasyncgen(result):
            return self._over_asteps(lambda: result)()
        return self._over_steps(lambda: result)() if isgenerator(result) else None

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        with self:
            return await coroutine

    def _start(self, *, inherited: bool = True) -> Run:
        watchdog = self._watchdog()
        around = frame_of(watchdog)
        return watchdog.start_run(
            budgets=self._budgets,
            tags=self._tags,
            parent=None if around is None or around.run is watchdog.process_run else around.run,
            dry_run=self._dry_run,
            guards=self._guards,
            is_block=True,
            inherited=inherited,
        )

    @contextmanager
    def _stepped(self, function: Callable[..., Any], stepper: FrameType | None) -> Iterator[_Steps]:
        """Begin a run that is in force in the steps of one generator only."""
        if is_split(stepper):
            raise UsageError(
                f"@clevagent.run(...) on the generator {name_of(function)}() covers its body, and this one is stepped as a context manager "
                "or a dependency, so that what is called between its two steps would be in no run. Open the block inside it: "
                "`with clevagent.run(...): yield`."
            )
        run = self._start(inherited=False)
        frame = stands(run.watchdog, run)
        try:
            yield _Steps(frame)
        finally:
            leave(frame)
            run.end()

    def _over_steps(self, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Generator[Any, Any, Any]]:
        @wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            with self._stepped(function, sys._getframe(1)) as in_run:  # noqa: SLF001 - documented
                generator = function(*args, **kwargs)
                step: Callable[[], Any] = lambda: next(generator)  # noqa: E731 - the first of those that follow
                while True:
                    try:
                        with in_run:
                            item = step()
                    except StopIteration as end:
                        return end.value
                    try:
                        sent = yield item
                    except BaseException as error:  # GeneratorExit, too: close() is a throw to a generator
                        thrown = error
                        step = lambda: generator.throw(thrown)  # noqa: E731, B023 - called before it changes
                    else:
                        step = lambda: generator.send(sent)  # noqa: E731, B023 - as above

        return steps

    def _over_asteps(self, function: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        @wraps(function)
        async def asteps(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            with self._stepped(function, sys._getframe(1)) as in_run:  # noqa: SLF001 - documented
                generator = function(*args, **kwargs)
                step: Callable[[], Any] = generator.__anext__
                while True:
                    try:
                        with in_run:
                            item = await step()
                    except StopAsyncIteration:
                        return
                    try:
                        sent = yield item
                    except BaseException as error:  # as above
                        thrown = error
                        step = lambda: generator.athrow(thrown)  # noqa: E731, B023 - called before it changes
                    else:
                        step = lambda: generator.asend(sent)  # noqa: E731, B023 - as above

        return asteps


def _is(kind: Callable[[object], bool], function: object) -> bool:
    """Tell whether a function is of a kind, or an object whose ``__call__`` is."""
    return kind(function) or kind(getattr(function, "__call__", None))  # noqa: B004 - which kind of method it is


class _Steps:
    """``with``: one step of a generator. Steps of one generator come one after the other."""

    __slots__ = ("_standing",)

    def __init__(self, frame: Frame) -> None:
        self._standing = Standing(frame)

    def __enter__(self) -> None:
        frame = self._standing.frame
        frame.watchdog.set_active(frame.run, is_active=True)
        frame.block = block_here()
        self._standing.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._standing.__exit__()
        frame = self._standing.frame
        frame.watchdog.set_active(frame.run, is_active=False)
