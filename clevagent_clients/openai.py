"""What a request to OpenAI's API is, by its path and its JSON: what it costs at most, and where its output limit goes.

Chat completions, old completions, responses and embeddings are priced. What else runs a model (images, sound, video, batches,
assistants, fine-tuning, agents) tells nothing that a bound could be made from. Everything else costs nothing by the token: lists,
files, moderations, token counts. Checked with openai 1.109, 2.54 and 3.54.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Not public, and what every client derives from since the SDKs are generated: the one place through which all requests go.
from openai._base_client import AsyncAPIClient, SyncAPIClient

from clevagent_clients.clients import Clients
from clevagent_clients.plans import JsonPlan, UnpricedPlan, begin, describe, mappings
from clevagent_core.bounds import content_bound
from clevagent_core.calls import LLMCall
from clevagent_providers.answers import ChatReader, Reader, ResponsesReader

_PRICED = re.compile(r"(?:^|/)(chat/completions|completions|responses|embeddings)$")
_FREE = re.compile(
    r"(?:^|/)(?:moderations|responses/input_tokens|agents|assistants|evals|threads|audio/voice_consents|files"
    r"|(?:assistants|evals|chat/completions|audio/voice_consents)/[^/]+|agents/(?!sessions$|automations$)[^/]+|threads/(?!runs$)[^/]+"
    r"|evals/[^/]+/runs/[^/]+|threads/[^/]+/(?:messages(?:/[^/]+)?|runs/[^/]+)|agents/environments/.*|fine_tuning/alpha/graders/validate"
    r"|containers(?:/[^/]+/files)?|(?:conversations|skills|uploads|vaults|vector_stores|webhook_endpoints)(?:/.*)?"
    r"|[^?]*/(?:cancel|pause|hangup|refer|reject))$|^/(?:v1/)?(?:organization|projects)/"
)
"""What keeps something, changes a setting, or ends something: no model runs, or one that is free."""
_REASONING = re.compile(r"(?:^|[/:])(?:o\d|gpt-(?:[5-9]|\d\d)|codex)")
"""Models that refuse ``max_tokens``; also behind gateways (``openai/o3``) and fine-tuned (``ft:o4-mini:...``)."""
_LONG = re.compile(r"(?:^|[/:])(?:chatgpt-4o|gpt-4o|gpt-4\.1)(?!-2024-05-13|-realtime)")


def plan(client: Any, options: Any) -> JsonPlan | UnpricedPlan | None:
    """Read a request: see :class:`~clevagent_clients.clients.Plan`; ``None`` where it costs nothing."""
    begun = begin(options, priced=_PRICED, free=_FREE)
    if not isinstance(begun, tuple):
        return begun
    kind, body = begun
    if body.get("models"):  # OpenRouter's way to name others that may answer
        return UnpricedPlan(f"/{kind} with fallbacks", "another model may answer it")
    if kind == "chat/completions":
        return _chat(client, body)
    if kind == "responses":
        return _response(client, body)
    return _completion(client, body) if kind == "completions" else _embeddings(client, body)


class _LimitedPlan(JsonPlan):
    """A request for text, whose limit and question for usage not every server takes."""

    _has_flipped = False
    _added: int | None = None
    """The limit that was sent last, where nobody had asked for one."""

    def __init__(self, client: Any, call: LLMCall, body: dict[str, Any], reader: Callable[[], Reader], **given: Any) -> None:
        """Plan a request: see :class:`JsonPlan`."""
        super().__init__(call, body, reader, **given)
        self._server = _server_of(client)
        call.most_output_tokens = _learnt.get((self._server, call.model)) or _most(call.model)

    def body(self, limit: int | None) -> Mapping[str, Any]:
        """See :meth:`JsonPlan.body`."""
        self._added = limit if self.call.max_output_tokens is None else None
        return super().body(limit)

    def adapt(self, error: Exception) -> bool:
        """See :meth:`clevagent_clients.clients.Plan.adapt`. Such a refusal is not billed."""
        if getattr(error, "status_code", None) not in {400, 422}:
            return False
        text = str(error)
        if self.hides_usage and "stream_options" in text:
            self.hides_usage = False
            del self._body["stream_options"]
            return True
        key = self._limit_key
        if key is None or self._added is None:
            return False
        if _TOO_LARGE.search(text) and (key in text or "context" in text):
            return self._lower(is_for_good="context" not in text)
        if key not in text or key not in _OTHER:
            return False
        # A model that knows only the other name of it.
        self._limit_key = None if self._has_flipped else _OTHER[key]
        self._has_flipped, flipped = True, self._has_flipped
        return not flipped

    def _lower(self, *, is_for_good: bool) -> bool:
        """Ask for less: the model can write less than others of its family, or with this prompt its window is nearly full."""
        most = (self._added or 0) // 4
        if most < self.call.min_output_tokens:
            return False
        self.call.most_output_tokens = most
        if is_for_good:
            if len(_learnt) >= _LEARNT:
                _learnt.clear()
            _learnt[self._server, self.call.model] = most
        return True


_LEARNT = 1000
_learnt: dict[tuple[str, str], int] = {}
"""What models of servers took, which were refused more: not to be refused each time."""
_TOO_LARGE = re.compile(r"too large|at most|maximum|exceed|<=|less than")
_OTHER = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


def _chat(client: Any, body: dict[str, Any]) -> JsonPlan:
    messages = body.get("messages")
    items = _items(messages)
    rest = {key: value for key, value in body.items() if key != "messages"}
    model = _model(client, body)
    # An answer in sound is referred to by its id alone.
    refers = any(isinstance(item, Mapping) and item.get("audio") is not None for item in items)
    call = describe(model, items, rest, provider=_biller(client), is_unbounded=refers)
    _add_prediction(call, body)
    hides = _ask_for_usage(body)
    # Both names are taken by OpenAI itself, but for the models that refuse one; other servers may know only the old one.
    is_new = "openai.com" in _server_of(client) or _REASONING.search(model) is not None
    return _LimitedPlan(
        client, call, body, ChatReader, limit_key="max_completion_tokens" if is_new else "max_tokens", hides_usage=hides
    )


def _completion(client: Any, body: dict[str, Any]) -> JsonPlan:
    prompts = _prompts(body.get("prompt"))
    rest = {key: value for key, value in body.items() if key not in {"prompt", "best_of", "n"}}
    made = [count for key in ("n", "best_of") if type(count := body.get(key)) is int]
    call = describe(_model(client, body), prompts, rest, provider=_biller(client), answers=max([1, *made]) * max(1, len(prompts)))
    return _LimitedPlan(client, call, body, ChatReader, limit_key="max_tokens", hides_usage=_ask_for_usage(body))


def _response(client: Any, body: dict[str, Any]) -> JsonPlan | UnpricedPlan:
    if any(tool.get("type") == "image_generation" for tool in mappings(body.get("tools"))):
        return UnpricedPlan("/responses with image_generation", "another model makes the images")
    items = [body["instructions"]] if body.get("instructions") is not None else []
    items += _items(body.get("input"))
    rest = {key: value for key, value in body.items() if key not in {"instructions", "input", "n"}}
    model = _model(client, body)
    call = describe(model, items, rest, provider=_biller(client))
    return _LimitedPlan(client, call, body, ResponsesReader, limit_key="max_output_tokens")


def _embeddings(client: Any, body: dict[str, Any]) -> JsonPlan:
    # Models for embeddings are listed by name for OpenAI and Azure only.
    provider = _biller(client) or "openai"
    call = LLMCall(model=_model(client, body), input=_prompts(body.get("input")), max_output_tokens=0, provider=provider)
    return JsonPlan(call, body, ChatReader)


def _model(client: Any, body: Mapping[str, Any]) -> str:
    # An Azure client may name its deployment once for all; what the body names is not read there.
    return str(getattr(client, "_azure_deployment", None) or body.get("model") or "")


@functools.lru_cache(maxsize=1024)
def _most(model: str) -> int | None:
    """Tell what a model can write at least, where nobody asked for a limit: more of it is sent with as little reason as less.

    By OpenAI's pages of its models (November 2026). Of others nobody knows; they get what ``assume_output_tokens`` says.
    """
    if _REASONING.search(model) is not None:
        return 16_384 if "chat" in model else 32_768
    return 16_384 if _LONG.search(model) is not None else None


def _biller(client: Any) -> str | None:
    # Many providers are reached through OpenAI's client; the model's own name tells more.
    return "azure" if _is_azure(type(client).__mro__) else None


@functools.lru_cache(maxsize=64)
def _is_azure(bases: tuple[type, ...]) -> bool:
    return any("AzureOpenAI" in base.__name__ for base in bases)


def _server_of(client: Any) -> str:
    """Return the URL of a client's server as text; httpx puts it together anew for everyone who asks."""
    url = client.base_url
    known = _servers.get(id(url))
    if known is None or known[0] is not url:
        if len(_servers) >= _SERVERS:
            _servers.clear()
        known = _servers[id(url)] = url, str(url)
    return known[1]


