"""What a model call used, read from what providers report: OpenAI's chat completions and responses, Anthropic's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clevagent_core.calls import UnusableUsage, Usage


def from_openai(raw: Mapping[str, Any] | None) -> Usage | None:
    """Read the ``usage`` of a chat completion, a text completion or a response of OpenAI's API; ``None`` when there is none.

    Raises:
        UnusableUsage: a total is missing, negative or no number.

    """
    if not raw:
        return None
    is_chat = "prompt_tokens" in raw or "completion_tokens" in raw
    kinds = ("prompt", "completion") if is_chat else ("input", "output")
    input_tokens = count(raw, f"{kinds[0]}_tokens")
    # A text completion that produced nothing leaves the key out.
    output_tokens = 0 if is_chat and "completion_tokens" not in raw else count(raw, f"{kinds[1]}_tokens")
    # xAI reports reasoning beside the output, in the total only.
    total = raw.get("total_tokens")
    if isinstance(total, int) and total > input_tokens + output_tokens:
        output_tokens = total - input_tokens
    if not input_tokens and not output_tokens:
        return None  # some make zeros of usage that was not reported; no call has an empty prompt
    details = raw.get(f"{kinds[0]}_tokens_details") or {}
    output_details = raw.get(f"{kinds[1]}_tokens_details") or {}
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=min(read := detail(details, "cached_tokens"), input_tokens),
        cache_write_tokens=min(detail(details, "cache_write_tokens"), max(0, input_tokens - read)),
        reasoning_tokens=min(detail(output_details, "reasoning_tokens"), output_tokens),
        input_audio_tokens=min(detail(details, "audio_tokens"), input_tokens),
        output_audio_tokens=min(detail(output_details, "audio_tokens"), output_tokens),
    )


def from_anthropic(raw: Mapping[str, Any] | None) -> Usage | None:
    """Read the ``usage`` of Anthropic's messages API; ``None`` when there is none.

    There, unlike at OpenAI, cached tokens stand *beside* ``input_tokens``; here, as everywhere in ClevAgent, they lie inside. What the
    provider used on the way (to sum up a context that grew too long, for advice) is not in its totals, and is added.

    Raises:
        UnusableUsage: a total is missing, negative or no number.

    """
    if not raw:
        return None
    iterations = raw.get("iterations")
    beside = [
        part
        for part in (iterations if isinstance(iterations, list) else ())
        if isinstance(part, Mapping) and part.get("type") in _BESIDE
    ]
    return add(usage for part in (raw, *beside) if (usage := _from_anthropic(part)) is not None)


_BESIDE = frozenset({"compaction", "advisor_message"})


def _from_anthropic(raw: Mapping[str, Any]) -> Usage | None:
    read = detail(raw, "cache_read_input_tokens")
    created = raw.get("cache_creation")
    hour = detail(created, "ephemeral_1h_input_tokens") if isinstance(created, Mapping) else 0
    five = detail(created, "ephemeral_5m_input_tokens") if isinstance(created, Mapping) else 0
    written = max(detail(raw, "cache_creation_input_tokens"), hour + five)
    input_tokens, output_tokens = count(raw, "input_tokens") + read + written, count(raw, "output_tokens")
    if not input_tokens and not output_tokens:
        return None  # some make zeros of usage that was not reported; no call has an empty prompt
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=min(hour, written),
    )


def from_error(error: BaseException) -> Usage | None:
    """Read the usage that an SDK's error carries: OpenAI's ``parse`` raises after the answer was billed."""
    usage = getattr(getattr(error, "completion", None), "usage", None)
    if usage is None:
        return None
    return from_openai(
        {
            "prompt_tokens": getattr(usage, "prompt_tokens", None),
            "completion_tokens": getattr(usage, "completion_tokens", None),
        }
    )


def add(parts: Iterable[Usage]) -> Usage | None:
    """Add up what the chunks of a stream reported; ``None`` when none did."""
    found = list(parts)
    if len(found) <= 1:
        return found[0] if found else None
    return Usage(**{name: sum(getattr(part, name) for part in found) for name in Usage.__slots__})


def count(metadata: Mapping[str, Any], name: str) -> int:
    """Read a total that must be there."""
    value = metadata.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnusableUsage(f"{name}={value!r}")
    return value


def detail(details: Mapping[str, Any], name: str) -> int:
    """Read a part of a total; 0 where it is not told."""
    for prefix in ("", "priority_", "flex_"):
        value = details.get(prefix + name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
