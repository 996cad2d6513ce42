"""Carries what a context stands in to the threads that are started in it, and to the work that is handed to pools in it.

A raw thread inherits no context. ``Thread.start`` notes on the thread what it was started in, weakly, and its own context stands in
that from the beginning, and so do the tasks that it begins; its target and ``run`` stay as they are. ``ThreadPoolExecutor.submit``, the
methods of ``multiprocessing.pool.ThreadPool`` and ``Future.add_done_callback`` set it for each piece of work, also where there is
nothing to carry: a worker must not keep what its pool's first user stood in, nor what a piece of work left behind. Put in place while
a watchdog is configured, and taken away with the last. Checked with CPython 3.11 to 3.13.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clevagent_core.frames import Frame, Standing, begin_thread, carry, mark, work_in
from clevagent_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

_WORKERS = ("concurrent.futures.", "multiprocessing.pool", "anyio.", "asgiref.")
"""Modules whose functions, or classes of threads, work for whoever comes next."""
_OF_THREAD_POOL = ("apply_async", "_map_async", "imap", "imap_unordered")
"""Where all methods of a ThreadPool take their function, as their first argument."""

_lock = threading.RLock()
_watchdogs: weakref.WeakSet[Watchdog] = weakref.WeakSet()
_replaced: dict[tuple[type[Any], str], tuple[Any, Any]] = {}
"""What stood there before (``None``: it was inherited), and what we have put there."""


class Carrying:
    """Watches threads and pools for one watchdog."""

    @hookimpl
    def clevagent_configure(self, watchdog: Watchdog) -> None:
        """Put it in place."""
        from concurrent.futures import Future, ThreadPoolExecutor  # noqa: PLC0415 - a millisecond that only a watchdog costs

        with _lock:
            _watchdogs.add(watchdog)
            _replace(threading.Thread, "start", _start)
            _replace(threading.Thread, "_bootstrap_inner", _beginning)
            _replace(ThreadPoolExecutor, "submit", _handing_over)
            _replace(Future, "add_done_callback", _handing_over)
            _watch_thread_pools()

    @hookimpl
    def clevagent_unconfigure(self, watchdog: Watchdog) -> None:
        """Take it away, with the last."""
        with _lock:
            _watchdogs.discard(watchdog)
            if _watchdogs:
                return
            for (kind, name), (original, ours) in _replaced.items():
                _restore(kind, name, original, ours)
            _replaced.clear()


def _watch_thread_pools() -> None:
    """As soon as somebody has imported them, which takes longer than all of this; a pool starts its threads before it gets work."""
    module: Any = sys.modules.get("multiprocessing.pool")
    pool = getattr(module, "ThreadPool", None)
    if pool is not None:
        with _lock:
            for name in _OF_THREAD_POOL:
                _replace(pool, name, _handing_over)


def _start(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        if ("multiprocessing.pool" in sys.modules) and not _is_watching_thread_pools():
            _watch_thread_pools()
        if not _works_for_a_pool(self):
            mark(self, _all())
        original(self)

    return start


def _beginning(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def begin(self: threading.Thread) -> None:
        begin_thread(self)
        original(self)

    return begin


def _handing_over(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def hand_over(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = carry(_all())
        if args:
            return original(self, functools.partial(_work, frame, args[0]), *args[1:], **kwargs)
        for name in ("func", "fn"):
            if name in kwargs:
                kwargs[name] = functools.partial(_work, frame, kwargs[name])
        return original(self, **kwargs)

    return hand_over


def _work(frame: Frame, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    before = work_in(frame)
    try:
        with Standing(frame):
            return function(*args, **kwargs)
    finally:
        work_in(before)


def _all() -> list[Watchdog]:
    with _lock:
        return list(_watchdogs)


def _works_for_a_pool(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    return type(thread).__module__.startswith(_WORKERS) or (getattr(target, "__module__", None) or "").startswith(_WORKERS)


def _is_watching_thread_pools() -> bool:
    return any(name == "imap" for _, name in list(_replaced))


def _replace(kind: type[Any], name: str, wrap: Callable[[Any], Any]) -> None:
    if (kind, name) in _replaced:
        return
    ours = wrap(getattr(kind, name))
    _replaced[kind, name] = kind.__dict__.get(name), ours
    setattr(kind, name, ours)


def _restore(kind: type[Any], name: str, original: Any, ours: Any) -> None:
    # Whoever has wrapped it since calls ours, which then carries for nobody.
    if kind.__dict__.get(name) is not ours:
        return
    if original is None:
        delattr(kind, name)
    else:
        setattr(kind, name, original)


def _after_fork_in_child() -> None:
    # The parent may have held it.
    global _lock  # noqa: PLW0603 - one per process is what this module is for
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def plugin() -> Carrying:
    """Make the built-in plugin of this module."""
    return Carrying()
