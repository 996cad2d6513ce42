"""One invocation of an agent as one run: found again by every hook of the middleware, and ended however the agent ends.

The nodes of a graph share neither a context nor an object of their own, only the graph's state. So a middleware keeps one private
key there, the run's :class:`Seat`. To a checkpoint, or to a stream of the state, it is a text, by which an agent that was
interrupted goes on. The object itself lives exactly as long as LangGraph's loop does: when an agent raised, was cancelled or was
dropped in mid-stream, no hook is called, but the seat is let go of, and the run ends. Checked with langgraph 1.2.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Self

from langchain.agents.middleware import AgentState
from langchain.agents.middleware.types import PrivateStateAttr

from clevagent_core.runs import Run
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.guards.loop import LoopGuard

_RESUMABLE = 1000
"""How many invocations that could be resumed are kept; the one that was not used for longest is ended when one more comes."""


class Invocation:
    """What the middleware knows of one invocation. Its fields are set by one operation each: parallel tools share it."""

    def __init__(self, run: Run, loops: LoopGuard) -> None:
        """Begin with nothing seen."""
        self.run = run
        self.turn = 0
        """How many answers the model has given."""
        self.refused: dict[str, int] = {}
        """The tools that the model was told are refused, with the turn in which it was told."""
        self.refusals: dict[str, Incident] = {}
        """Why they were."""
        self.told_loop: Incident | None = None
        """The loop that the model was told of."""
        self.ending: Incident | None = None
        """Why the agent ends: no call is made any more but the closing one."""
        self.is_closed = False
        """Whether the closing message was written."""
        self.is_checked = False
        """Whether the tools that budgets name were looked for."""
        self.seat: weakref.ref[Seat] | None = None
        """Where it is held while the graph runs; ``None`` after it was resumed, until the model has answered once."""
        self._loops = loops

    def move_into(self, outer: Run | None) -> None:
        """Go on inside the run that is around the agent now, if it was resumed under another one than it began in."""
        run = self.run
        if outer is None:
            if run.parent is None or run.parent.ended_at is None:
                return
        elif outer in run.chain() or run in outer.chain():
            return
        # What was worked out for it where it was before, budgets and loops, holds no more.
        run.root.state.pop(self._loops, None)
        run.parent, run.root = (outer, outer.root) if outer is not None else (None, run)
        run.root.sees_tools = True
        run.tags = dict(outer.tags) if outer is not None else {}
        if outer is not None and outer.guards is not None:
            run.guards = outer.guards + run.guards if run.guards is not None else outer.guards
        run.memo.clear()
        run.state.clear()

    def end(self, *, is_finished: bool = False) -> None:
        """End the run; does nothing the second time. ``is_finished`` tells whether the agent has come to its end."""
        self.run.end(is_finished=is_finished and self.ending is None)
        # The guard keeps what it saw with the outermost run, which may outlive many agents.
        self.run.root.state.pop(self._loops, None)


class Seat(str):
    """Holds an invocation in the state of a graph that runs; its text is the key by which it is found once it is gone."""

    __slots__ = ("__weakref__", "invocation")

    invocation: Invocation

    def __new__(cls, key: str, invocation: Invocation) -> Self:
        """Take the place of an earlier one."""
        seat = super().__new__(cls, key)
        seat.invocation = invocation
        invocation.seat = weakref.ref(seat)
        return seat

    def __deepcopy__(self, memo: object) -> Self:
        """A copy of the state is of the same run."""
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Leave the process as the text."""
        return str, (str(self),)


class WatchedState(AgentState[Any]):
    """The state of an agent with the private key of the middleware, which is in neither the input nor the output."""

    clevagent_run: NotRequired[Annotated[str, PrivateStateAttr]]


KEY = "clevagent_run"


class Invocations:
    """The invocations of one middleware. Safe to use from any thread."""

    def __init__(self) -> None:
        """None yet."""
        self._lock = threading.RLock()
        self._resumable: dict[str, Invocation] = {}

    def take_seat(self, invocation: Invocation, *, is_resumable: bool, key: str | None = None) -> Seat:
        """Hold an invocation that begins, or one that was resumed where nobody knows it any more (``key``)."""
        seat = Seat(key or uuid.uuid4().hex, invocation)
        if is_resumable:
            self._keep(str(seat), invocation)
        else:
            # Not at the end of the process: nobody would hear of it.
            weakref.finalize(seat, invocation.end).atexit = False
        return seat

    def find(self, state: Mapping[str, Any]) -> Seat | None:
        """Find the invocation that the state of a graph belongs to."""
        key = state.get(KEY)
        if key is None or isinstance(key, Seat):
            return key
        with self._lock:
            invocation = self._resumable.pop(key, None)
            if invocation is None:
                return None
            self._resumable[key] = invocation  # the one that was used last
            return Seat(key, invocation)

    def end(self, state: Mapping[str, Any]) -> Seat | None:
        """End the invocation that the state of a graph belongs to."""
        seat = self.find(state)
        if seat is not None:
            with self._lock:
                self._resumable.pop(str(seat), None)
            seat.invocation.end(is_finished=True)
        return seat

    def end_abandoned(self, state: Mapping[str, Any]) -> None:
        """End the invocation before on the same conversation, unless it still goes on: it will not be resumed any more."""
        key = state.get(KEY)
        with self._lock:
            before = self._resumable.get(key or "")
            if key is None or before is None or (before.seat is not None and before.seat() is not None):
                return
            del self._resumable[key]
        before.end()

    def _keep(self, key: str, invocation: Invocation) -> None:
        dropped: list[Invocation] = []
        with self._lock:
            self._resumable[key] = invocation
            if len(self._resumable) > _RESUMABLE:
                # Those that are running are not dropped: a run that is ended forgets what it has spent.
                idle = _idle(self._resumable)
                dropped = [self._resumable.pop(one) for one in idle[: len(self._resumable) - _RESUMABLE]]
        for other in dropped:
            other.end()


def _idle(resumable: Mapping[str, Invocation]) -> list[str]:
    return [key for key, invocation in resumable.items() if invocation.seat is None or invocation.seat() is None]
