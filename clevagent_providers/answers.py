"""What an answer tells, read from the JSON that each API sends, whole or as the events of a stream: its usage, and what it says.

What it says is for the loop guard: the first answer's text, and the tools that it asks for. Ids, which are made anew for every
answer, are left out, and how a stream was cut does not show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from clevagent_core.calls import Usage
from clevagent_providers.usage import from_anthropic, from_openai


class Reader(Protocol):
    """Reads one answer. One is made for each attempt."""

    is_final: bool
    """Whether what was read tells the usage of the whole answer: a stream may tell what there is so far."""

    def whole(self, data: Mapping[str, Any]) -> None:
        """Take an answer that came whole."""
        ...

    def event(self, data: Mapping[str, Any]) -> bool:
        """Take one event of a stream; tell whether it carries nothing but usage."""
        ...

    def usage(self) -> Usage | None:
        """Give the usage that was told.

        Raises:
            UnusableUsage: it cannot be true.

        """
        ...

    def answer(self) -> object:
        """Give what the model said, so far."""
        ...


class Said:
    """Text, and the tools that are asked for, put together from pieces."""

    __slots__ = ("_calls", "_text")

    def __init__(self) -> None:
        """Nothing so far."""
        self._text: list[str] = []
        self._calls: dict[object, tuple[str, list[str]]] = {}

    def say(self, text: object) -> None:
        """Take a piece of text."""
        if isinstance(text, str) and text:
            self._text.append(text)

    def call(self, key: object, name: object = None, arguments: object = None) -> None:
        """Take a tool call, or a piece of its arguments; ``key`` tells which."""
        known, pieces = self._calls.get(key, ("", []))
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, sort_keys=True)
        if isinstance(arguments, str) and arguments:
            pieces.append(arguments)
        self._calls[key] = name if isinstance(name, str) and name else known, pieces

    def answer(self) -> object:
        """Put it together."""
        text = "".join(self._text)
        if not self._calls:
            return text
        return text, [(name, _arguments("".join(pieces))) for name, pieces in self._calls.values()]


class ChatReader:
    """OpenAI's chat completions, old completions and embeddings."""

    __slots__ = ("_has_ended", "_said", "_usage", "is_final")

    def __init__(self) -> None:
        """Nothing so far."""
        self.is_final = False
        self._usage: Mapping[str, Any] | None = None
        self._said = Said()
        self._has_ended = False

    def whole(self, data: Mapping[str, Any]) -> None:
        """See :meth:`Reader.whole`."""
        self._usage = _mapping(data.get("usage"))
        for choice in _list(data.get("choices"))[:1]:
            self._note(choice, "message")
        self.is_final = True

    def event(self, data: Mapping[str, Any]) -> bool:
        """See :meth:`Reader.event`."""
        choices = _list(data.get("choices"))
        for choice in choices:
            if choice.get("finish_reason"):
                self._has_ended = True
            if not choice.get("index"):
                self._note(choice, "delta")
        usage = _mapping(data.get("usage"))
        if usage:
            # Some tell with every chunk what there is so far: the last one counts.
            self._usage = usage
            self.is_final = self._has_ended
        return bool(usage) and not choices and not data.get("error")

    def usage(self) -> Usage | None:
        """See :meth:`Reader.usage`."""
        return from_openai(self._usage)

    def answer(self) -> object:
        """See :meth:`Reader.answer`."""
        return self._said.answer()

    def _note(self, choice: Mapping[str, Any], key: str) -> None:
        said = self._said
        said.say(choice.get("text"))
        message = choice.get(key)
        if not isinstance(message, Mapping):
            return
        said.say(message.get("content"))
        said.say(message.get("refusal"))
        for place, call in enumerate(_list(message.get("tool_calls"))):
            index = call.get("index", place)
            custom = call.get("custom")
            if isinstance(custom, Mapping):
                said.call(index, custom.get("name"), custom.get("input"))
            elif isinstance(function := call.get("function"), Mapping):
                said.call(index, function.get("name"), function.get("arguments"))
        if isinstance(function := message.get("function_call"), Mapping):
            said.call("function", function.get("name"), function.get("arguments"))


