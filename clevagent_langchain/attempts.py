"""What a guarded model does for one call: how it is described, asked for, sent, and read (see ``clevagent_core.attempts``)."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import var_child_runnable_config

from clevagent_core import default
from clevagent_core.attempts import Attempt
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.coverage import cover, uncover
from clevagent_core.frames import frame_of
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket
from clevagent_langchain.dialects import Dialect
from clevagent_langchain.failures import comes_from_a_callback
from clevagent_langchain.graphs import aopen_in_graph, open_in_graph, put_in_place
from clevagent_langchain.marks import root_run
from clevagent_langchain.results import Said, answer_of
from clevagent_langchain.usage import from_llm_output, from_metadata
from clevagent_providers import failures
from clevagent_providers.usage import add

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

Answer = TypeVar("Answer")

_inside: ContextVar[_Inside | None] = ContextVar("clevagent_langchain_inside", default=None)
"""The attempt that this context is inside of."""
_MUTE = "stream_usage"
"""What a provider has learnt nothing of: to tell the usage of a stream."""


@dataclass(frozen=True)
class Guard:
    """What a guarded model knows beside being a model."""

    max_retries: object
    """What the user's model has as ``max_retries``."""
    budgets: tuple[Budget, ...]
    watchdog: Watchdog | None
    """The watchdog it was guarded with; ``None`` for the process's own, whichever that is when a call is made."""
    dialect: Dialect
    retries: int
    """How many times a failed attempt is repeated."""
    lost: tuple[str, ...] = ()
    """The budgets that it was guarded with when it was written as JSON, where they cannot stand."""
    learnt: set[str] = field(default_factory=set)
    """What its provider has refused before."""

    def __deepcopy__(self, memo: object) -> Guard:
        """A copy of the model has the same budgets, and the same watchdog."""
        return self


class _Inside:
    """One attempt that goes on. What it has begun, and what outlives it, has this in its context for ever."""

    __slots__ = ("is_over", "model", "run_manager")

    def __init__(self, model: BaseChatModel, run_manager: Any) -> None:
        self.model = model
        self.run_manager = run_manager
        self.is_over = False

    def is_of(self, model: BaseChatModel, run_manager: Any) -> bool:
        if self.model is not model or self.is_over:
            return False
        return run_manager is None or (self.run_manager is not None and run_manager.run_id == self.run_manager.run_id)


def is_inside(model: BaseChatModel, run_manager: Any) -> bool:
    """Tell whether a guarded model's own method is running: some make ``_generate`` out of their ``_stream``, or the other way round.

    Only the same call counts as that. What a callback, or a task that outlives it, asks the same model is a call of its own.
    """
    inside = _inside.get()
    return inside is not None and inside.is_of(model, run_manager)


class Asking(Attempt[Ticket, Answer]):
    """One call of a guarded model."""

    failures = failures

    def __init__(
        self,
        model: BaseChatModel,
        guard: Guard,
        base: Callable[..., Any],
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: Any,
        kwargs: dict[str, Any],
    ) -> None:
        """Describe it. ``base`` is the method of the model's class that makes the request."""
        self.retries = guard.retries
        self._guard = guard
        self._model = model
        self._base = base
        self._messages = messages
        self._stop = stop
        self._kwargs = kwargs
        self._run_manager = run_manager
        self._inside = _Inside(model, run_manager)
        self._before: _Inside | None = None
        self._run, self._asks = _describe(model, guard, messages, kwargs, run_manager)

    def open(self) -> Ticket:
        """See :class:`Attempt`."""
        return open_in_graph(self._run, self._asks, self._guard.budgets)

    async def aopen(self) -> Ticket:
        """See :class:`Attempt`."""
        return await aopen_in_graph(self._run, self._asks, self._guard.budgets)

    def abandon(self) -> None:
        """See :class:`Attempt`."""
        self._run.abandon(self._asks)

    def enter(self, ticket: Ticket) -> None:
        """See :class:`Attempt`. What the SDK's client sends does not count again where that is guarded too."""
        if self._inside.is_over:
            self._inside = _Inside(self._model, self._run_manager)
        self._before = _inside.get()
        _inside.set(self._inside)
        cover(ticket)

    def leave(self, ticket: Ticket) -> None:
        """See :class:`Attempt`."""
        # Not by token: an asynchronous generator may be closed in another context than the one it ran in.
        _inside.set(self._before)
        uncover(ticket)

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """See :class:`Attempt`."""
        self._inside.is_over = True
        # What somebody's handler raised, whatever it looks like, tells nothing of the request.
        failures.fail(ticket, error, sent=True if comes_from_a_callback(error) else None)

    def end(self) -> None:
        """It is over: what is asked of the model from here on is no part of it."""
        self._inside.is_over = True

    def _sent(self, ticket: Ticket, kwargs: dict[str, Any]) -> Any:
        kwargs = self._guard.dialect.with_limit(self._model, kwargs, ticket, self._asks)
        return self._base(self._model, self._messages, stop=self._stop, **kwargs)


class Answering(Asking[ChatResult]):
    """One call that is answered whole."""

    def send(self, ticket: Ticket) -> ChatResult | Awaitable[ChatResult]:
        """See :class:`Attempt`."""
        # No part of the request, which is read from the other keywords.
        manager = manager_of(self._base, self._run_manager)
        sent: ChatResult | Awaitable[ChatResult] = self._sent(ticket, {**self._kwargs, **manager})
        return sent

    def settle(self, ticket: Ticket, answer: ChatResult) -> None:
        """See :class:`Attempt`."""
        ticket.settle_by(_usage_of, answer_of, answer)


