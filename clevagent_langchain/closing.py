"""What the model, and the user, are told when an agent is stopped: closing messages, and notes to a model that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage

from clevagent_core.money import format_usd, to_pico
from clevagent_core.verdicts import Incident

_OF_TOOLS = ("parallel_tool_calls", "response_format", "strict", "tool_choice")
"""Settings of a call that providers refuse where no tools are sent."""


def why(incident: Incident) -> str:
    """Say in one clause why an agent is stopped, with the values."""
    if incident.kind == "loop":
        return f"it repeats itself without anything new: {_round(incident)}"
    if incident.budget is None or incident.unit is None:
        return incident.message.rstrip(".")
    if incident.details.get("reason") == "too_large":
        amounts = _amounts(incident, incident.needed, incident.ceiling)
        return f"one request is larger than the whole budget {incident.budget!r} ({amounts})"
    return f"the budget {incident.budget!r} is used up ({_amounts(incident, incident.spent, incident.ceiling)})"


def _amounts(incident: Incident, *given: float | None) -> str:
    amounts = [amount for amount in given if amount is not None]
    if incident.unit == "usd":
        return " of ".join(format_usd(to_pico(amount, what="usd")) for amount in amounts)
    return f"{' of '.join(f'{amount:,.0f}' for amount in amounts)} {str(incident.unit).replace('_', ' ')}"


def note_on_loop(incident: Incident) -> str:
    """Tell the model what it repeats, once."""
    return (
        f"You repeat yourself: {_round(incident)}, and nothing new came of it. Do not do the same again. Do something else, or finish "
        "now with what you have. If it goes on, you will be stopped."
    )


def note_on_refusal(tool: str, incident: Incident) -> str:
    """Tell the model why a tool was not run, so that it can do without."""
    return f"The tool {tool!r} was not run to its end: {why(incident)}. Do not call it again. Go on without it, or finish now with what you have."


def note_on_end(tool: str, incident: Incident) -> str:
    """Answer a tool call that nobody will hear of any more."""
    return f"The tool {tool!r} was not run: {why(incident)}. The work stops here."


def closing_request(request: ModelRequest[Any], incident: Incident) -> ModelRequest[Any]:
    """Ask the model for a closing message: as the request was, but without tools, and with an instruction behind it."""
    instruction = (
        f"The work is stopped here, because {why(incident)}. You cannot call tools any more. Answer now with what you have, in short, and "
        "say what is missing."
    )
    settings = {name: value for name, value in request.model_settings.items() if name not in _OF_TOOLS}
    messages = [*request.messages, *answers_to_pending(request.messages, incident), HumanMessage(instruction)]
    has_tool_calls = any(isinstance(message, AIMessage) and message.tool_calls for message in request.messages)
    if has_tool_calls and request.tools and any(base.__name__ == "ChatAnthropic" for base in type(request.model).__mro__):
        # Anthropic refuses a history of tool calls that comes without the tools.
        return request.override(messages=messages, tool_choice={"type": "none"}, response_format=None, model_settings=settings)
    return request.override(messages=messages, tools=[], tool_choice=None, response_format=None, model_settings=settings)


def written_closing(response: ModelResponse[Any], incident: Incident) -> AIMessage | None:
    """Take the model's own closing message; ``None`` where it says nothing."""
    for message in reversed(response.result):
        if isinstance(message, AIMessage):
            if not message.text.strip():
                return None
            told = {**message.response_metadata, "clevagent": facts(incident)}
            if not message.tool_calls and not message.invalid_tool_calls:
                return message.model_copy(update={"response_metadata": told})
            # It asks for tools although it has none: only what it says is kept.
            return AIMessage(
                message.text, id=message.id, name=message.name, usage_metadata=message.usage_metadata, response_metadata=told
            )
    return None


def plain_closing(messages: Sequence[AnyMessage], incident: Incident, name: str | None) -> AIMessage:
    """Write a closing message without the model."""
    results = [message for message in messages if isinstance(message, ToolMessage) and message.status != "error"]
    tools = ", ".join(sorted({message.name for message in results if message.name}))
    have = (
        f"{len(results)} {'result' if len(results) == 1 else 'results'} of tools{f' ({tools})' if tools else ''}, in the messages above"
        if results
        else "no results of tools yet"
    )
    text = f"I stopped here, because {why(incident)}. The work is not finished. What there is: {have}."
    return AIMessage(text, name=name, response_metadata={"clevagent": facts(incident)})


def answers_to_pending(messages: Sequence[AnyMessage], incident: Incident) -> list[ToolMessage]:
    """Answer the tool calls at the end of a history that nobody has answered: providers refuse a history with any."""
    answered: set[str | None] = set()
    for message in reversed(messages):
        if isinstance(message, ToolMessage):
            answered.add(message.tool_call_id)
        elif isinstance(message, AIMessage):
            return [
                ToolMessage(note_on_end(call["name"], incident), name=call["name"], tool_call_id=call["id"], status="error")
                for call in message.tool_calls
                if call["id"] is not None and call["id"] not in answered
            ]
        else:
            break
    return []


def facts(incident: Incident) -> dict[str, Any]:
    """Tell an incident as plain data that can be written as JSON; what is not known is left out."""
    known = {name: value for name, value in asdict(incident).items() if value not in (None, {}, "")}
    plain: dict[str, Any] = json.loads(json.dumps(known | {"action": "halt"}, default=str))
    return plain


def _round(incident: Incident) -> str:
    details: Mapping[str, Any] = incident.details
    calls, times = details.get("calls") or ["the same call"], details.get("times")
    what = f"{calls[0]} was called" if len(calls) == 1 else f"the round of {', '.join(map(str, calls))} came"
    return f"{what} {times} times" if times else f"{what} again and again"
