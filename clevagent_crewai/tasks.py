"""What a task does beside its agent's work: making its output fit a model, judging it by a guardrail in words.

These calls say neither whose they are nor for which task, and come when the agent's own work is over. So the whole of a task is
marked as such, and a guarded agent's budgets cover all of it. Checked with crewai 1.15.19 and 1.15.30.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crewai.task import Task

from clevagent_core.frames import leave
from clevagent_crewai.crews import around_agent
from clevagent_crewai.gates import doing, name_of, stand_in_task, task_name_of

_SYNC, _ASYNC = "_execute_core", "_aexecute_core"


def watch_work() -> None:
    """Wrap what every task goes through, once."""
    for name, wrap in ((_SYNC, _marking), (_ASYNC, _amarking)):
        method = getattr(Task, name)
        if not hasattr(method, "_clevagent_original"):
            wrapper = wrap(method)
            vars(wrapper)["_clevagent_original"] = method
            setattr(Task, name, wrapper)


def unwatch_work() -> None:
    """Take the wrappers off."""
    for name in (_SYNC, _ASYNC):
        original = getattr(getattr(Task, name), "_clevagent_original", None)
        if original is not None:
            setattr(Task, name, original)


def _marking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute_core(self: Task, agent: Any, *args: Any, **kwargs: Any) -> Any:
        with _marked(self, agent or self.agent):
            return original(self, agent, *args, **kwargs)

    return execute_core


def _amarking(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def aexecute_core(self: Task, agent: Any, *args: Any, **kwargs: Any) -> Any:
        with _marked(self, agent or self.agent):
            return await original(self, agent, *args, **kwargs)

    return aexecute_core


@contextmanager
def _marked(task: Task, agent: Any) -> Iterator[None]:
    role, name = name_of(agent, "role"), task_name_of(task)
    before = doing.get()
    doing.set((role, name))
    frames = stand_in_task(role, name)
    try:
        with around_agent(agent):
            yield
    finally:
        for frame in reversed(frames):
            leave(frame)
        # Not by token: an asynchronous task may be closed in another context than the one it was begun in.
        doing.set(before)
