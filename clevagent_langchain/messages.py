"""What LangChain's messages send, as plain text and nestings of it. Checked with langchain-core 1.7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from clevagent_core.bounds import is_opaque

_SENT_BESIDE = ("tool_calls", "invalid_tool_calls", "tool_call_id", "name")
_PLAIN = frozenset({HumanMessage, SystemMessage})


def items_of(messages: Sequence[BaseMessage]) -> tuple[list[object], bool]:
    """What each message sends, as plain text and nestings of it (the same objects for the same messages); and whether any of it
    is something that its text cannot bound.

    Runs over the whole history for every call, so it reads the fields where pydantic keeps them.
    """  # noqa: D205 - two results
    items: list[object] = []
    is_any_opaque = False
    for message in messages:
        fields = message.__dict__
        content = fields["content"]
        if type(content) is not str and is_opaque(content):
            is_any_opaque = True
        is_plain = type(message) in _PLAIN and fields["name"] is None
        items.append(content if is_plain else _item(content, fields))
    return items, is_any_opaque


def _item(content: object, fields: Mapping[str, Any]) -> object:
    parts = [fields[name] for name in _SENT_BESIDE if fields.get(name)]
    extra = fields["additional_kwargs"]
    if extra:
        # The same tool calls stand there once more, as the provider wrote them; else they are sent from there.
        told = {"tool_calls", "refusal"} if fields.get("tool_calls") or fields.get("invalid_tool_calls") else {"refusal"}
        rest = {key: value for key, value in extra.items() if key not in told}
        if rest:
            parts.append(rest)
    return (content, *parts) if parts else content
