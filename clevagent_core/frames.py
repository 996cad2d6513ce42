"""Where code stands: whose run it is a part of, and which tools, nodes and wrap-ups are around it.

One context variable of the process holds the innermost :class:`Frame`; each links to the one around it, and a watchdog finds its own
by walking up. Frames are never changed but for being over: a block that is left in another context than it was entered in, as the
``with`` of a generator that somebody else closes, only marks its frame, and whoever meets a frame that is over looks past it.

A block that is opened in a generator covers the generator's own body, not what its consumer does between the steps. So it counts
where the generator is on the Python stack, and where its context was inherited by another task or thread. Blocks that were opened
through contextlib, pytest or pluggy, which split a generator into an enter and an exit, are like any other.

Nothing here blocks; all of it is safe from any thread. Checked with CPython 3.11 to 3.13.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator
from contextvars import ContextVar
from inspect import (
    CO_ASYNC_GENERATOR,
    CO_GENERATOR,
    CO_ITERABLE_COROUTINE,
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
)
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from clevagent_core.calls import LLMCall, ToolCall, parts_of, path
from clevagent_core.errors import UsageError

if TYPE_CHECKING:
    import asyncio

    from clevagent_core.budgets import Budget
    from clevagent_core.verdicts import Incident

Ending = Callable[["Incident"], type[BaseException] | None]
"""Gives, for what was refused, the exception type by which the framework around is ended; ``None`` to leave it at ``through``."""

_SPLITTERS = ("contextlib", "_pytest.", "pluggy", "pytest_asyncio", "anyio.pytest_plugin")
"""Modules that step a generator once to enter a block, and once more to leave it."""
_COPIERS = ("anyio", "asyncio.threads", "concurrent.futures", "asgiref")
"""Modules that run a function in a copy of the context, which is thrown away afterwards with all that was set in it."""


class Activity:
    """A tool, a node, or a wrap-up that goes on around a context."""

    __slots__ = ("__weakref__", "is_over", "kind", "name", "place")

    def __init__(
        self, kind: Literal["tool", "node", "wrap_up", "work"], name: str = "", place: tuple[str, ...] | None = None
    ) -> None:
        """Begin it."""
        self.kind = kind
        """``node`` for agents and tasks, too; ``work`` is an adapter's own."""
        self.name = name
        self.place = place
        """For a node of a graph: the names by which the framework has it, outermost graph first."""
        self.is_over = False


class Frame:
    """What holds inside one block. Made by :func:`enter` and its like, and not changed once code stands in it, but for being over."""

    __slots__ = (
        "activities", "activity", "around", "block", "covered", "ending", "is_over", "lent", "outer", "run", "through", "watchdog", "wraps_up",
    )  # fmt: skip

    def __init__(self, watchdog: Any, run: Any, base: Frame | None, activity: Activity | None, outer: Frame | None) -> None:
        """Begin with what holds in ``base``."""
        self.watchdog = watchdog
        self.run = run
        """The run that calls in it are a part of."""
        self.activity = activity
        """What begins and ends with it."""
        if base is None:
            self.activities: tuple[Activity, ...] = () if activity is None else (activity,)
            """What goes on around it, outermost first; some may be over."""
            self.lent: tuple[Budget, ...] = ()
            """The budgets of the nodes around it: they cover every call in them."""
            self.through: type[BaseException] | None = None
            """The exception type that the framework around lets pass: what is raised here is one, too."""
            self.ending: Ending | None = None
            """Where that depends on what was refused."""
            self.wraps_up = False
            """Whether a wrap-up was begun around it."""
        else:
            self.activities = base.activities if activity is None else (*base.activities, activity)
            self.lent = base.lent
            self.through = base.through
            self.ending = base.ending
            self.wraps_up = base.wraps_up
        self.covered: Any = None
        """The ticket of the model call that a framework's adapter opened: whatever is further down is a part of it."""
        self.outer = outer
        """What this context held before."""
        self.around = outer
        """What is around it; another than ``outer`` in a generator that is stepped in another context."""
        self.is_over = False
        self.block: Block | None = None
        """Where it was opened, if its run may be another one than that around it, or a generator has opened it."""

    def is_wrap_up(self) -> bool:
        """Tell whether it holds for a run that is over, too: what that keeps back is for the answer after the stop."""
        return self.activity is not None and self.activity.kind == "wrap_up"


