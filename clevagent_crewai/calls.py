"""One call of a model that is let through: its tickets, and the view of the model that it is made on.

A view is an object of a subclass that shares the model's state, all of it, and differs in what holds for this call only: the output
limit that was granted, and clients that do not retry. What the model reports of its usage passes through it. Checked with crewai 1.15.19 and 1.15.30.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Self, cast

from crewai.llms.base_llm import BaseLLM

from clevagent_core.attempts import drive
from clevagent_core.calls import LLMCall, UnusableUsage, Usage
from clevagent_core.coverage import cover, uncover
from clevagent_core.errors import Stopped
from clevagent_core.tickets import Ticket
from clevagent_crewai.aborted import aborted_by, through_crews
from clevagent_crewai.caches import cache
from clevagent_crewai.dialects import FALLBACKS, Dialect, limited
from clevagent_crewai.gates import Gate, refuse
from clevagent_crewai.usage import usage_of
from clevagent_providers.failures import may_be_billed
from clevagent_providers.usage import add, from_error

logger = logging.getLogger("clevagent")

_open_call: ContextVar[Call | None] = ContextVar("clevagent_crewai_open_call", default=None)
"""The call of a model that this context is inside of."""
_SLOTS = ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__")


class Call:
    """One ``call`` of a model, from its first request to its last: what its view needs to know."""

    __slots__ = (
        "_asking",
        "_asks",
        "_clients",
        "_has_delegated",
        "_outer",
        "_used",
        "dialect",
        "failed",
        "fields",
        "gates",
        "model",
        "tickets",
    )

    def __init__(self, model: BaseLLM, dialect: Dialect, gates: list[Gate], asks: LLMCall) -> None:
        self.model = model
        self.dialect = dialect
        self.gates = gates
        self.tickets: list[Ticket] = []
        self.fields: dict[str, object] = {}
        """Fields of the model that are others in this call."""
        self._asks = self._asking = asks
        self._used: list[Usage] = []
        self._clients = 0
        self._has_delegated = False
        self._outer: Call | None = None
        self.failed: Exception | None = None
        """What the last attempt ended with, where a model of the user's own made it and may make another."""

    # -- asking

    def open(self) -> None:
        """Ask everybody; give back what some have let through where another has not."""
        drive(self._open(is_async=False))

    async def aopen(self) -> None:
        """Do what ``open`` does, waiting without blocking the event loop."""
        await self._open(is_async=True)

    async def _open(self, *, is_async: bool) -> None:
        self._is_inside()
        try:
            for gate in self.gates:
                asks = self._asking = again(self._asks) if self.tickets else self._asks
                through = through_crews(gate.watchdog)
                opened = (
                    gate.run.aopen(asks, gate.extra, through=through)
                    if is_async
                    else gate.run.open(asks, gate.extra, through=through)
                )
                self.tickets.append(opened if isinstance(opened, Ticket) else await opened)
            self._opened()
        except Exception as error:  # whose code: ours; what cannot be checked is not sent
            failed = aborted_by(error, self.gates[len(self.tickets) % len(self.gates)].watchdog)
            self._refused(failed)
        except BaseException:
            self.abandon()
            raise
        else:
            return
        raise failed

    def abandon(self) -> None:
        """Give back what was let through, also that which nobody was given the ticket of."""
        for ticket in self.tickets:
            ticket.release()
        self.tickets = []
        for gate in self.gates:
            gate.run.abandon(self._asking)

    def _is_inside(self) -> None:
        outer = _open_call.get()
        if outer is not None and outer is not self:
            outer.delegate()

    def _refused(self, error: BaseException) -> None:
        for ticket in self.tickets:
            ticket.release(error)
        self.tickets = []
        if isinstance(error, Stopped):
            refuse(self.gates, error)

    def _opened(self) -> None:
        limits = [ticket.max_output_tokens for ticket in self.tickets if ticket.max_output_tokens is not None]
        self.fields = limited(self.model, self.dialect, min(limits)) if limits and self.dialect.is_known else {}
        if self.dialect.quiet:
            # One request, and to no other model: what is tried next is tried by us.
            params: Any = self.fields.get("additional_params", self.model.additional_params)
            kept = {name: value for name, value in params.items() if name not in FALLBACKS}
            self.fields["additional_params"] = {**kept, **self.dialect.quiet}

    # -- while it goes on

    def __enter__(self) -> Self:
        """Let nobody further down count it again."""
        self._outer = _open_call.get()
        _open_call.set(self)
        for ticket in self.tickets:
            cover(ticket)
        return self

    def __exit__(self, *exception: object) -> None:
        """What follows is counted by whoever makes it."""
        _open_call.set(self._outer)
        for ticket in reversed(self.tickets):
            uncover(ticket)

    def delegate(self) -> None:
        """Another model is called inside: one that only hands its calls on sends nothing itself."""
        if not self.dialect.is_known:
            self.hand_over()

    def hand_over(self) -> None:
        """What this was asked for is sent by somebody else, who asks for it."""
        if not self._used and not self._has_delegated:
            self._has_delegated = True
            for ticket in self.tickets:
                ticket.release()

    def note(self, raw: Mapping[str, Any] | None) -> None:
        """Take what the model says it has used."""
        try:
            usage = usage_of(raw)
        except UnusableUsage as problem:
            for ticket in self.tickets:
                ticket.tell_unusable(problem)
            return
        if usage is None:
            return
        if self._has_delegated:
            # It did send something itself, too: nothing was held for it, but it is counted.
            for ticket in self.tickets:
                ticket.run.log(ticket.call, usage, ticket.rates.cost(usage) if ticket.rates is not None else None)
            return
        self._used.append(usage)

    def begin_again(self) -> None:
        """A model of the user's own, derived from CrewAI's, tries again what has failed: that is a request of its own.

        Raises:
            Stopped: there is no room for it.

        """
        if self.failed is None:
            return
        self.fail(self.failed)
        self.tickets, self._used = [], []
        self._asks = again(self._asks)
        # On an event loop this does not wait.
        self.open()
        self.failed = None
        for ticket in self.tickets:
            cover(ticket)

    def sends(self) -> None:
        """A client was asked for, which each request does once: what comes after an answer is a request of its own.

        Raises:
            Stopped: there is no room for it.

        """
        self._clients += 1
        if self._clients > 1 and self._used:
            self.settle(None)
            self.tickets, self._used = [], []
            # It holds what the model has just said, and what a tool made of it: nobody has told how much that is.
            self._asks = again(self._asks)
            self._asks.opaque = True
            # On an event loop this does not wait.
            self.open()
            for ticket in self.tickets:
                cover(ticket)

    # -- when it is over

    def settle(self, answer: object) -> None:
        """Tell what it used."""
        usage = add(self._used[:1])
        for ticket in self.tickets:
            ticket.settle(usage, result=answer)

    def fail(self, error: BaseException) -> None:
        """Tell that it failed: settled where its usage was told, charged where it may have been billed, else released."""
        if self._used:
            self.settle(None)
            return
        cause = root_of(error)
        usage = None
        with contextlib.suppress(UnusableUsage):  # then its bound is charged
            usage = from_error(cause)
        sent = _may_be_billed(cause)
        for ticket in self.tickets:
            if usage is not None:
                ticket.settle(usage, error=error)
            else:
                ticket.fail(error, sent=sent)


