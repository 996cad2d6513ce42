"""What a loopback provider is told to answer, and what it remembers of each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clevagent_core.errors import UsageError

Kind = Literal["answer", "error", "hang", "drop"]

_OK = 200
_FIRST_ERROR = 400
_LAST_STATUS = 599


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one request is answered with. Immutable, so one reply can serve any number of requests at once.

    Raises:
        UsageError: a count or a time is negative, ``chunks`` is below 1, the status is neither 200 nor an error, or two of
            an error status, ``hang`` and ``drop`` are asked for at once.

    """

    text: str = "ok"
    """The answer's text, the same for each of ``n`` answers; also beside ``tool_calls`` (``""`` for none). A request with a
    response format needs text that fits it."""
    tool_calls: Sequence[tuple[str, Mapping[str, object]]] = ()
    """The tools that the answer calls: name and arguments."""
    status: int = _OK
    """The HTTP status; 400 and above is an error, which bills nothing."""
    error_message: str | None = None
    """What an error says; a sentence with the status when left out."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """More headers of the response, for example ``{"Retry-After": "1"}``."""
    usage: bool = True
    """Whether the answer tells its usage. It is billed either way."""
    input_tokens: int | None = None
    """Bill this many input tokens for the request, whatever was sent."""
    output_tokens: int | None = None
    """Bill this many output tokens for the request (all ``n`` answers together), whatever its limit."""
    cached_tokens: int = 0
    """How many of the input tokens are told as read from the cache (at most all); they are billed like the others."""
    reasoning_tokens: int = 0
    """How many of the output tokens are told as reasoning (at most all)."""
    delay_s: float = 0
    """Real seconds before the answer; ``close()`` cuts them short."""
    hang: bool = False
    """Never answer: the request waits until the client goes away or the provider is closed."""
    drop: Literal["before", "middle"] | None = None
    """Close the connection before the first byte of the answer, or after half of its body or of its stream's events."""
    chunks: int = 2
    """How many pieces a streamed text, or a streamed tool call's arguments, come in: at most one for each character."""
    chunk_delay_s: float = 0
    """Real seconds between the events of a stream; with 0 they are sent together."""

    def __post_init__(self) -> None:
        """Refuse what cannot be played."""
        for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "delay_s", "chunk_delay_s"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UsageError(f"Reply({name}={value!r}) is below zero, which no provider can do. Give at least 0.")
        if self.chunks < 1:
            raise UsageError(f"Reply(chunks={self.chunks!r}) would be a stream without text. Give at least 1.")
        if self.status != _OK and not _FIRST_ERROR <= self.status <= _LAST_STATUS:
            raise UsageError(f"Reply(status={self.status!r}) is neither an answer nor an error. Give 200, or 400 to 599.")
        if (self.status != _OK) + self.hang + (self.drop is not None) > 1:
            raise UsageError(
                f"Reply(status={self.status!r}, hang={self.hang!r}, drop={self.drop!r}) asks for several faults at once, so "
                "it is not clear whether the request is billed. Give one of an error status, hang and drop."
            )

    @property
    def kind(self) -> Kind:
        """Which of the four ends a request can meet this is."""
        if self.hang:
            return "hang"
        if self.drop is not None:
            return "drop"
        return "answer" if self.status == _OK else "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedRequest:
    """One request that a loopback provider received, and what it was billed for it."""

    number: int
    """Which request it was since the start or the last ``reset()``, from 1."""
    path: str
    """Its path, without the query."""
    body: dict[str, Any]
    """Its JSON as parsed; empty where it was none. Do not change it."""
    model: str
    """The model that it names, or ``""``."""
    kind: Kind
    """What the provider set out to do with it: a client that goes away first changes nothing here, nor on the bill."""
    status: int | None
    """The HTTP status of the response; ``None`` where none was sent (``hang``, ``drop="before"``)."""
    billed_input_tokens: int
    """Input tokens on the bill, cached ones included."""
    billed_output_tokens: int
    """Output tokens on the bill, of all answers together, reasoning included."""
    billed_usd_pico: int
    """The bill, in pico-USD (10**-12 US dollars)."""

    @property
    def answered(self) -> bool:
        """Whether it was given a whole answer, as far as the provider is concerned."""
        return self.kind == "answer"
