"""How each API writes requests, answers, streams and errors.

Written from the public API references and checked with openai 3.54, anthropic 2.12, langchain-openai 1.7 and
langchain-anthropic 1.7. Fields that no client reads are left out.
"""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, Protocol

from clevagent.testing.billing import Asked, Bill, schemas_of, texts_of, within
from clevagent.testing.replies import Reply

_Json = dict[str, Any]


class Answer(NamedTuple):
    """One request, and what it is to be answered."""

    number: int
    model: str
    body: Mapping[str, Any]
    reply: Reply
    bill: Bill

    @property
    def cached_tokens(self) -> int:
        """Input tokens told as read from the cache."""
        return min(self.reply.cached_tokens, self.bill.input_tokens)

    @property
    def reasoning_tokens(self) -> int:
        """Output tokens told as reasoning."""
        return min(self.reply.reasoning_tokens, self.bill.output_tokens)

    @property
    def texts(self) -> list[str]:
        """The text in the pieces that a stream sends."""
        return _pieces(self.reply.text, self.reply.chunks)

    def tools(self) -> Iterator[tuple[int, str, str, Mapping[str, object]]]:
        """Number, id, name and arguments of each tool call; ids are unique per provider."""
        for index, (name, arguments) in enumerate(self.reply.tool_calls):
            yield index, f"call_{self.number}_{index}", name, arguments


class Dialect(Protocol):
    """One API. Has no state."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """Find what is billed."""
        ...

    def answer(self, answer: Answer) -> _Json:
        """Write an answer whole."""
        ...

    def events(self, answer: Answer) -> Iterator[bytes]:
        """Write an answer as server-sent events."""
        ...

    def error(self, status: int, message: str) -> _Json:
        """Write an error."""
        ...


def encode(value: object) -> bytes:
    """Write JSON for the wire."""
    return json.dumps(value, separators=(",", ":")).encode()


class _OpenAI:
    """What OpenAI's APIs share."""

    def error(self, status: int, message: str) -> _Json:
        code = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}.get(status)
        return {"error": {"message": message, "type": _error_type(status), "param": None, "code": code}}


