"""Whom a call has to be asked of: every watchdog that guards the kickoffs around it, the model, or the process."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from clevagent_core import default
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, ToolCall
from clevagent_core.errors import BudgetBusy, Stopped
from clevagent_core.frames import Activity, Frame, enter, frame_of, living, place
from clevagent_core.runs import Run
from clevagent_crewai.works import Work, works

if TYPE_CHECKING:
    from crewai.llms.base_llm import BaseLLM

    from clevagent_core.watchdog import Watchdog

attached: list[Watchdog] = []
"""Whom every call of the process is asked of."""
working: ContextVar[str | None] = ContextVar("clevagent_crewai_role", default=None)
"""The role of the agent that has called a model last in this context."""
doing: ContextVar[tuple[str | None, str | None]] = ContextVar("clevagent_crewai_doing", default=(None, None))
"""The role of the agent, and the name of the task, that go on in this context: whose the calls are that do not say so."""

GUARD = "_clevagent_guard"
"""Where a guarded model keeps its guard, beside its private attributes."""


class ModelGuard:
    """What a guarded model knows beside being a model."""

    __slots__ = ("budgets", "watchdog")

    def __init__(self, watchdog: Watchdog | None, budgets: tuple[Budget, ...]) -> None:
        self.watchdog = watchdog
        """``None`` for the process's own, whichever that is when a call is made."""
        self.budgets = budgets

    def __deepcopy__(self, memo: object) -> ModelGuard:
        """A copy of the model has the same budgets, and the same watchdog."""
        return self


class Gate:
    """One watchdog that has to be asked, with what it is told of the call."""

    __slots__ = ("extra", "run", "watchdog", "work")

    def __init__(self, watchdog: Watchdog, work: Work | None) -> None:
        self.watchdog = watchdog
        self.work = work
        """The innermost kickoff that it watches."""
        self.run: Run
        self.extra: tuple[Budget, ...] = ()

    def add(self, budgets: tuple[Budget, ...]) -> None:
        """Add budgets of a guarded object. The same tuple each time, where it can be: accounts are looked up by it."""
        if not self.extra:
            self.extra = budgets
        elif budgets:
            self.extra = _together(self.extra, budgets)


_Budgets = tuple[Budget, ...]
_known: dict[tuple[int, int], tuple[_Budgets, _Budgets, _Budgets]] = {}
_KNOWN = 256


def _together(ones: _Budgets, others: _Budgets) -> _Budgets:
    # By identity: what a budget calls at its ceiling need not be hashable.
    key = id(ones), id(others)
    found = _known.get(key)
    if found is None or found[0] is not ones or found[1] is not others:
        if len(_known) >= _KNOWN:
            _known.clear()
        found = _known[key] = ones, others, (*ones, *(budget for budget in others if budget not in ones))
    return found[2]


def gates_of(role: str | None, task: str | None, model: BaseLLM | None = None) -> list[Gate]:
    """Find everybody who has to let a call through: one of ``model``, or of a tool.

    Raises:
        Stopped: the kickoff that it is a part of was stopped.

    """
    gates: list[Gate] = []
    for work in works(model):
        gate = _gate_of(gates, work.watchdog, work)
        work.check()
        if not work.is_over:
            gate.add(work.budgets_for(role, task))
    guard = guard_of(model) if model is not None else None
    if guard is not None:
        gate = _gate_of(gates, guard.watchdog or default.current(), None)
        gate.add(guard.budgets)
    for watchdog in attached:
        _gate_of(gates, watchdog, None)
    for gate in gates:
        gate.run = _run_of(gate, role, task)
    return gates


def _gate_of(gates: list[Gate], watchdog: Watchdog, work: Work | None) -> Gate:
    for gate in gates:
        if gate.watchdog is watchdog:
            return gate
    gates.append(Gate(watchdog, work))
    return gates[-1]


def _run_of(gate: Gate, role: str | None, task: str | None) -> Run:
    frame = frame_of(gate.watchdog)
    run: Run | None = None if frame is None else frame.run
    work = gate.work
    if work is not None and not work.is_over and (run is None or (run is not work.run and run in work.run.chain())):
        run = work.run  # what is called in a kickoff counts for it, also where a thread has activated the run around it
    if run is None:
        return gate.watchdog.current_run()
    return run if work is None or work.is_over else work.run_of(run, role, task)


def stand_in_agent(gate: Gate, role: str | None) -> list[Frame]:
    """Enter what an agent does, unless this is a part of that already; for whoever leaves it."""
    nodes = living(frame_of(gate.watchdog), "node")
    if role is None or (nodes and nodes[-1].name == role):
        return []
    return [enter(gate.watchdog, gate.run, Activity("node", role), begins=True)]


def stand_in_task(role: str | None, task: str | None) -> list[Frame]:
    """Enter a task of every kickoff that goes on around it: whatever is called in it counts for it; for whoever leaves it."""
    gates: list[Gate] = []
    for work in works():
        if not work.is_over:
            _gate_of(gates, work.watchdog, work)
    frames: list[Frame] = []
    for gate in gates:
        gate.run = _run_of(gate, role, task)
        frames.append(enter(gate.watchdog, gate.run, None if role is None else Activity("node", role), begins=True))
    return frames


def put_in_place(call: LLMCall | ToolCall, watchdog: Watchdog, role: str | None) -> None:
    """Write into a call which agent makes it, inside of which nodes and tools."""
    frame = frame_of(watchdog)
    nodes = [activity.name for activity in living(frame, "node")]
    if role is not None and (not nodes or nodes[-1] != role):
        call.node = role
    place(call, frame)


def name_of(value: object, attribute: str) -> str | None:
    """Give an agent's role, or a task's name, without the spaces around it that YAML leaves."""
    name = getattr(value, attribute, None)
    return name.strip() or None if isinstance(name, str) else None


def task_name_of(task: object) -> str | None:
    """Give what a task is called: its name, else its description."""
    return name_of(task, "name") or name_of(task, "description")


def guard_of(model: BaseLLM) -> ModelGuard | None:
    """Give what a guarded model knows beside being a model."""
    return (model.__pydantic_private__ or {}).get(GUARD)


def refuse(gates: Sequence[Gate], error: Stopped) -> None:
    """Latch the kickoffs around a call that was refused; not where what there is is only held by other calls."""
    for gate in gates:
        if gate.work is not None and not gate.work.is_over and not isinstance(error, BudgetBusy):
            gate.work.latch(error)
