"""The guard around the clients that Stainless generates (``openai``, ``anthropic``): one place, through which all they send goes.

Every entry point of such a client (create, parse, stream, raw responses, ``with_options``, whatever a new version adds) ends in
``request(cast_to, options, ...)`` of its base class, and each answer comes back through ``_process_response``. In the first an
attempt is asked for, before it is sent; the second gives the HTTP response, whose body is metered. The SDK's own retries bill
unseen, so they are set to 0 for each request and made by an ``Attempt``, each with a ticket of its own. What is read is ``options``, which is
what is about to be sent, not what the user wrote. Checked with openai 1.109, 2.54 and 3.54, anthropic 0.69, 0.73 and 2.12.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from clevagent_clients.metering import Meter, tap, tap_iterators
from clevagent_core import default
from clevagent_core.attempts import Attempt
from clevagent_core.budgets import Budget, OnExceed, check_actions
from clevagent_core.calls import LLMCall, Usage
from clevagent_core.coverage import give_back, look_out, take
from clevagent_core.errors import ClevAgentError, UsageError
from clevagent_core.frames import frame_of, place
from clevagent_core.runs import Run
from clevagent_core.tickets import Ticket
from clevagent_providers import failures
from clevagent_providers.answers import Reader
from clevagent_providers.requests import seconds_of
from clevagent_providers.transports import check_transport

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog


class Plan(Protocol):
    """One request that costs something."""

    call: LLMCall
    """What it is, for guards."""
    is_priced: bool
    """Whether anything tells what it costs."""
    hides_usage: bool
    """Whether the event of the stream that only tells usage is one that the user did not ask for."""

    def body(self, limit: int | None) -> Mapping[str, Any] | None:
        """Write the JSON to send, with the output limit that was granted; ``None`` to send what there is."""
        ...

    def reader(self) -> Reader | None:
        """Make what reads the answer; ``None`` where it tells nothing."""
        ...

    def adapt(self, error: Exception) -> bool:
        """Change what was added to the request, if that is what the provider refuses; tell whether it was."""
        ...

    def explain(self, error: UsageError) -> UsageError:
        """Say in the API's words why the call cannot be priced."""
        ...


Planner = Callable[[Any, Any], Plan | None]
"""Reads a request: given the client and its options; ``None`` where it costs nothing."""


class Layer(NamedTuple):
    """One guard around a client."""

    plan: Planner
    watchdog: Watchdog | None
    """Whom it asks; ``None`` for the process's own, whichever that is when a call is made."""
    budgets: tuple[Budget, ...] = ()


class _Request:
    """One attempt on its way through one layer."""

    __slots__ = ("meter", "number", "options", "plan", "ticket", "watchdog")

    def __init__(self, watchdog: Watchdog, options: object, plan: Plan, ticket: Ticket | None, number: int) -> None:
        self.watchdog = watchdog
        self.options = options
        """The very object that is handed on: by it the next layer knows that this is the same request."""
        self.plan = plan
        self.ticket = ticket
        """``None`` where another ticket covers the request."""
        self.number = number
        self.meter: Meter | None = None


_PREPARE = "_copy_and_prepare"
"""Where anthropic (from 2.0 on) makes plain JSON of what the user gave: of objects, files and iterators that can be read once."""

_requests: ContextVar[tuple[_Request, ...]] = ContextVar("clevagent_client_requests", default=())
"""The layers that the request being sent in this context has come through, outermost first."""


