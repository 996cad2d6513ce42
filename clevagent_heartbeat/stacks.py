"""Where is a thread, or an asyncio task, stuck? Files, lines and functions; no values, no arguments, no source text.

Looking costs some ten microseconds, changes nothing, and needs nothing of what is stuck.
"""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import PurePath
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import asyncio

_OPAQUE = frozenset({"async_generator_asend", "async_generator_athrow", "anext_awaitable", "coroutine_wrapper"})
MOST_FRAMES = 50
"""Of more, the middle is left out."""
_MOST_CAUSES = 10
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))  # noqa: PTH120 - as text, to compare
_OURS = os.path.join(_ROOT, "clevagent")  # noqa: PTH118 - as above; and clevagent_core and the adapters


class Frame(NamedTuple):
    """One place in a stack."""

    file: str
    """The file, as its code was compiled from."""
    line: int
    function: str


class Stack(NamedTuple):
    """Where something stands, and how it got there."""

    frames: tuple[Frame, ...]
    """Outermost first; the last is where it stands. Of more than :data:`MOST_FRAMES`, the middle is left out."""
    own: Frame | None = None
    """The innermost one of the user's own code, also where it is among those left out."""
    causes: tuple[str, ...] = ()
    """Of an exception: what it came from, and where that was raised; no texts."""

    @property
    def where(self) -> str:
        """Say in a line where it stands: in the user's own code, and in what that waits for."""
        if not self.frames:
            return "unknown"
        last = self.frames[-1]
        own = self.own or last
        return _show(own) if own == last else f"{_show(own)} (waiting in {_show(last)})"

    def lines(self) -> list[str]:
        """Write each frame in a line."""
        return [f"{frame.file}:{frame.line} in {frame.function}" for frame in self.frames]


def thread_stack(thread_id: int) -> Stack | None:
    """Give the stack of a thread, by the number that ``threading.get_ident()`` has in it; ``None`` if it has ended."""
    frame = sys._current_frames().get(thread_id)  # noqa: SLF001 - documented
    return None if frame is None else _stack(_frames_of(frame))


def task_stack(task: asyncio.Task[Any]) -> Stack | None:
    """Give the stack of an asyncio task, with all that it awaits; ``None`` if it is done.

    Where its event loop is itself stuck inside of it (a blocking call in asynchronous code), that is where its thread stands.
    """
    if task.done():
        return None
    running = _running(task)
    if running is not None:
        return _stack(_frames_of(running))
    return _stack(_awaits(task))


def from_exception(error: BaseException) -> Stack:
    """Give the stack of an exception: from where it was caught, or by nobody, to where it was raised."""
    return _stack(_raised(error))._replace(causes=tuple(_causes(error)))


# -- inside ---------------------------------------------------------------------------------------------------------------


def _stack(found: list[Frame]) -> Stack:
    own = next((frame for frame in reversed(found) if _is_users(frame.file)), None)
    if len(found) > MOST_FRAMES:
        half = MOST_FRAMES // 2
        left_out = Frame("...", 0, f"{len(found) - 2 * half} frames left out")
        found = [*found[:half], left_out, *found[-half:]]
    return Stack(tuple(found), own)


