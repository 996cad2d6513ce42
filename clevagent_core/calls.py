"""What adapters say to the core: a call that is about to be made, what it used, and one sign of progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Self

from clevagent_core.errors import UsageError


class Path(str):
    """Names of what is inside each other, outermost first, written with slashes: ``researcher/model``."""

    __slots__ = ("parts",)

    parts: tuple[str, ...]

    def __new__(cls, parts: Sequence[str]) -> Self:
        """Write them."""
        made = super().__new__(cls, "/".join(parts))
        made.parts = tuple(parts)
        return made

    def __reduce__(self) -> tuple[type[Path], tuple[tuple[str, ...]]]:
        """Survive pickling with all parts."""
        return type(self), (self.parts,)


def path(names: Sequence[str]) -> str | None:
    """Name what is inside each other; ``None`` for nothing."""
    if len(names) <= 1:
        return names[0] if names else None
    return Path(names)


def parts_of(name: str | None) -> tuple[str, ...]:
    """Give the names in a path; a name that is none stands for itself."""
    return () if name is None else name.parts if isinstance(name, Path) else (name,)


@dataclass(slots=True, kw_only=True)
class LLMCall:
    """One model call that is about to be sent.

    Built by an adapter for each attempt; read by guards and by the providers of prices and bounds. Nothing in it is sent
    anywhere.
    """

    model: str
    """The model's name as the request carries it; the name that prices are looked up by."""
    input: Sequence[object] = ()
    """What is sent, one item a message: a ``str``, or any nesting of ``str``, numbers, ``dict``, ``list`` and ``tuple``.
    Items are compared with ``==`` to find the part of a history that was priced before, so give the same objects again."""
    tools: Sequence[object] = ()
    """Schemas sent beside the messages (tools, response formats): they are billed as input too."""
    max_output_tokens: int | None = None
    """The largest output limit that the request may carry, for one answer; ``None`` when it carries none."""
    min_output_tokens: int = 256
    """With ``clamp``: the smallest limit worth sending. Below it the call is refused."""
    most_output_tokens: int | None = None
    """With ``clamp``: what the model can write at most, when that is known."""
    clamp: bool = False
    """Whether the caller sends the limit that :class:`~clevagent_core.tickets.Ticket` grants."""
    answers: int = 1
    """How many answers are asked for (``n``); each may be as long as the limit."""
    provider: str | None = None
    """Who bills it, as genai-prices names it (``openai``, ``anthropic``); a hint, not a condition."""
    opaque: bool = False
    """True when something is sent whose tokens cannot be bounded from text (an image, a file, a stored prompt): the input then
    counts as the whole context window."""
    audio: bool = False
    """True when sound may be sent or answered, which can cost many times what text does. What is opaque may hold some."""
    writes_cache: bool = True
    """False where the request asks its provider to keep nothing in a cache, so that what that costs cannot be billed."""
    rounds: int = 1
    """How often the model may read what is opaque: once more for each use of a tool that its provider runs."""
    context_window: int | None = None
    """The model's context window where the caller knows it: no bound is larger. Else what is opaque counts as the price list's."""
    service_tier: str | None = None
    """The provider's service tier, where the request names one."""
    node: str | None = None
    """The node, agent or task it is made in, for ``Budget(node=...)`` and the summary: a :class:`Path` where they are nested."""
    tool: str | None = None
    """The tool it is made in, for ``Budget(tool=...)`` and the summary; a :class:`Path`, as for ``node``."""
    thread_id: str | None = None
    """The conversation it belongs to, for ``Budget(per="thread")``."""
    timeout_s: float | None = None
    """After how many seconds without an answer whoever sends it gives up, where that is known: until then it is not stalled."""
    seen: object = field(default=None, compare=False, repr=False)
    """For the provider of bounds: what it already knew of this history when it was asked."""
    began: dict[object, int] | None = field(default=None, compare=False, repr=False)
    """For loop guards: how many steps each had seen when this call began."""


@dataclass(slots=True, kw_only=True)
class ToolCall:
    """One tool call that is about to be run."""

    tool: str
    """The tool's name."""
    arguments: object = None
    """What it is called with; stays in the process."""
    node: str | None = None
    """The node, agent or task it is made in: a :class:`Path` where they are nested."""
    inside: str | None = None
    """The tool it is made in; a :class:`Path`, as for ``node``."""
    thread_id: str | None = None
    """The conversation it belongs to."""
    timeout_s: float | None = None
    """After how many seconds it is given up, where that is known: until then it is not stalled."""
    began: dict[object, int] | None = field(default=None, compare=False, repr=False)
    """For loop guards: how many steps each had seen when this call began."""


Call = LLMCall | ToolCall


@dataclass(slots=True, kw_only=True)  # not frozen: that would double the cost of making one, which every call does
class Usage:
    """What one model call used, as the provider reported it, in tokens.

    The detail fields lie *inside* the totals: ``cache_read_tokens + cache_write_tokens <= input_tokens``, and
    ``reasoning_tokens <= output_tokens``.

    Raises:
        UsageError: a field is negative, or is no whole number.

    """

    input_tokens: int = 0
    """All input tokens, cached ones included."""
    output_tokens: int = 0
    """All output tokens, reasoning included."""
    cache_read_tokens: int = 0
    """Input tokens that were read from the provider's cache."""
    cache_write_tokens: int = 0
    """Input tokens that were written to the provider's cache, whatever their time to live."""
    cache_write_1h_tokens: int = 0
    """Those of ``cache_write_tokens`` that were written to live for an hour."""
    reasoning_tokens: int = 0
    """Output tokens that the user does not see."""
    input_audio_tokens: int = 0
    """Input tokens that were audio."""
    output_audio_tokens: int = 0
    """Output tokens that were audio."""

    def __post_init__(self) -> None:
        """Refuse what no provider can mean, so that a ledger is never credited by a broken report."""
        try:
            # One comparison for all of them: integers combined by "or" are negative if any of them is.
            if (
                self.input_tokens
                | self.output_tokens
                | self.cache_read_tokens
                | self.cache_write_tokens
                | self.cache_write_1h_tokens
                | self.reasoning_tokens
                | self.input_audio_tokens
                | self.output_audio_tokens
            ) >= 0:
                return
        except TypeError:
            pass  # one of them is no integer: it is named below
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UsageError(
                    f"Usage({name}={value!r}) is not a token count: counts are whole numbers of at least 0. "
                    "The call stays charged at its upper bound until usage that can be true is given."
                )


_NOTHING: Mapping[str, object] = MappingProxyType({})


class UnusableUsage(ValueError):
    """A provider reported something that cannot be a token count."""


@dataclass(slots=True, kw_only=True)  # not frozen, as Usage is not: every node makes one
class Step:
    """One sign of progress: a finished call, node or task, or a ``ping()``. Not to be changed: observers share it."""

    kind: Literal["llm_call", "tool_call", "node", "task", "ping"]
    """What was finished."""
    name: str = ""
    """The model's, tool's, node's or task's name; for a ping its status."""
    detail: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    """What else is told; for a ping its message and meta."""
