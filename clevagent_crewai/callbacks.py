"""``step_callback`` and ``task_callback``: signs of progress for the heartbeat and the loop guard, from CrewAI's callbacks.

What CrewAI hands to a ``step_callback`` (checked with crewai 1.15.19 and 1.15.30): an agent that is asked in text gives a
``ToolResult`` and then an ``AgentAction`` for each tool; one with native function calling a single ``AgentFinish``, at the end; one
without tools nothing at all. None of them has ``.agent``, and only ``AgentFinish`` has ``.output``: a callback that reads them raises, and
CrewAI answers by running the whole task again. These two take anything and raise nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from clevagent_core import default
from clevagent_core.calls import Step
from clevagent_core.errors import UsageError
from clevagent_core.frames import frame_of, living
from clevagent_core.interrupts import is_interrupt

if TYPE_CHECKING:
    from clevagent_core.budgets import Budget, OnExceed
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")

_Kind = Literal["llm_call", "tool_call", "node", "task", "ping"]


class StepCallback:
    """Takes what a ``step_callback`` of CrewAI is given, and tells it as a step."""

    __slots__ = ("_watchdog",)

    def __init__(
        self, *, watchdog: Watchdog | None = None, budgets: Sequence[Budget] = (), on_exceed: OnExceed | None = None
    ) -> None:
        """Tell ``watchdog``, or the process's own, whichever that is when it is called.

        Raises:
            UsageError: budgets or an action were given, which a callback cannot keep; the message tells what can.

        """
        _refuse("StepCallback", budgets, on_exceed)
        self._watchdog = watchdog

    def __call__(self, output: Any = None) -> None:
        """Tell a step. Safe from any thread; never raises."""
        try:
            watchdog = self._watchdog or default.current()
            tool = getattr(output, "tool", None)
            kind: _Kind = "node"
            name = ""
            if isinstance(tool, str):
                kind, name = "tool_call", tool
            elif hasattr(output, "result_as_answer"):
                kind, name = "tool_call", _tool(watchdog) or ""
            agent = _agent(watchdog)
            if not name:
                name = agent or type(output).__name__
            told = getattr(output, "output", None)
            if told is None:
                told = getattr(output, "result", None)
            watchdog.current_run().step(Step(kind=kind, name=name, detail=_detail(agent, tool, told)))
        except Exception as error:  # whose code: ours, in the user's crew, which would run the whole task again
            if is_interrupt(error):
                raise
            logger.exception("ClevAgent could not tell a step; the crew goes on.")

    def __reduce__(self) -> str | tuple[Any, ...]:
        """The process's own can be pickled, and written into a checkpoint, by name."""
        return "step_callback" if self._watchdog is None else super().__reduce__()


class TaskCallback:
    """Takes what a ``task_callback`` of CrewAI is given, and tells it as a finished task."""

    __slots__ = ("_watchdog",)

    def __init__(
        self, *, watchdog: Watchdog | None = None, budgets: Sequence[Budget] = (), on_exceed: OnExceed | None = None
    ) -> None:
        """Tell ``watchdog``, or the process's own, whichever that is when it is called.

        Raises:
            UsageError: budgets or an action were given, which a callback cannot keep; the message tells what can.

        """
        _refuse("TaskCallback", budgets, on_exceed)
        self._watchdog = watchdog

    def __call__(self, output: Any = None) -> None:
        """Tell a finished task. Safe from any thread; never raises."""
        try:
            watchdog = self._watchdog or default.current()
            name = getattr(output, "name", None) or getattr(output, "description", None) or "task"
            agent = getattr(output, "agent", None)
            watchdog.current_run().step(
                Step(kind="task", name=str(name), detail=_detail(agent, None, getattr(output, "raw", None)))
            )
        except Exception as error:  # whose code: ours, in the user's crew
            if is_interrupt(error):
                raise
            logger.exception("ClevAgent could not tell a finished task; the crew goes on.")

    def __reduce__(self) -> str | tuple[Any, ...]:
        """The process's own can be pickled, and written into a checkpoint, by name."""
        return "task_callback" if self._watchdog is None else super().__reduce__()


def _refuse(name: str, budgets: Sequence[Budget], on_exceed: OnExceed | None) -> None:
    if not budgets and on_exceed is None:
        return
    given = f"budgets={list(budgets)!r}" if budgets else f"on_exceed={on_exceed!r}"
    raise UsageError(
        f"{name}({given}): CrewAI calls its callbacks after the model and the tool have run (and a step_callback not at all for an agent "
        "without tools), and answers an exception in one by running the task again, so it can neither refuse, nor lower a limit, nor "
        "halt. Guard the crew, clevagent.guard(crew, budgets=[...], on_exceed='halt'), or attach to all of them, "
        "clevagent.init(attach=['crewai'], budgets=[...]); the callbacks may stay for what they tell."
    )


def _tool(watchdog: Watchdog) -> str | None:
    tools = living(frame_of(watchdog), "tool")
    return tools[-1].name if tools else None


def _agent(watchdog: Watchdog) -> str | None:
    nodes = living(frame_of(watchdog), "node")
    if nodes:
        return nodes[-1].name
    gates = sys.modules.get("clevagent_crewai.gates")
    return gates.working.get() if gates is not None else None


def _detail(agent: object, tool: object, told: object) -> MappingProxyType[str, object]:
    detail = {"agent": agent, "output": told} if tool is None else {"agent": agent, "tool": tool, "output": told}
    return MappingProxyType(detail)


step_callback = StepCallback()
"""Ready to hand to ``Agent(step_callback=...)`` and ``Crew(step_callback=...)``."""
task_callback = TaskCallback()
"""Ready to hand to ``Crew(task_callback=...)`` and ``Task(callback=...)``."""
