"""How a refusal leaves a graph: the exception types by which LangGraph ends it, and the question that a graph asks.

LangGraph lets a ``GraphBubbleUp`` through: no retry policy repeats it, no error handler gets it, ``ToolNode`` does not answer it. A
``GraphInterrupt`` is one, too, and ends a graph without an exception: with the values of the last step, what its finished branches
have written included, and with its interrupts stored in the checkpoint. Checked with langgraph 1.2.0 and 1.2.22.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

from langgraph.config import get_config
from langgraph.errors import GraphBubbleUp, GraphInterrupt
from langgraph.types import Interrupt

from clevagent_core.interrupts import is_interrupt
from clevagent_core.money import PICO_PER_USD, format_usd
from clevagent_core.verdicts import Incident

MARK = "clevagent"
"""The key by which a question of ours is told from those of the user's own nodes."""
QUESTION = "question"
QUESTION_ID = "question_id"


class Halted(GraphInterrupt):
    """Ends a graph with the state it has reached, and nothing to answer."""

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]  # a field in C, in which the message stands
        """What LangGraph stores and returns: nothing."""
        return ((),)


class Asked(GraphInterrupt):
    """Ends a graph with a question, by whose answer it goes on."""

    incident: Incident

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]  # a field in C, in which the message stands
        """What LangGraph stores and returns: the question."""
        details = self.incident.details
        return ((Interrupt(details[QUESTION], id=str(details[QUESTION_ID])),),)


def ask(incident: Incident) -> type[Asked]:
    """Put a refusal as a question, where it arises: LangGraph looks at it elsewhere, when the node's context is gone."""
    incident.details[QUESTION] = question_of(incident, answer_waits=_answer_waits())
    incident.details[QUESTION_ID] = _id_here()
    return Asked


def bubbling(outer: type[BaseException] | None) -> type[BaseException]:
    """Give the type to raise through a graph, inside a framework that lets ``outer`` pass."""
    if outer is None or issubclass(outer, GraphBubbleUp):
        return outer or GraphBubbleUp
    found = _bubbling.get(outer)
    if found is None:
        body = {"__module__": outer.__module__, "__qualname__": outer.__qualname__}
        found = _bubbling.setdefault(outer, type(outer.__name__, (outer, GraphBubbleUp), body))
    return found


_bubbling: dict[type[BaseException], type[BaseException]] = {}


def is_question(interrupt: Interrupt) -> bool:
    """Tell whether an interrupt is a question of ours."""
    return isinstance(interrupt.value, Mapping) and MARK in interrupt.value


def question_of(incident: Incident, *, answer_waits: bool = False) -> dict[str, Any]:
    """Put a refusal as a question, in plain data: it is stored with the checkpoint, and may be answered in another process."""
    return {
        MARK: incident.kind,
        "question": _text(incident),
        "budget": incident.budget,
        "unit": incident.unit,
        "spent": incident.spent,
        "held": incident.held,
        "needed": incident.needed,
        "ceiling": incident.ceiling,
        "key": incident.key,
        "window": incident.window,
        "run_id": incident.run_id,
        "message": incident.message,
        "answer_waits": answer_waits,
    }


def _text(incident: Incident) -> str:
    if incident.budget is None:
        return f"{incident.message} Go on all the same, or stop here?"

    def show(amount: float | None) -> str:
        if incident.unit == "usd":
            return format_usd(round((amount or 0) * PICO_PER_USD))
        return f"{amount or 0:,.0f} {(incident.unit or '').replace('_', ' ')}"

    held = f" (and calls in flight hold {show(incident.held)})" if incident.held else ""
    return (
        f"The budget {incident.budget!r} has spent {show(incident.spent)} of {show(incident.ceiling)}{held}, and the next call could "
        f"cost up to {show(incident.needed)}. Raise it, or stop here?"
    )


def namespace() -> str | None:
    """Find the node that this context is in, with those around it, as LangGraph names it; ``None`` outside of a graph."""
    try:
        found = get_config()["configurable"].get("checkpoint_ns")
    except (RuntimeError, KeyError):
        return None
    return found if isinstance(found, str) and found else None


def _id_here() -> str:
    # The same for each attempt of one task, and never that of a question which the node itself asks.
    here = namespace()
    return hashlib.blake2b(f"clevagent {here or uuid.uuid4().hex}".encode(), digest_size=16).hexdigest()


def _answer_waits() -> bool:
    """Tell whether a person's answer was given to this node, and its ``interrupt()`` has not been reached yet.

    The answer stays with the checkpoint either way. Where it was taken, a second question of the node would take it once more: that
    is LangGraph's way with every node that fails after a question. So when the graph goes on, what was taken is removed.
    """
    try:
        scratchpad = get_config()["configurable"]["__pregel_scratchpad"]
        # Taking it tells: this task ends here, and takes it from the checkpoint when it is run again.
        return scratchpad.get_null_resume(True) is not None
    except Exception as error:  # whose code: LangGraph's, which promises none of this
        if is_interrupt(error):
            raise
        return False
