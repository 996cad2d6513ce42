"""Tells an exception that a signal handler raised from one of the code that it landed in.

Celery's ``SoftTimeLimitExceeded`` and the exceptions of timeout decorators are plain ``Exception``s, raised in the main thread wherever
it happens to be. Where that is inside a plugin, or code of ours that fails open, they must not be taken for a fault of it: whoever set
the alarm waits for them. Their type does not tell, but their traceback does.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import signal
import threading
from types import CodeType, FrameType, FunctionType, MethodType

_DEPTH = 10
"""How many wrappers around a handler are looked through."""


def is_interrupt(error: BaseException) -> bool:
    """Check whether a signal handler raised ``error``: then it has to leave as itself. For code that catches ``Exception``.

    Takes some microseconds. A handler that is no Python function, and calls none, leaves no trace.
    """
    step = error.__traceback__
    codes: set[CodeType] | None = None
    while step is not None and step.tb_next is not None:
        caller, step = step.tb_frame, step.tb_next
        if _was_called_for_signal(step.tb_frame, caller):
            return True
        if codes is None:
            codes = _codes_of_handlers()
        if step.tb_frame.f_code in codes:
            return True
    return False


def _was_called_for_signal(frame: FrameType, caller: FrameType) -> bool:
    """Check whether the first arguments of ``frame`` are a signal's number and the frame that it interrupted.

    So a handler is known that is not registered any more, because it puts the former one back before it raises.
    """
    code = frame.f_code
    count = code.co_argcount
    has_more = bool(code.co_flags & inspect.CO_VARARGS)
    if count + has_more == 0:
        return False
    values = frame.f_locals
    given = [values.get(name) for name in code.co_varnames[:count]]
    if has_more:
        more = values.get(code.co_varnames[count + code.co_kwonlyargcount])
        given += more if isinstance(more, tuple) else ()
    return any(second is caller and isinstance(first, int) for first, second in itertools.pairwise(given))


def _codes_of_handlers() -> set[CodeType]:
    """Find the code of every handler that is registered. Python runs them in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return set()
    codes = (_code_of(signal.getsignal(number)) for number in signal.valid_signals())
    return {code for code in codes if code is not None}


def _code_of(handler: object) -> CodeType | None:
    """Find the function whose frame is the first when ``handler`` is called."""
    for _ in range(_DEPTH):
        if isinstance(handler, FunctionType):
            return handler.__code__
        if isinstance(handler, MethodType):
            handler = handler.__func__
        elif isinstance(handler, functools.partial):
            handler = handler.func
        elif not callable(handler):
            return None
        else:
            call = getattr(type(handler), "__call__", None)  # noqa: B004 - what is called, not whether it can be
            # An object that is callable in Python; or a wrapper in C, which has kept what it wraps.
            handler = call if isinstance(call, FunctionType) else getattr(handler, "__wrapped__", None)
    return None
