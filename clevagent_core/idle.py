"""Ceilings that could not act: a run whose budgets have covered no call says so when it ends, and how to guard.

What is read here is what the run has counted anyway. While it goes on, only the accounts that a call of a new shape counts against
are noted (``Run.met``). Nothing is told of a run that failed, was stopped, or may go on later: it has not come to its end. Nor of a budget
whose names exist in this process, and that has covered a call of a run that was begun at the same place: there it does act.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from clevagent_core.budgets import TOOL_CALLS, Budget, matches
from clevagent_core.calls import Call, LLMCall, ToolCall
from clevagent_core.names import KINDS, Kind, Known, closest, listed
from clevagent_core.verdicts import Incident

if TYPE_CHECKING:
    from clevagent_core.runs import Run
    from clevagent_core.summaries import Tally

_MOST = 4096
"""How many names, and places, are kept."""

_HOW = (
    "Guard what makes the calls: clevagent.guard(...) for a model, a client, a graph or a crew; clevagent.init(attach='auto') for every "
    "framework that is imported; `with clevagent.llm_call(...)` and `with clevagent.tool_call(...)` around what you send yourself."
)
_HOW_TOOLS = (
    "A guarded model does not see the tools that are run: for an agent of create_agent give middleware=[BudgetMiddleware()]; else guard the "
    "graph or the crew, clevagent.init(attach=['langchain']), callbacks=[ClevAgentCallbackHandler()], or `with clevagent.tool_call(...)`."
)


def limits(budget: Budget, call: Call) -> bool:
    """Tell whether ``call``, which ``budget`` covers, counts against one of its limits: tool calls use neither money nor tokens."""
    # Field by field: limits() converts them, and this is asked for each budget of a run.
    if isinstance(call, ToolCall):
        return budget.tool_calls is not None or budget.seconds is not None
    fields = (budget.usd, budget.tokens, budget.llm_calls, budget.input_tokens, budget.output_tokens, budget.seconds)
    return any(limit is not None for limit in (*fields, budget.baseline_multiple))


def place() -> object:
    """Find where a run is begun: the line of the code that is neither ours nor contextlib's."""
    frame = sys._getframe(2)  # noqa: SLF001 - documented, and a hundred times as fast as inspect
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("clevagent", "contextlib")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class _Seen(NamedTuple):
    """The calls that were counted."""

    model_calls: int
    tool_calls: int
    names: Mapping[Kind, Collection[str]]
    has_tools: bool
    """Whether tool calls were seen, or would have been."""

    def told(self) -> str:
        """Write it."""
        names = "; ".join(f"{kind}s: {listed(self.names[kind])}" for kind in KINDS if self.names[kind])
        return (
            f"{self.model_calls} model call{'' if self.model_calls == 1 else 's'} and "
            f"{self.tool_calls} tool call{'' if self.tool_calls == 1 else 's'}{f' ({names})' if names else ''}"
        )


class IdleBudgets:
    """What one watchdog knows of names, and of budgets that did act. Safe from any thread: sets that only grow."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.names: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
        """Every name that was seen, or is known to exist."""
        self._acted: set[tuple[object, str]] = set()
        """Where a run was begun, and the budget that has covered a call of it."""
        self._met: set[str] = set()
        """The budgets of the process that have covered a call."""

    def learn(self, kind: Kind, names: Iterable[str]) -> None:
        """Take note of names that exist."""
        known = self.names[kind]
        if len(known) < _MOST:
            known.update(names)

    def learn_known(self, known: Mapping[Kind, Known]) -> None:
        """Take note of the names that an object has."""
        for kind, of_kind in known.items():
            self.learn(kind, of_kind.names)

    def learn_tools(self, call: LLMCall) -> None:
        """Take note of the tools that a model is offered, as OpenAI and Anthropic have them."""
        schemas = [tool.get("function", tool) for tool in call.tools if isinstance(tool, Mapping)]
        names = [schema.get("name") for schema in schemas if isinstance(schema, Mapping)]
        self.learn("tool", [name for name in names if isinstance(name, str)])

    def ended(self, run: Run, *, is_finished: bool) -> Incident | None:
        """Take note of a run that ends; give what is to be told of budgets that have covered nothing."""
        tally = run.tally
        for kind, table in _tables(tally):
            if not self.names[kind].issuperset(table):
                self.learn(kind, _parts(kind, table))
        if run.parent is None and run.watchdog.settings.budgets:
            self._met.update(budget.label for budget in run.watchdog.settings.budgets if budget.label in run.met)
        if not run.budgets:
            return None
        if len(self._acted) < _MOST:
            self._acted.update((run.place, label) for label in run.met)
        if run.met.issuperset([budget.label for budget in run.budgets]) or not is_finished or not _has_said_all(run):
            return None
        names = {kind: _parts(kind, table) for kind, table in _tables(tally)}
        seen = _Seen(sum(row[0] for row in list(tally.by_model.values())), tally.tool_calls, names, run.root.sees_tools)
        idle = [budget for budget in run.budgets if self._is_idle(run, budget, seen)]
        return _incident(run, idle, seen) if idle else None

    def process_ended(self, run: Run) -> Incident | None:
        """Give what is to be told of the process's own budgets that have covered none of its calls; of none at all, nothing."""
        watchdog = run.watchdog
        total = watchdog.totals()
        # A program that ends with an exception has not come to its end.
        if total.refusals or not (total.llm_calls or total.tool_calls) or watchdog.unrecorded or hasattr(sys, "last_value"):
            return None
        seen = _Seen(total.llm_calls, total.tool_calls, self.names, run.sees_tools)
        idle = [
            budget
            for budget in watchdog.settings.budgets
            if budget.label not in self._met and _can_limit(budget) and self._is_misspelt(budget)
        ]
        return _incident(run, idle, seen) if idle else None

    def _is_idle(self, run: Run, budget: Budget, seen: _Seen) -> bool:
        if budget.label in run.met or not _can_limit(budget) or (run.place, budget.label) in self._acted:
            return False
        if not seen.model_calls and not seen.tool_calls:
            return not run.is_asked
        return self._is_strange(budget, seen)

    def _is_strange(self, budget: Budget, seen: _Seen) -> bool:
        """Tell whether a budget has covered none of the calls that were seen for another reason than that none was made."""
        if _needs_tools(budget):
            if not seen.tool_calls and not seen.has_tools:
                return True
        elif not seen.model_calls and not seen.has_tools:
            return True
        return any(_is_unknown(getattr(budget, kind), self.names[kind]) for kind in KINDS)

    def _is_misspelt(self, budget: Budget) -> bool:
        """Tell whether a budget names what nothing in the process is called, while other names of the kind exist."""
        return any(self.names[kind] and _is_unknown(getattr(budget, kind), self.names[kind]) for kind in KINDS)


