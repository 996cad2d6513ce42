"""How each provider's LangChain model takes an output limit, and where its SDK keeps its retries.

The wrong key is refused by some providers and ignored by others, so a limit is only sent where the key is known (measured):
``max_tokens`` for OpenAI chat, Anthropic and Mistral, ``max_completion_tokens`` for OpenAI Responses, ``max_output_tokens`` for
Gemini. Ollama takes ``options``, and has no price to limit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage

from clevagent_core.calls import LLMCall
from clevagent_core.tickets import Ticket
from clevagent_langchain.messages import items_of
from clevagent_providers import requests
from clevagent_providers.transports import check_transport

_TIMEOUTS = ("request_timeout", "default_request_timeout", "timeout")
"""What models call the time after which they give an answer up."""


def _timeout_of(model: BaseChatModel) -> float | None:
    # Not by getattr, which takes long to say that a model has no such field.
    fields = model.__dict__
    for name in _TIMEOUTS:
        value = fields.get(name)
        if value is not None:
            return requests.seconds_of(value)
    return None


class Dialect:
    """A model of an unknown provider: it is described and metered, but no limit is sent and its retries stay its own."""

    is_known = False
    provider: str | None = None

    def model_name(self, model: BaseChatModel) -> str:
        """The name that the request carries."""
        for attribute in ("model_name", "model", "model_id"):
            name = getattr(model, attribute, None)
            if isinstance(name, str) and name:
                return name
        return type(model).__name__

    def params(self, model: BaseChatModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the request that matter here: the model's own, then those of this call."""
        params: dict[str, Any] = {}
        fields = model.__dict__  # where pydantic keeps them
        for name in _own_params(type(model)):
            value = fields.get(name)
            if value:
                params[name] = value
        own = params.get("model_kwargs")
        if own:
            params.update(own)
        params.update(kwargs)
        return params

    def describe(self, model: BaseChatModel, messages: Sequence[BaseMessage], kwargs: Mapping[str, Any]) -> LLMCall:
        """Say what the model is about to send."""
        params = self.params(model, kwargs)
        facts = requests.facts_of(params)
        limit = self._asked(model, facts.limit)
        items, is_opaque = items_of(messages)
        own_name = self.model_name(model)
        name = requests.model_of(params) or own_name
        call = LLMCall(
            model=name,
            input=items,
            max_output_tokens=limit,
            clamp=self.is_known,
            provider=self.provider,
            service_tier=facts.service_tier,
            timeout_s=_timeout_of(model),
        )
        if limit is None and name == own_name:
            call.most_output_tokens = self._most(model)
        if is_opaque or not facts.is_plain:
            call.tools, call.answers, call.rounds, call.audio = facts.tools, facts.answers, facts.rounds, facts.is_audio
            call.min_output_tokens = facts.least_output_tokens(limit)
            call.opaque = facts.is_unbounded or is_opaque
            if call.opaque:
                call.context_window = _profile(model).get("max_input_tokens")
        return call

    def with_limit(self, model: BaseChatModel, kwargs: dict[str, Any], ticket: Ticket, call: LLMCall) -> dict[str, Any]:
        """Give the call's keywords with the output limit that was granted."""
        limit = ticket.max_output_tokens
        if not self.is_known or limit is None:
            return kwargs
        if limit == call.max_output_tokens and kwargs.keys().isdisjoint(_LIMITING) and not _has_rest(model):
            return kwargs  # it is the constructor's own
        return self.set_limit(model, kwargs, limit)

    def set_limit(self, model: BaseChatModel, kwargs: dict[str, Any], limit: int) -> dict[str, Any]:
        """Put ``limit`` where this provider reads it, and take every other limit out of the way."""
        return kwargs

    def with_stream_usage(self, model: BaseChatModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the call's keywords so that a stream tells its usage."""
        return kwargs

    def take_over_retries(self, model: BaseChatModel, copy: BaseChatModel) -> int:
        """Switch the SDK's retries off in ``copy``; tell how many there were."""
        return 0

    def _asked(self, model: BaseChatModel, limit: int | None) -> int | None:
        """Tell which limit the user asked for, given the one that would be sent."""
        return limit

    def _most(self, model: BaseChatModel) -> int | None:
        most = _profile(model).get("max_output_tokens")
        return most if type(most) is int and most > 0 else None


class OpenAIDialect(Dialect):
    """``BaseChatOpenAI`` and what derives from it (Azure, DeepSeek, xAI, ...)."""

    is_known = True

    def set_limit(self, model: BaseChatModel, kwargs: dict[str, Any], limit: int) -> dict[str, Any]:
        """See :meth:`Dialect.set_limit`. A limit of the call goes before the constructor's, except in ``extra_body``."""
        sent = _without_limits(model, kwargs)
        # The Responses API renames each of them in turn, and the last renamed is sent.
        sent["max_completion_tokens" if _uses_responses(model, kwargs) else "max_tokens"] = limit
        for key in (getattr(model, "model_kwargs", None) or {}).keys() & requests.LIMIT_KEYS:
            # Sent beside the other, and by some providers instead of it.
            sent[key] = limit
        return sent

    def with_stream_usage(self, model: BaseChatModel, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Ask for usage unless the user has said no: behind a base URL of one's own LangChain does not ask."""
        told = {"stream_usage", "stream_options"}
        own = getattr(model, "model_kwargs", None) or {}
        if getattr(model, "stream_usage", None) is not None or not (told.isdisjoint(own) and told.isdisjoint(kwargs)):
            return dict(kwargs)
        # The Responses API tells usage without being asked, and refuses the question.
        return dict(kwargs) if _uses_responses(model, kwargs) else {**kwargs, "stream_usage": True}

    def take_over_retries(self, model: BaseChatModel, copy: BaseChatModel) -> int:
        """The clients are made when the model is: give the copy clients of its own that share the connections."""
        retries = getattr(model, "max_retries", None)
        fields = copy.__dict__
        for root_name, name in (("root_client", "client"), ("root_async_client", "async_client")):
            # Whoever gives a client of their own gives its chat completions, and there is no root.
            root = fields.get(root_name) or getattr(fields.get(name), "_client", None)
            if root is None:
                continue
            check_transport(root, "guard(model)")
            if retries is None:
                retries = root.max_retries
            root = root.with_options(max_retries=0)
            if fields.get(root_name) is not None:
                fields[root_name] = root
            fields[name] = root.chat.completions
        fields["max_retries"] = 0
        return int(retries or 0)


class AnthropicDialect(Dialect):
    """``ChatAnthropic``."""

    is_known = True
    provider = "anthropic"

    def model_name(self, model: BaseChatModel) -> str:
        """See :meth:`Dialect.model_name`."""
        return str(getattr(model, "model", ""))

    def describe(self, model: BaseChatModel, messages: Sequence[BaseMessage], kwargs: Mapping[str, Any]) -> LLMCall:
        """See :meth:`Dialect.describe`. Anthropic keeps in its cache, at up to twice the price, only what is marked for it."""
        call = super().describe(model, messages, kwargs)
        own = (getattr(model, "model_kwargs", None), getattr(model, "extra_body", None))
        contents = [message.content for message in messages if type(message.content) is not str]
        call.writes_cache = requests.has_key((kwargs, own, contents), "cache_control")
        return call

    def set_limit(self, model: BaseChatModel, kwargs: dict[str, Any], limit: int) -> dict[str, Any]:
        """See :meth:`Dialect.set_limit`."""
        sent = _without_limits(model, kwargs)
        sent["max_tokens"] = limit
        return sent

    def take_over_retries(self, model: BaseChatModel, copy: BaseChatModel) -> int:
        """The clients are made when they are first used; those that were made already share their connections."""
        retries = int(getattr(model, "max_retries", 0) or 0)
        fields = copy.__dict__
        fields.pop("_client_params", None)
        for name in ("_client", "_async_client"):
            if name in fields:
                check_transport(fields[name], "guard(model)")
                fields[name] = fields[name].with_options(max_retries=0)
        fields["max_retries"] = 0
        return retries

    def _asked(self, model: BaseChatModel, limit: int | None) -> int | None:
        # Every request must carry a limit, so the model's own maximum stands in where the user gave none.
        return None if limit is not None and limit == _profile(model).get("max_output_tokens") else limit

    def _most(self, model: BaseChatModel) -> int | None:
        return getattr(model, "max_tokens", None)


class KeywordDialect(Dialect):
    """Models that take the limit as one keyword of the call."""

    is_known = True

    def __init__(self, key: str, provider: str) -> None:
        self._key = key
        self.provider = provider

    def set_limit(self, model: BaseChatModel, kwargs: dict[str, Any], limit: int) -> dict[str, Any]:
        """See :meth:`Dialect.set_limit`."""
        return {**_without_limits(model, kwargs), self._key: limit}

    def take_over_retries(self, model: BaseChatModel, copy: BaseChatModel) -> int:
        """These read ``max_retries`` when a call is made."""
        retries = getattr(model, "max_retries", None)
        if isinstance(retries, int):
            copy.__dict__["max_retries"] = 0
            return retries
        return 0


_DIALECTS: dict[str, Dialect] = {
    "langchain_openai": OpenAIDialect(),
    "langchain_anthropic": AnthropicDialect(),
    "langchain_mistralai": KeywordDialect("max_tokens", "mistral"),
    "langchain_google_genai": KeywordDialect("max_output_tokens", "google"),
}
_UNKNOWN = Dialect()


def dialect_of(model: BaseChatModel) -> Dialect:
    """Find how ``model`` takes its limits, by the package that its class, or one that it derives from, comes from."""
    for base in type(model).__mro__:
        dialect = _DIALECTS.get(base.__module__.partition(".")[0])
        if dialect is not None:
            return dialect
    return _UNKNOWN


_PARAMS = (
    "max_tokens", "max_output_tokens", "num_predict", "n", "extra_body", "model_kwargs", "service_tier", "thinking", "mcp_servers",
    "output_config", "container", "use_previous_response_id",
)  # fmt: skip


@functools.cache
def _own_params(model_class: type[BaseChatModel]) -> tuple[str, ...]:
    """Which parameters a class of models has: pydantic takes microseconds to say that an attribute is missing."""
    return tuple(name for name in _PARAMS if name in model_class.model_fields)


def _profile(model: BaseChatModel) -> Mapping[str, Any]:
    profile = getattr(model, "profile", None)
    return profile if isinstance(profile, Mapping) else {}


_LIMITING = frozenset({*requests.LIMIT_KEYS, "extra_body"})
"""Keywords of a call by which a limit may be set or taken off."""


def _has_rest(model: BaseChatModel) -> bool:
    return bool(getattr(model, "model_kwargs", None) or getattr(model, "extra_body", None))


def _uses_responses(model: BaseChatModel, kwargs: Mapping[str, Any]) -> bool:
    asks = getattr(model, "_use_responses_api", None)
    return asks is not None and bool(asks({**(getattr(model, "model_kwargs", None) or {}), **kwargs}))


def _without_limits(model: BaseChatModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    sent = {key: value for key, value in kwargs.items() if key not in requests.LIMIT_KEYS}
    extra = sent.get("extra_body")
    if extra is None:
        extra = getattr(model, "extra_body", None) or (getattr(model, "model_kwargs", None) or {}).get("extra_body")
    if isinstance(extra, Mapping) and any(key in extra for key in requests.LIMIT_KEYS):
        # It is merged into the body last, over every limit beside it.
        sent["extra_body"] = {key: value for key, value in extra.items() if key not in requests.LIMIT_KEYS}
    return sent
