"""What a call used and said, as CrewAI's models tell it. Checked with crewai 1.15.19 and 1.15.30.

Native models tell ``prompt_tokens`` and ``completion_tokens`` (OpenAI), or ``input_tokens`` with the cached ones inside and
``output_tokens`` (Anthropic); ``LLM`` hands on what litellm reports; Gemini has names of its own. A model that was told nothing says
``{"total_tokens": 0}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clevagent_core.calls import UnusableUsage, Usage

_INPUT = ("prompt_tokens", "prompt_token_count", "input_tokens")
_OUTPUT = ("completion_tokens", "candidates_token_count", "output_tokens")
_READ = ("cached_prompt_tokens", "cached_tokens", "cache_read_input_tokens")
_WRITTEN = ("cache_creation_tokens", "cache_creation_input_tokens")


def usage_of(raw: Mapping[str, Any] | None) -> Usage | None:
    """Read what a model reported; ``None`` where that is nothing.

    Raises:
        UnusableUsage: a count is negative or no number.

    """
    if not raw:
        return None
    inputs, outputs = _first(raw, _INPUT), _first(raw, _OUTPUT)
    read, written = _first(raw, _READ), _first(raw, _WRITTEN)
    if not read:
        details = raw.get("prompt_tokens_details")
        read = _first(details, ("cached_tokens",)) if isinstance(details, Mapping) else 0
    if "prompt_tokens" not in raw and "cached_prompt_tokens" not in raw and "cache_read_input_tokens" in raw:
        inputs += read + written  # as Anthropic's API tells it: beside the input
    total = raw.get("total_tokens")
    if isinstance(total, int) and total > inputs + outputs:
        outputs = total - inputs  # reasoning that is told in the total only
    if not inputs and not outputs:
        return None
    read = min(read, inputs)
    return Usage(
        input_tokens=inputs,
        output_tokens=outputs,
        cache_read_tokens=read,
        cache_write_tokens=min(written, inputs - read),
        reasoning_tokens=min(_first(raw, ("reasoning_tokens",)), outputs),
    )


def answer_of(result: object) -> object:
    """Give what a model said, for the loop guard: text, or the tools that it asks for, without the ids that are new each time."""
    if isinstance(result, str) or result is None:
        return result
    if isinstance(result, Sequence):
        return "", [_tool_call(call) for call in result]
    dump = getattr(result, "model_dump_json", None)
    return dump() if dump is not None else str(result)


def _tool_call(call: Any) -> object:
    if isinstance(call, Mapping):
        inner = call.get("function")
        if isinstance(inner, Mapping):
            return inner.get("name"), inner.get("arguments")
        return call.get("name"), call.get("input", call.get("arguments"))
    inner = getattr(call, "function", call)
    return getattr(inner, "name", None), getattr(inner, "arguments", None) or getattr(inner, "input", None) or str(inner)


def _first(raw: Mapping[str, Any], names: Sequence[str]) -> int:
    for name in names:
        value = raw.get(name)
        if value is None or value == 0:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UnusableUsage(f"{name}={value!r}")
        return value
    return 0