class Block:
    """Where a frame was opened."""

    opener = 0
    """The identity of the generator's Python frame whose body it covers; 0 where that is no generator."""
    code: CodeType | None = None
    """The code of that frame."""
    by = 0
    """The identity of the generator's Python frame that opened it, also through contextlib: the one that leaves it."""
    is_outside = False
    """Whether it only tells that this is outside of every run, as far as the context knows; a framework may know better."""
    outliving: weakref.WeakSet[asyncio.Task[Any]] | None = None
    """The tasks that there were when its frame was over and could not be taken out of its context."""

    def __init__(self, thread: object, task: object) -> None:
        """Begin it; ``None`` for both where it was carried."""
        self.thread = thread
        self.task = task

    def is_own(self) -> bool:
        """Tell whether this code runs in the task, or else the thread, that opened it."""
        return self.thread is _here.mark and self.task == current_task()

    def is_outlived(self) -> bool:
        """Tell whether this task, or thread, was begun in it, once its frame is over; not where it only was left in the context."""
        if self.is_own():
            return False
        task = current_task()
        return self.outliving is None or (task is not None and task() in self.outliving)


class Spot(NamedTuple):
    """A thread, and the task that runs in it; two are equal for one task, or else one thread."""

    thread: object
    task: object


def spot() -> Spot:
    """Tell where this code runs."""
    return Spot(_here.mark, current_task())


class _Here(threading.local):
    """Tells threads apart; unlike their idents, these are not used again."""

    below: Frame | None = None
    """What a piece of work that a pool does here stands in, where that runs in a context of its own."""

    def __init__(self) -> None:
        self.mark = object()


_MARKS = "_clevagent_marks"
_here = _Here()
_current: ContextVar[Frame | None] = ContextVar("clevagent_frame", default=None)
_openers: dict[int, list[Frame]] = {}
"""The blocks that are open in generators, by the generator's frame. By its identity, as a reference would keep the generator alive,
and its code: a generator whose event loop was closed goes away without closing its block, and its identity may be another's then."""
_has_pools = False
"""Whether any work was ever handed to a pool: until then no thread has to be asked what it does."""
_lost: dict[Frame, None] = {}
"""The blocks that were opened, through contextlib, in a context that was thrown away then."""


_running_loop: Callable[[], object] | None = None
"""What tells of a running event loop, from when asyncio was seen to be imported."""


def current_task() -> weakref.ref[asyncio.Task[Any]] | None:
    """Find the asyncio task that runs here: the same object each time. Costs next to nothing where asyncio is not in use."""
    running_loop = _running_loop or _find_running_loop()
    if running_loop is None or running_loop() is None:
        return None
    task = sys.modules["asyncio"].current_task()
    return None if task is None else weakref.ref(task)


def _find_running_loop() -> Callable[[], object] | None:
    global _running_loop  # noqa: PLW0603 - found once
    # Another thread may be importing it at this moment: a loop can only run here once that is done. Documented; the public one raises.
    _running_loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
    return _running_loop


# -- blocks ---------------------------------------------------------------------------------------------------------------


def enter(watchdog: Any, run: Any, activity: Activity | None = None, *, begins: bool = False) -> Frame:
    """Enter a block of an adapter's, which it leaves itself, in the same context or another one.

    ``begins`` says that its run may be another than that around it.
    """
    raw = _current.get()
    if raw is None and not _openers and not _has_pools:
        frame = Frame(watchdog, run, None, activity, None)
    elif raw is None or _openers or raw.is_over or raw.watchdog is not watchdog or raw.run.ended_at is not None:
        frame = _frame_here(watchdog, run, activity, raw)
    else:
        frame = Frame(watchdog, run, raw, activity, raw)
    if begins:
        # A run that is over already is not left here by mistake.
        frame.block = Block(None, None) if run.ended_at is not None else Block(_here.mark, current_task())
    _current.set(frame)
    return frame