class ChatCompletions(_OpenAI):
    """``POST /v1/chat/completions``."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See :meth:`Dialect.asked`."""
        schemas = schemas_of(body.get("tools"), body.get("functions"), within(body, "response_format", "json_schema"))
        return Asked(
            chain(texts_of(body.get("messages")), schemas),
            (body.get("max_completion_tokens"), body.get("max_tokens")),
            (body.get("n"),),
        )

    def answer(self, answer: Answer) -> _Json:
        """See :meth:`Dialect.answer`."""
        message: _Json = {"role": "assistant", "content": answer.reply.text or None, "refusal": None}
        if answer.reply.tool_calls:
            message["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                for _, id_, name, arguments in answer.tools()
            ]
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer)}
            for index in range(answer.body.get("n") or 1)
        ]
        return _completion(answer, "chat.completion", choices) | _completion_usage(answer)

    def events(self, answer: Answer) -> Iterator[bytes]:
        """See :meth:`Dialect.events`."""
        tells_usage = within(answer.body, "stream_options", "include_usage") is True
        rest = {"usage": None} if tells_usage else {}

        def send(delta: _Json, finish_reason: str | None = None) -> Iterator[bytes]:
            for index in range(answer.body.get("n") or 1):
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
                yield _event(_completion(answer, "chat.completion.chunk", [choice]) | rest)

        yield from send({"role": "assistant", "content": "", "refusal": None})
        for text in answer.texts:
            yield from send({"content": text})
        for index, id_, name, arguments in answer.tools():
            start = {"index": index, "id": id_, "type": "function", "function": {"name": name, "arguments": ""}}
            yield from send({"tool_calls": [start]})
            for piece in _pieces(json.dumps(arguments), answer.reply.chunks):
                yield from send({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        yield from send({}, _finish_reason(answer))
        if tells_usage and answer.reply.usage:
            yield _event(_completion(answer, "chat.completion.chunk", []) | _completion_usage(answer))
        yield b"data: [DONE]\n\n"


class Completions(_OpenAI):
    """``POST /v1/completions``, the old text completions."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See :meth:`Dialect.asked`. Each of several prompts is answered, and ``best_of`` answers are made for ``n``."""
        return Asked(texts_of(body.get("prompt")), (body.get("max_tokens"),), (self._prompts(body), self._made(body)))

    def answer(self, answer: Answer) -> _Json:
        """See :meth:`Dialect.answer`."""
        choices = [
            {"index": index, "text": answer.reply.text, "logprobs": None, "finish_reason": "stop"}
            for index in range(self._told(answer.body))
        ]
        return _completion(answer, "text_completion", choices) | _completion_usage(answer)

    def events(self, answer: Answer) -> Iterator[bytes]:
        """See :meth:`Dialect.events`."""
        texts = answer.texts
        for index in range(self._told(answer.body)):
            for text, reason in zip(["", *texts], [*[None] * len(texts), "stop"], strict=True):
                choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
                yield _event(_completion(answer, "text_completion", [choice]))
        if within(answer.body, "stream_options", "include_usage") is True and answer.reply.usage:
            yield _event(_completion(answer, "text_completion", []) | _completion_usage(answer))
        yield b"data: [DONE]\n\n"

    @staticmethod
    def _prompts(body: Mapping[str, Any]) -> int:
        prompt = body.get("prompt")
        return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1

    @staticmethod
    def _made(body: Mapping[str, Any]) -> object:
        counts = [body[key] for key in ("n", "best_of") if body.get(key) is not None]
        return max(counts, default=None) if all(type(count) is int for count in counts) else counts[0]

    def _told(self, body: Mapping[str, Any]) -> int:
        return self._prompts(body) * (body.get("n") or 1)


class Embeddings(_OpenAI):
    """``POST /v1/embeddings``: input only. A prompt of token ids has as many tokens as ids, whatever the tokenizer."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See :meth:`Dialect.asked`."""
        return Asked(chain.from_iterable(texts_of(part) for part in self._inputs(body)), (), (), has_output=False)

    def answer(self, answer: Answer) -> _Json:
        """See :meth:`Dialect.answer`. Every vector is (1, 0), in base64 where that is asked for, as SDKs do."""
        vector: object = [1.0, 0.0]
        if answer.body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack("<2f", 1.0, 0.0)).decode()
        count = max(1, len(self._inputs(answer.body)))
        data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(count)]
        usage = {"usage": {"prompt_tokens": answer.bill.input_tokens, "total_tokens": answer.bill.input_tokens}}
        return {"object": "list", "model": answer.model, "data": data} | (usage if answer.reply.usage else {})

    def events(self, answer: Answer) -> Iterator[bytes]:
        """See :meth:`Dialect.events`. There is no stream of them."""
        yield _event(self.answer(answer))

    @staticmethod
    def _inputs(body: Mapping[str, Any]) -> list[object]:
        inputs = body.get("input")
        if not isinstance(inputs, list) or (inputs and isinstance(inputs[0], int)):
            inputs = [inputs]
        # One letter for each token id: that is one token where nothing else is said.
        return ["x" * len(part) if isinstance(part, list) else part for part in inputs]


