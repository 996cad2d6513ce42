"""What each kind of CrewAI model is about to send, and where it takes an output limit.

A model is known by the class of CrewAI's that it derives from, looked up by name: CrewAI imports each provider's SDK only when a
model of it is made, and so does this. Checked with crewai 1.15.19 and 1.15.30: ``OpenAICompletion`` sends
``max_completion_tokens`` or else ``max_tokens``, as ``max_output_tokens`` where it talks to the Responses API; ``LLM``, which goes
through litellm, ``max_tokens`` or else ``max_completion_tokens``; all of them what is in ``additional_params`` beside or instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clevagent_core.bounds import is_opaque
from clevagent_core.calls import LLMCall
from clevagent_core.interrupts import is_interrupt
from clevagent_crewai.caches import cache
from clevagent_providers import requests

logger = logging.getLogger("clevagent")

_FLOOR = 256
"""An ordinary answer cut below this many tokens is hardly worth its prompt."""
_WHOLE_FLOOR = 1024
"""The same where a cut answer cannot be read at all, and no limit was given."""
_AFTER_THINKING = 256
FALLBACKS = ("fallbacks", "context_window_fallback_dict")
"""Parameters of litellm that name other models to ask in the same call."""
_READ_FIELDS = (
    "extra_body", "include", "instructions", "mcp_servers", "modalities", "n", "previous_response_id", "response_format", "service_tier",
    "store", "thinking", "web_search_options",
)  # fmt: skip
"""Fields of models that are sent under their own name, and that tell what a request costs."""


@dataclass(frozen=True)
class Dialect:
    """One kind of model."""

    provider: str | None = None
    """Who bills it, as genai-prices names it."""
    limits: tuple[str, ...] = ()
    """Its fields that are an output limit, the one that is sent first; none where it is not known."""
    unset: str = ""
    """The field to put a limit into where none of them is set."""
    default: Callable[[str], int] | None = None
    """The limit that CrewAI puts in where the user gave none."""
    quiet: Mapping[str, object] | None = None
    """Parameters by which litellm is told not to retry."""

    @property
    def is_known(self) -> bool:
        """Whether a limit can be sent."""
        return bool(self.limits)


UNKNOWN = Dialect()


def dialect_of(model: Any) -> Dialect:
    """Find the dialect of a model by the class of CrewAI's that it derives from."""
    make = _maker(type(model))
    return make(model) if make is not None else UNKNOWN


@cache
def _maker(cls: type[Any]) -> Callable[[Any], Dialect] | None:
    names = (base.__name__ for base in cls.__mro__ if base.__module__.startswith("crewai."))
    return next((_DIALECTS[name] for name in names if name in _DIALECTS), None)


def _openai(model: Any) -> Dialect:
    # Servers that speak OpenAI's language may not know the newer key; OpenAI's reasoning models refuse the older one.
    is_elsewhere = bool(model.base_url or model.__dict__.get("api_base"))
    provider = None if is_elsewhere else "openai"
    return Dialect(provider, ("max_completion_tokens", "max_tokens"), "max_tokens" if is_elsewhere else "max_completion_tokens")


def _anthropic(_: Any) -> Dialect:
    from crewai.llms.providers.anthropic import completion  # noqa: PLC0415 - imported already: the model is of it

    default = getattr(completion, "_default_max_tokens_for_model", None)
    return Dialect("anthropic", ("max_tokens",), "max_tokens", default)


def _litellm(_: Any) -> Dialect:
    # max_tokens is put in place of what is not there; litellm hands both numbers of retries to the SDK below.
    return Dialect(None, ("max_tokens", "max_completion_tokens"), "max_tokens", None, {"max_retries": 0, "num_retries": 0})


_DIALECTS: dict[str, Callable[[Any], Dialect]] = {
    "OpenAICompletion": _openai,
    "AnthropicCompletion": _anthropic,
    "LLM": _litellm,
    "GeminiCompletion": lambda _: Dialect("google", ("max_output_tokens",), "max_output_tokens"),
    "AzureCompletion": lambda _: Dialect("azure", ("max_completion_tokens", "max_tokens"), "max_tokens"),
    "BedrockCompletion": lambda _: Dialect("aws", ("max_tokens",), "max_tokens"),
}


