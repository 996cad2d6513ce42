"""What the parameters of a request tell of its cost, whoever sends it: an SDK, or a framework that hands them on to one.

Output limits stand under several keys, and the largest may be the one that is sent (a limit of the constructor and one of the
call go out side by side), so the largest counts. The keys are those of the OpenAI and Anthropic APIs and of frameworks over them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from clevagent_core.bounds import is_opaque, rounds_of, runs_at_provider

LIMIT_KEYS = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "max_tokens_to_sample",
    "max_new_tokens",
    "num_predict",
)
_LIMITS = frozenset(LIMIT_KEYS)
_LEAST = 256
"""An ordinary answer cut below this many tokens is hardly worth its prompt."""
_LEAST_WHOLE = 1024
"""The same where a cut answer cannot be read at all, and no limit was given."""
_AFTER_THINKING = 256
_NESTED = ("extra_body", "model_kwargs", "options", "generation_config")
_UNBOUNDED = (
    "previous_response_id", "prompt", "mcp_servers", "container", "conversation", "cached_content", "web_search_options", "thread",
    "data_sources", "search_parameters", "plugins", "enable_search",
)  # fmt: skip
"""Parameters that put text before the model which is not in the request; also those of Azure, xAI, OpenRouter and DashScope."""
_MESSAGES = ("messages", "input", "system")
_NO_TEXT = frozenset({
    *LIMIT_KEYS,
    "_type", "betas", "cache_control", "default_request_timeout", "effort", "extra_headers", "extra_query", "frequency_penalty",
    "headers", "include", "inference_geo", "logit_bias", "logprobs", "max_retries", "metadata", "model", "model_name",
    "max_tool_calls", "parallel_tool_calls", "presence_penalty", "prompt_cache_key", "prompt_cache_retention", "reasoning", "reasoning_effort",
    "safety_identifier", "seed", "service_tier", "stop", "stop_sequences", "store", "stream", "stream_options", "stream_usage",
    "streaming", "strict", "temperature", "timeout", "top_k", "top_logprobs", "top_p", "user", "verbosity",
})  # fmt: skip
"""Parameters that a model does not read. Whatever else a request carries may be billed as input; most requests carry nothing."""
_READ_ELSEWHERE = frozenset({
    *_NO_TEXT, *_NESTED, "n", "tools", "tool_choice", "ls_structured_output_format", "use_previous_response_id",
})  # fmt: skip
"""Not ``thinking`` and ``truncation``: by them a provider leaves out parts of a history, so what it reported for one value says nothing
for another."""


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
    """What is sent beside the messages and billed as input: tools, response formats, instructions, and what is not known here."""
    tools = params.get("tools")
    others = [
        _schema(value)
        for key, value in params.items()
        if key not in _READ_ELSEWHERE and value is not None and not isinstance(value, (bool, int, float))
    ]
    if others:
        return [*(tools or ()), *others]
    return tools if isinstance(tools, (list, tuple)) else ()


def is_unbounded(params: Mapping[str, Any]) -> bool:
    """Tell whether the request refers to text that is not in it, or uses tools that run at the provider."""
    if any(params.get(key) not in (None, False) for key in _UNBOUNDED) or params.get("use_previous_response_id"):
        return True
    if any(is_opaque(params[key]) for key in _MESSAGES if key in params):
        return True
    tools = params.get("tools")
    return isinstance(tools, (list, tuple)) and any(map(runs_at_provider, tools))


def has_key(value: object, key: str) -> bool:
    """Tell whether ``key`` stands anywhere in a nesting of mappings and lists."""
    if isinstance(value, Mapping):
        return key in value or any(has_key(part, key) for part in value.values())
    return isinstance(value, (list, tuple)) and any(has_key(part, key) for part in value)


def wants_whole_answer(params: Mapping[str, Any]) -> bool:
    """Tell whether a cut answer would be of no use: structured output, or a tool that must be called."""
    if params.get("ls_structured_output_format") is not None:
        return True
    formats = [params.get("response_format"), params.get("output_format")]
    around = (params.get("text"), params.get("output_config"))
    formats += [outer.get("format") for outer in around if isinstance(outer, Mapping)]
    if any(format_ is not None and not _is_of_type(format_, "text") for format_ in formats):
        return True
    choice = params.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        choice = choice.get("mode")
    return choice is not None and choice not in ("auto", "none") and not _is_of_type(choice, "auto", "none")


def thinking_tokens(params: Mapping[str, Any]) -> int:
    """What of the output limit is set aside for thinking (Anthropic answers 400 to a limit below it)."""
    thinking = params.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return budget if type(budget) is int and budget > 0 else 0


def _is_of_type(value: object, *kinds: str) -> bool:
    return isinstance(value, Mapping) and value.get("type") in kinds


class Facts(NamedTuple):
    """What the parameters of a request tell of its cost."""

    limit: int | None = None
    """The largest output limit that it may send."""
    answers: int = 1
    tools: Sequence[object] = ()
    is_unbounded: bool = False
    wants_whole_answer: bool = False
    thinking_tokens: int = 0
    service_tier: str | None = None
    rounds: int = 1
    is_audio: bool = False
    """Whether sound may come in the answer."""
    is_plain: bool = False
    """Whether the limit and the service tier are all there is; the other fields then have their defaults."""

    def least_output_tokens(self, limit: int | None) -> int:
        """Tell the smallest output limit that is worth sending, where ``limit`` was asked for; below it the call is refused."""
        least = _LEAST
        if self.wants_whole_answer:
            least = limit or _LEAST_WHOLE
        if self.thinking_tokens:
            least = max(least, self.thinking_tokens + _AFTER_THINKING)
        return least


def facts_of(params: Mapping[str, Any]) -> Facts:
    """Read the parameters of a request."""
    if _NO_TEXT.issuperset(params):
        return _plain_facts(_largest(params), _tier(params))
    own, extra = params.get("model_kwargs"), params.get("extra_body")
    # The extra body is merged into the request last, whatever it holds.
    sent = {**(own if isinstance(own, Mapping) else {}), **params, **(extra if isinstance(extra, Mapping) else {})}
    return Facts(
        largest_limit(params),
        answers_of(params),
        schemas_of(sent),
        is_unbounded(sent),
        wants_whole_answer(sent),
        thinking_tokens(sent),
        _tier(sent),
        rounds_of(sent),
        "audio" in (sent.get("modalities") or ()) or sent.get("audio") is not None,
    )


@functools.lru_cache(maxsize=256)
def _plain_facts(limit: int | None, tier: str | None) -> Facts:
    return Facts(limit, service_tier=tier, is_plain=True)


def _tier(params: Mapping[str, Any]) -> str | None:
    tier = params.get("service_tier")
    return tier if isinstance(tier, str) else None


def model_of(params: Mapping[str, Any]) -> str | None:
    """Find the model that a request names beside the one that it was built for."""
    extra = params.get("extra_body")
    model = (extra.get("model") if isinstance(extra, Mapping) else None) or params.get("model")
    return model if isinstance(model, str) else None


def _largest(params: Mapping[str, Any]) -> int | None:
    largest: int | None = None
    for key in _LIMITS.intersection(params):
        value = whole(params[key])
        if value is not None and value > 0 and (largest is None or value > largest):
            largest = value
    return largest


def whole(value: object) -> int | None:
    """Read a limit: servers take ``100.0`` as well as ``100``."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _schema(value: object) -> object:
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        return _strict_schema(value)
    return value


@functools.lru_cache(maxsize=128)
def _strict_schema(model: Any) -> object:
    """Write a model's schema as OpenAI's SDK sends it: every object closed, its references with siblings written out."""
    root = model.model_json_schema()
    return {"name": model.__name__, "strict": True, "type": "json_schema", "schema": _closed(root, root)}


def _closed(schema: object, root: Mapping[str, Any]) -> object:
    if isinstance(schema, list):
        return [_closed(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and len(schema) > 1:
        found: Any = root
        for name in reference.removeprefix("#/").split("/"):
            found = found[name]
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
        return _closed(schema, root)
    closed = {key: _closed(value, root) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed |= {"additionalProperties": False, "required": list(schema["properties"])}
    return closed


def seconds_of(*timeouts: object) -> float | None:
    """Give how long an answer is waited for, by the first of ``timeouts`` that says something: seconds, or an httpx ``Timeout``."""
    for timeout in timeouts:
        seconds = getattr(timeout, "read", timeout)
        if isinstance(seconds, (int, float)) and not isinstance(seconds, bool):
            return float(seconds)
    return None