def manager_of(base: Callable[..., Any], run_manager: Any) -> dict[str, Any]:
    """Give the keywords with which a method is told of the callbacks, if it wants to know."""
    return {"run_manager": run_manager} if run_manager is not None and _takes_run_manager(base) else {}


class Streaming(Asking[tuple[Any, ChatGenerationChunk | None]]):
    """One call that is answered in chunks, up to the first of them: what comes before it can be repeated, as the SDK would.

    The chunks after it are got by whoever streams (``next_of`` or ``anext_of``), who tells what they are (``note``), how it ended
    (``read`` or ``break_off``), and that it is over (``end``).
    """

    def __init__(self, *given: Any) -> None:
        """See :class:`Asking`."""
        super().__init__(*given)
        guard, kwargs = self._guard, self._kwargs
        asked = dict(kwargs) if _MUTE in guard.learnt else guard.dialect.with_stream_usage(self._model, kwargs)
        self._hides_usage = asked.keys() != kwargs.keys()
        """Whether the user has not asked for it."""
        if self._run_manager is not None:
            asked["run_manager"] = self._run_manager
        self._asked = asked
        self._parts: list[Mapping[str, Any]] = []
        self._said = Said()
        self._has_ended = False
        self._is_final = False
        """Whether the answer was over when its usage was told: some providers tell what there is so far with every chunk."""
        self._ticket: Ticket | None = None

    def send(self, ticket: Ticket) -> Any:
        """See :class:`Attempt`."""
        chunks = iter(self._sent(ticket, self._asked))
        return chunks, next(chunks, None)

    def settle(self, ticket: Ticket, answer: tuple[Any, ChatGenerationChunk | None]) -> None:  # noqa: ARG002 - it has only begun
        """See :class:`Attempt`."""
        self._ticket = ticket

    def adapts(self, error: Exception) -> bool:
        """Ask for no usage, if that is what the provider has refused, unbilled."""
        if not self._hides_usage or getattr(error, "status_code", None) not in {400, 422} or "stream_options" not in str(error):
            return False
        self._hides_usage = False
        del self._asked["stream_usage"]
        self._guard.learnt.add(_MUTE)
        return True

    def note(self, chunk: ChatGenerationChunk) -> bool:
        """Take note of a chunk; tell whether whoever reads the stream gets to see it."""
        if self._ticket is not None:
            self._ticket.touch()
        message = chunk.message
        self._said.note(message)
        for info in (chunk.generation_info, message.response_metadata):
            if info and (info.get("finish_reason") or info.get("stop_reason") or info.get("status")):
                self._has_ended = True
        metadata = getattr(message, "usage_metadata", None)
        if metadata is not None:
            self._parts.append(metadata)
            self._is_final = self._has_ended and bool(metadata.get("output_tokens"))
            if self._hides_usage:
                message.usage_metadata = None  # type: ignore[attr-defined]  # an AIMessageChunk, which has it
                return bool(message.content or message.additional_kwargs or chunk.generation_info or message.tool_call_chunks)  # type: ignore[attr-defined]  # as above
        return True

    def next_of(self, chunks: Iterator[ChatGenerationChunk]) -> ChatGenerationChunk | None:
        """Get the next chunk, as a part of this call."""
        self._enter_again()
        try:
            return next(chunks, None)
        finally:
            self._leave_again()

    async def anext_of(self, chunks: AsyncIterator[ChatGenerationChunk]) -> ChatGenerationChunk | None:
        """Do what ``next_of`` does."""
        self._enter_again()
        try:
            return await anext(chunks, None)
        finally:
            self._leave_again()

    def _enter_again(self) -> None:
        if self._ticket is not None:
            self.enter(self._ticket)

    def _leave_again(self) -> None:
        if self._ticket is not None:
            self.leave(self._ticket)

    def read(self) -> None:
        """It was read to its end."""
        if self._ticket is not None:
            self._ticket.settle_by(self._usage, self._said.answer)

    def break_off(self, error: BaseException) -> None:
        """It was not."""
        ticket = self._ticket
        if ticket is None:
            return
        # The report comes last: a stream that was broken off before it may still be billed in full.
        if self._is_final:
            ticket.settle_by(self._usage, None)
        else:
            ticket.charge(error)

    def _usage(self) -> Usage | None:
        return add(usage for part in self._parts if (usage := from_metadata(part)) is not None)


class AsyncStreaming(Streaming):
    """The same, of ``_astream``."""

    async def send(self, ticket: Ticket) -> Any:
        """See :class:`Attempt`."""
        chunks = aiter(self._sent(ticket, self._asked))
        return chunks, await anext(chunks, None)


def _describe(
    model: BaseChatModel, guard: Guard, messages: Sequence[BaseMessage], kwargs: Mapping[str, Any], run_manager: Any
) -> tuple[Run, LLMCall]:
    watchdog = guard.watchdog or default.current()
    frame = frame_of(watchdog)
    if frame is not None:
        run: Run | None = frame.run
    else:
        # A handler that is attached too knows the root invocation; it may be that of a call long over.
        run = root_run.get()
    if run is None or run.ended_at is not None or run.watchdog is not watchdog:
        run = watchdog.current_run()
    if run_manager is not None:
        metadata = run_manager.metadata
    else:
        config = var_child_runnable_config.get()
        metadata = config.get("metadata") if config else None
    call = guard.dialect.describe(model, messages, kwargs)
    put_in_place(call, frame, metadata)
    return run, call


def _usage_of(result: ChatResult) -> Usage | None:
    for generation in result.generations:
        usage = from_metadata(generation.message.__dict__.get("usage_metadata"))
        if usage is not None:
            return usage
    return from_llm_output(result.llm_output)


@functools.cache
def _takes_run_manager(method: Callable[..., object]) -> bool:
    parameters = signature(method).parameters
    return "run_manager" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