_SERVERS = 64
_servers: dict[int, tuple[object, str]] = {}
"""The URLs of servers as text, by identity: each is kept beside its text, so that no other can have its id."""


def _items(messages: object) -> list[object]:
    if isinstance(messages, (list, tuple)):
        return list(messages)
    return [] if messages is None else [messages]


def _prompts(prompt: object) -> Sequence[object]:
    """Give each prompt as text. One of token ids has as many tokens as ids, and so as many as this many letters at most."""
    if not isinstance(prompt, (list, tuple)):
        return [] if prompt is None else [prompt]
    if prompt and isinstance(prompt[0], int):
        return ["x" * len(prompt)]
    return ["x" * len(part) if isinstance(part, (list, tuple)) else part for part in prompt]


def _add_prediction(call: LLMCall, body: Mapping[str, Any]) -> None:
    """What was predicted and not written is billed as output, beside the limit: more answers of that length cover it."""
    prediction = body.get("prediction")
    if prediction is None:
        return
    tokens, limit = content_bound(prediction), call.max_output_tokens
    call.answers *= 2 if limit is None else 1 - (-tokens // limit)
    # Not clamped: the shorter the limit, the less would be covered.
    call.min_output_tokens = max(call.min_output_tokens, tokens) if limit is None else limit


def _ask_for_usage(body: dict[str, Any]) -> bool:
    """Let a stream tell its usage, in ``body``; tell whether the user has not asked for that."""
    if body.get("stream") is not True:
        return False
    options = body.get("stream_options")
    if isinstance(options, Mapping) and options.get("include_usage"):
        return False
    body["stream_options"] = {**options, "include_usage": True} if isinstance(options, Mapping) else {"include_usage": True}
    return True


clients = Clients((SyncAPIClient, AsyncAPIClient), plan)
