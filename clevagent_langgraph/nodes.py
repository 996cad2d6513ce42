"""``monitored_node``: a node whose executions are steps, whose costs are told under its name, and which may have a ceiling of its own.

The wrapper is of the node's own kind (function, async function, generator of either kind), since LangGraph looks at that, and carries
its name, signature and annotations, since LangGraph reads from them what to inject, what the node is given, and where a ``Command`` may
lead. It needs no injected parameter itself. Checked with langgraph 1.2.0 and 1.2.22.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from langchain_core.runnables import Runnable
from langchain_core.runnables.config import var_child_runnable_config

from clevagent_core import default
from clevagent_core.accounts import action_of, cover
from clevagent_core.budgets import TOOL_CALLS, Budget, as_budgets, check_actions
from clevagent_core.calls import LLMCall, Step
from clevagent_core.errors import UsageError
from clevagent_core.frames import enter, frame_of, leave, wraps_up
from clevagent_core.guards.messages import exhausted_incident
from clevagent_core.ledger.account import Refusal
from clevagent_core.names import Known, check_known
from clevagent_langchain.graphs import nodes_of
from clevagent_langgraph.stops import bubbling

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from clevagent_core.runs import Run
    from clevagent_core.watchdog import Watchdog

F = TypeVar("F", bound=Callable[..., Any])


_END = object()


@overload
def monitored_node(name: F, /) -> F: ...
@overload
def monitored_node(
    name: str | None = None, /, *, budgets: Sequence[Budget] = (), watchdog: Watchdog | None = None
) -> Callable[[F], F]: ...
def monitored_node(
    name: F | str | None = None, /, *, budgets: Sequence[Budget] = (), watchdog: Watchdog | None = None
) -> F | Callable[[F], F]:
    """Watch a node: ``@monitored_node``, ``@monitored_node("research")``, or ``monitored_node("research")(function)``.

    For functions, async functions, generators of both kinds, methods, callable objects and partials; with ``@task`` and
    ``@entrypoint``, write it below them. Each execution that comes to its end is a step of the run, and feeds the loop guard: a state that
    no longer changes, over executions of one node or a round of several, is a loop. What is called inside is told under the name.

    Args:
        name: what it is called in summaries and budgets; the function's own name when not given.
        budgets: ceilings for what is called in it, over all its executions (``per="run"``: in the outermost run). A node of which
            nothing is left is refused before it runs. Where the graph is to end gracefully then, give the budget to the graph:
            ``clevagent.guard(graph, budgets=[Budget(node="research", ...)], on_exceed="halt")``.
        watchdog: another watchdog than the process's own.

    Raises:
        UsageError: what cannot be wrapped, with the way that can; a budget that asks for a graceful end, or misspells the node.

    """
    if name is not None and not isinstance(name, str):
        return _watched(name, _name_of(name), (), None)
    own = as_budgets(budgets)
    check_actions(own, where="monitored_node(budgets=[...])")
    if name == "":
        raise UsageError('monitored_node("") names nothing, so no cost could be told under it. Give a name, or leave it out.')

    def decorate(function: F) -> F:
        called = name or _name_of(function)
        check_known(own, {"node": Known({called}, opaque={called})}, where=f"monitored_node({called!r})")
        return _watched(function, called, tuple(_of_node(budget, called) for budget in own), watchdog)

    return decorate


def _of_node(budget: Budget, name: str) -> Budget:
    """Let a budget that was given no name of its own belong to one node, so that equal ones of two nodes are two ceilings."""
    if replace(budget, name=None).label != budget.label:
        return budget
    return replace(budget, name=f"{budget.label} in node {name}")


def _watched(function: F, name: str, budgets: tuple[Budget, ...], watchdog: Watchdog | None) -> F:
    if isinstance(function, staticmethod):
        return cast("F", staticmethod(_watched(function.__func__, name, budgets, watchdog)))
    _check(function, name)
    node = _Node(name, budgets, watchdog, skips=_skipped(function))
    called = function if _is_plain(function) else type(function).__call__
    if inspect.isasyncgenfunction(called):
        wrapper = _async_generator(node, function)
    elif inspect.iscoroutinefunction(called):
        wrapper = _coroutine(node, function)
    elif inspect.isgeneratorfunction(called):
        wrapper = _generator(node, function)
    else:
        wrapper = _function(node, function)
    return cast("F", _described(wrapper, function))


def _check(function: object, name: str) -> None:
    kind = type(function)
    if isinstance(function, Runnable):
        raise UsageError(
            f"monitored_node({name!r}) was given a {kind.__qualname__}, a Runnable, which cannot be wrapped as a function. Decorate the function "
            "inside it; or guard the graph it is a node of, which needs no change to nodes: clevagent.guard(graph, "
            f"budgets=[Budget(node={name!r}, ...)])."
        )
    if kind.__module__ == "langgraph.func":
        raise UsageError(
            f"monitored_node({name!r}) was given what @task made, and would see a future in place of the work. Write it below: @task, then "
            "@monitored_node, then the function."
        )
    if isinstance(function, (type, classmethod)) or not callable(function):
        raise UsageError(
            f"monitored_node({name!r}) was given {function!r}, which LangGraph does not run as a node. Give a function, a method or an object with "
            "__call__ (a @classmethod: write monitored_node below it)."
        )


def _is_plain(function: object) -> bool:
    return inspect.isroutine(function) or isinstance(function, functools.partial)


def _name_of(function: object) -> str:
    if isinstance(function, functools.partial):
        return _name_of(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def _skipped(function: object) -> int:
    """Tell how many arguments come before the state: a method that is decorated in its class gets its object first."""
    try:
        names = list(inspect.signature(function).parameters)  # type: ignore[arg-type]  # it was seen to be callable
    except (TypeError, ValueError):
        return 0
    return 1 if inspect.isfunction(function) and names[:1] in (["self"], ["cls"]) else 0


def _described(wrapper: Any, function: Any) -> Any:
    """Carry over what LangGraph reads of a node."""
    if isinstance(function, functools.partial):
        made = functools.update_wrapper(wrapper, function.func)
        made.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # as inspect looks for it
        return made
    if _is_plain(function):
        return functools.update_wrapper(wrapper, function)
    # An object: its annotations, and the names in them, are those of its method.
    made = functools.update_wrapper(wrapper, function.__call__)
    made.__name__ = made.__qualname__ = type(function).__name__
    return made


# -- one wrapper for each kind --------------------------------------------------------------------------------------------


def _function(node: _Node, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        execution = _Execution(node)
        with execution:
            result = function(*args, **kwargs)
        if isinstance(result, Runnable) and execution.is_in_graph:
            return _Returned(execution, result, args, kwargs)
        execution.finish(args, kwargs, result)
        return result

    return wrapper


def _coroutine(node: _Node, function: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        execution = _Execution(node)
        with execution:
            result = await function(*args, **kwargs)
        if isinstance(result, Runnable) and execution.is_in_graph:
            return _Returned(execution, result, args, kwargs)
        execution.finish(args, kwargs, result)
        return result

    return wrapper


def _generator(node: _Node, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
        execution = _Execution(node)
        result: Any = None
        with execution:
            items = function(*args, **kwargs)
        try:
            while True:
                with execution:
                    item = next(items, _END)
                if item is _END:
                    break
                result = item
                yield item
        finally:
            with execution:
                items.close()
        execution.finish(args, kwargs, result)

    return wrapper


def _async_generator(node: _Node, function: Callable[..., Any]) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        execution = _Execution(node)
        result: Any = None
        with execution:
            items = function(*args, **kwargs)
        try:
            while True:
                with execution:
                    item = await anext(items, _END)
                if item is _END:
                    break
                result = item
                yield item
        finally:
            with execution:
                await items.aclose()
        execution.finish(args, kwargs, result)

    return wrapper


class _Returned(Runnable[Any, Any]):
    """A Runnable that a node gave back, which LangGraph then runs in its place: as a part of the node."""

    def __init__(
        self, execution: _Execution, runnable: Runnable[Any, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.name = runnable.get_name()
        self._execution = execution
        self._runnable = runnable
        self._arguments = args, kwargs

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002 - LangChain's name
        with self._execution:
            result = self._runnable.invoke(input, config, **kwargs)
        self._execution.finish(*self._arguments, result)
        return result

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: A002 - as above
        with self._execution:
            result = await self._runnable.ainvoke(input, config, **kwargs)
        self._execution.finish(*self._arguments, result)
        return result


# -- one execution --------------------------------------------------------------------------------------------------------


class _Node:
    """What is known of a monitored node."""

    __slots__ = ("budgets", "lent", "name", "own_watchdog", "skips")

    def __init__(self, name: str, budgets: tuple[Budget, ...], watchdog: Watchdog | None, *, skips: int) -> None:
        self.name = name
        self.budgets = budgets
        self.own_watchdog = watchdog
        self.skips = skips
        self.lent: dict[tuple[Budget, ...], tuple[Budget, ...]] = {(): budgets}
        """The budgets of this node and of those around it, by the latter: the same tuple for the same ones."""

    def lending(self, around: tuple[Budget, ...]) -> tuple[Budget, ...]:
        """Give the budgets of this node with those of the nodes around it."""
        return self.lent.get(around) or self.lent.setdefault(around, (*around, *self.budgets))


def _began(run: Run, metadata: Mapping[str, Any]) -> int:
    """Tell how many nodes had finished when this one began, for the loop guard: branches side by side are no repetition."""
    finished = run.root.finished_nodes
    step, path = metadata.get("langgraph_step"), metadata.get("langgraph_path") or ()
    if step is None or len(path) > _PATH_OF_A_NODE:
        return finished  # one of @task is called when the one before it has ended
    graph = metadata.get("langgraph_checkpoint_ns", "").rpartition("|")[0]
    steps: dict[str, tuple[int, int]] = run.state.setdefault(_Execution, {})
    known = steps.get(graph)
    if known is not None and known[0] == step:
        return known[1]
    if len(steps) > _GRAPHS:
        steps.clear()
    steps[graph] = step, finished
    return finished


_PATH_OF_A_NODE = 3
_GRAPHS = 64
"""Of how many graphs inside graphs it is known which step they are in."""


class _Execution:
    """One execution of a node. As a context manager, what is set while the node's own code runs."""

    __slots__ = ("_began", "_frame", "_node", "_place", "_run", "_thread_id", "_watchdog", "_work")

    def __init__(self, node: _Node) -> None:
        """Look where the node is, and refuse it where it could do nothing."""
        watchdog = node.own_watchdog or default.current()
        frame = frame_of(watchdog)
        run: Run = watchdog.current_run(tells=False) if frame is None else frame.run
        config = var_child_runnable_config.get()
        metadata: Mapping[str, Any] = (config.get("metadata") if config else None) or {}
        self._node = node
        self._watchdog = watchdog
        self._run = run
        self._thread_id = metadata.get("thread_id")
        self._place = nodes_of(metadata) if metadata else ()
        self._began = _began(run, metadata) if metadata else run.root.finished_nodes
        if node.budgets or run.root.gates or watchdog.control.stops:
            with self:
                run.check()
                if node.budgets and not wraps_up(watchdog):
                    self._check_left()

    def __enter__(self) -> None:
        node = self._node
        work = self._work = self._run.begin(node.name, self._place)
        frame = self._frame = enter(self._watchdog, self._run, work)
        if node.budgets:
            frame.lent = node.lending(frame.lent)
        if self._place:  # in a guarded graph it passes already
            frame.through = bubbling(frame.through)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        leave(self._frame)
        self._run.finish(self._work)

    @property
    def is_in_graph(self) -> bool:
        """Whether LangGraph called it, and runs what it gives back where that can be run."""
        return bool(self._place)

    def finish(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Tell the step. What failed, or waits for a person, has not finished."""
        run = self._run
        hooks = run.hooks()
        if not hooks.step:
            return
        skips = self._node.skips
        given: Any = args[skips] if len(args) == skips + 1 else args[skips:] or kwargs
        detail = {"given": given, "result": result, "began": self._began, "thread_id": self._thread_id}
        run.tell_step(hooks, Step(kind="node", name=self._node.name, detail=detail))

    def _check_left(self) -> None:
        """Refuse the node if its own ceiling leaves nothing to spend. Holds nothing."""
        run, node = self._run, self._node
        watchdog = run.watchdog
        key = "node", id(node.budgets), self._thread_id
        found = run.memo.get(key)
        if found is None or watchdog.clock.wall() >= found.valid_until or any(line.account.closed for line in found.lines):
            # A call of no model and no tool: budgets of some only are left to those calls.
            call = LLMCall(model="", node=node.name, thread_id=self._thread_id)
            found = run.memo[key] = cover(run, call, node.budgets)
        for line, budget in zip(found.lines, found.budgets, strict=True):
            if not line.enforced or budget not in node.budgets or callable(action_of(run, budget)):
                continue
            balance = watchdog.ledger.balance(line.account)
            was_refused = run.is_latched(line.account, balance)
            if was_refused or (line.unit != TOOL_CALLS and balance.is_exhausted):
                # Where only tool calls are used up, models may still answer; where models are, nothing goes on.
                incident = exhausted_incident(
                    run, node.name, Refusal(line, balance, 0, "latched" if was_refused else "exhausted"), budget
                )
                watchdog.tell_once(incident, key=("node", balance.key, balance.ceiling))
                raise run.refused(incident)