def _frame_here(watchdog: Any, run: Any, activity: Activity | None, raw: Frame | None) -> Frame:
    # Left behind by a generator that the garbage collector has closed, or where an exception of a signal handler landed in leave().
    raw = _past_what_is_over(raw)
    base = frame_of(watchdog)
    frame = Frame(watchdog, run, base, activity, raw)
    if _openers:
        frame.around = _counting(raw)
        if base is not None and not _leads_to(frame.around, base):
            frame.around = base
    return frame


def open_block(watchdog: Any, run: Any, activity: Activity | None = None, *, begins: bool = False) -> Frame:
    """Enter a block of the user's, which may stand in a generator. To be called by the ``__enter__`` that the user's code calls."""
    frame = enter(watchdog, run, activity, begins=begins)
    caller = sys._getframe(2)  # noqa: SLF001 - documented; inspect.stack() reads files
    if caller.f_code.co_flags & _GENERATORS or _kind_of(caller):
        _note_opener(frame, caller)
    return frame


def _note_opener(frame: Frame, caller: FrameType) -> None:
    block = frame.block = frame.block or Block(_here.mark, current_task())
    block.by = _generator_in(caller)
    python, is_thrown_away = _opener(caller)
    if is_thrown_away:
        _lost[frame] = None
    if python is None:
        return
    block.opener, block.code = id(python), python.f_code
    _openers.setdefault(block.opener, []).append(frame)


def _generator_in(python: FrameType | None) -> int:
    """Find the generator that calls a block's method."""
    while python is not None and not _is_generator(python.f_code):
        if not _kind_of(python):
            return 0
        python = python.f_back
    return 0 if python is None else id(python)


def leave(frame: Frame) -> None:
    """Leave a block, in whatever context. Never raises, and does nothing the second time."""
    # As finish does; each node and each tool comes here.
    frame.is_over = True
    if frame.activity is not None:
        frame.activity.is_over = True
    block = frame.block
    if block is not None and (block.opener or _lost):
        _unlist(frame, block)
    if _latest.event is _of_each.start and _is_collecting():
        _note_left_behind(block)
        return
    top = _current.get()
    if top is not frame:
        # Only what is over may stand upon it: what has begun in it and goes on stays.
        while top is not None and top is not frame and top.is_over:
            top = top.outer
    if top is frame:
        outer = frame.outer
        _current.set(_past_what_is_over(outer) if outer is not None and outer.is_over else outer)
    if block is not None and (top is not frame or (block.by and not block.is_own())):
        _note_left_behind(block)  # in this context, or in that which this one was copied from
    if frame.around is not None and frame.around.is_over:
        _cut(frame)


def _past_what_is_over(frame: Frame | None) -> Frame | None:
    """Look past frames of this task, or thread, that are over. Those of others tell what this one has outlived."""
    while frame is not None and frame.is_over and (frame.block is None or frame.block.is_own()):
        frame = frame.outer
    return frame


def _cut(frame: Frame) -> None:
    """Let go of what is over around a frame that is over: code that begins the next from inside the last would keep them all."""
    around, outer = frame.around, frame.outer
    while around is not None and around.is_over:
        around = around.around
    while outer is not None and outer.is_over:
        outer = outer.outer
    frame.around, frame.outer = around, outer


def finish(frame: Frame) -> None:
    """Let a frame be over, and leave the context as it is."""
    frame.is_over = True
    if frame.activity is not None:
        frame.activity.is_over = True
    block = frame.block
    if block is not None and (block.opener or _lost):
        _unlist(frame, block)
    _note_left_behind(block)


