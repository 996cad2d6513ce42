"""What a request of an SDK's client costs at most, and how it is changed so that it fits: what every API's requests share."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clevagent_core.bounds import is_opaque
from clevagent_core.calls import LLMCall
from clevagent_core.errors import UsageError
from clevagent_providers.answers import Reader
from clevagent_providers.requests import LIMIT_KEYS, Facts, facts_of, whole


class JsonPlan:
    """A request whose JSON tells what it costs."""

    is_priced = True

    def __init__(
        self,
        call: LLMCall,
        body: dict[str, Any],
        reader: Callable[[], Reader],
        *,
        limit_key: str | None = None,
        hides_usage: bool = False,
    ) -> None:
        """Plan a request.

        Args:
            call: what it is, for guards.
            body: its JSON, as it would be sent.
            reader: makes what reads its answer.
            limit_key: where an output limit goes that nobody asked for.
            hides_usage: whether the body asks for usage that the user did not ask for.

        """
        self.call = call
        self.hides_usage = hides_usage
        self._body = body
        self._reader = reader
        self._limit_key = limit_key

    def body(self, limit: int | None) -> Mapping[str, Any]:
        """Write the JSON to send: every limit in it is lowered to ``limit``; where there is none, one is added."""
        body = self._body
        if not self.call.clamp or limit is None or limit == self.call.max_output_tokens:
            return body
        present = [key for key in LIMIT_KEYS if whole(body.get(key)) is not None]
        if present:
            return {**body, **{key: min(body[key], limit) for key in present}}
        return {**body, self._limit_key: limit} if self._limit_key is not None else body

    def reader(self) -> Reader:
        """Make what reads the answer."""
        return self._reader()

    def adapt(self, error: Exception) -> bool:  # noqa: ARG002 - what others look at
        """Nothing was added that could be refused."""
        return False

    def explain(self, error: UsageError) -> UsageError:
        """The core's words fit."""
        return error


class UnpricedPlan:
    """A request that costs something which nothing in it tells: an image, a sound, a batch of calls that are made later, another model.

    Where money or tokens are limited it is refused. Else it counts as one call, of a model that is named after the endpoint.
    """

    is_priced = False
    hides_usage = False

    def __init__(self, what: str, why: str = "it is not billed by the tokens of its text, or runs models later") -> None:
        """Plan a request to a path, or with something; ``why`` says in words why nothing tells its cost."""
        self._what = what
        self._why = why
        self.call = LLMCall(model=f"POST {what}", max_output_tokens=0, opaque=True)

    def body(self, limit: int | None) -> None:
        """Nothing in it can be lowered."""

    def reader(self) -> None:
        """Its answer tells nothing."""

    def adapt(self, error: Exception) -> bool:  # noqa: ARG002 - what others look at
        """Nothing was added that could be refused."""
        return False

    def explain(self, error: UsageError) -> UsageError:
        """Say which endpoint it is, and what can be done."""
        if self.call.model not in str(error):
            return error
        return UsageError(
            f"What a POST to {self._what} costs cannot be told before it is sent ({self._why}), so a ceiling in US dollars or tokens "
            "could not be held and it was refused. Send it with a client that is "
            "not guarded and record it with clevagent.log_cost(cost_usd=...); or let all of unknown price pass, counted as calls that "
            'cost $0, with clevagent.init(unknown_price="allow").'
        )


def describe(
    model: str,
    items: Sequence[object],
    rest: Mapping[str, Any],
    *,
    provider: str | None = None,
    answers: int | None = None,
    is_unbounded: bool = False,
) -> LLMCall:
    """Say what is about to be sent.

    Args:
        model: the name in the request.
        items: its messages, one each.
        rest: its other parameters.
        provider: who bills it, where that is certain.
        answers: how many answers are made, where ``n`` does not tell.
        is_unbounded: whether the messages refer to what is not in them.

    """
    facts: Facts = facts_of(rest)
    limit = facts.limit
    return LLMCall(
        model=model,
        input=items,
        tools=facts.tools,
        max_output_tokens=limit,
        min_output_tokens=facts.least_output_tokens(limit),
        # A limit inside of something else (a gateway's options) cannot be lowered from here.
        clamp=limit is None or any(rest.get(key) == limit for key in LIMIT_KEYS),
        answers=facts.answers if answers is None else answers,
        provider=provider,
        opaque=is_unbounded or facts.is_unbounded or is_opaque(items),
        service_tier=facts.service_tier,
        rounds=facts.rounds,
        audio=facts.is_audio,
    )


def begin(options: Any, *, priced: re.Pattern[str], free: re.Pattern[str]) -> tuple[str, dict[str, Any]] | UnpricedPlan | None:
    """Look at what a client is about to send: which of the ``priced`` endpoints it goes to, and its JSON.

    ``None`` where it costs nothing: all but POST, and the ``free`` endpoints. An endpoint that nobody knows may cost anything.
    """
    if options.method.lower() != "post":
        return None
    path, kind = _endpoint_of(str(options.url), priced, free)
    if kind == "free":
        return None
    body = None if kind is None else json_body(options)
    return UnpricedPlan(path) if kind is None or body is None else (kind, body)


@functools.lru_cache(maxsize=1024)
def _endpoint_of(url: str, priced: re.Pattern[str], free: re.Pattern[str]) -> tuple[str, str | None]:
    """Return the path of ``url``, and the priced endpoint that it is, ``free``, or ``None`` for neither."""
    path = re.sub(r"^https?://[^/]*", "", url).partition("?")[0].rstrip("/")
    found = priced.search(path)
    if found is not None:
        return path, found[1]
    return path, "free" if free.search(path) is not None else None


def mappings(value: object) -> list[Mapping[str, Any]]:
    """Give those parts of a list that are objects."""
    return [part for part in value if isinstance(part, Mapping)] if isinstance(value, (list, tuple)) else []


def json_body(options: Any) -> dict[str, Any] | None:
    """Find the JSON that a client is about to send, ``extra_body`` included; ``None`` where it sends something else."""
    data = options.json_data
    extra = options.extra_json
    content = getattr(options, "content", None)
    if data is None and isinstance(content, (bytes, bytearray)) and not extra:
        try:
            data = json.loads(content)
        except ValueError:
            return None
    if options.files or not isinstance(data, Mapping):
        return None
    return {key: value for key, value in {**data, **(extra or {})}.items() if type(value).__name__ not in _NOT_SENT}


_NOT_SENT = frozenset({"Omit", "NotGiven"})
"""The SDKs' marks for a parameter that is left out."""