def again(call: LLMCall) -> LLMCall:
    """Describe the same call to another guard: each keeps notes of its own in it."""
    return replace(call, seen=None, began=None)


def root_of(error: BaseException) -> BaseException:
    """Find what the SDK raised: CrewAI's providers put their own words around it."""
    seen: set[int] = set()
    root = error
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if getattr(current, "response", None) is not None or any(
            base.__name__ in {"APIConnectionError", "APITimeoutError"} for base in type(current).__mro__
        ):
            root = current
        current = current.__cause__
    return root


_REFUSED = range(400, 500)
_TIMED_OUT = 408


def _may_be_billed(error: BaseException) -> bool:
    if type(error).__module__.partition(".")[0] == "litellm":
        # It makes answers up (a status 500) for connections that were lost, which may be billed.
        status = getattr(error, "status_code", None)
        return not (isinstance(status, int) and status in _REFUSED and status != _TIMED_OUT)
    return may_be_billed(error)


# -- the view -------------------------------------------------------------------------------------------------------------


def view_of(call: Call) -> BaseLLM:
    """Make the view of a model that one call is made on."""
    model = call.model
    base = plain_class(type(model))
    view: BaseLLM = object.__new__(_view_class(base))
    for name in _SLOTS:
        object.__setattr__(view, name, getattr(model, name))
    object.__setattr__(view, "_clevagent_call", call)
    return view


