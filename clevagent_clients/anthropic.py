"""What a request to Anthropic's API is, by its path and its JSON: what it costs at most, and where its output limit goes.

Messages and the old text completions are priced. Batches, and agents that run at Anthropic, tell nothing that a bound could be made
from. Everything else costs nothing by the token: lists, files, token counts. Checked with anthropic 0.69, 0.73 and 2.12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Not public, and what every client derives from since the SDKs are generated: the one place through which all requests go.
from anthropic._base_client import AsyncAPIClient, SyncAPIClient

from clevagent_clients.clients import Clients
from clevagent_clients.plans import JsonPlan, UnpricedPlan, begin, describe, mappings
from clevagent_providers.answers import MessagesReader
from clevagent_providers.requests import has_key

_PRICED = re.compile(r"(?:^|/)(messages|complete)$")
_FREE = re.compile(
    r"(?:^|/)(?:messages/count_tokens|agents(?:/[^/]+)?|files|sessions/[^/]+(?:/resources)?"
    r"|(?:environments|memory_stores|organizations|skills|tunnels|user_profiles|vaults)(?:/.*)?|[^?]*/(?:archive|cancel|pause))$"
)
"""What keeps something, changes a setting, or ends something: no model runs."""
_STANDARD = frozenset({None, "standard", "global", "not_available"})
_BILLERS = {
    "AnthropicBedrock": "aws",
    "AsyncAnthropicBedrock": "aws",
    "AnthropicVertex": "google",
    "AsyncAnthropicVertex": "google",
}


def plan(client: Any, options: Any) -> JsonPlan | UnpricedPlan | None:
    """Read a request: see :class:`~clevagent_clients.clients.Plan`; ``None`` where it costs nothing."""
    begun = begin(options, priced=_PRICED, free=_FREE)
    if not isinstance(begun, tuple):
        return begun
    kind, body = begun
    return _message(client, body) if kind == "messages" else _completion(client, body)


def _message(client: Any, body: dict[str, Any]) -> JsonPlan | UnpricedPlan:
    others = ["fallbacks"] if body.get("fallbacks") else []
    others += ["an advisor"] if any(str(tool.get("type")).startswith("advisor") for tool in mappings(body.get("tools"))) else []
    if others:
        return UnpricedPlan(f"/v1/messages with {' and '.join(others)}", "another model may write in it, with limits of its own")
    system, messages = body.get("system"), body.get("messages")
    items = [] if system is None else [system]
    items += messages if isinstance(messages, (list, tuple)) else []
    rest = {key: value for key, value in body.items() if key not in {"system", "messages", "n"}}
    model = _model(body)
    management = body.get("context_management")
    edits = mappings(management.get("edits")) if isinstance(management, Mapping) else []
    # Then the model is called once more, with all that there is, and writes a summary.
    compacts = any(str(edit.get("type")).startswith("compact") for edit in edits)
    call = describe(model, items, rest, provider=_biller(client, model), answers=2 if compacts else None, is_unbounded=compacts)
    # Anthropic keeps in its cache, at up to twice the price, only what is marked for it.
    call.writes_cache = has_key(body, "cache_control")
    return JsonPlan(call, body, MessagesReader, limit_key="max_tokens")


def _completion(client: Any, body: dict[str, Any]) -> JsonPlan:
    prompt = body.get("prompt")
    rest = {key: value for key, value in body.items() if key not in {"prompt", "n"}}
    model = _model(body)
    call = describe(model, [] if prompt is None else [prompt], rest, provider=_biller(client, model))
    return JsonPlan(call, body, MessagesReader, limit_key="max_tokens_to_sample")


def _model(body: dict[str, Any]) -> str:
    name = str(body.get("model") or "")
    # These cost more than the price list knows (six times for speed="fast"): such a model has a price of its own, or none.
    dearer = [f"{key}={body[key]}" for key in ("speed", "inference_geo") if body.get(key) not in _STANDARD]
    return "/".join([*dearer, name])


def _biller(client: Any, model: str) -> str | None:
    if "=" in model:
        return None  # no list has a price for that, and none may take it for the plain model
    return next((biller for base in type(client).__mro__ if (biller := _BILLERS.get(base.__name__)) is not None), "anthropic")


clients = Clients((SyncAPIClient, AsyncAPIClient), plan)
