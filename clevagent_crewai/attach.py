"""Attaching to every model call of CrewAI in the process: to the models' classes, and to the kickoffs, each of which is a run.

What is wrapped is taken off again when the last watchdog detaches. Checked with crewai 1.15.19 and 1.15.30.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from crewai.agent.core import Agent
from crewai.crew import Crew
from crewai.flow.flow import Flow

from clevagent_crewai import models
from clevagent_crewai.crews import AGENT_ENTRIES, CREW_ENTRIES, FLOW_ENTRIES, entry
from clevagent_crewai.gates import attached
from clevagent_crewai.progress import unwatch_tasks, watch_tasks
from clevagent_crewai.tasks import unwatch_work, watch_work
from clevagent_crewai.tools import unwatch_tools, watch_tools

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

_ENTRIES: tuple[tuple[type[Any], tuple[str, ...]], ...] = (
    (Crew, CREW_ENTRIES),
    # Not execute_task: by it, a crew lets the agent work.
    (Agent, tuple(name for name in AGENT_ENTRIES if "execute" not in name)),
    (Flow, FLOW_ENTRIES),
)
_lock = threading.RLock()


def attach(watchdog: Watchdog) -> None:
    """Ask ``watchdog`` before every model and tool call from now on, also of crews that were made, or have worked, before."""
    with _lock:
        if watchdog in attached:
            return
        attached.append(watchdog)
        models.install(for_good=False)
        watch_tools()
        watch_tasks()
        watch_work()
        for cls, names in _ENTRIES:
            for name in names:
                _patch(cls, name)


def detach(watchdog: Watchdog) -> None:
    """Ask ``watchdog`` no more."""
    with _lock:
        if watchdog not in attached:
            return
        attached.remove(watchdog)
        if attached:
            return
        for cls, names in _ENTRIES:
            for name in names:
                _unpatch(cls, name)
        models.uninstall()
        if not models.is_installed():
            unwatch_tools()
            unwatch_tasks()
            unwatch_work()


def _patch(cls: type[Any], name: str) -> None:
    method = getattr(cls, name, None)
    if method is None or hasattr(method, "_clevagent_original"):
        return
    wrapper = entry(name, method)
    vars(wrapper).update(_clevagent_original=method, _clevagent_is_own=name in cls.__dict__)
    setattr(cls, name, wrapper)


def _unpatch(cls: type[Any], name: str) -> None:
    method = cls.__dict__.get(name)
    known = getattr(method, "__dict__", {})
    original = known.get("_clevagent_original")
    if original is None:
        return  # not there, or somebody else has wrapped it since: then it stays, and passes through
    if known["_clevagent_is_own"]:
        setattr(cls, name, original)
    else:
        delattr(cls, name)
