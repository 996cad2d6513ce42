"""``clevagent.guard(graph)``: a compiled graph whose every invocation is a run with budgets of its own.

A guarded graph is a copy of the user's, of a subclass made for its class, that overrides the two methods through which every way of
invoking goes: ``stream`` and ``astream``. While the graph works, its run is the current one, refusals are of a type that ends it as it
should end, and a callback handler is added by context, so that neither nodes nor the user's config are touched. Between two
items of a stream all that is taken back: what the consumer does there is not the graph's. Checked with langgraph 1.2.0 and 1.2.22.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

from langgraph.pregel import Pregel
from langgraph.pregel.protocol import PregelProtocol

from clevagent_core import default
from clevagent_core.budgets import GRACEFUL, Budget, OnExceed, check_actions
from clevagent_core.errors import UsageError
from clevagent_core.streams import abelonging, belonging
from clevagent_langgraph.answers import asettle_answers, settle_answers
from clevagent_langgraph.invocations import Kept, begin, register

if TYPE_CHECKING:
    from clevagent_core.verdicts import Incident
    from clevagent_core.watchdog import Watchdog

_GUARD = "_clevagent_guard"
_END = object()


@dataclass(frozen=True, eq=False)
class GraphGuard:
    """What a guarded graph knows beside being a graph. Its copies share it."""

    budgets: tuple[Budget, ...]
    on_exceed: OnExceed | None
    """What happens at every ceiling that stops it; ``None`` for what each budget says."""
    own_watchdog: Watchdog | None
    stops: Kept[str, Incident] = field(default_factory=Kept)
    """Why the last invocation on a thread was stopped."""
    checked_for: WeakSet[Watchdog] = field(default_factory=WeakSet)
    """For whom the names in its budgets were looked for in the graph."""

    @property
    def watchdog(self) -> Watchdog:
        """The watchdog it was guarded with, else the process's own, whichever that is now."""
        return self.own_watchdog or default.current()

    def action_at(self, incident: Incident) -> str | None:
        """Tell how the graph ends at a refusal; ``None`` where this guard does not say."""
        action = self.on_exceed
        if isinstance(action, str) and action != "warn":
            return action
        if incident.action in GRACEFUL and any(budget.label == incident.budget for budget in self.budgets):
            return incident.action
        return None

    @property
    def asks(self) -> bool:
        """Whether it may end with a question."""
        return self.on_exceed == "ask" or any(budget.on_exceed == "ask" for budget in self.budgets)


def guard_graph(obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None) -> object | None:
    """Guard a compiled graph; ``None`` for anything else.

    Raises:
        UsageError: the graph is not compiled, or cannot do what is asked of it.

    """
    if not isinstance(obj, Pregel):
        _refuse_relatives(obj)
        return None
    check_actions(budgets, where="guard(graph)", can=tuple(GRACEFUL))
    if on_exceed is not None and not budgets and (callable(on_exceed) or on_exceed == "warn"):
        raise UsageError(
            f"guard(graph, on_exceed={on_exceed!r}) has no budgets of its own to which that could apply. Give budgets=[...] beside it, or "
            "say on_exceed in the budgets of init() or run(). ('halt', 'ask' and 'raise' say how the graph ends, and need none.)"
        )
    before = guard_of(obj)
    own = tuple(budgets)
    if before is not None:
        if not own and on_exceed is None and watchdog in {None, before.own_watchdog}:
            return obj
        # Guarded once more with budgets of its own: both sets hold.
        own = (*before.budgets, *(budget for budget in own if budget not in before.budgets))
        guard = GraphGuard(own, on_exceed or before.on_exceed, watchdog or before.own_watchdog, before.stops)
    else:
        guard = GraphGuard(own, on_exceed, watchdog)
    if guard.asks and not obj.checkpointer:
        raise UsageError(
            "guard(graph, on_exceed='ask') asks a person, and goes on with the answer; this graph has no checkpointer, so it could not go "
            "on. Compile it with one, as builder.compile(checkpointer=InMemorySaver()); or use on_exceed='halt', which ends it with the "
            "state it has reached, or 'raise'."
        )
    register()
    return _guarded(obj, guard)


def guard_of(graph: object) -> GraphGuard | None:
    """Give what a guarded graph knows; ``None`` of one that is not guarded."""
    found: GraphGuard | None = vars(graph).get(_GUARD) if isinstance(graph, Pregel) else None
    return found