_VARYING = ("max_tokens", "max_completion_tokens", "max_output_tokens", "additional_params")


@cache
def _view_class(base: type[BaseLLM]) -> type[BaseLLM]:
    """Make the class of views of one class of models."""
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__slots__": ("_clevagent_call",),
        "_track_token_usage_internal": _track,
        "_emit_call_completed_event": _completed,
        "_handle_tool_execution": _before_a_tool("_handle_tool_execution"),
    }
    for name in ("_handle_tool_call", "_execute_first_tool", "_execute_tools_and_collect_results"):
        if hasattr(base, name):
            body[name] = _before_a_tool(name)
    for name in ("_get_sync_client", "_get_async_client"):
        if hasattr(base, name):
            body[name] = _client(name)
    # By the model that they were given for, not by its view.
    for name in ("_effective_stream",):
        if hasattr(base, name):
            body[name] = _of_the_model(name)
    made = cast("type[BaseLLM]", subclass(base, body))
    # Not in its body: pydantic takes a property there for a field that lost its type.
    for name in _VARYING:
        if name in base.model_fields:
            setattr(made, name, _varying(name))
    stops = getattr(BaseLLM, "stop_sequences", None)
    if isinstance(stops, property):
        made.stop_sequences = property(lambda self: self._clevagent_call.model.stop_sequences)  # type: ignore[method-assign,assignment]
    return made


def subclass(base: type[Any], body: dict[str, Any]) -> type[Any]:
    """Make a subclass of the same name and metaclass."""
    metaclass: Any = type(base)
    made: type[Any] = metaclass(base.__name__, (base,), body)
    return made


def _varying(name: str) -> property:
    def read(self: Any) -> object:
        fields = self._clevagent_call.fields
        return fields[name] if name in fields else self.__dict__.get(name)

    def write(self: Any, value: object) -> None:
        self._clevagent_call.fields.pop(name, None)
        self.__dict__[name] = value

    return property(read, write)


def _base_method(view: Any, name: str) -> Callable[..., Any]:
    return cast("Callable[..., Any]", getattr(type(view).__bases__[0], name))


def _of_the_model(name: str) -> Callable[..., Any]:
    def method(self: Any) -> Any:
        return getattr(self._clevagent_call.model, name)()

    return method


def _client(name: str) -> Callable[..., Any]:
    def method(self: Any) -> Any:
        call = self._clevagent_call
        call.sends()
        return quiet(_base_method(self, name)(self))

    return method


def _track(self: Any, usage_data: dict[str, Any]) -> None:
    self._clevagent_call.note(usage_data)
    _base_method(self, "_track_token_usage_internal")(self, usage_data)


def _completed(self: Any, *args: Any, **kwargs: Any) -> None:
    call = self._clevagent_call
    if not call._used:  # noqa: SLF001 - the same module
        # A custom model may tell its usage here only.
        call.note(kwargs.get("usage"))
    _base_method(self, "_emit_call_completed_event")(self, *args, **kwargs)


def _before_a_tool(name: str) -> Callable[..., Any]:
    """A tool is run inside of a call: the model has answered, and what the tool calls is not a part of that."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._clevagent_call
        if call._used:  # noqa: SLF001 - the same module
            call.settle(None)
        return _base_method(self, name)(self, *args, **kwargs)

    return method


def call_of(view: Any) -> Call:
    """Give the call that a view of a model was made for."""
    call: Call = view._clevagent_call  # noqa: SLF001 - where view_of has put it
    return call


_quieted: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def quiet(client: Any) -> Any:
    """Give an SDK's client that sends a request once; it shares its connections with the one that was given."""
    if not getattr(client, "max_retries", 0) or not hasattr(client, "with_options"):
        return client
    found = _quieted.get(client)
    if found is None:
        found = _quieted[client] = client.with_options(max_retries=0)
    return found


def plain_class(cls: type[BaseLLM]) -> type[BaseLLM]:
    """Give the user's class of a model that may be guarded."""
    return cast("type[BaseLLM]", cls.__bases__[0]) if "_clevagent_is_guarded" in cls.__dict__ else cls
