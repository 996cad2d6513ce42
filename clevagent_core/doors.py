"""The framework-free door: ``llm_call`` and ``tool_call`` blocks. An adapter does nothing that these could not do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, TypeVar

from clevagent_core.bounds import is_opaque, rounds_of, runs_at_provider
from clevagent_core.calls import LLMCall, ToolCall, Usage
from clevagent_core.coverage import cover, uncover
from clevagent_core.errors import ClevAgentError, UsageError
from clevagent_core.frames import Activity, Frame, frame_of, leave, open_block, place
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket
from clevagent_core.watchdog import Watchdog

Opened = TypeVar("Opened")
_NOT_TOLD = object()
_NOTHING = "null"
"""What a tool gave back that gave back ``None``, as a framework would write it for a model."""


def _seconds(timeout_s: object, what: str) -> float | None:
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if timeout_s is None or (is_number and 0 < timeout_s < float("inf")):  # type: ignore[operator]  # asked for just now
        return timeout_s  # type: ignore[return-value]  # as above
    raise UsageError(
        f"{what}(timeout_s={timeout_s!r}) is no number of seconds, so nobody could tell when the call is stalled. Give the timeout that it "
        "is made with, or leave it out."
    )


class OpenLLMCall:
    """A model call that was let through: make it, then tell what it used."""

    def __init__(self, ticket: Ticket) -> None:
        """Made by ``llm_call`` only."""
        self._ticket = ticket

    @property
    def max_output_tokens(self) -> int | None:
        """The output limit to send with the request: what was asked for, or, with ``clamp=True``, what is left of it."""
        return self._ticket.max_output_tokens

    def settle(
        self,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        reasoning_tokens: int = 0,
        answer: object = None,
    ) -> None:
        """Tell what the provider reported, in tokens. Only the first time counts.

        Args:
            input_tokens: all input tokens, cached ones included.
            output_tokens: all output tokens, reasoning included.
            cache_read_tokens: those of the input that came from the provider's cache.
            cache_write_tokens: those of the input that were written to it.
            reasoning_tokens: those of the output that the user does not see.
            answer: what the model said, and the tools it asks for; any nesting of text. Loops of model calls are found by it. It
                stays in the process.

        Raises:
            UsageError: a count is missing, negative or no whole number, or a detail is more than its total; the call then stays
                charged at its upper bound.

        """
        if input_tokens is None or output_tokens is None:
            raise UsageError(
                f"settle(input_tokens={input_tokens!r}, output_tokens={output_tokens!r}) leaves a part of the usage out, so the call "
                "cannot be priced and stays charged at its upper bound. Give both; 0 where there was none."
            )
        usage = Usage(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cache_read_tokens=cache_read_tokens,
            cache_write_tokens=cache_write_tokens,
            reasoning_tokens=reasoning_tokens,
        )
        if cache_read_tokens + cache_write_tokens > input_tokens or reasoning_tokens > output_tokens:
            raise UsageError(
                f"settle(input_tokens={input_tokens}, cache_read_tokens={cache_read_tokens}, cache_write_tokens={cache_write_tokens}, "
                f"output_tokens={output_tokens}, reasoning_tokens={reasoning_tokens}) cannot be true: cached tokens lie inside the "
                "input, reasoning inside the output. The call stays charged at its upper bound; give the totals as the provider does."
            )
        self._ticket.settle(usage, result=answer)

    def release(self) -> None:
        """Tell that the request was never sent, or was refused unbilled: what the call held is given back."""
        self._ticket.release()


class OpenToolCall:
    """A tool call that was let through: run the tool, then tell how it ended."""

    def __init__(self, ticket: Ticket) -> None:
        """Made by ``tool_call`` only."""
        self._ticket = ticket

    def settle(self, *, result: object = _NOT_TOLD, error: BaseException | None = None) -> None:
        """Tell that the tool has run. Only the first time counts; leaving the block tells it too, without a result.

        Args:
            result: what it gave back; loops of tool calls are found by it. It stays in the process.
            error: what it failed with.

        """
        # To the rest, None means that nobody has told.
        told = None if result is _NOT_TOLD else _NOTHING if result is None else result
        self._ticket.settle(error=error, result=told)

    def release(self) -> None:
        """Tell that the tool was not run after all."""
        self._ticket.release()


class _Block(ABC, Generic[Opened]):
    """``with`` and ``async with`` around one call: asked for when the block is entered, ended when it is left, however that is."""

    def __init__(self, watchdog: Callable[[], Watchdog], call: LLMCall | ToolCall) -> None:
        self._watchdog = watchdog
        self._call = call
        self._ticket: Ticket | None = None

    def __enter__(self) -> Opened:
        """Check the call and hold what it could cost, or raise; may wait for held money."""
        run = self._run()
        try:
            return self._entered(run.open(self._call))
        except ClevAgentError:
            raise
        except BaseException:  # a signal handler's: the block is not entered, so nobody would tell what became of the call
            run.abandon(self._call)
            raise

    async def __aenter__(self) -> Opened:
        """Do what ``__enter__`` does, waiting without blocking the event loop."""
        run = self._run()
        try:
            return self._entered(await run.aopen(self._call))
        except ClevAgentError:
            raise
        except BaseException:  # as above, and a cancelled task
            run.abandon(self._call)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End the call, unless the block told what became of it."""
        if self._ticket is not None:
            self._left(self._ticket, error)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the call, unless the block told what became of it."""
        self.__exit__(kind, error, traceback)

    def _run(self) -> Run:
        watchdog = self._watchdog()
        place(self._call, frame_of(watchdog))
        return watchdog.current_run()

    @abstractmethod
    def _entered(self, ticket: Ticket) -> Opened:
        """Begin what goes on while the call does."""

    @abstractmethod
    def _left(self, ticket: Ticket, error: BaseException | None) -> None:
        """End it, and the call."""


class LLMCallBlock(_Block[OpenLLMCall]):
    """``with clevagent.llm_call(...) as call:`` and its async twin. One block is one call."""

    def __init__(
        self,
        watchdog: Callable[[], Watchdog],
        *,
        model: str,
        input: object,  # noqa: A002 - what every provider calls it
        max_output_tokens: int | None,
        tools: Sequence[object],
        clamp: bool,
        answers: int,
        provider: str | None,
        node: str | None,
        timeout_s: float | None,
    ) -> None:
        """Made by ``llm_call()``."""
        if not isinstance(model, str) or not model:
            raise UsageError(f"llm_call(model={model!r}) names no model, so it has no price. Give the name the request carries.")
        if max_output_tokens is not None and (type(max_output_tokens) is not int or max_output_tokens < 1):
            raise UsageError(
                f"llm_call(max_output_tokens={max_output_tokens!r}) is no output limit. Give the positive whole number that the "
                "request carries, or leave it out."
            )
        if type(answers) is not int or answers < 1:
            raise UsageError(f"llm_call(answers={answers!r}) asks for nothing. Give a positive whole number.")
        if node is not None and not isinstance(node, str):
            raise UsageError(
                f"llm_call(node={node!r}) is no name, so Budget(node=...) could not match it. Give text, or leave it out."
            )
        tools = list(tools or ())
        items = list(input) if isinstance(input, (list, tuple)) else [input]
        call = LLMCall(
            model=model,
            input=items,
            tools=tools,
            max_output_tokens=max_output_tokens,
            clamp=clamp,
            answers=answers,
            provider=provider,
            node=node,
            opaque=is_opaque(items) or any(runs_at_provider(tool) for tool in tools),
            rounds=rounds_of({"tools": tools}),
            timeout_s=_seconds(timeout_s, "llm_call"),
        )
        super().__init__(watchdog, call)

    def _entered(self, ticket: Ticket) -> OpenLLMCall:
        self._ticket = ticket
        # A client that is guarded, too, sends the request as a part of this call.
        cover(ticket)
        return OpenLLMCall(ticket)

    def _left(self, ticket: Ticket, error: BaseException | None) -> None:
        try:
            uncover(ticket)
        finally:
            ticket.charge(error)  # unless it was settled: it may have been sent


class ToolCallBlock(_Block[OpenToolCall]):
    """``with clevagent.tool_call(...) as call:`` and its async twin. One block is one call."""

    def __init__(
        self, watchdog: Callable[[], Watchdog], *, name: str, arguments: object, node: str | None, timeout_s: float | None
    ) -> None:
        """Made by ``tool_call()``."""
        if not isinstance(name, str) or not name:
            raise UsageError(f"tool_call({name!r}) names no tool. Give the tool's name.")
        if node is not None and not isinstance(node, str):
            raise UsageError(
                f"tool_call(node={node!r}) is no name, so Budget(node=...) could not match it. Give text, or leave it out."
            )
        super().__init__(watchdog, ToolCall(tool=name, arguments=arguments, node=node, timeout_s=_seconds(timeout_s, "tool_call")))
        self._frame: Frame | None = None

    def _entered(self, ticket: Ticket) -> OpenToolCall:
        self._ticket = ticket
        self._frame = open_block(ticket.run.watchdog, ticket.run, Activity("tool", ticket.name))
        return OpenToolCall(ticket)

    def _left(self, ticket: Ticket, error: BaseException | None) -> None:
        try:
            if self._frame is not None:
                leave(self._frame)
        finally:
            ticket.settle(error=error)
