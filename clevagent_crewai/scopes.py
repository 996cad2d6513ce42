"""CrewAI's stack of events that were begun: put back where a call or a kickoff is broken off.

A refusal, a cancelled call and a failed one leave events that nobody ends, or end one too many; at a hundred, CrewAI itself raises
``StackDepthExceededError`` out of whatever comes next in that context. Checked with crewai 1.15.19 and 1.15.30.
"""

from __future__ import annotations

from typing import Any

from crewai.events import event_context

Scopes = tuple[Any, ...]


def open_scopes() -> Scopes:
    """Give the events that are begun in this context."""
    stack: Scopes = event_context._event_id_stack.get()  # noqa: SLF001 - asked for by nothing public
    return stack


def put_back(stack: Scopes) -> None:
    """Let these be the ones that are begun."""
    event_context.restore_event_scope(stack)
