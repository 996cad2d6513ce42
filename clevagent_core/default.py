"""The process's own watchdog: what ``clevagent.init()`` makes, and what guarded objects look up at each call."""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any

from clevagent_core.errors import UsageError
from clevagent_core.frames import frame_of
from clevagent_core.settings import Settings
from clevagent_core.watchdog import Watchdog

_lock = threading.RLock()
_watchdog: Watchdog | None = None
_is_implicit = False
_was_shut_down = False
"""Whether a watchdog with budgets was shut down: calls that it would have refused must not go on without it."""


def init(**settings: Any) -> Watchdog:
    """Start the process's watchdog: see ``clevagent.init``."""
    global _watchdog, _is_implicit, _was_shut_down  # noqa: PLW0603 - one per process is what this module is for
    with _lock:
        found = _watchdog
        if found is not None and found.pid != os.getpid():
            # Forked: the parent's watchdog is not ours to end. This process starts with accounts of its own.
            found = None
        if found is not None:
            wanted = Settings.resolve(settings)
            if wanted == found.settings:
                _is_implicit = False
                return found
            if not _is_implicit or found.is_used:
                raise UsageError(_already(found.settings, wanted, implicit=_is_implicit))
            # Not the process's any more, even if the next one cannot be made.
            _watchdog = None
            found.shutdown()
        elif _watchdog is None:
            atexit.register(shutdown)
        _watchdog = Watchdog(**settings)
        _is_implicit = _was_shut_down = False
        return _watchdog


def current() -> Watchdog:
    """Find the process's watchdog; started with default settings by the first that asks, unless ``init`` came before."""
    global _watchdog, _is_implicit  # noqa: PLW0603 - one per process is what this module is for
    found = _watchdog
    if found is not None:
        return found
    with _lock:
        if _watchdog is None:
            if _was_shut_down:
                raise UsageError(
                    "The watchdog of this process was shut down, and it had budgets: a call made now would count against none of them, "
                    "so it was refused. Call clevagent.init(...) again first, also with no budgets."
                )
            atexit.register(shutdown)
            _watchdog = Watchdog()
            _is_implicit = True
        return _watchdog


def is_over() -> bool:
    """Tell whether a watchdog with budgets was shut down, and none was started since."""
    return _watchdog is None and _was_shut_down


def note_asked(watchdog: Watchdog | None) -> None:
    """Let the runs around know that something guarded was asked, which may bring no call: an answer from a cache, what costs nothing.

    ``None`` for the process's own watchdog.
    """
    found = watchdog or _watchdog
    frame = None if found is None else frame_of(found)
    if frame is not None:
        frame.run.is_asked = True


def shutdown() -> None:
    """Shut the process's watchdog down, if there is one."""
    global _watchdog, _was_shut_down  # noqa: PLW0603 - one per process is what this module is for
    with _lock:
        found, _watchdog = _watchdog, None
        if found is not None and not _is_implicit:
            _was_shut_down = bool(found.settings.budgets)
        atexit.unregister(shutdown)
        if found is None:
            return
        found.shutdown()


def _after_fork_in_child() -> None:
    # The parent may have held it.
    global _lock  # noqa: PLW0603 - one per process is what this module is for
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _already(old: Settings, new: Settings, *, implicit: bool) -> str:
    changed = [name for name in vars(new) if getattr(old, name) != getattr(new, name)]
    values = "; ".join(
        # A key is not for logs.
        "api_key is another one"
        if name == "api_key"
        else f"{name} is {getattr(old, name)!r}, and is now given as {getattr(new, name)!r}"
        for name in changed
    )
    how = "was started by the first call that needed it, with the settings of the environment" if implicit else "is already running"
    return (
        f"clevagent.init() was called a second time with other settings: {values}. The watchdog of this process {how}, and what it "
        "has counted would be lost. Call init once, before anything is guarded; or call clevagent.shutdown() first, which ends "
        "every run; or make a second one that shares nothing with clevagent.Watchdog(...)."
    )
