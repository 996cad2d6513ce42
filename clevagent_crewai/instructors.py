"""Requests that CrewAI sends past its models: ``InternalInstructor`` has a client of its own.

It makes ``output_json``, and what litellm answers to a response model. Neither ``call`` of the model, nor its limit, nor its retries
hold there: each request is asked for, with a limit that fits. Instructor itself may ask again when an answer does not fit the model.
Checked with crewai 1.15.19 and 1.15.30, and instructor 1.15.4 and 1.17.0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from crewai.llms.base_llm import BaseLLM
from crewai.utilities.internal_instructor import InternalInstructor

from clevagent_core import default
from clevagent_core.calls import LLMCall
from clevagent_crewai.aborted import aborted_by
from clevagent_crewai.calls import Call, again, call_of, quiet
from clevagent_crewai.dialects import describe, dialect_of
from clevagent_crewai.gates import Gate, attached, doing, gates_of, name_of, put_in_place, working
from clevagent_crewai.works import works

_FLOOR = 1024
_LIMITS = ("max_tokens", "max_completion_tokens")


def watch_instructors() -> None:
    """Wrap it, once."""
    original = InternalInstructor.to_pydantic
    if not hasattr(original, "_clevagent_original"):
        InternalInstructor.to_pydantic = _guarding(original)  # type: ignore[method-assign]


def unwatch_instructors() -> None:
    """Take the wrapper off."""
    original = getattr(InternalInstructor.to_pydantic, "_clevagent_original", None)
    if original is not None:
        InternalInstructor.to_pydantic = original  # type: ignore[method-assign]


def _guarding(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_pydantic(self: Any) -> Any:
        sender = _begin(self) if isinstance(self.llm, BaseLLM) else None
        if sender is None:
            return original(self)
        try:
            with _sending_by(self._client, sender):
                return original(self)
        except Exception:  # whose code: instructor's; it puts its own words around a refusal
            if sender.refusal is None:
                raise
        raise sender.refusal

    vars(to_pydantic)["_clevagent_original"] = original
    return to_pydantic


def _begin(converter: Any) -> _Sender | None:
    """Find whom to ask; ``None`` where that is nobody."""
    try:
        return _sender_of(converter)
    except Exception as error:  # whose code: ours; what cannot be checked is not sent
        failed = error
    work = next(works(converter.llm), None)
    raise aborted_by(failed, work.watchdog if work is not None else attached[0] if attached else default.current())


def _sender_of(converter: Any) -> _Sender | None:
    llm = converter.llm
    # litellm's own calls come here in the middle of one that was asked for.
    outer = call_of(llm) if "_clevagent_call" in type(llm).__dict__ else None
    model = outer.model if outer is not None else llm
    # A converter tells neither.
    role, task = (name_of(converter.agent, "role"), None) if converter.agent is not None else doing.get()
    role = role or working.get()
    gates = outer.gates if outer is not None else gates_of(role, task, model)
    return _Sender(model, gates, outer, role, converter._client.create_fn.__wrapped__) if gates else None  # noqa: SLF001 - CrewAI's


@contextmanager
def _sending_by(client: Any, sender: _Sender) -> Iterator[None]:
    """Let a client of Instructor's send its requests by ``sender``."""
    import instructor  # noqa: PLC0415 - imported already

    before = client.create_fn
    client.create_fn = instructor.patch(create=sender.send, mode=client.mode, provider=client.provider)
    try:
        yield
    finally:
        client.create_fn = before


class _Sender:
    """Asks for each request of one conversion, and sends it."""

    __slots__ = ("_dialect", "_gates", "_limit", "_model", "_outer", "_role", "_send", "refusal")

    def __init__(self, model: BaseLLM, gates: list[Gate], outer: Call | None, role: str | None, send: Callable[..., Any]) -> None:
        self._model = model
        self._gates = gates
        self._outer = outer
        self._role = role
        self._send = send
        self._dialect = dialect_of(model)
        taken = inspect.signature(send).parameters
        self._limit = next((name for name in (self._dialect.unset, *_LIMITS) if name in taken), None)
        """How the SDK's method takes an output limit; ``None`` where it does not say (those of Google and Amazon)."""
        self.refusal: Exception | None = None
        """Why nothing more is sent; Instructor would try again."""

    def send(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the SDK's method does, once, if everybody lets it through."""
        call = self._opened(kwargs)
        try:
            with call:
                answer = _once(self._send)(*args, **{**kwargs, **self._limits(call, kwargs), **(self._dialect.quiet or {})})
        except BaseException as error:
            call.fail(error)
            raise
        call.note(_usage_of(answer))
        call.settle(None)
        return answer

    def _opened(self, kwargs: dict[str, Any]) -> Call:
        if self.refusal is None:
            if self._outer is not None:
                self._outer.hand_over()
            try:
                call = Call(self._model, self._dialect, self._gates, self._asks(kwargs))
                call.open()
            except Exception as error:  # whose code: ours; what cannot be checked is not sent
                self.refusal = aborted_by(error, self._gates[0].watchdog)
            else:
                return call
        raise self.refusal

    def _asks(self, kwargs: Mapping[str, Any]) -> LLMCall:
        call = again(describe(self._model, self._dialect, kwargs.get("messages") or [], None, None))
        # The model's own limit is not sent on this way.
        limit = max((value for name in _LIMITS if isinstance(value := kwargs.get(name), int)), default=None)
        floor = min(_FLOOR, limit) if limit else _FLOOR
        call = replace(call, max_output_tokens=limit, min_output_tokens=floor, clamp=self._limit is not None)
        call.opaque = call.opaque or "messages" not in kwargs
        call.tools = [*(kwargs.get("tools") or ()), *filter(None, [kwargs.get("response_format"), kwargs.get("system")])]
        put_in_place(call, self._gates[0].watchdog, self._role)
        return call

    def _limits(self, call: Call, kwargs: Mapping[str, Any]) -> dict[str, int]:
        """Give the limits to send: in place of those that are sent anyway, else one."""
        granted = [ticket.max_output_tokens for ticket in call.tickets if ticket.max_output_tokens is not None]
        names = [name for name in _LIMITS if kwargs.get(name) is not None]
        if not names and self._limit is not None:
            names.append(self._limit)
        return dict.fromkeys(names, min(granted)) if granted else {}


def _usage_of(answer: Any) -> Mapping[str, Any] | None:
    dump = getattr(getattr(answer, "usage", None), "model_dump", None)
    return None if dump is None else dump()


def _once(send: Callable[..., Any]) -> Callable[..., Any]:
    """Give an SDK's method that sends a request once."""
    resource = getattr(send, "__self__", None)
    client = getattr(resource, "_client", None)
    if resource is None or client is None:
        return send
    method: Callable[..., Any] = getattr(type(resource)(quiet(client)), send.__name__)
    return method
