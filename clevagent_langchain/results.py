"""What came back from a model or a tool, as plain text and nestings of it: what a loop is recognised by.

Ids that LangChain and providers make anew for every answer are left out, and how a stream was cut into chunks does not show, so
that the same answer looks the same. Checked with langchain-core 1.0 and 1.7.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatResult, LLMResult
from langchain_core.tools import ToolException


def answer_of(result: ChatResult | LLMResult) -> object:
    """Give what a model said first: its text, and the tools it asks for."""
    for generation in result.generations:
        first = generation[0] if isinstance(generation, list) and generation else generation
        message = getattr(first, "message", None)
        if message is None:
            return getattr(first, "text", None)
        content = message.content
        text = content if type(content) is str else _text(content)
        if not isinstance(message, AIMessage) or not (message.tool_calls or message.invalid_tool_calls):
            return text
        calls: list[object] = [(call["name"], call["args"]) for call in message.tool_calls]
        return text, calls + [(call["name"], call["args"]) for call in message.invalid_tool_calls]
    return None


def tool_result(output: object) -> tuple[object, Exception | None]:
    """Give what a tool gave back, and the error that it told of instead of raising."""
    if isinstance(output, ToolMessage):
        error = ToolException(str(output.content)) if output.status == "error" else None
        return output.content, error
    if isinstance(output, list) and output and not isinstance(output[0], (str, dict)):
        return [_told(part) for part in output], None
    return _told(output), None


class Said:
    """What the chunks of one stream said."""

    __slots__ = ("_calls", "_text")

    def __init__(self) -> None:
        """Nothing so far."""
        self._text: list[str] = []
        self._calls: dict[object, tuple[list[str], list[str]]] = {}

    def note(self, message: BaseMessage) -> None:
        """Take one chunk."""
        for call in getattr(message, "tool_call_chunks", None) or ():
            index = call.get("index")
            # Without an index each comes whole.
            names, args = self._calls.setdefault(("whole", len(self._calls)) if index is None else index, ([], []))
            names.append(call.get("name") or "")
            args.append(call.get("args") or "")
        content = message.content
        if content:
            self._text.append(content if isinstance(content, str) else _text(content))

    def answer(self) -> object:
        """Put it together, once the stream has ended."""
        text = "".join(self._text)
        if not self._calls:
            return text
        valid: list[object] = []
        invalid: list[object] = []
        for names, parts in self._calls.values():
            name, written = "".join(names), "".join(parts)
            try:
                args = json.loads(written) if written else {}
            except ValueError:
                args = None
            if isinstance(args, dict):
                valid.append((name, args))
            else:
                invalid.append((name, written))
        return text, valid + invalid


def _text(content: str | Sequence[Any]) -> str:
    if isinstance(content, str):
        return content
    # Blocks: those of text carry it, those that ask for tools stand in the message's tool calls too.
    return "".join(block if isinstance(block, str) else str(block.get("text") or "") for block in content)


def _told(output: object) -> object:
    if output is None:
        return "null"  # what an agent is told of it; None would mean that it is not known
    if isinstance(output, BaseMessage):
        return output.content
    # LangGraph's, which needs not be installed.
    if type(output).__name__ == "Command" and hasattr(output, "goto"):
        return "goto", _goto(output.goto), _update(getattr(output, "update", None))
    return output


def _goto(goto: object) -> object:
    """Name where a tool hands over to. What it sends along is the history so far, and its own message."""
    if isinstance(goto, (list, tuple)):
        return [_goto(part) for part in goto]
    node = getattr(goto, "node", None)
    return (node, _update(getattr(goto, "arg", None))) if node is not None else goto


def _update(update: object) -> object:
    """Of the messages that a tool writes the last one is its own: those before it may be the history, which grows."""
    if not isinstance(update, Mapping):
        return update
    return {
        key: value[-1].content if isinstance(value, list) and value and isinstance(value[-1], BaseMessage) else value
        for key, value in update.items()
    }
