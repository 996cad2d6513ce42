"""What came back from a model or a tool, as plain text and nestings of it: what a loop is recognised by.

Ids that LangChain and providers make anew for every answer are left out, and how a stream was cut into chunks does not show, so
that the same answer looks the same. Checked with langchain-core 1.0 and 1.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import BaseMessage, ToolMessage
from langchain_core.outputs import ChatResult, LLMResult
from langchain_core.tools import ToolException


def answer_of(result: ChatResult | LLMResult) -> object:
    """Give what a model said first: its text, and the tools it asks for."""
    for generation in result.generations:
        first = generation[0] if isinstance(generation, list) and generation else generation
        message = getattr(first, "message", None)
        if message is None:
            return getattr(first, "text", None)
        calls = getattr(message, "tool_calls", None)
        text = _text(message.content)
        return (text, [(call["name"], call["args"]) for call in calls]) if calls else text
    return None


def tool_result(output: object) -> tuple[object, Exception | None]:
    """Give what a tool gave back, and the error that it told of instead of raising."""
    if isinstance(output, ToolMessage):
        error = ToolException(str(output.content)) if output.status == "error" else None
        return output.content, error
    return (output.content if isinstance(output, BaseMessage) else output), None


class Said:
    """What the chunks of one stream said."""

    __slots__ = ("_calls", "_text")

    def __init__(self) -> None:
        """Nothing so far."""
        self._text: list[str] = []
        self._calls: dict[object, list[str]] = {}

    def note(self, message: BaseMessage) -> None:
        """Take one chunk."""
        for call in getattr(message, "tool_call_chunks", None) or ():
            name = call.get("name")
            self._calls.setdefault(call.get("index"), []).append((f"{name} " if name else "") + (call.get("args") or ""))
        content = message.content
        if content:
            self._text.append(content if isinstance(content, str) else _text(content))

    def answer(self) -> object:
        """Put it together; ``None`` where nothing was said."""
        text = "".join(self._text)
        if self._calls:
            return (text, ["".join(parts) for parts in self._calls.values()])
        return text or None


def _text(content: str | Sequence[Any]) -> str:
    if isinstance(content, str):
        return content
    # Blocks: those of text carry it, those that ask for tools stand in the message's tool calls too.
    return "".join(block if isinstance(block, str) else str(block.get("text") or "") for block in content)
