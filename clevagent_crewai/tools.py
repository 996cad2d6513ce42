"""Tickets for tool calls, through CrewAI's hooks before and after each.

An exception in the first only skips the tool: CrewAI tells the model so, and pays for its next answer. So a refusal latches the
kickoff around it, whose next model call is refused. Checked with crewai 1.15.19 and 1.15.30: both hooks run in the context of the tool, the one
after it also where the tool failed or was skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from crewai.hooks.dispatch import InterceptionPoint, get_global_hook_list

from clevagent_core import default
from clevagent_core.calls import ToolCall
from clevagent_core.errors import Stopped
from clevagent_core.frames import Activity, Frame, enter, leave
from clevagent_core.tickets import Ticket
from clevagent_crewai.aborted import aborted_by, through_crews
from clevagent_crewai.gates import doing, gates_of, name_of, put_in_place, stand_in_agent, task_name_of
from clevagent_crewai.works import works


class _OpenTool(NamedTuple):
    """One tool that runs, or was refused (without tickets)."""

    tool: str
    tickets: tuple[Ticket, ...]
    frames: tuple[Frame, ...]
    """What it stands in, for each watchdog."""
    before: _OpenTool | None


_open: ContextVar[_OpenTool | None] = ContextVar("clevagent_crewai_tool", default=None)


def watch_tools() -> None:
    """Put the hooks where CrewAI looks, unless they are there; ``clear_all_global_hooks()`` takes them off with all others."""
    for point, hook in ((InterceptionPoint.PRE_TOOL_CALL, before_tool), (InterceptionPoint.POST_TOOL_CALL, after_tool)):
        hooks = get_global_hook_list(point)
        if hook not in hooks:
            hooks.append(hook)


def unwatch_tools() -> None:
    """Take the hooks off."""
    for point, hook in ((InterceptionPoint.PRE_TOOL_CALL, before_tool), (InterceptionPoint.POST_TOOL_CALL, after_tool)):
        hooks = get_global_hook_list(point)
        if hook in hooks:
            hooks.remove(hook)


def before_tool(context: Any) -> None:
    """Ask before a tool is run.

    Raises:
        HookAborted: it was refused, or cannot be checked. CrewAI lets the tool run on any other exception.

    """
    try:
        _ask(context)
    except Exception as error:  # whose code: ours; what cannot be checked is not run
        _open.set(_OpenTool(str(context.tool_name), (), (), _open.get()))
        work = next(works(), None)
        failed = aborted_by(error, work.watchdog if work is not None else default.current())
        if isinstance(failed, Stopped) and work is not None and not work.is_over:
            # Busy, too: the tool is skipped, and nobody would call it again.
            work.latch(failed)
        raise failed from error.__cause__


def after_tool(context: Any) -> None:
    """Tell what a tool gave back."""
    entry = _open.get()
    if entry is None or entry.tool != str(context.tool_name):
        return
    _open.set(entry.before)
    for frame in reversed(entry.frames):
        leave(frame)
    for ticket in entry.tickets:
        ticket.settle(result=context.tool_result)
    if entry.tickets:
        for work in works():
            work.tool_ended()


def _arguments(given: Any) -> dict[str, Any]:
    """Give what a tool is called with; a model may have said something else than an object, and CrewAI tells it so."""
    if isinstance(given, Mapping):
        return dict(given)
    return {} if given is None else {"": given}


def _ask(context: Any) -> None:
    role = name_of(context.agent, "role")
    task = task_name_of(context.task)
    around = doing.get()
    role, task = role or around[0], task or around[1]
    name = str(context.tool_name)
    tickets: list[Ticket] = []
    frames: list[Frame] = []
    gates = gates_of(role, task)
    for gate in gates:
        call = ToolCall(tool=name, arguments=_arguments(context.tool_input))
        put_in_place(call, gate.watchdog, role)
        try:
            tickets.append(gate.run.open(call, gate.extra, through=through_crews(gate.watchdog)))
        except BaseException as error:
            for ticket in tickets:
                ticket.release(error)
            if isinstance(error, Stopped) and gate.work is not None and not gate.work.is_over:
                gate.work.latch(error)
            raise
    for gate in gates:
        frames += stand_in_agent(gate, role)
        frames.append(enter(gate.watchdog, gate.run, Activity("tool", name), begins=True))
    for work in works():
        work.tool_begins()
    if gates:
        _open.set(_OpenTool(name, tuple(tickets), tuple(frames), _open.get()))