def _note_left_behind(block: Block | None) -> None:
    """Note which tasks there are when a frame is over that stays in its context: those that are begun later only find it there."""
    if block is None or block.outliving is not None:
        return
    task = block.task() if isinstance(block.task, weakref.ref) else None
    block.outliving = weakref.WeakSet() if task is None else weakref.WeakSet(sys.modules["asyncio"].all_tasks(task.get_loop()))


def _unlist(frame: Frame, block: Block) -> None:
    if block.opener:
        blocks = _openers.get(block.opener, [])
        if frame in blocks:
            blocks.remove(frame)
        if not blocks:
            _openers.pop(block.opener, None)
    elif _lost:
        _lost.pop(frame, None)


class _Latest:
    """The latest event of the garbage collector, under whichever name it has."""

    __slots__ = ("event",)

    event: object


class _OfEach:
    """The latest event of each kind."""

    __slots__ = ("start", "stop")

    start: object
    stop: object


_Latest.start = _Latest.stop = _Latest.event  # type: ignore[attr-defined, misc]
_latest, _of_each, _here_too = _Latest(), _OfEach(), threading.local()
_latest.event, _of_each.start = None, object()  # nothing yet
if sys.version_info < (3, 12):
    # They are called with (phase, info). No Python code runs in them: an exception of a signal handler would end there, unheard.
    gc.callbacks += [functools.partial(setattr, events) for events in (_latest, _of_each, _here_too)]


def _is_collecting() -> bool:
    """Tell whether the garbage collector runs in this thread: whether its latest event is a start, and came here.

    Before CPython 3.12 that may be in the middle of a ``ContextVar.set``, which makes objects: a second ``set``, by what the collector
    closes, frees the mapping that the first one reads, and values are lost for good in this context and all that are copied from it.
    """
    return _latest.event is _of_each.start and _latest.event is getattr(_here_too, "start", None)


def left_by(frames: list[Frame]) -> Frame:
    """Find which of several frames of one block is left here: that of this generator, else of this context, else the latest."""
    by = _generator_in(sys._getframe(2))  # noqa: SLF001 - as above
    if by:
        for frame in reversed(frames):
            if frame.block is not None and frame.block.by == by:
                return frame
    here = [frame for frame in _chain(_current.get()) if frame in frames and not (frame.block is not None and frame.block.by)]
    return here[0] if here else frames[-1]


def _counting(frame: Frame | None) -> Frame | None:
    """Look past the blocks of generators that this is the consumer of."""
    stack = _stack()
    while frame is not None and frame.block is not None and _is_passed(frame, frame.block, stack):
        frame = frame.outer
    return frame


def _is_passed(frame: Frame, block: Block, stack: dict[int, CodeType]) -> bool:
    return bool(block.opener) and not frame.is_over and stack.get(block.opener) is not block.code and block.is_own()


def block_here() -> Block:
    """Tell of this thread and task as where something is opened, or stepped."""
    return Block(_here.mark, current_task())


def stands(watchdog: Any, run: Any) -> Frame:
    """Make what the steps of a generator stand in (``stand_in``), with what is around it now."""
    frame = _frame_here(watchdog, run, None, _current.get())
    frame.block = Block(None, None)
    return frame


F = TypeVar("F", bound=Callable[..., Any])


