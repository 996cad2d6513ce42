"""``clevagent.guard(crew)``, and the same for an agent and a flow: each kickoff is a run under the budgets that were given.

A guarded crew or agent is a shallow copy of the user's, of a subclass made for its class: tasks, agents and memory are the same
objects, so that ``task.output`` is where it always is, and the crew that was given stays as it is. A flow's methods belong to the
object that it is, so a flow is guarded itself. What is guarded is a *context*: every model that is called in it, whoever made it.
Checked with crewai 1.15.19 and 1.15.30.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from crewai.agents.agent_builder.base_agent import BaseAgent
from crewai.crew import Crew
from crewai.flow.flow import Flow
from crewai.process import Process

from clevagent_core import default
from clevagent_core.budgets import Budget, OnExceed
from clevagent_core.errors import BudgetExceeded, Stopped, UsageError
from clevagent_crewai import models
from clevagent_crewai.caches import cache
from clevagent_crewai.gates import attached, name_of, task_name_of
from clevagent_crewai.names import learn_names
from clevagent_crewai.outputs import output_of
from clevagent_crewai.progress import watch_tasks
from clevagent_crewai.scopes import open_scopes, put_back
from clevagent_crewai.tools import watch_tools
from clevagent_crewai.works import Work, is_inside, is_watched_by, run_around, works

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from clevagent_core.watchdog import Watchdog

_GUARD = "_clevagent_guard"

CREW_ENTRIES = ("kickoff", "akickoff", "kickoff_for_each", "kickoff_for_each_async", "akickoff_for_each", "replay", "train", "test")
AGENT_ENTRIES = ("kickoff", "kickoff_async", "akickoff", "execute_task", "aexecute_task")
FLOW_ENTRIES = ("kickoff", "kickoff_async", "akickoff", "resume", "resume_async")


class Guard(NamedTuple):
    """What a guarded object knows beside being what it is."""

    watchdog: Watchdog | None
    """``None`` for the process's own, whichever that is when it is kicked off."""
    budgets: tuple[Budget, ...]
    on_exceed: OnExceed | None

    def __deepcopy__(self, memo: object) -> Guard:
        """A copy of a guarded object has the same budgets, and the same watchdog."""
        return self

    def halts(self, stop: Stopped) -> bool:
        """Tell whether what a kickoff was stopped with ends it gracefully."""
        if not isinstance(stop, BudgetExceeded):
            return False
        return self.on_exceed == "halt" or any(
            budget.on_exceed == "halt" and budget.label == stop.budget for budget in self.budgets
        )

    @property
    def can_halt(self) -> bool:
        """Whether anything does."""
        return self.on_exceed == "halt" or any(budget.on_exceed == "halt" for budget in self.budgets)


def guard_crew(crew: Crew, guard: Guard) -> Crew:
    """Give a guarded copy of a crew."""
    prepare()
    return cast("Crew", _guarded_copy(crew, _with_earlier(crew, guard), _crew_class))


def guard_agent(agent: BaseAgent, guard: Guard) -> BaseAgent:
    """Give a guarded copy of an agent, for ``kickoff`` or for a crew."""
    prepare()
    copy = _guarded_copy(agent, _with_earlier(agent, guard), _agent_class)
    copy.agent_executor = None  # the other's, if it has worked before
    return cast("BaseAgent", copy)


def guard_flow(flow: Flow[Any], guard: Guard) -> Flow[Any]:
    """Guard a flow: the very object, because its methods are bound to it."""
    prepare()
    guard = _with_earlier(flow, guard)
    plain = _plain(type(flow))
    object.__setattr__(flow, "__class__", _flow_class(plain))
    _set_guard(flow, guard)
    return flow


def prepare() -> None:
    """Put everything in its place that guarded kickoffs need."""
    models.install(for_good=True)
    watch_tools()
    watch_tasks()
    from clevagent_crewai.tasks import watch_work  # noqa: PLC0415 - which needs this module

    watch_work()


def _with_earlier(obj: object, guard: Guard) -> Guard:
    before = _guard_of(obj)
    if before is None:
        return guard
    # Guarded once more with budgets of its own: both sets hold.
    budgets = (*before.budgets, *(budget for budget in guard.budgets if budget not in before.budgets))
    return Guard(guard.watchdog or before.watchdog, budgets, guard.on_exceed or before.on_exceed)