def _refuse_relatives(obj: object) -> None:
    compile_ = getattr(obj, "compile", None)
    if callable(compile_) and type(obj).__module__.startswith("langgraph."):
        raise UsageError(
            f"guard() was given a {type(obj).__qualname__} that is not compiled, so there is nothing to run yet. Compile it first: "
            "clevagent.guard(builder.compile(...))."
        )
    if isinstance(obj, PregelProtocol):
        raise UsageError(
            f"guard() was given a {type(obj).__qualname__}: its nodes run in another process, in which nothing here can refuse a call. Guard the "
            "graph where it is made; what is in front of it here can be guarded as a tool or a node of a graph."
        )


def _guarded(graph: Pregel[Any, Any, Any, Any], guard: GraphGuard) -> Pregel[Any, Any, Any, Any]:
    plain = type(graph) if guard_of(graph) is None else _base(type(graph))
    made = object.__new__(_guarded_class(plain))
    vars(made).update(vars(graph))
    vars(made)[_GUARD] = guard
    return cast("Pregel[Any, Any, Any, Any]", made)


def _base(kind: type[Any]) -> type[Any]:
    return cast("type[Any]", kind.__bases__[0])


def _guarded_class(base: type[Any]) -> type[Any]:
    """Find the subclass for one class of graphs."""
    return _classes.get(base) or _classes.setdefault(base, _subclass(base))


_classes: dict[type[Any], type[Any]] = {}


def _subclass(base: type[Any]) -> type[Any]:
    @functools.wraps(base.copy)
    def copy(self: Any, update: dict[str, Any] | None = None) -> Any:
        # The copy is made by the constructor, which does not know of guards.
        plain = object.__new__(base)
        vars(plain).update({name: value for name, value in vars(self).items() if name != _GUARD})
        return _guarded(plain.copy(update), vars(self)[_GUARD])

    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    metaclass: Any = type(base)
    methods = {"stream": _stream_of(base), "astream": _astream_of(base), "astream_events": _astream_events_of(base), "copy": copy}
    made: type[Any] = metaclass(base.__name__, (base,), body | methods)
    return made


def _stream_of(base: type[Any]) -> Callable[..., Iterator[Any]]:
    def steps(self: Any, input: Any, config: Any, kwargs: dict[str, Any]) -> Iterator[Any]:  # noqa: A002 - LangGraph's name
        invocation = begin(self, vars(self)[_GUARD], input, config, kwargs)
        try:
            given = settle_answers(self, invocation, input) if invocation.may_be_resumed else input
            chunks = base.stream(self, given, invocation.config, **kwargs)
            try:
                while True:
                    with invocation:
                        chunk = next(chunks, _END)
                    if chunk is _END:
                        break
                    if not invocation.hides(chunk):
                        yield chunk
            except BaseException as error:
                with invocation:
                    chunks.close()
                if not invocation.is_ended_by(error):
                    raise
            else:
                invocation.is_finished = True
        finally:
            invocation.end()

    @functools.wraps(base.stream)
    def stream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:  # noqa: A002 - LangGraph's name
        return belonging(vars(self)[_GUARD].watchdog, lambda: steps(self, input, config, kwargs))

    return stream


def _astream_of(base: type[Any]) -> Callable[..., AsyncIterator[Any]]:
    async def steps(self: Any, input: Any, config: Any, kwargs: dict[str, Any]) -> AsyncIterator[Any]:  # noqa: A002 - as above
        invocation = begin(self, vars(self)[_GUARD], input, config, kwargs)
        try:
            given = await asettle_answers(self, invocation, input) if invocation.may_be_resumed else input
            chunks = base.astream(self, given, invocation.config, **kwargs)
            try:
                while True:
                    with invocation:
                        chunk = await anext(chunks, _END)
                    if chunk is _END:
                        break
                    if not invocation.hides(chunk):
                        yield chunk
            except BaseException as error:
                with invocation:
                    await chunks.aclose()
                if not invocation.is_ended_by(error):
                    raise
            else:
                invocation.is_finished = True
        finally:
            invocation.end()

    @functools.wraps(base.astream)
    def astream(self: Any, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:  # noqa: A002 - as above
        return abelonging(vars(self)[_GUARD].watchdog, lambda: steps(self, input, config, kwargs))

    return astream


def _astream_events_of(base: type[Any]) -> Callable[..., AsyncIterator[Any]]:
    @functools.wraps(base.astream_events)
    def astream_events(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        return abelonging(vars(self)[_GUARD].watchdog, lambda: base.astream_events(self, *args, **kwargs))

    return astream_events