def _raised(error: BaseException) -> list[Frame]:
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(_frame(traceback.tb_frame.f_code, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames


def _causes(error: BaseException) -> Iterator[str]:
    """Name what an exception came from, nearest first: its causes, and the exceptions of a group."""
    seen = {id(error)}
    waiting = _behind(error)
    while waiting and len(seen) <= _MOST_CAUSES:
        cause = waiting.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield f"Caused by {type(cause).__module__}.{type(cause).__qualname__} at {_stack(_raised(cause)).where}"
            waiting += _behind(cause)


def _behind(error: BaseException) -> list[BaseException]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    members = error.exceptions[:_MOST_CAUSES] if isinstance(error, BaseExceptionGroup) else ()
    return [*members, *([] if cause is None else [cause])]


def _frame(code: CodeType, line: int | None) -> Frame:
    return Frame(code.co_filename, line or code.co_firstlineno, code.co_name)


def _frames_of(innermost: FrameType) -> list[Frame]:
    frames = []
    frame: FrameType | None = innermost
    while frame is not None:
        frames.append(_frame(frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return frames[::-1]


def _running(task: asyncio.Task[Any]) -> FrameType | None:
    """Find the innermost frame of the thread that runs the task's code at this moment, if one does."""
    tasks = sys.modules["asyncio.tasks"]
    # An entry of its own for each loop: the task that it is in the middle of.
    if tasks._current_tasks.get(task.get_loop()) is not task if hasattr(tasks, "_current_tasks") else False:  # noqa: SLF001 - nothing public tells of another thread's
        return None
    outermost = getattr(task.get_coro(), "cr_frame", None)
    for innermost in sys._current_frames().values():  # noqa: SLF001 - documented
        frame: FrameType | None = innermost
        while frame is not None:
            if frame is outermost:
                return innermost
            frame = frame.f_back
    return None


def _awaits(task: asyncio.Task[Any]) -> list[Frame]:
    """Follow what a task awaits: its coroutines, then the future that the innermost waits for, and whose that is."""
    frames: list[Frame] = []
    seen: set[int] = set()
    current: Any = task
    while current is not None and id(current) not in seen and len(frames) < 10 * MOST_FRAMES:
        seen.add(id(current))
        try:
            frames.extend(_chain(current.get_coro() if hasattr(current, "get_coro") else None))
            current = _next(current)
        except Exception:  # whose code: a future or an awaitable of the user's; the stall is told with what was found
            break
    return frames


def _chain(awaited: Any) -> Iterator[Frame]:
    """Walk a chain of coroutines and generators, outermost first."""
    for _ in range(10 * MOST_FRAMES):
        if type(awaited).__name__ in _OPAQUE:
            # What ``async for`` awaits, and a coroutine's ``__await__()``, names whose it is to the garbage collector only.
            awaited = next(filter(_is_awaited, gc.get_referents(awaited)), None)
            continue
        frame = _first(awaited, "cr_frame", "gi_frame", "ag_frame")
        if frame is not None:
            yield _frame(frame.f_code, frame.f_lineno)
        inner = _first(awaited, "cr_await", "gi_yieldfrom", "ag_await")
        if inner is None:
            return
        awaited = inner


def _is_awaited(found: Any) -> bool:
    return isinstance(found, AsyncGeneratorType | CoroutineType) or type(found).__name__ in _OPAQUE


def _first(value: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(value, name, None)) is not None), None)


def _next(current: Any) -> Any:
    """Give the task that ``current`` waits for, directly or through a future that stands for several (gather)."""
    waits_for = getattr(current, "_fut_waiter", None) if hasattr(current, "get_coro") else current
    if waits_for is None or hasattr(waits_for, "get_coro"):
        return waits_for
    children = getattr(waits_for, "_children", None) or _waited_by(waits_for)
    return next((child for child in children if not child.done()), None)


def _waited_by(future: Any) -> list[Any]:
    """Find the tasks whose end a plain future was made to wait for: of ``asyncio.wait``, a ``TaskGroup``, a ``shield``."""
    loop = future.get_loop()
    waiting = []
    for task in sys.modules["asyncio.tasks"].all_tasks(loop):
        callbacks = getattr(task, "_callbacks", None) or ()
        for entry in callbacks:
            callback = entry[0] if isinstance(entry, tuple) else entry
            cells = getattr(callback, "__closure__", None) or ()
            owner = getattr(callback, "__self__", None)
            given = getattr(callback, "args", ())  # of a partial: asyncio.wait_for
            if any(_sets(found, future) for found in [owner, *given, *map(_content, cells)]):
                waiting.append(task)
    return waiting


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _sets(found: Any, future: Any) -> bool:
    """Tell whether a callback that holds ``found`` is to set ``future``. Only task groups, asyncio's and anyio's, are asked for theirs."""
    return found is future or (type(found).__name__ == "TaskGroup" and getattr(found, "_on_completed_fut", None) is future)


def _show(frame: Frame) -> str:
    return f"{'/'.join(PurePath(frame.file).parts[-2:])}:{frame.line} in {frame.function}"


_TYPED = ("<string>", "<stdin>", "<python-input", "<ipython")
"""What code is compiled from that is in no file: of ``python -c``, of a pipe, of the prompt."""
_PATHS = {name: os.path.join(path, "") for name, path in sysconfig.get_paths().items() if path}  # noqa: PTH118 - as text, to compare


def _is_users(file: str) -> bool:
    """Tell whether code is neither Python's, nor of an installed package, nor ours."""
    if file.startswith("<") and not file.startswith(_TYPED):
        return False
    if any(file.startswith(_PATHS[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib") if name in _PATHS):
        return False
    parts = PurePath(file).parts
    is_ours = file.startswith(_OURS) and parts[len(PurePath(_ROOT).parts)].startswith("clevagent")
    return not is_ours and "site-packages" not in parts and "dist-packages" not in parts
