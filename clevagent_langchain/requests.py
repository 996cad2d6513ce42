"""What a LangChain model is about to send, as an ``LLMCall``: read from messages and parameters, never from a tokenizer.

Output limits stand under several keys, and the largest may be the one that is sent (a limit of the constructor and one of the
call go out side by side), so the largest counts. ``ls_model_name`` tells a model that was overridden for one call, where
``invocation_params["model_name"]`` is stale. Checked with langchain-core 1.7 and 1.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from clevagent_core.bounds import is_opaque

LIMIT_KEYS = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens_to_sample",
    "max_new_tokens",
    "num_predict",
)
_NESTED = ("extra_body", "model_kwargs", "options", "generation_config")
_UNBOUNDED = ("previous_response_id", "prompt", "mcp_servers", "container", "conversation", "cached_content")
"""Parameters that put text before the model which is not in the request."""
_PLAIN = frozenset({HumanMessage, SystemMessage})


def items_of(messages: Sequence[BaseMessage]) -> list[object]:
    """What each message sends, as plain text and nestings of it; the same objects for the same messages."""
    return [
        message.content if type(message) in _PLAIN and message.name is None else _item(message) for message in messages
    ]


def has_opaque(messages: Sequence[BaseMessage]) -> bool:
    """Tell whether a message holds something that its text cannot bound."""
    return any(type(message.content) is not str and is_opaque(message.content) for message in messages)


def largest_limit(params: Mapping[str, Any]) -> int | None:
    """Find the largest output limit that ``params`` may send."""
    largest: int | None = None
    for key in LIMIT_KEYS:
        value = params.get(key)
        if type(value) is int and value > 0 and (largest is None or value > largest):
            largest = value
    for key in _NESTED:
        nested = params.get(key)
        if isinstance(nested, Mapping):
            value = largest_limit(nested)
            if value is not None and (largest is None or value > largest):
                largest = value
    return largest


def answers_of(params: Mapping[str, Any]) -> int:
    """How many answers are asked for."""
    answers = 1
    for source in (params, params.get("extra_body"), params.get("model_kwargs")):
        value = source.get("n") if isinstance(source, Mapping) else None
        if type(value) is int and value > answers:
            answers = value
    return answers


def schemas_of(params: Mapping[str, Any]) -> Sequence[object]:
    """What is sent beside the messages and billed as input: tools, functions, response formats."""
    tools = params.get("tools")
    others = [
        _schema(params[key]) for key in ("functions", "response_format", "text", "output_config") if params.get(key) is not None
    ]
    if others:
        return [*(tools or ()), *others]
    return tools if isinstance(tools, (list, tuple)) else ()


def is_unbounded(params: Mapping[str, Any]) -> bool:
    """Tell whether the request refers to text that is not in it, or uses tools that run at the provider."""
    if any(params.get(key) is not None for key in _UNBOUNDED) or params.get("use_previous_response_id"):
        return True
    tools = params.get("tools")
    if not isinstance(tools, (list, tuple)):
        return False
    # A provider's own tools are named by type (web_search_20250305, file_search, mcp): what they read is billed as input.
    return any(isinstance(tool, Mapping) and tool.get("type", "function") not in {"function", "custom"} for tool in tools)


def wants_whole_answer(params: Mapping[str, Any]) -> bool:
    """Tell whether a cut answer would be of no use: structured output, or a tool that must be called."""
    if params.get("response_format") is not None or params.get("ls_structured_output_format") is not None:
        return True
    choice = params.get("tool_choice")
    return choice is not None and choice not in ("auto", "none") and choice != {"type": "auto"}


def thinking_tokens(params: Mapping[str, Any]) -> int:
    """What of the output limit is set aside for thinking (Anthropic answers 400 to a limit below it)."""
    thinking = params.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return budget if type(budget) is int and budget > 0 else 0


def _item(message: BaseMessage) -> object:
    parts: list[object] = [message.content]
    tool_calls = getattr(message, "tool_calls", None)
    if tool_calls:
        parts.append(tool_calls)
    invalid = getattr(message, "invalid_tool_calls", None)
    if invalid:
        parts.append(invalid)
    tool_call_id = getattr(message, "tool_call_id", None)
    if tool_call_id is not None:
        parts.append(tool_call_id)
    if message.name is not None:
        parts.append(message.name)
    extra = message.additional_kwargs
    if extra:
        # The same tool calls stand there once more, as the provider wrote them.
        rest = {key: value for key, value in extra.items() if key not in {"tool_calls", "refusal"}}
        if rest:
            parts.append(rest)
    return parts[0] if len(parts) == 1 else tuple(parts)


def _schema(value: object) -> object:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    return value