class Within(ContextDecorator):
    """``with``: what is called inside is a part of one run, or of a wrap-up. Can be entered many times, also at once."""

    def __init__(self, run: Any, kind: Literal["wrap_up"] | None = None) -> None:
        """For a run, or what gives one when the block is entered; a wrap-up is one of whatever run is around it, if there is one."""
        self._run = run
        self._kind = kind
        self._frames: list[Frame] = []

    def __enter__(self) -> Any:
        """Enter it; give the run."""
        run = self._run() if callable(self._run) else self._run
        if self._kind is None:
            frame = open_block(run.watchdog, run, begins=True)
        else:
            around = frame_of(run.watchdog)
            frame = open_block(run.watchdog, run if around is None else around.run, Activity(self._kind))
            frame.wraps_up = True
        self._frames.append(frame)
        return run

    def __exit__(self, *exception: object) -> None:
        """Leave it, in whatever context."""
        frames = self._frames
        if len(frames) == 1:
            leave(frames.pop())
            return
        frame = left_by(frames)
        frames.remove(frame)
        leave(frame)

    def __call__(self, function: F) -> F:
        """Enter it for each call of ``function``, sync or async.

        Raises:
            UsageError: it is a generator, whose body runs in pieces.

        """
        if isgeneratorfunction(function) or isasyncgenfunction(function):
            raise UsageError(
                f"activate(), wrap_up() and outside_runs() cannot decorate the generator {name_of(function)}(): its body runs in pieces, and "
                "none of its calls would be covered. Write the `with` block inside it; or decorate it with @clevagent.run(...)."
            )
        if not iscoroutinefunction(function):
            return super().__call__(function)

        @functools.wraps(function)
        async def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await function(*args, **kwargs)

        return cast("F", inside)

    async def __aenter__(self) -> Any:
        """Enter it; give the run."""
        return self.__enter__()

    async def __aexit__(self, *exception: object) -> None:
        """Leave it, in whatever context."""
        self.__exit__()


def name_of(function: Any) -> str:
    """Name a function, or what is called like one."""
    function = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(function, "__name__", type(function).__name__))


class Standing:
    """``with``: what is called inside stands in a frame, which is not left by that. For one step of something after the other."""

    __slots__ = ("_before", "_spot", "frame")

    def __init__(self, frame: Frame) -> None:
        """Stand in ``frame``."""
        self.frame = frame
        self._before: Frame | None = None
        self._spot: Spot | None = None

    def __enter__(self) -> None:
        """Stand in it."""
        self._before, self._spot = _current.get(), spot()
        if not _is_collecting():
            _current.set(self.frame)

    def __exit__(self, *exception: object) -> None:
        """Stand where this stood before."""
        before, self._before = self._before, None
        top = _current.get()
        while top is not None and top is not self.frame:
            top = top.outer
        # A coroutine that nobody awaits any more is closed wherever the collector, or somebody else, comes upon it.
        if top is not None and self._spot == spot() and not _is_collecting():
            _current.set(before)


def entry(watchdog: Any) -> Frame | None:
    """Find what an entry point must stand in that hands its work to other tasks or threads; ``None`` where the context tells them.

    It does not where a generator's block is open, or was: they would inherit that of one that only left it there.
    """
    top = _current.get()
    if top is None and not _openers:
        return None
    frame = frame_of(watchdog)
    if frame is top:
        return None
    return frame if frame is not None else _resolved(watchdog, watchdog.current_run(), None)


def _resolved(watchdog: Any, run: Any, outer: Frame | None) -> Frame:
    """Make a frame of what was found out where no frame claims the code."""
    frame = Frame(watchdog, run, None, None, outer)
    frame.block = Block(None, None)
    # Over, so that whoever only wants to know what counts here need not ask.
    frame.is_over = frame.block.is_outside = run is watchdog.process_run
    return frame


def _opener(python: FrameType | None) -> tuple[FrameType | None, bool]:
    """Find the generator that opens a block, if one does; and whether contextlib steps it, in a context that is thrown away."""
    was_split = False
    while python is not None:
        if _is_generator(python.f_code):
            driver = python.f_back
            if driver is None or _kind_of(driver) != "splits":
                return python, False
            python, was_split = driver, True
            continue
        kind = _kind_of(python)
        if kind not in ("splits", "ours"):
            return None, was_split and kind == "copies"
        python = python.f_back
    return None, False


def is_split(python: FrameType | None) -> bool:
    """Tell whether whoever steps a generator takes its two steps for an enter and an exit."""
    return python is not None and _kind_of(python) == "splits"