class ResponsesReader:
    """OpenAI's responses."""

    __slots__ = ("_response", "_said", "is_final")

    def __init__(self) -> None:
        """Nothing so far."""
        self.is_final = False
        self._response: Mapping[str, Any] = {}
        self._said = Said()

    def whole(self, data: Mapping[str, Any]) -> None:
        """See :meth:`Reader.whole`."""
        self._response = data
        for place, item in enumerate(_list(data.get("output"))):
            self._item(place, item)
        self.is_final = True

    def event(self, data: Mapping[str, Any]) -> bool:
        """See :meth:`Reader.event`. The last event carries the response whole."""
        response = data.get("response")
        if data.get("type") in _LAST_EVENTS and isinstance(response, Mapping):
            self.whole(response)
        return False

    def usage(self) -> Usage | None:
        """See :meth:`Reader.usage`. A response that goes on in the background has not told it yet."""
        return from_openai(_mapping(self._response.get("usage")))

    def answer(self) -> object:
        """See :meth:`Reader.answer`."""
        return self._said.answer()

    def _item(self, place: int, item: Mapping[str, Any]) -> None:
        kind = item.get("type")
        if kind == "message":
            for part in _list(item.get("content")):
                self._said.say(part.get("text"))
                self._said.say(part.get("refusal"))
        elif kind in {"function_call", "custom_tool_call"}:
            self._said.call(place, item.get("name"), item.get("arguments", item.get("input")))


_LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})


class MessagesReader:
    """Anthropic's messages. Its old text completions have the same shape of stream and tell no usage."""

    __slots__ = ("_said", "_usage", "is_final")

    def __init__(self) -> None:
        """Nothing so far."""
        self.is_final = False
        self._usage: dict[str, Any] = {}
        self._said = Said()

    def whole(self, data: Mapping[str, Any]) -> None:
        """See :meth:`Reader.whole`."""
        self._told(data.get("usage"))
        self._said.say(data.get("completion"))
        for place, block in enumerate(_list(data.get("content"))):
            self._block(place, block)
        self.is_final = True

    def event(self, data: Mapping[str, Any]) -> bool:
        """See :meth:`Reader.event`. The start tells the input, the last delta all there is."""
        kind = data.get("type")
        if kind == "message_start":
            self._told(_mapping(data.get("message")).get("usage"))
        elif kind == "message_delta":
            self._told(data.get("usage"))
            if data.get("usage") and _mapping(data.get("delta")).get("stop_reason"):
                self.is_final = True
        elif kind == "content_block_start":
            self._block(data.get("index"), _mapping(data.get("content_block")), is_start=True)
        elif kind == "content_block_delta":
            delta = _mapping(data.get("delta"))
            if delta.get("type") == "text_delta":
                self._said.say(delta.get("text"))
            elif delta.get("type") == "input_json_delta":
                self._said.call(data.get("index"), None, delta.get("partial_json"))
        elif kind == "completion":
            self._said.say(data.get("completion"))
        return False

    def usage(self) -> Usage | None:
        """See :meth:`Reader.usage`."""
        return from_anthropic(self._usage)

    def answer(self) -> object:
        """See :meth:`Reader.answer`."""
        return self._said.answer()

    def _told(self, usage: object) -> None:
        # Counts are cumulative, and a delta leaves out what has not changed.
        self._usage.update({key: value for key, value in _mapping(usage).items() if value is not None})

    def _block(self, place: object, block: Mapping[str, Any], *, is_start: bool = False) -> None:
        kind = block.get("type")
        if kind == "text":
            self._said.say(block.get("text"))
        elif kind == "tool_use":
            # A stream starts with an empty input, and sends it in pieces.
            self._said.call(place, block.get("name"), None if is_start else block.get("input"))


def _arguments(written: str) -> object:
    try:
        return json.loads(written) if written else {}
    except ValueError:
        return written


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[Mapping[str, Any]]:
    return [part for part in value if isinstance(part, Mapping)] if isinstance(value, list) else ()