def _guarded_copy(obj: Any, guard: Guard, make: Callable[[type[Any]], type[Any]]) -> Any:
    cls = make(_plain(type(obj)))
    copy = object.__new__(cls)
    object.__setattr__(copy, "__dict__", dict(obj.__dict__))
    object.__setattr__(copy, "__pydantic_fields_set__", set(obj.__pydantic_fields_set__))
    object.__setattr__(copy, "__pydantic_extra__", obj.__pydantic_extra__)
    object.__setattr__(copy, "__pydantic_private__", dict(obj.__pydantic_private__ or {}))
    _set_guard(copy, guard)
    return copy


def _set_guard(obj: Any, guard: Guard) -> None:
    private = getattr(obj, "__pydantic_private__", None)
    if private is not None:
        private[_GUARD] = guard
    else:
        object.__setattr__(obj, _GUARD, guard)


def _guard_of(obj: Any) -> Guard | None:
    private = getattr(obj, "__pydantic_private__", None)
    found: Guard | None = (private if private is not None else obj.__dict__).get(_GUARD)
    return found


def _plain(cls: type[Any]) -> type[Any]:
    return cast("type[Any]", cls.__bases__[0]) if "_clevagent_is_guarded" in cls.__dict__ else cls


# -- one kickoff ----------------------------------------------------------------------------------------------------------


class _Kickoff:
    """What is around one kickoff of one object, sync or async: a run for each watchdog that guards it."""

    __slots__ = ("_before", "_guard", "_obj", "_scopes", "_stack", "_works", "is_single")

    def __init__(self, obj: Any, guard: Guard | None, *, is_single: bool) -> None:
        self._obj = obj
        self._guard = guard
        self.is_single = is_single
        """Whether it gives one crew's output."""
        self._stack = ExitStack()
        self._scopes = open_scopes()
        self._works: list[Work] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        watch_tools()  # again: clear_all_global_hooks() may have been called since
        obj, guard = self._obj, self._guard
        for work in works():
            work.check()  # a thread that a kickoff has left behind begins no other
        known = models_in(obj)
        if guard is not None:
            watchdog = guard.watchdog or default.current()
            # An agent in a crew's kickoff, or in a block, is a part of that run.
            around = run_around(watchdog) if isinstance(obj, BaseAgent) else None
            self._enter(Work(obj, watchdog, guard.budgets, around, known))
        for watchdog in tuple(attached):
            if not is_watched_by(watchdog):
                self._enter(Work(obj, watchdog, (), None, known))
        if guard is not None and guard.can_halt and isinstance(obj, Crew):
            self._before = {id(task): task.output for task in obj.tasks}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            put_back(self._scopes)
        self._stack.__exit__(kind, error, traceback)

    def _enter(self, work: Work) -> None:
        learn_names(work.obj, work.watchdog)
        self._stack.enter_context(_entered(work))
        self._works.append(work)

    def finished(self, result: Any) -> Any:
        """Give what the caller gets."""
        guard = self._guard
        if guard is None or not guard.can_halt or not self.is_single or not hasattr(result, "tasks_output"):
            return result
        stop = self._works[0].refusal
        return output_of(self._obj, result, self._before, stop.incident if stop else None, is_complete=stop is None)

    def failed(self, error: Exception) -> Any:
        """Give what the caller gets all the same, or raise.

        Raises:
            Exception: what it failed with; the refusal behind it, where there is one.

        """
        stop = error if isinstance(error, Stopped) else next((work.refusal for work in self._works if work.refusal), None)
        if stop is None:
            raise error
        guard = self._guard
        if guard is not None and self.is_single and isinstance(self._obj, Crew) and guard.halts(stop):
            put_back(self._scopes)
            return output_of(self._obj, None, self._before, stop.incident, is_complete=False)
        if stop is error:
            raise error
        raise stop from error


@contextmanager
def around_agent(agent: Any) -> Iterator[None]:
    """Let the budgets of a guarded agent cover what is done here for it."""
    guard = _guard_of(agent) if isinstance(agent, BaseAgent) else None
    if guard is None or is_inside(agent):
        yield
        return
    with _Kickoff(agent, guard, is_single=False) as kickoff:
        try:
            yield
        except Exception as error:  # whose code: CrewAI's and the user's; raised again, as the refusal behind it where there is one
            kickoff.failed(error)
            raise


@contextmanager
def _entered(work: Work) -> Iterator[None]:
    with work:
        yield


def models_in(obj: Any) -> list[Any]:
    """Give the models of a crew and its agents, or of an agent, that are models already."""
    agents = [*getattr(obj, "agents", ()), getattr(obj, "manager_agent", None), obj]
    values = [
        # Not by getattr: one of them is deprecated, and says so whenever it is read.
        (getattr(agent, "__dict__", None) or {}).get(name)
        for agent in agents
        for name in ("llm", "function_calling_llm", "manager_llm", "planning_llm")
    ]
    return models.models_of(*values)


