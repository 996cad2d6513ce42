"""Exceptions that nobody catches: of the main thread, of other threads, and of asyncio tasks that nobody awaits.

What Python does about them stays as it is, and is done whatever becomes of ours: the hooks that were there before are always called.
For tasks a *filter* on asyncio's logger looks at what is logged and lets all of it pass; a handler there would take away the handler
of last resort, which writes to stderr in programs without logging of their own. Event loops of any make log there.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import uuid
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

logger = logging.getLogger("clevagent")

Tell = Callable[[str, BaseException], None]
_HEARD = "_clevagent_heard"
"""Where an exception says who was told of it: an exception cannot be held weakly, and another may later have its ``id``. Names, so that
the exception can be pickled as before."""
_NO_CRASH = (KeyboardInterrupt, SystemExit, GeneratorExit)


class Crashes:
    """Tells of each uncaught exception, once. Several can be installed, and uninstalled in any order."""

    def __init__(self, tell: Tell) -> None:
        """Tell by ``tell(where, error)``, a bound method, which is held weakly."""
        self._tell = weakref.WeakMethod(tell)
        self._name = uuid.uuid4().hex

    def install(self) -> None:
        """Begin to listen. Safe to call twice."""
        with _lock:
            _listeners.add(self)
            _put_hooks()

    def uninstall(self) -> None:
        """Listen no more; the last one takes the hooks off, unless somebody has put his own above them. Safe to call twice."""
        with _lock:
            _listeners.discard(self)
            if not _listeners:
                _take_hooks()

    def hear(self, where: str, error: BaseException) -> None:
        """Tell of an exception, unless it was told before: a task's may come up to the main thread, too. Never raises."""
        tell = self._tell()
        if tell is None or isinstance(error, _NO_CRASH):
            return
        try:
            if self._is_news(error):
                tell(where, error)
        except Exception:  # whose code: ours; the user's traceback is still to be written
            logger.exception("An exception that nobody caught could not be told.")

    def _is_news(self, error: BaseException) -> bool:
        try:
            heard = vars(error).setdefault(_HEARD, [])
        except Exception:  # whose code: the user's exception, which keeps its attributes in a way of its own
            return True
        if self._name in heard:
            return False
        heard.append(self._name)
        return True


_listeners: weakref.WeakSet[Crashes] = weakref.WeakSet()


def _hear(where: str, error: BaseException | None) -> None:
    if error is not None:
        for listener in list(_listeners):
            listener.hear(where, error)


class _MainHook:
    """Stands where ``sys.excepthook`` stood, and calls what was there."""

    def __init__(self) -> None:
        self.before = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        try:
            _hear("main thread", error)
        finally:
            self.before(kind, error, traceback)


class _ThreadHook:
    """Stands where ``threading.excepthook`` stood, and calls what was there."""

    def __init__(self) -> None:
        self.before = threading.excepthook

    def __call__(self, arguments: Any, /) -> None:
        try:
            name = arguments.thread.name if arguments.thread is not None else "unknown"
            _hear(f"thread {name!r}", arguments.exc_value)
        finally:
            self.before(arguments)


class _TaskFilter(logging.Filter):
    """Looks at what asyncio logs of tasks whose exception nobody retrieved, and lets everything pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        # Nothing here may raise, or it would in whoever logs: not record.getMessage(), which formats. asyncio gives no arguments.
        if isinstance(record.exc_info, tuple) and isinstance(record.msg, str) and "exception was never retrieved" in record.msg:
            _hear("asyncio task", record.exc_info[1])
        return True


_task_filter = _TaskFilter()
_lock = threading.RLock()


def _after_fork_in_child() -> None:
    # A thread of the parent's may have held it; in the child nobody would ever let go.
    global _lock  # noqa: PLW0603 - one for the interpreter, as the hooks are
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _put_hooks() -> None:
    # Above whatever was put there since: it may or may not call ours, and what is told twice is told once.
    if not isinstance(sys.excepthook, _MainHook):
        sys.excepthook = _MainHook()
    if not isinstance(threading.excepthook, _ThreadHook):
        threading.excepthook = _ThreadHook()
    tasks = logging.getLogger("asyncio")
    if _task_filter not in tasks.filters:
        tasks.addFilter(_task_filter)


def _take_hooks() -> None:
    if isinstance(sys.excepthook, _MainHook):
        sys.excepthook = sys.excepthook.before
    if isinstance(threading.excepthook, _ThreadHook):
        threading.excepthook = threading.excepthook.before
    logging.getLogger("asyncio").removeFilter(_task_filter)