class Responses(_OpenAI):
    """``POST /v1/responses``."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See :meth:`Dialect.asked`. What a ``previous_response_id`` stands for is not known here, and not billed."""
        schemas = schemas_of(body.get("tools"), within(body, "text", "format", "schema"))
        texts = chain(texts_of(body.get("instructions")), texts_of(body.get("input")), schemas)
        return Asked(texts, (body.get("max_output_tokens"),), ())

    def answer(self, answer: Answer) -> _Json:
        """See :meth:`Dialect.answer`."""
        usage = None
        if answer.reply.usage:
            bill = answer.bill
            usage = {
                "input_tokens": bill.input_tokens,
                "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": bill.output_tokens,
                "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
                "total_tokens": bill.input_tokens + bill.output_tokens,
            }
        return self._response(answer, "completed") | {"output": self._items(answer), "usage": usage}

    def events(self, answer: Answer) -> Iterator[bytes]:
        """See :meth:`Dialect.events`."""
        for number, event in enumerate(self._events(answer)):
            yield _named_event(event | {"sequence_number": number})

    def _events(self, answer: Answer) -> Iterator[_Json]:
        begun = self._response(answer, "in_progress") | {"output": [], "usage": None}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        for index, item in enumerate(self._items(answer)):
            at = {"output_index": index, "item_id": item["id"]}
            empty: _Json = {"content": []} if item["type"] == "message" else {"arguments": ""}
            started = item | empty | {"status": "in_progress"}
            yield {"type": "response.output_item.added", "output_index": index, "item": started}
            yield from (
                self._message_events(at, item, answer) if item["type"] == "message" else self._call_events(at, item, answer)
            )
            yield {"type": "response.output_item.done", "output_index": index, "item": item}
        yield {"type": "response.completed", "response": self.answer(answer)}

    @staticmethod
    def _message_events(at: _Json, item: _Json, answer: Answer) -> Iterator[_Json]:
        part = item["content"][0]
        at = at | {"content_index": 0}
        yield {"type": "response.content_part.added", **at, "part": part | {"text": ""}}
        for text in answer.texts:
            yield {"type": "response.output_text.delta", **at, "delta": text, "logprobs": []}
        yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **at, "part": part}

    @staticmethod
    def _call_events(at: _Json, item: _Json, answer: Answer) -> Iterator[_Json]:
        for piece in _pieces(item["arguments"], answer.reply.chunks):
            yield {"type": "response.function_call_arguments.delta", **at, "delta": piece}
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **at, **done}

    @staticmethod
    def _response(answer: Answer, status: str) -> _Json:
        body = answer.body
        return {
            "id": f"resp_{answer.number}",
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata") or {},
            "model": answer.model,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "temperature": body.get("temperature", 1.0),
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p", 1.0),
            "max_output_tokens": body.get("max_output_tokens"),
            "previous_response_id": body.get("previous_response_id"),
        }

    @staticmethod
    def _items(answer: Answer) -> list[_Json]:
        items: list[_Json] = []
        if answer.reply.text:
            part = {"type": "output_text", "text": answer.reply.text, "annotations": [], "logprobs": []}
            id_ = f"msg_{answer.number}"
            items.append({"type": "message", "id": id_, "status": "completed", "role": "assistant", "content": [part]})
        for _, id_, name, arguments in answer.tools():
            call = {"call_id": id_, "name": name, "arguments": json.dumps(arguments)}
            items.append({"type": "function_call", "id": f"fc_{id_}", "status": "completed", **call})
        return items


class TokenCounts:
    """``POST /v1/messages/count_tokens`` of Anthropic, which is free."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See :meth:`Dialect.asked`."""
        return Messages().asked(body)._replace(output_limits=(), has_output=False, is_free=True)

    def answer(self, answer: Answer) -> _Json:
        """See :meth:`Dialect.answer`."""
        return {"input_tokens": answer.bill.input_tokens}

    def events(self, answer: Answer) -> Iterator[bytes]:
        """See :meth:`Dialect.events`. There is no stream of them."""
        yield _event(self.answer(answer))

    def error(self, status: int, message: str) -> _Json:
        """See :meth:`Dialect.error`."""
        return Messages().error(status, message)


