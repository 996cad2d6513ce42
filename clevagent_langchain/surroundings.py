"""What is around a hook of the middleware, and what it puts around the calls that are made inside."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager
from langchain_core.tracers.context import register_configure_hook
from langgraph.config import get_config

from clevagent_core.frames import Activity, enter, frame_of, leave
from clevagent_core.runs import Run
from clevagent_core.watchdog import Watchdog
from clevagent_langchain.handler import ClevAgentCallbackHandler
from clevagent_langchain.tracker import tracker_of

_CHECKPOINTER = "__pregel_checkpointer"
"""Where LangGraph keeps the checkpointer of a graph that runs, its own or that of the graph around it."""


_MODEL_NODES = frozenset({"model_node", "amodel_node"})


class _ModelCalls(ClevAgentCallbackHandler):
    """Sees the calls of models that are not guarded: those that tools make, and that other middleware puts in the model's place."""

    ignore_agent = True  # so LangChain calls what tells of tools


_seeing: ContextVar[BaseCallbackHandler | None] = ContextVar("clevagent_langchain_seeing", default=None)
_registered: list[bool] = []


def register() -> None:
    """Let handlers be added by context: once in a process, and not on import, because LangChain's hooks cannot be taken off."""
    if not _registered:
        _registered.append(True)
        register_configure_hook(_seeing, inheritable=True)


@contextmanager
def inside(run: Run, tool: str | None = None) -> Iterator[None]:
    """Make ``run`` the current one, and ``tool`` the current tool, for every call that is made inside."""
    watchdog, outer_seeing = run.watchdog, _seeing.get()
    frame = enter(watchdog, run, None if tool is None else Activity("tool", tool), begins=True)
    _seeing.set(_ModelCalls(watchdog=watchdog))
    try:
        yield
    finally:
        leave(frame)
        _seeing.set(outer_seeing)


def outer_run(watchdog: Watchdog) -> Run | None:
    """Find the run around the agent: that of a block, else the one that a callback handler began for the root invocation."""
    frame = frame_of(watchdog)
    if frame is not None:
        run: Run = frame.run
        return run
    callbacks = get_config().get("callbacks")
    branch = tracker_of(watchdog).branch(callbacks.parent_run_id if isinstance(callbacks, BaseCallbackManager) else None)
    return branch.run if branch is not None else None


def is_resumable() -> bool:
    """Tell whether the graph that runs is saved, so that it can go on after an interrupt or an error."""
    return bool(get_config().get("configurable", {}).get(_CHECKPOINTER))


def tool_names(offered: Iterable[Any]) -> set[str]:
    """Name the tools of the agent in whose model node this is, and those that are offered to the model: other middleware chooses of them.

    All of them are known where the agent makes its request, which is looked for on the stack. Checked with langchain 1.4.
    """
    tools = list(offered)
    python: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and a hundred times as fast as inspect
    while python is not None and not (
        python.f_code.co_name in _MODEL_NODES and python.f_globals.get("__name__") == "langchain.agents.factory"
    ):
        python = python.f_back
    if python is not None:
        tools += python.f_locals.get("default_tools", ())
    names = (tool.get("name") if isinstance(tool, dict) else getattr(tool, "name", None) for tool in tools)
    return {name for name in names if isinstance(name, str)}


def agent_name() -> str | None:
    """Find the name that was given to ``create_agent``."""
    name = (get_config().get("metadata") or {}).get("lc_agent_name")
    return name if isinstance(name, str) else None