def _is_stream(obj: Any) -> bool:
    # Nothing is called before somebody reads; what then is kicked off is the same object, without stream.
    return bool(getattr(obj, "stream", False))


def entry(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Make an entry point of a crew, an agent or a flow that begins a run; of a kickoff that goes on, it is a part."""
    is_single = name in {"kickoff", "akickoff", "replay"}
    if asyncio.iscoroutinefunction(original):

        @functools.wraps(original)
        async def akick(self: Any, *args: Any, **kwargs: Any) -> Any:
            guard = _guard_of(self)
            if _passes(self, guard):
                return await original(self, *args, **kwargs)
            with _Kickoff(self, guard, is_single=is_single) as kickoff:
                try:
                    result = await original(self, *args, **kwargs)
                except Exception as error:  # whose code: CrewAI's and the user's; raised again unless the crew halts
                    return kickoff.failed(error)
                return kickoff.finished(result)

        return akick

    @functools.wraps(original)
    def kick(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard = _guard_of(self)
        # An agent's kickoff inside of an event loop gives a coroutine of its kickoff_async.
        if _passes(self, guard) or (isinstance(self, BaseAgent) and name == "kickoff" and _is_in_event_loop()):
            return original(self, *args, **kwargs)
        with _Kickoff(self, guard, is_single=is_single) as kickoff:
            try:
                result = original(self, *args, **kwargs)
            except Exception as error:  # whose code: CrewAI's and the user's; raised again unless the crew halts
                return kickoff.failed(error)
            return kickoff.finished(result)

    return kick


def _passes(obj: Any, guard: Guard | None) -> bool:
    if is_inside(obj) or _is_stream(obj):
        return True
    return guard is None and all(is_watched_by(watchdog) for watchdog in attached)


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


# -- the classes of guarded objects ---------------------------------------------------------------------------------------


def _guarded_class(base: type[Any], entries: Sequence[str], more: dict[str, Any]) -> type[Any]:
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_clevagent_is_guarded": True,
        "__annotations__": {"_clevagent_is_guarded": "ClassVar[bool]"},
        **more,
    }
    body |= {name: entry(name, _unpatched(getattr(base, name))) for name in entries if hasattr(base, name)}
    metaclass: Any = type(base)
    made: type[Any] = metaclass(base.__name__, (base,), body)
    return made


def _unpatched(method: Any) -> Any:
    return getattr(method, "_clevagent_original", method)


@cache
def _crew_class(base: type[Any]) -> type[Any]:
    def copy(self: Any) -> Any:
        guard = _guard_of(self)
        plain = base.copy(self)
        return guard_crew(plain, guard) if guard is not None else plain

    return _guarded_class(base, CREW_ENTRIES, {"copy": copy})


@cache
def _agent_class(base: type[Any]) -> type[Any]:
    def copy(self: Any) -> Any:
        guard = _guard_of(self)
        made = base.copy(self)
        if guard is not None:
            _set_guard(made, guard)
        return made

    return _guarded_class(base, AGENT_ENTRIES, {"copy": copy})


@cache
def _flow_class(base: type[Any]) -> type[Any]:
    return _guarded_class(base, FLOW_ENTRIES, {})


def check_scopes(crew: Crew, budgets: Sequence[Budget]) -> None:
    """Refuse a budget of a node that the crew has not: it would never stop anything.

    Raises:
        UsageError: no agent and no task of the crew is called that.

    """
    from clevagent_crewai.works import matches  # noqa: PLC0415 - only here

    roles = [name_of(agent, "role") for agent in (*crew.agents, crew.manager_agent) if agent is not None]
    tasks = [task_name_of(task) for task in crew.tasks]
    if crew.process == Process.hierarchical or any("{" in name for name in (*roles, *tasks) if name):
        return  # its manager, or some of the names, are made when it is kicked off
    for budget in budgets:
        if budget.node is not None and not any(matches(budget.node, name) for name in (*roles, *tasks)):
            names = ", ".join(sorted(repr(name) for name in {*roles, *(name_of(task, "name") for task in crew.tasks)} if name))
            raise UsageError(
                f"Budget({budget.label!r}, node={budget.node!r}) was given to guard(crew), which has no agent of that role and no task of "
                f"that name, so it would never stop anything. Known here: {names}. Give one of them; * and ? match."
            )