def _is_generator(code: CodeType) -> bool:
    return bool(code.co_flags & _GENERATORS) and not code.co_flags & CO_ITERABLE_COROUTINE


_GENERATORS = CO_GENERATOR | CO_ASYNC_GENERATOR


def _kind_of(python: FrameType) -> str:
    """Tell what the module of a Python frame does with generators and contexts."""
    module = python.f_globals.get("__name__", "")
    found = _kinds.get(module)
    if found is None:
        name = str(module)
        found = _kinds[module] = _kind(name)
    return found


def _kind(module: str) -> str:
    for kind, modules in (("splits", _SPLITTERS), ("copies", _COPIERS), ("ours", ("clevagent_core.",))):
        if module.startswith(modules):
            return kind
    return ""


_kinds: dict[object, str] = {}
"""By module: every block that is opened asks for one."""


# -- what counts here -----------------------------------------------------------------------------------------------------


def frame_of(watchdog: Any) -> Frame | None:
    """Find the innermost frame of ``watchdog`` that counts here, by the context and the Python stack."""
    frame = _current.get()
    if not _openers:
        if frame is None:
            return look(watchdog).frame if _has_pools and _here.below is not None else None
        if frame.watchdog is watchdog and not frame.is_over and frame.run.ended_at is None:
            return frame
    return look(watchdog).frame


class Outlived(NamedTuple):
    """A run that this task or thread was begun in, and that is over, with all those around it."""

    run_id: str
    has_budgets: bool


class Look(NamedTuple):
    """What was found of a watchdog."""

    frame: Frame | None
    """What counts here."""
    outlived: Outlived | None
    """What would have counted."""
    is_outside: bool
    """Whether this is outside of every run, for certain: the code that steps a generator in which a run is open, for one."""


def look(watchdog: Any) -> Look:
    """Find what counts here, and what else the context tells."""
    stack = _stack() if _openers else {}
    found, outlived, is_outside = _search(watchdog, _current.get(), stack)
    stepped = _stepped(watchdog, stack) if stack else None
    if stepped is not None and not _leads_to(found, stepped):
        return Look(stepped, None, False)
    if found is None and outlived is None:
        found, outlived = _marked(watchdog, _marks_of(_current.get()))
    if found is None and outlived is None and _here.below is not None:
        found, outlived, was_outside = _search(watchdog, _here.below, stack)
        is_outside = is_outside or was_outside
    return Look(found, outlived, is_outside and found is None)


def _search(watchdog: Any, top: Frame | None, stack: dict[int, CodeType]) -> tuple[Frame | None, Outlived | None, bool]:
    """Find what counts of a chain of frames; what would have, if it were not over; and whether it is known to be outside."""
    is_outside = False
    frame = top
    while frame is not None:
        block = frame.block
        is_passed = block is not None and _is_passed(frame, block, stack)
        if frame.watchdog is not watchdog:
            pass
        elif block is not None and block.is_outside:
            is_outside = True
        elif frame.is_over or (frame.run.ended_at is not None and not frame.is_wrap_up()):
            if block is not None and block.is_outlived():
                found = _still_around(frame.run)
                return found, None if found is not None else _outlived(frame.run), is_outside
        elif not is_passed:
            return frame, None, is_outside
        else:
            is_outside = True  # this is the code of whoever steps the generator, or comes after it
        # Not around it where this code is not in it.
        frame = frame.outer if is_passed or frame.is_over else frame.around
    return None, None, is_outside


def _chain(frame: Frame | None) -> Iterator[Frame]:
    while frame is not None:
        yield frame
        frame = frame.around


def _leads_to(frame: Frame | None, other: Frame) -> bool:
    return any(one is other for one in _chain(frame))


def _still_around(run: Any) -> Frame | None:
    """Give a frame for the nearest run that goes on, of one and those around it."""
    for one in run.chain():
        if one.ended_at is None:
            return Frame(run.watchdog, one, None, None, None)
    return None