def describe(model: Any, dialect: Dialect, messages: Any, tools: Any, response_model: Any) -> LLMCall:
    """Say what ``model.call(messages, tools, response_model=...)`` is about to send."""
    call = LLMCall(model=sent_name(model), clamp=dialect.is_known, provider=dialect.provider)
    try:
        _read(call, model, dialect, messages, tools, response_model)
    except Exception as error:  # whose code: ours, or a model's own; what cannot be read counts as the context window
        if is_interrupt(error):
            raise
        logger.exception("ClevAgent could not read a request; it counts as the model's whole context window.")
        call.opaque = True
    return call


def sent_name(model: Any) -> str:
    """Give the name that prices are looked up by: without the provider that litellm is told of by a prefix."""
    name = str(model.model)
    return name.rpartition("/")[2] if "/" in name and (model.is_litellm or _maker(type(model)) is _litellm) else name


def _read(call: LLMCall, model: Any, dialect: Dialect, messages: Any, tools: Any, response_model: Any) -> None:
    call.input = [messages] if isinstance(messages, str) else list(messages)
    # Read where pydantic keeps them: asking for what a model has not takes it a microsecond each.
    fields = model.__dict__
    params = {name: value for name in _READ_FIELDS if (value := fields.get(name)) is not None}
    params |= model.additional_params
    for name in dialect.limits or ("max_tokens",):
        value = fields.get(name)
        if isinstance(value, (int, float)) and value > 0:
            params[name] = int(value)
    if tools:
        params["tools"] = [*(params.get("tools") or ()), *_converted(model, tools)]
    formats = [wanted for wanted in (response_model, fields.get("response_format")) if wanted is not None]
    if formats:
        params["response_format"] = formats[0]
    facts = requests.facts_of(params)
    limit = facts.limit
    if dialect.default is not None and limit == dialect.default(str(model.model)):
        # Not the user's wish, but what the API asks for: as much as the model can write.
        limit, call.most_output_tokens = None, limit
    floor = _FLOOR
    if facts.wants_whole_answer:
        floor = limit or _WHOLE_FLOOR
    if facts.thinking_tokens:
        floor = max(floor, facts.thinking_tokens + _AFTER_THINKING)
    call.min_output_tokens = floor if limit is None else min(floor, limit)
    call.max_output_tokens = limit
    call.tools = [*facts.tools, *_descriptions(formats)]
    call.answers = facts.answers
    call.service_tier = facts.service_tier
    call.audio = facts.is_audio
    call.rounds = facts.rounds
    call.opaque = (
        facts.is_unbounded
        or is_opaque(call.input)
        or any(isinstance(message, Mapping) and message.get("files") for message in call.input)
        or bool(fields.get("builtin_tools"))
        or bool(fields.get("auto_chain") and getattr(model, "last_response_id", None) is not None)
        or bool(fields.get("auto_chain_reasoning"))
        or bool(fields.get("tool_search"))
    )


def _converted(model: Any, tools: Sequence[Any]) -> Sequence[object]:
    """Give the tools as they are sent: closed schemas are longer than those that CrewAI hands over."""
    convert = model._convert_tools_for_interference  # noqa: SLF001 - the base class's, for providers to override
    converted: Sequence[object] = convert(list(tools))
    return converted


def _descriptions(formats: Sequence[Any]) -> list[object]:
    """Give response models as CrewAI describes them, which may be longer than the SDK's own way."""
    if not formats:
        return []
    from crewai.utilities.pydantic_schema_utils import generate_model_description  # noqa: PLC0415 - seldom asked for

    return [generate_model_description(wanted) for wanted in formats if isinstance(wanted, type)]


def limited(model: Any, dialect: Dialect, limit: int) -> dict[str, object]:
    """Give the fields of ``model`` as they have to be for ``limit`` to be sent."""
    fields: dict[str, object] = {}
    given = [name for name in dialect.limits if model.__dict__.get(name) is not None]
    fields |= dict.fromkeys(given or [dialect.unset], limit)
    own = model.additional_params
    if own:
        lowered = _lowered(own, limit)
        if lowered != own:
            fields["additional_params"] = lowered
    return fields


def _lowered(params: Mapping[str, Any], limit: int) -> dict[str, Any]:
    return {
        key: limit
        if key in requests.LIMIT_KEYS
        else _lowered(value, limit)
        if key in {"extra_body", "model_kwargs", "options", "generation_config"} and isinstance(value, Mapping)
        else value
        for key, value in params.items()
    }
