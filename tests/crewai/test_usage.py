"""What CrewAI's models report, read as usage: never less than what they say, and never what cannot be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevagent_core.calls import UnusableUsage, Usage
from clevagent_crewai.usage import answer_of, usage_of

COUNT = st.integers(0, 10**9)
NAMES = (
    "prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens", "cached_prompt_tokens", "cached_tokens",
    "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation_tokens", "reasoning_tokens", "prompt_token_count",
    "candidates_token_count",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), st.none() | COUNT))
def test_whatever_is_told_the_details_lie_inside_and_no_token_is_lost(raw):
    usage = usage_of(raw)
    told_in = max(raw.get(name) or 0 for name in ("prompt_tokens", "prompt_token_count", "input_tokens"))
    told_out = max(raw.get(name) or 0 for name in ("completion_tokens", "candidates_token_count", "output_tokens"))
    if usage is None:
        assert not told_in and not told_out
        return
    assert usage.cache_read_tokens + usage.cache_write_tokens <= usage.input_tokens
    assert usage.reasoning_tokens <= usage.output_tokens
    if sum(name in raw for name in ("prompt_tokens", "prompt_token_count", "input_tokens")) <= 1:
        assert usage.input_tokens >= told_in
    if sum(name in raw for name in ("completion_tokens", "candidates_token_count", "output_tokens")) <= 1:
        assert usage.output_tokens >= told_out


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        (None, None),
        ({"total_tokens": 0}, None),
        (
            {"prompt_tokens": 9, "completion_tokens": 5, "cached_prompt_tokens": 4, "reasoning_tokens": 2},
            Usage(input_tokens=9, output_tokens=5, cache_read_tokens=4, reasoning_tokens=2),
        ),
        (
            {"input_tokens": 9, "output_tokens": 5, "cached_prompt_tokens": 4, "cache_creation_tokens": 3},
            Usage(input_tokens=9, output_tokens=5, cache_read_tokens=4, cache_write_tokens=3),
        ),
        (
            {"input_tokens": 2, "output_tokens": 5, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 3},
            Usage(input_tokens=9, output_tokens=5, cache_read_tokens=4, cache_write_tokens=3),
        ),
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 20}, Usage(input_tokens=9, output_tokens=11)),
    ],
    ids=["nothing", "zeros", "openai", "anthropic", "anthropic-raw", "total"],
)
def test_each_way_of_telling(raw, usage):
    assert usage_of(raw) == usage


@pytest.mark.parametrize("count", [-1, 1.5, "7", True])
def test_what_cannot_be_a_count_is_told(count):
    with pytest.raises(UnusableUsage):
        usage_of({"prompt_tokens": count, "completion_tokens": 1})


def test_answers_leave_out_ids():
    calls = [{"id": "1", "function": {"name": "lookup", "arguments": "{}"}}]
    assert answer_of(calls) == answer_of([{**calls[0], "id": "2"}]) == ("", [("lookup", "{}")])
    assert answer_of("text") == "text"