class _Sending(Attempt["_Request", Any]):
    """What one layer does about one request, sync or async."""

    failures = failures

    def __init__(
        self,
        layer: Layer,
        watchdog: Watchdog,
        client: Any,
        options: Any,
        plan: Plan,
        outer: tuple[_Request, ...],
        base: Callable[..., Any],
    ) -> None:
        self.plan = plan
        self.watchdog = watchdog
        self.outer = outer
        self.run: Run = watchdog.current_run()
        self.asks = plan.call
        place(self.asks, frame_of(watchdog))
        self.asks.timeout_s = seconds_of(options.timeout, client.timeout)
        if not plan.is_priced and watchdog.settings.unknown_price == "allow":
            self.asks.opaque = False
        self.retries = _retries(client, options)
        self._base = base
        """Sends a request, given its options and the layers it has come through."""
        self._budgets = layer.budgets
        self._number = 0
        self._options = copy.copy(options)
        self._options.max_retries = 0
        if self.retries and self._options.idempotency_key is None:
            # One for all attempts, as the SDK does.
            self._options.idempotency_key = client._idempotency_key()  # noqa: SLF001 - the SDK's own, asked for by nothing public

    def open(self) -> _Request:
        return self._begun(self._asked())

    async def aopen(self) -> _Request:
        return self._begun(await self._aasked())

    def abandon(self) -> None:
        self.run.abandon(self.asks)

    def send(self, held: _Request) -> Any:
        return self._base((*self.outer, held), held.options)

    def settle(self, held: _Request, answer: Any) -> None:  # noqa: ARG002 - its body is read from the response
        # Without a response to read (a subclass of the user's has made one up), nobody else ends its ticket.
        if held.ticket is not None and held.meter is None:
            held.ticket.charge()

    def fail(self, held: _Request, error: BaseException) -> None:
        if held.ticket is not None:
            failures.fail(held.ticket, error)

    def adapts(self, error: Exception) -> bool:
        return self.plan.adapt(error)

    def _asked(self) -> Ticket:
        try:
            return self.run.open(self.asks, self._budgets)
        except UsageError as error:
            raise self.plan.explain(error) from None

    async def _aasked(self) -> Ticket:
        try:
            return await self.run.aopen(self.asks, self._budgets)
        except UsageError as error:
            raise self.plan.explain(error) from None

    def _begun(self, ticket: Ticket) -> _Request:
        options = copy.copy(self._options)
        try:
            self._write(options, self.plan.body(ticket.max_output_tokens))
        except BaseException as error:
            ticket.release(error if isinstance(error, Exception) else None)
            raise
        request = _Request(self.watchdog, options, self.plan, ticket, self._number)
        self._number += 1
        return request

    @staticmethod
    def _write(options: Any, body: Mapping[str, Any] | None) -> None:
        if body is not None:
            options.json_data = body
            options.extra_json = None  # it is in the body
            if getattr(options, "content", None) is not None:
                options.content = None  # the same, as bytes

    def end(self) -> None:
        """It is over, however it ended."""


class _Covered(_Sending):
    """The same, where the ticket of whoever is around it covers the request: it counts one, and each further one is reserved here."""

    def __init__(self, *given: Any, covering: Ticket | None) -> None:
        super().__init__(*given)
        self._covering = covering
        self._failed: BaseException | None = None
        """Why the request before failed after it may have been billed."""
        self._is_unbilled = False

    def open(self) -> _Request:
        if self._failed is not None:
            try:
                self._asked().charge(self._failed)
            except ClevAgentError as refusal:
                raise refusal from self._failed
        return self._covered()

    async def aopen(self) -> _Request:
        if self._failed is not None:
            try:
                (await self._aasked()).charge(self._failed)
            except ClevAgentError as refusal:
                raise refusal from self._failed
        return self._covered()

    def _covered(self) -> _Request:
        """Make one request with no larger limit than that ticket was granted."""
        self._is_unbilled = False
        options = copy.copy(self._options)
        asked, granted = self.asks.max_output_tokens, self._covering.max_output_tokens if self._covering is not None else None
        if asked is not None and granted is not None and granted < asked and self.asks.clamp:
            self._write(options, self.plan.body(granted))
        return _Request(self.watchdog, options, self.plan, None, 0)

    def fail(self, held: _Request, error: BaseException) -> None:  # noqa: ARG002 - it has no ticket
        self._is_unbilled = not failures.may_be_billed(error)
        self._failed = None if self._is_unbilled else error

    def adapts(self, error: Exception) -> bool:  # noqa: ARG002 - what was added to the request is whoever's is around it
        return False

    def end(self) -> None:
        """A ticket whose request was refused unbilled covers the next one."""
        if self._is_unbilled and self._covering is not None:
            give_back(self._covering)


