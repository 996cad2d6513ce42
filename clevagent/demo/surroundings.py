"""Keeps the demo apart from the process around it: its environment, its plugins, its log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from clevagent_core.plugins import ENTRY_POINT_GROUP

_PREFIXES = ("CLEVAGENT_", "LANGCHAIN_", "LANGSMITH_", "LANGGRAPH_", "OPENAI_")
"""Settings of one's own agents: other budgets, tracing that would send the demo away, another provider's address."""
_OURS = frozenset({"langchain", "langgraph", "openai", "crewai"})
"""The entry points of the adapters that the demo needs."""
_QUIET = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "OTEL_SDK_DISABLED": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_DISABLE_VERSION_CHECK": "true",
}
"""CrewAI tells its makers of each kickoff, unless it is told not to."""


@contextmanager
def own_environment() -> Iterator[None]:
    """Hide the user's settings, and every proxy: nothing of the demo leaves this machine. For a process that does nothing else."""
    before = dict(os.environ)
    for name in before:
        if name.upper().startswith(_PREFIXES) or name.upper().endswith("_PROXY"):
            del os.environ[name]
    # With this the proxies of the operating system are not asked for either.
    os.environ["NO_PROXY"] = "127.0.0.1"
    os.environ.update(_QUIET)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def kept_log() -> Iterator[list[logging.LogRecord]]:
    """Collect what ClevAgent logs, instead of writing it across the screen; what LangChain and CrewAI log of it is dropped."""
    records: list[logging.LogRecord] = []
    kept: dict[str, logging.Handler] = {
        "clevagent": _Collector(records),
        "crewai": logging.NullHandler(),
        "langchain_core": logging.NullHandler(),
    }
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in kept}
    for name, handler in kept.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [handler], False
    try:
        yield records
    finally:
        for name, (handlers, propagate) in before.items():
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate


def plugins_of_others() -> list[str]:
    """Name the installed plugins that the demo leaves out: they may tell somebody, or stop something."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)} - _OURS)


class _Collector(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