class Messages:
    """``POST /v1/messages`` of Anthropic."""

    def asked(self, body: Mapping[str, Any]) -> Asked:
        """See :meth:`Dialect.asked`."""
        schemas = schemas_of(
            body.get("tools"), within(body, "output_config", "format", "schema"), within(body, "output_format", "schema")
        )
        texts = chain(texts_of(body.get("system")), texts_of(body.get("messages")), schemas)
        return Asked(texts, (body.get("max_tokens"),), ())

    def answer(self, answer: Answer) -> _Json:
        """See :meth:`Dialect.answer`."""
        end = {"stop_reason": self._stop_reason(answer), "stop_sequence": None}
        return self._message(answer) | end | {"content": self._blocks(answer), "usage": self._usage(answer)}

    def events(self, answer: Answer) -> Iterator[bytes]:
        """See :meth:`Dialect.events`. As from Anthropic, the start tells the input and one token of output, the end all."""
        usage = self._usage(answer)
        begun = usage | {"output_tokens": min(1, answer.bill.output_tokens)} if usage is not None else None
        open_end: _Json = {"stop_reason": None, "stop_sequence": None, "content": [], "usage": begun}
        yield _named_event({"type": "message_start", "message": self._message(answer) | open_end})
        for index, block in enumerate(self._blocks(answer)):
            is_text = block["type"] == "text"
            empty: _Json = {"text": ""} if is_text else {"input": {}}
            yield _named_event({"type": "content_block_start", "index": index, "content_block": block | empty})
            for piece in answer.texts if is_text else _pieces(json.dumps(block["input"]), answer.reply.chunks):
                delta = {"type": "text_delta", "text": piece} if is_text else {"type": "input_json_delta", "partial_json": piece}
                yield _named_event({"type": "content_block_delta", "index": index, "delta": delta})
            yield _named_event({"type": "content_block_stop", "index": index})
        end = {"stop_reason": self._stop_reason(answer), "stop_sequence": None}
        yield _named_event({"type": "message_delta", "delta": end, "usage": usage})
        yield _named_event({"type": "message_stop"})

    def error(self, status: int, message: str) -> _Json:
        """See :meth:`Dialect.error`."""
        return {"type": "error", "error": {"type": _error_type(status), "message": message}}

    @staticmethod
    def _message(answer: Answer) -> _Json:
        return {"id": f"msg_{answer.number}", "type": "message", "role": "assistant", "model": answer.model}

    @staticmethod
    def _stop_reason(answer: Answer) -> str:
        return "tool_use" if answer.reply.tool_calls else "end_turn"

    @staticmethod
    def _blocks(answer: Answer) -> list[_Json]:
        text = [{"type": "text", "text": answer.reply.text}] if answer.reply.text else []
        return [
            *text,
            *({"type": "tool_use", "id": id_, "name": name, "input": args} for _, id_, name, args in answer.tools()),
        ]

    @staticmethod
    def _usage(answer: Answer) -> _Json | None:
        """Tell usage: here, unlike in OpenAI's APIs, cached tokens lie outside ``input_tokens``."""
        if not answer.reply.usage:
            return None
        return {
            "input_tokens": answer.bill.input_tokens - answer.cached_tokens,
            "cache_read_input_tokens": answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": answer.bill.output_tokens,
            "output_tokens_details": {"thinking_tokens": answer.reasoning_tokens},
        }


def _completion(answer: Answer, kind: str, choices: list[_Json]) -> _Json:
    id_ = f"chatcmpl-{answer.number}"
    return {"id": id_, "object": kind, "created": int(time.time()), "model": answer.model, "choices": choices}


def _completion_usage(answer: Answer) -> _Json:
    if not answer.reply.usage:
        return {}
    bill = answer.bill
    return {
        "usage": {
            "prompt_tokens": bill.input_tokens,
            "completion_tokens": bill.output_tokens,
            "total_tokens": bill.input_tokens + bill.output_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens, "audio_tokens": 0},
        }
    }


def _finish_reason(answer: Answer) -> str:
    return "tool_calls" if answer.reply.tool_calls else "stop"


def _error_type(status: int) -> str:
    types = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        529: "overloaded_error",
    }
    return types.get(status, "api_error")


def _pieces(text: str, count: int) -> list[str]:
    """Cut ``text`` into ``count`` pieces of nearly the same length, none of them empty."""
    count = min(count, len(text))
    return [text[len(text) * i // count : len(text) * (i + 1) // count] for i in range(count)]


def _event(value: object) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _named_event(value: _Json) -> bytes:
    name: str = value["type"]
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"