def _has_said_all(run: Run) -> bool:
    """Tell whether all that a run would call was called: it was not stopped, may not be resumed, and nothing is still to be counted."""
    return not (run.resumable or run.stops or run.tally.refusals or run.watchdog.unrecorded) and bool(run.hooks().reserve)


def _tables(tally: Tally) -> tuple[tuple[Kind, Mapping[str, object]], ...]:
    return ("node", tally.by_node), ("tool", tally.by_tool), ("model", tally.by_model)


def _parts(kind: Kind, table: Mapping[str, object]) -> set[str]:
    """Give names: paths, and what they consist of; those of models have slashes of their own."""
    names = list(table)
    return set(names) if kind == "model" else {part for name in names for part in (name, *name.split("/"))}


def _can_limit(budget: Budget) -> bool:
    """Tell whether it limits more than time, which passes without a call."""
    return bool(budget.limits()) or budget.baseline_multiple is not None


def _needs_tools(budget: Budget) -> bool:
    return budget.tool is not None or (budget.baseline_multiple is None and all(unit == TOOL_CALLS for unit, _ in budget.limits()))


def _is_unknown(pattern: str | None, names: Iterable[str]) -> bool:
    # "*" names nothing in particular.
    return pattern is not None and bool(pattern.strip("*?")) and not any(matches(pattern, name) for name in list(names))


def _incident(run: Run, idle: Sequence[Budget], seen: _Seen) -> Incident:
    watchdog = run.watchdog
    is_process = run is watchdog.process_run
    whose = "this process" if is_process else f"this run ({run.run_id})"
    which = " and ".join(f"{budget.label!r}{_scope(budget)}" for budget in idle)
    budgets = f"its budget{'s' if len(idle) > 1 else ''} {which}"
    has = "have" if len(idle) > 1 else "has"
    if not seen.model_calls and not seen.tool_calls:
        message = (
            f"No model or tool call was seen in {whose}, so {budgets} {has} limited nothing. Either it needed no call, or nothing inside it "
            f"is guarded, and nothing would have stopped it. {_HOW}"
        )
    else:
        message = (
            f"{seen.told()} were seen in {whose}, and none of them counts against {budgets}, which {has} limited nothing. "
            f"{' '.join(_hints(idle, seen))}"
        )
    return Incident(
        kind="idle_budget",
        message=message,
        agent=watchdog.settings.agent,
        run_id=run.run_id,
        at=watchdog.clock.wall(),
        budget=idle[0].label,
        details={
            "budgets": [budget.label for budget in idle],
            "model_calls": seen.model_calls,
            "tool_calls": seen.tool_calls,
        },
    )


def _scope(budget: Budget) -> str:
    words = ", ".join(f"{kind}={getattr(budget, kind)!r}" for kind in KINDS if getattr(budget, kind) is not None)
    return f" ({words})" if words else ""


def _hints(idle: Sequence[Budget], seen: _Seen) -> list[str]:
    """Say what to do, each thing once."""
    hints: dict[str, None] = {}
    for budget in idle:
        unseen = _needs_tools(budget) and not seen.tool_calls and not seen.has_tools
        for kind in KINDS:
            pattern = getattr(budget, kind)
            if not _is_unknown(pattern, seen.names[kind]) or (unseen and kind == "tool"):
                continue
            meant = closest(pattern, seen.names[kind])
            hints.setdefault(
                f"Did you mean {kind}={meant!r}?"
                if meant is not None
                else f"If {kind}={pattern!r} is the right name, and there was nothing to do there, all is well; else correct it (* and ? match)."
            )
        if unseen:
            hints.setdefault(_HOW_TOOLS)
        elif not _needs_tools(budget) and not seen.model_calls:
            hints.setdefault(_HOW)
    return list(hints)