def _retries(client: Any, options: Any) -> int:
    retries = options.get_max_retries(client.max_retries)
    return retries if type(retries) is int and retries > 0 else 0


def _outer(options: object) -> tuple[_Request, ...]:
    """Find the layers that this request has come through; not those of another one that is being sent around it."""
    outer = _requests.get()
    return outer if outer and outer[-1].options is options else ()


def request(
    layer: Layer, base: Callable[..., Any], client: Any, cast_to: Any, options: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Send a request of a sync client, if it may be sent. The arguments after ``client`` are those of its ``request``.

    Raises:
        Stopped: it was refused, and not sent. UsageError: it cannot be priced.

    """
    outer = _outer(options)
    prepare = getattr(client, _PREPARE, None)
    if prepare is not None:
        options = prepare(options)

    def send(requests: tuple[_Request, ...], options: Any) -> Any:
        return _send(requests, base, cast_to, options, args, kwargs)

    sending = _sending(layer, client, options, outer, send)
    if sending is None:
        return send((), options)
    try:
        return sending.call()
    finally:
        sending.end()


async def arequest(
    layer: Layer,
    base: Callable[..., Awaitable[Any]],
    client: Any,
    cast_to: Any,
    options: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Do what ``request`` does, for an async client; waits without blocking the event loop."""
    outer = _outer(options)
    prepare = getattr(client, _PREPARE, None)
    if prepare is not None:
        options = await prepare(options)

    async def send(requests: tuple[_Request, ...], options: Any) -> Any:
        return await _asend(requests, base, cast_to, options, args, kwargs)

    sending = _sending(layer, client, options, outer, send)
    if sending is None:
        return await send((), options)
    try:
        return await sending.acall()
    finally:
        sending.end()


def _sending(layer: Layer, client: Any, options: Any, outer: tuple[_Request, ...], send: Callable[..., Any]) -> _Sending | None:
    """Read a request; ``None`` where it costs nothing."""
    plan = layer.plan(client, options)
    if plan is None:
        default.note_asked(layer.watchdog)
        return None
    watchdog = layer.watchdog or default.current()
    is_covered, covering = _covering(layer, watchdog, plan, outer)
    if is_covered:
        return _Covered(layer, watchdog, client, options, plan, outer, send, covering=covering)
    return _Sending(layer, watchdog, client, options, plan, outer, send)


def _send(
    requests: tuple[_Request, ...],
    base: Callable[..., Any],
    cast_to: Any,
    options: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    token = _requests.set(requests)
    try:
        return base(cast_to, options, *args, **kwargs)
    finally:
        _requests.reset(token)


async def _asend(
    requests: tuple[_Request, ...],
    base: Callable[..., Awaitable[Any]],
    cast_to: Any,
    options: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    token = _requests.set(requests)
    try:
        return await base(cast_to, options, *args, **kwargs)
    finally:
        _requests.reset(token)


def _covering(layer: Layer, watchdog: Watchdog, plan: Plan, outer: tuple[_Request, ...]) -> tuple[bool, Ticket | None]:
    """Tell whether the request is covered, and by which ticket; ``None`` where by that of a layer around this one."""
    if any(request.watchdog is watchdog for request in outer):
        return True, None
    ticket = take(watchdog, plan.call.model)
    if ticket is None:
        return False, None
    if layer.budgets:
        give_back(ticket)
        names = ", ".join(repr(budget.label) for budget in layer.budgets)
        raise UsageError(
            f"A client that was guarded with budgets of its own ({names}) was called by a framework whose call is counted already, "
            "so these budgets would not see it, and it was refused before it was sent. Give the budgets to what the framework calls, "
            "clevagent.guard(model, budgets=[...]), or to clevagent.run(budgets=[...]) around it; and hand it the plain client."
        )
    return True, ticket


# -- the answer -----------------------------------------------------------------------------------------------------------


def _meter(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Meter the response, once; give what the SDK makes its answer from."""
    requests = [request for request in _requests.get() if request.ticket is not None]
    meters = []
    # The innermost sees the body first: what it asked for, no layer around it knows.
    for request in reversed(requests):
        if request.meter is None and request.ticket is not None:
            reader = request.plan.reader()
            if reader is None:
                request.ticket.settle(Usage())
                continue
            request.meter = Meter(request.ticket, reader, hides_usage=request.plan.hides_usage)
            meters.append(request.meter)
    if meters:
        tap(kwargs["response"], meters)
    if requests and requests[0].number:
        kwargs["retries_taken"] = requests[0].number
    return kwargs


# -- one client -----------------------------------------------------------------------------------------------------------

_LAYERS = "_clevagent_layers"


def _guarded(client: Any, plan: Planner, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None) -> Any:
    check_actions(budgets, where="guard(client)")
    if on_exceed is not None and not budgets:
        raise UsageError(
            f"guard(client, on_exceed={on_exceed!r}) has no budgets of its own to which that could apply. "
            "Give budgets=[...] beside it, or say on_exceed in the budgets of init() or run()."
        )
    for budget in budgets:
        if budget.tool_calls is not None:
            raise UsageError(
                f"guard(client, budgets=[{budget.label!r}]) limits tool calls, but a client is not asked when a tool is run, so the "
                "limit would never hold. Give it to clevagent.run(budgets=[...]) and put `with clevagent.tool_call(...)` around your tools."
            )
    layers: tuple[Layer, ...] = client.__dict__.get(_LAYERS, ())
    kind: Any = type(client)
    guarded_class = kind if layers else _guarded_class(kind)
    # Guarded once more: both hold, each with its budgets.
    own = watchdog if watchdog is not None or not layers else layers[-1].watchdog
    before = next((layer for layer in layers if layer.watchdog is own), None)
    if before is None:
        layers = (*layers, Layer(plan, own, tuple(budgets)))
    elif not budgets:
        return client
    else:
        more = tuple(budget for budget in budgets if budget not in before.budgets)
        joined = before._replace(budgets=(*before.budgets, *more))
        layers = tuple(joined if layer is before else layer for layer in layers)
    copied = object.__new__(guarded_class)
    # Its resources (client.chat, ...) belong to the client that made them; the copy makes its own.
    copied.__dict__.update(
        {name: _of(copied, client, value) for name, value in client.__dict__.items() if not _is_cached(client, name)}
    )
    copied.__dict__[_LAYERS] = layers
    return copied


def _is_cached(client: Any, name: str) -> bool:
    """Tell whether a value is one that the client makes when it is first asked for, and that holds the client."""
    if not isinstance(getattr(type(client), name, None), functools.cached_property):
        return False
    # Not what the user has set there: the region of a client for Vertex.
    return getattr(client.__dict__[name], "_client", None) is client


def _of(copied: Any, client: Any, value: Any) -> Any:
    # Clients of other clouds make their resources when they are made themselves.
    return type(value)(copied) if getattr(value, "_client", None) is client else value


@functools.cache
def _guarded_class(base: type[Any]) -> type[Any]:
    """Make the subclass for one class of clients."""

    def copy_guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = base.copy(self, *args, **kwargs)
        made.__dict__[_LAYERS] = _layers_of(self)
        return made

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "copy": copy_guarded,
        "with_options": copy_guarded,
        # Looked up at each call: what is attached to all clients may come and go.
        "request": _request_through(base.request, _layers_of, lambda: base.request),
        "_process_response": _process_metered(base._process_response, lambda: base._process_response),  # noqa: SLF001 - what is overridden
    }
    return type(base.__name__, (base,), body)


def _layers_of(client: Any) -> tuple[Layer, ...]:
    layers: tuple[Layer, ...] = client.__dict__.get(_LAYERS, ())
    if not layers:
        raise UsageError(
            f"This {type(client).__name__} was made from the class of a guarded one, and nobody asked for it to be guarded, so its "
            "call was refused. Make it from the class in the SDK, or guard it: clevagent.guard(client)."
        )
    return layers


def _request_through(
    base: Callable[..., Any], layers: Callable[[Any], Sequence[Layer]], current: Callable[[], Callable[..., Any]] | None = None
) -> Callable[..., Any]:
    """Wrap the ``request`` of a class of clients: what is sent goes through the layers, of which the last is asked first."""
    through: Callable[..., Any] = arequest if iscoroutinefunction(base) else request
    current = current or (lambda: base)

    @functools.wraps(base)
    def send(self: Any, cast_to: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
        inner: Callable[..., Any] = functools.partial(current(), self)
        for layer in layers(self):
            inner = functools.partial(_through, through, layer, inner, self)
        return inner(cast_to, options, *args, **kwargs)

    return send


def _through(
    through: Callable[..., Any],
    layer: Layer,
    inner: Callable[..., Any],
    client: Any,
    cast_to: Any,
    options: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return through(layer, inner, client, cast_to, options, args, kwargs)


def _process_metered(base: Callable[..., Any], current: Callable[[], Callable[..., Any]] | None = None) -> Callable[..., Any]:
    current = current or (lambda: base)
    if iscoroutinefunction(base):

        @functools.wraps(base)
        async def aprocess(self: Any, **kwargs: Any) -> Any:
            made = await current()(self, **_meter(kwargs))
            return tap_iterators(made) if kwargs.get("stream") else made

        return aprocess

    @functools.wraps(base)
    def process(self: Any, **kwargs: Any) -> Any:
        made = current()(self, **_meter(kwargs))
        # Not asked of a plain answer, which takes long to say that it has no such attribute.
        return tap_iterators(made) if kwargs.get("stream") else made

    return process


# -- all clients of the process -------------------------------------------------------------------------------------------


class Clients:
    """The clients of one SDK, each guarded by itself or all of them. Safe to use from any thread."""

    def __init__(self, classes: tuple[type[Any], ...], plan: Planner) -> None:
        """Guard none yet. ``classes`` are those that every client is one of."""
        self._classes = classes
        self._plan = plan
        self._lock = threading.RLock()
        self._layers: tuple[Layer, ...] = ()
        self._replaced: dict[tuple[type[Any], str], tuple[Any, Any]] = {}
        """What stood there before, and what we have put there."""

    def guard(self, obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget], on_exceed: OnExceed | None) -> object | None:
        """Make a guarded copy of a client, of a subclass of its class; ``None`` for anything else. It shares the connections.

        Raises:
            UsageError: a budget that a client cannot hold, or an action that it cannot carry out.

        """
        if not isinstance(obj, self._classes):
            return None
        check_transport(obj, "guard(client)")
        look_out()
        guarded: object = _guarded(obj, self._plan, watchdog, budgets, on_exceed)
        return guarded

    def attach(self, watchdog: Watchdog) -> None:
        """Ask ``watchdog`` before each request of every client, made before or later, beside those that are asked already."""
        look_out()
        with self._lock:
            if any(layer.watchdog is watchdog for layer in self._layers):
                return
            self._layers = (*self._layers, Layer(self._plan, watchdog))
            for client_class in self._classes:
                self._replace(client_class, "request", lambda base: _request_through(base, lambda _: self._layers))
                self._replace(client_class, "_process_response", _process_metered)

    def detach(self, watchdog: Watchdog) -> None:
        """Ask ``watchdog`` no more; the last one puts the classes back as they were."""
        with self._lock:
            self._layers = tuple(layer for layer in self._layers if layer.watchdog is not watchdog)
            if self._layers:
                return
            for (client_class, name), (original, ours) in self._replaced.items():
                _restore(client_class, name, original, ours)
            self._replaced.clear()

    def _replace(self, client_class: type[Any], name: str, wrap: Callable[[Any], Any]) -> None:
        found = client_class.__dict__[name]
        _, ours = self._replaced.get((client_class, name), (None, None))
        if found is ours:
            return
        # Where somebody has wrapped ours it is put around that once more: the inner one finds that the outer one has asked.
        ours = wrap(found)
        self._replaced[client_class, name] = found, ours
        setattr(client_class, name, ours)


def _restore(client_class: type[Any], name: str, original: Any, ours: Any) -> None:
    # Whoever has wrapped it since calls ours, which asks nobody any more.
    if client_class.__dict__.get(name) is ours:
        setattr(client_class, name, original)