def _stack() -> dict[int, CodeType]:
    found: dict[int, CodeType] = {}
    python: FrameType | None = sys._getframe(2)  # noqa: SLF001 - documented; inspect.stack() reads files
    while python is not None:
        found[id(python)] = python.f_code
        python = python.f_back
    return found


def _stepped(watchdog: Any, stack: dict[int, CodeType]) -> Frame | None:
    """Find the innermost block of ``watchdog`` in a generator that is being stepped here."""
    for python, code in stack.items():
        for frame in reversed(_openers.get(python, ())):
            is_here = frame.block is not None and frame.block.code is code
            if is_here and frame.watchdog is watchdog and not frame.is_over and frame.run.ended_at is None:
                return frame
    return None


def blocks_of(watchdog: Any, *, of_task: bool) -> list[Any]:
    """The runs of the blocks that code may be begun in whose context tells of none.

    They were opened in a context that is gone; or, if a task asks, they are open in generators of its thread, to whose steps a context
    belongs that others use, too.
    """
    found = list(_lost)
    if of_task:
        found += [
            frame for blocks in list(_openers.values()) for frame in blocks if frame.block and frame.block.thread is _here.mark
        ]
    return [frame.run for frame in found if frame.watchdog is watchdog and frame.run.ended_at is None]


def _outlived(run: Any) -> Outlived:
    return Outlived(run.run_id, has_budgets(run))


def has_budgets(run: Any) -> bool:
    """Tell whether something limits what a run may spend, beside what limits the whole process."""
    if run.dry_run:
        return False
    if any(one.budgets for one in run.chain()):
        return True
    return any(budget.per == "run" or budget.by is not None for budget in run.watchdog.settings.budgets)


# -- what is carried ------------------------------------------------------------------------------------------------------


class _Mark(NamedTuple):
    """What a thread was started in. It may go on for ever: nothing of it is kept alive."""

    watchdog: weakref.ref[Any]
    run: weakref.ref[Any]
    activities: tuple[weakref.ref[Activity], ...]
    lent: tuple[Budget, ...]
    told: Outlived


def mark(thread: threading.Thread, watchdogs: Iterable[Any]) -> None:
    """Note on a thread, which is about to be started, what it is started in."""
    frames = [frame for watchdog in watchdogs if (frame := frame_of(watchdog)) is not None]
    if frames:
        object.__setattr__(thread, _MARKS, tuple(_mark_of(frame) for frame in frames))  # whatever its class makes of new attributes


def _mark_of(frame: Frame) -> _Mark:
    run = frame.run
    activities = tuple(weakref.ref(activity) for activity in _carried(frame))
    return _Mark(weakref.ref(frame.watchdog), weakref.ref(run), activities, frame.lent, _outlived(run))


def _carried(frame: Frame) -> tuple[Activity, ...]:
    return tuple(activity for activity in frame.activities if activity.kind != "wrap_up" and not activity.is_over)


class _Started(Frame):
    """What stands at the bottom of the context of a thread, and of all that are copied from it."""

    __slots__ = ("marks",)

    def __init__(self, marks: tuple[_Mark, ...]) -> None:
        super().__init__(None, None, None, None, None)
        self.marks = marks


def begin_thread(thread: threading.Thread) -> None:
    """Let this thread, which begins now, stand in what it was started in."""
    marks = getattr(thread, _MARKS, None)
    if marks:
        _current.set(_Started(marks))


def _marks_of(top: Frame | None) -> tuple[_Mark, ...]:
    """Find what the thread was started in in whose context, or a copy of it, this stands."""
    while top is not None:
        if isinstance(top, _Started):
            return top.marks
        top = top.outer
    return ()


