"""What can be asked of a guarded graph's threads afterwards: why the last invocation was stopped; and to raise what stopped it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clevagent_core.errors import UsageError
from clevagent_core.runs import Run
from clevagent_core.verdicts import Incident
from clevagent_langgraph.answers import account_of
from clevagent_langgraph.graphs import GraphGuard, guard_of
from clevagent_langgraph.invocations import arun_id_of, kept_runs, last_stop, run_id_of
from clevagent_langgraph.stops import question_of

_UNITS = ("usd", "tokens", "input_tokens", "output_tokens", "llm_calls", "tool_calls")


def stopped(graph: Any, config: Mapping[str, Any] | None = None) -> Incident | None:
    """Tell why the last invocation of a guarded graph was stopped; ``None`` where it came to its own end.

    Args:
        graph: what ``clevagent.guard`` gave.
        config: whose thread (``thread_id``) is meant, of those that this process has invoked; else the last invocation of this
            graph in this thread or task counts.

    Raises:
        UsageError: the graph is not guarded.

    """
    guard = _guard_of(graph, "stopped")
    thread_id = _thread_of(graph, config)
    if thread_id is not None:
        return guard.stops.get(thread_id)
    last, incident = last_stop.get()
    return incident if last is guard else None


def top_up(graph: Any, config: Mapping[str, Any], *, budget: str | None = None, **amounts: Any) -> None:
    """Raise a ceiling of a guarded graph's thread: ``graph.invoke(None, config)`` then goes on.

    Args:
        graph: what ``clevagent.guard`` gave.
        config: the thread, as the graph is invoked with it.
        budget: the budget's name. Not needed where one budget stopped the thread in this process, or only one has that limit.
        amounts: ``usd``, ``tokens``, ``input_tokens``, ``output_tokens``, ``llm_calls`` or ``tool_calls``, as of ``Run.top_up``.

    Raises:
        UsageError: nothing to add, a negative amount, or no single budget that is meant; a graph that is not guarded, or has no such
            thread.

    """
    guard = _guard_of(graph, "top_up")
    run_id = run_id_of(graph, graph.get_state(config)) if graph.checkpointer else None
    _raise(graph, guard, config, run_id, budget, amounts)


async def atop_up(graph: Any, config: Mapping[str, Any], *, budget: str | None = None, **amounts: Any) -> None:
    """Do what ``top_up`` does, where the checkpointer is an asynchronous one."""
    guard = _guard_of(graph, "atop_up")
    run_id = await arun_id_of(graph, await graph.aget_state(config)) if graph.checkpointer else None
    _raise(graph, guard, config, run_id, budget, amounts)


def _raise(
    graph: Any, guard: GraphGuard, config: Mapping[str, Any], run_id: str | None, budget: str | None, amounts: Mapping[str, Any]
) -> None:
    unknown = [name for name in amounts if name not in _UNITS]
    if unknown:
        raise UsageError(f"top_up({unknown[0]}=...) names no limit, so no ceiling was raised. Use one of {', '.join(_UNITS)}.")
    watchdog = guard.watchdog
    thread_id = _thread_of(graph, config)
    before = kept_runs(watchdog).get(run_id) if run_id is not None else None
    run = Run(
        watchdog,
        budgets=guard.budgets,
        tags={"thread_id": thread_id} if thread_id is not None else None,
        parent=watchdog.enclosing_run(),
        run_id=run_id,
        resumable=True,
    )
    if before is not None:
        run.lent.update(before.lent)
    if budget is None and len(amounts) == 1:
        stop = guard.stops.get(thread_id) if thread_id is not None else None
        unit = next(iter(amounts))
        account = account_of(run, question_of(stop)) if stop is not None and stop.unit == unit else None
        if account is not None:
            budget = account.key.budget
    run.top_up(budget=budget, **amounts)


def _guard_of(graph: Any, what: str) -> GraphGuard:
    guard = guard_of(graph)
    if guard is None:
        raise UsageError(
            f"{what}() was given a {type(graph).__qualname__} that is not guarded, so there is nothing to tell or raise. Give it what "
            "clevagent.guard(graph) gave back."
        )
    return guard


def _thread_of(graph: Any, config: Mapping[str, Any] | None) -> str | None:
    for known in (config, graph.config):
        thread_id = ((known or {}).get("configurable") or {}).get("thread_id")
        if thread_id:
            return str(thread_id)
    return None
