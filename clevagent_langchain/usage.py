"""What a model call used, from the places where LangChain's integrations put it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clevagent_core.calls import Usage
from clevagent_providers.usage import count, detail, from_openai


def from_metadata(metadata: Mapping[str, Any] | None) -> Usage | None:
    """Read ``AIMessage.usage_metadata``; ``None`` when there is none.

    Two traps, checked with langchain-openai 1.7 and langchain-anthropic 1.7: Anthropic's ``cache_creation`` is 0 where the keys
    of the cache's time to live are present; OpenAI's service tiers put ``priority_`` or ``flex_`` before the detail keys.

    Raises:
        UnusableUsage: a part is missing, negative or no number.

    """
    if metadata is None:
        return None
    input_tokens, output_tokens = metadata.get("input_tokens"), metadata.get("output_tokens")
    if type(input_tokens) is not int or type(output_tokens) is not int or input_tokens < 0 or output_tokens < 0:
        # Something is wrong with it, or it is a number of an unusual type.
        input_tokens, output_tokens = count(metadata, "input_tokens"), count(metadata, "output_tokens")
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
    hour = detail(details, "ephemeral_1h_input_tokens")
    written = detail(details, "cache_creation") or hour + detail(details, "ephemeral_5m_input_tokens")
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=min(detail(details, "cache_read"), input_tokens),
        cache_write_tokens=min(written, input_tokens),
        cache_write_1h_tokens=min(hour, written, input_tokens),
        reasoning_tokens=min(detail(output_details, "reasoning"), output_tokens),
        input_audio_tokens=min(detail(details, "audio"), input_tokens),
        output_audio_tokens=min(detail(output_details, "audio"), output_tokens),
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
        return from_openai(raw)
    if "input_tokens" in raw:
        return from_metadata(raw)
    return None


def is_cached(metadata: Mapping[str, Any] | None) -> bool:
    """Tell whether an answer came from LangChain's own cache, so that nothing was sent."""
    return metadata is not None and metadata.get("total_cost") == 0
