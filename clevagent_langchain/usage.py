"""What a model call used, from the places where LangChain's integrations put it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clevagent_core.calls import Usage


class UnusableUsage(ValueError):
    """A provider reported something that cannot be a token count."""


def from_metadata(metadata: Mapping[str, Any] | None) -> Usage | None:
    """Read ``AIMessage.usage_metadata``; ``None`` when there is none.

    Two traps, checked with langchain-openai 1.7 and langchain-anthropic 1.7: Anthropic's ``cache_creation`` is 0 where the keys
    of the cache's time to live are present; OpenAI's service tiers put ``priority_`` or ``flex_`` before the detail keys.

    Raises:
        UnusableUsage: a part is missing, negative or no number.

    """
    if metadata is None:
        return None
    input_tokens = _count(metadata, "input_tokens")
    output_tokens = _count(metadata, "output_tokens")
    if not input_tokens and not output_tokens:
        # langchain-anthropic makes zeros of usage that was not reported; no call has an empty prompt.
        return None
    # xAI reports reasoning beside the output, in the total only.
    total = metadata.get("total_tokens")
    if isinstance(total, int) and total > input_tokens + output_tokens:
        output_tokens = total - input_tokens
    details = metadata.get("input_token_details")
    output_details = metadata.get("output_token_details")
    if not details and not output_details:
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens)
    details, output_details = details or {}, output_details or {}
    hour = _detail(details, "ephemeral_1h_input_tokens")
    written = _detail(details, "cache_creation") or hour + _detail(details, "ephemeral_5m_input_tokens")
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=min(_detail(details, "cache_read"), input_tokens),
        cache_write_tokens=min(written, input_tokens),
        cache_write_1h_tokens=min(hour, written, input_tokens),
        reasoning_tokens=min(_detail(output_details, "reasoning"), output_tokens),
        input_audio_tokens=min(_detail(details, "audio"), input_tokens),
        output_audio_tokens=min(_detail(output_details, "audio"), output_tokens),
    )


def from_llm_output(llm_output: Mapping[str, Any] | None) -> Usage | None:
    """Read ``LLMResult.llm_output``: ``token_usage`` (OpenAI) or ``usage`` (Anthropic); ``None`` when there is none.

    Raises:
        UnusableUsage: a part is missing, negative or no number.

    """
    if not llm_output:
        return None
    raw = llm_output.get("token_usage") or llm_output.get("usage")
    if not isinstance(raw, Mapping) or not raw:
        return None
    if "prompt_tokens" in raw or "completion_tokens" in raw:
        return from_metadata(
            {
                "input_tokens": raw.get("prompt_tokens"),
                # A text completion that produced nothing leaves the key out.
                "output_tokens": raw.get("completion_tokens", 0),
                "total_tokens": raw.get("total_tokens"),
            }
        )
    if "input_tokens" in raw:
        return from_metadata(raw)
    return None


def from_error(error: BaseException) -> Usage | None:
    """Read the usage that an SDK's error carries: OpenAI's ``parse`` raises after the answer was billed."""
    usage = getattr(getattr(error, "completion", None), "usage", None)
    if usage is None:
        return None
    return from_metadata(
        {
            "input_tokens": getattr(usage, "prompt_tokens", None),
            "output_tokens": getattr(usage, "completion_tokens", None),
        }
    )


def is_cached(metadata: Mapping[str, Any] | None) -> bool:
    """Tell whether an answer came from LangChain's own cache, so that nothing was sent."""
    return metadata is not None and metadata.get("total_cost") == 0


def add(parts: Iterable[Usage]) -> Usage | None:
    """Add up what the chunks of a stream reported; ``None`` when none did."""
    found = list(parts)
    if len(found) <= 1:
        return found[0] if found else None
    return Usage(**{name: sum(getattr(part, name) for part in found) for name in Usage.__slots__})


def _count(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnusableUsage(f"{name}={value!r}")
    return value


def _detail(details: Mapping[str, Any], name: str) -> int:
    for prefix in ("", "priority_", "flex_"):
        value = details.get(prefix + name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
