"""Counts that come out the same on any machine: memory blocks that a call takes, and blocks that stay.

``sys.getallocatedblocks()`` tells how many blocks of CPython's own allocator are in use. Between the start and the end of a call it
says what stays; looked at before each bytecode instruction it says what was taken on the way, whether or not it was given back.
"""

from __future__ import annotations

import gc
import statistics
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_blocks = sys.getallocatedblocks
_HAS_MONITORING = sys.version_info >= (3, 12)
_LARGEST_SHARED_INT = 256
"""Larger integers are blocks of their own."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect now, and not again before the end: the collector's own work is nobody's."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Meter:
    """A trace function that adds up the blocks that each instruction of this thread took.

    The numbers live in an ``array``, since a Python integer would be a block itself. An instruction that takes blocks and gives some
    back counts with the difference. Tracing makes one frame object for each Python function that is entered: those are taken off. So is
    the number by which CPython 3.12 and later tell a trace function, inside the interpreter, which instruction is next.
    """

    def __init__(self) -> None:
        self._state = array("q", [0, 0])

    def count(self, function: Callable[[], object]) -> int:
        """Call ``function`` once; give the number of blocks it took."""
        state = self._state
        tracer = self._tracer()
        outer = sys.gettrace()
        state[1] = 0
        state[0] = _blocks()
        sys.settrace(tracer)
        try:
            function()
        finally:
            sys.settrace(outer)
        return state[1]

    def _tracer(self) -> Callable[[FrameType, str, object], Any]:
        state = self._state

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            now = _blocks()
            if event == "call":
                frame.f_trace_opcodes = True
                state[1] -= 1
            elif event != "opcode":
                return trace  # the same instruction follows as an opcode
            elif _HAS_MONITORING and frame.f_lasti > _LARGEST_SHARED_INT:
                now -= 1
            state[1] += max(0, now - state[0])
            state[0] = now
            return trace

        return trace


def blocks_taken(function: Callable[[], object], *, repeats: int = 25, warm_up: int = 100) -> int:
    """Count the blocks that one call takes: the median of ``repeats`` warm calls, since now and then a table grows."""
    meter = _Meter()
    for _ in range(warm_up):
        function()
    with no_collection():
        return int(statistics.median([meter.count(function) for _ in range(repeats)]))


def blocks_left(function: Callable[[], object], calls: int, *, warm_up: int = 500) -> int:
    """Count the blocks that are in use after ``calls`` calls and were not before."""
    for _ in range(warm_up):
        function()
    with no_collection():
        before = _blocks()
        for _ in range(calls):
            function()
        gc.collect()
        return _blocks() - before