def _marked(watchdog: Any, marks: tuple[_Mark, ...]) -> tuple[Frame | None, Outlived | None]:
    """Find what counts of what a thread was started in."""
    for found in marks:
        if found.watchdog() is not watchdog:
            continue
        run = found.run()
        frame = None if run is None else _still_around(run)
        if frame is None:
            return None, found.told
        activities = (reference() for reference in found.activities)
        frame.activities = tuple(activity for activity in activities if activity is not None and not activity.is_over)
        frame.lent = found.lent
        return frame, None
    return None, None


def carry(watchdogs: Iterable[Any]) -> Frame:
    """Make what a piece of work for a pool stands in, wherever it is done: what stands here, without what holds for this call only.

    Where it is known that this is outside of every run, that is known of the work, too; what nobody knows here, nobody knows there.
    """
    bottom = Frame(None, None, None, None, None)
    for watchdog in watchdogs:
        frame = frame_of(watchdog)
        if frame is not None:
            bottom = made = Frame(watchdog, frame.run, None, None, bottom)
            made.block = Block(None, None)
            made.activities, made.lent = _carried(frame), frame.lent
        elif (run := watchdog.known_run()) is not None:
            bottom = _resolved(watchdog, run, bottom)
    return bottom


def work_in(frame: Frame | None) -> Frame | None:
    """Let a piece of work that a pool does in this thread stand in a frame, also in a context of its own; give what to put back."""
    global _has_pools  # noqa: PLW0603 - it never ends
    _has_pools = True
    before, _here.below = _here.below, frame
    return before


def kept(frame: Frame) -> Frame:
    """Make what a stream stands in that was made in ``frame`` and may be read elsewhere."""
    return Frame(frame.watchdog, frame.run, frame, None, frame)


# -- what is asked --------------------------------------------------------------------------------------------------------


def living(frame: Frame | None, kind: str) -> list[Activity]:
    """Give the activities of one kind that go on around a frame, outermost first."""
    if frame is None:
        return []
    return [activity for activity in frame.activities if activity.kind == kind and not activity.is_over]


def activities_here(kind: str) -> list[Activity]:
    """Give all activities of one kind that this context, or this thread, was begun in, of every watchdog, innermost first.

    Some may be over: it is for those who begin them to say what that means.
    """
    found: dict[Activity, None] = {}
    top = _current.get()
    for frame in (*_chain(top), *_chain(_here.below)):
        found.update(dict.fromkeys(activity for activity in reversed(frame.activities) if activity.kind == kind))
    if not found:
        activities = [reference() for noted in _marks_of(top) for reference in reversed(noted.activities)]
        found.update(dict.fromkeys(activity for activity in activities if activity is not None and activity.kind == kind))
    return list(found)


def nodes_around(frame: Frame | None) -> list[Activity]:
    """Give the nodes that go on around a frame, outermost first; one that has a name of its user's only by that."""
    found: list[Activity] = []
    for node in living(frame, "node"):
        before = found[-1] if found else None
        if before is not None and node.place and before.place == node.place and before.name == node.place[-1]:
            found.pop()
        found.append(node)
    return found


def wraps_up(watchdog: Any) -> bool:
    """Tell whether calls made here may use what budgets keep back."""
    frame = frame_of(watchdog)
    return frame is not None and frame.wraps_up and bool(living(frame, "wrap_up"))


def covering(watchdog: Any) -> list[Frame]:
    """Give the frames of calls that cover what is sent here, innermost first."""
    return [
        frame for frame in _chain(_current.get()) if frame.covered is not None and not frame.is_over and frame.watchdog is watchdog
    ]


def place(call: LLMCall | ToolCall, frame: Frame | None) -> None:
    """Write into a call which tools and nodes are around it; a node that it has already stays the innermost."""
    if frame is None or not frame.activities:
        return
    tools = path([activity.name for activity in living(frame, "tool")])
    nodes = [activity.name for activity in nodes_around(frame)]
    if nodes:
        call.node = path([*nodes, *parts_of(call.node)])
    if isinstance(call, LLMCall):
        call.tool = tools
    else:
        call.inside = tools
