"""What a LangChain model is about to send, as an ``LLMCall``: read from messages and parameters, never from a tokenizer.

Output limits stand under several keys, and the largest may be the one that is sent (a limit of the constructor and one of the
call go out side by side), so the largest counts. ``ls_model_name`` tells a model that was overridden for one call, where
``invocation_params["model_name"]`` is stale. Checked with langchain-core 1.7 and 1.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
_SCHEMAS = ("functions", "response_format", "text", "output_config")
_RARE = frozenset({
    *_NESTED, *_UNBOUNDED, *_SCHEMAS,
    "n", "tools", "tool_choice", "thinking", "use_previous_response_id", "ls_structured_output_format",
})  # fmt: skip
"""Parameters that few requests have; without any of them, only the limits need reading."""
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


def largest_limit(params: Mapping[str, Any]) -> int | None:
    """Find the largest output limit that ``params`` may send."""
    largest = _largest(params)
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
        _schema(params[key]) for key in _SCHEMAS if params.get(key) is not None
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


class Facts(NamedTuple):
    """What the parameters of a request tell of its cost."""

    limit: int | None = None
    """The largest output limit that it may send."""
    answers: int = 1
    tools: Sequence[object] = ()
    is_unbounded: bool = False
    wants_whole_answer: bool = False
    thinking_tokens: int = 0


def facts_of(params: Mapping[str, Any]) -> Facts:
    """Read the parameters of a request."""
    if _RARE.isdisjoint(params):
        return Facts(_largest(params))
    return Facts(
        largest_limit(params),
        answers_of(params),
        schemas_of(params),
        is_unbounded(params),
        wants_whole_answer(params),
        thinking_tokens(params),
    )


def _largest(params: Mapping[str, Any]) -> int | None:
    largest: int | None = None
    for key in LIMIT_KEYS:
        value = params.get(key)
        if type(value) is int and value > 0 and (largest is None or value > largest):
            largest = value
    return largest


def _item(content: object, fields: Mapping[str, Any]) -> object:
    parts = [fields[name] for name in _SENT_BESIDE if fields.get(name)]
    extra = fields["additional_kwargs"]
    if extra:
        # The same tool calls stand there once more, as the provider wrote them.
        rest = {key: value for key, value in extra.items() if key not in {"tool_calls", "refusal"}}
        if rest:
            parts.append(rest)
    return (content, *parts) if parts else content


def _schema(value: object) -> object:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return value.model_json_schema()
    return value
