"""Requests that CrewAI sends past its models: ``InternalInstructor`` (``output_json``; litellm with a response model) has a client of its own.

Neither ``call`` of the model, nor its limit, nor its retries hold there: each request is asked for, with a limit that fits. Instructor
itself asks again, up to three times, when an answer does not fit the model. Checked with crewai 1.15.30 and instructor 1.15.4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from crewai.llms.base_llm import BaseLLM
from crewai.utilities.internal_instructor import InternalInstructor

from clevagent_core.calls import LLMCall
from clevagent_core.errors import Stopped
from clevagent_crewai.aborted import aborted_by
from clevagent_crewai.calls import Call, again, call_of, quiet
from clevagent_crewai.dialects import Dialect, describe, dialect_of
from clevagent_crewai.gates import Gate, doing, gates_of, name_of, working

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
        refusals: list[Exception] = []
        if isinstance(self.llm, BaseLLM):
            _guard(self, refusals)
        try:
            return original(self)
        except Exception as error:  # whose code: instructor's; it puts its own words around a refusal
            if refusals:
                raise refusals[0] from error.__cause__
            raise

    vars(to_pydantic)["_clevagent_original"] = original
    return to_pydantic


def _guard(self: Any, refusals: list[Exception]) -> None:
    import instructor  # noqa: PLC0415 - imported already

    llm = self.llm
    outer = call_of(llm) if "_clevagent_call" in type(llm).__dict__ else None
    model = outer.model if outer is not None else llm
    # A converter tells neither.
    role, task = (name_of(self.agent, "role"), None) if self.agent is not None else doing.get()
    role = role or working.get()
    gates = outer.gates if outer is not None else gates_of(role, task, model)
    if not gates:
        return
    dialect = dialect_of(model)
    client = self._client
    send = getattr(client.create_fn, "_clevagent_send", None) or client.create_fn.__wrapped__

    @functools.wraps(send)
    def create(*args: Any, **kwargs: Any) -> Any:
        if refusals:
            raise refusals[0]
        if outer is not None:
            outer.hand_over()
        try:
            this = Call(model, dialect, gates, _asks(model, dialect, gates, kwargs, role))
            this.open()
        except Exception as error:  # whose code: ours; what cannot be checked is not sent
            refusals.append(error if isinstance(error, Stopped) else aborted_by(error, gates[0].watchdog))
            raise refusals[0] from None
        granted = [ticket.max_output_tokens for ticket in this.tickets if ticket.max_output_tokens is not None]
        if granted:
            given = [name for name in _LIMITS if kwargs.get(name) is not None]
            kwargs |= dict.fromkeys(given or [dialect.unset if dialect.is_known else "max_tokens"], min(granted))
        kwargs |= dialect.quiet or {}
        try:
            with this:
                answer = quiet_method(send)(*args, **kwargs)
        except BaseException as error:
            this.fail(error)
            raise
        dump = getattr(getattr(answer, "usage", None), "model_dump", None)
        this.note(None if dump is None else dump())
        this.settle(None)
        return answer

    client.create_fn = instructor.patch(create=create, mode=client.mode, provider=client.provider)
    vars(client.create_fn)["_clevagent_send"] = send


def _asks(model: BaseLLM, dialect: Dialect, gates: list[Gate], kwargs: dict[str, Any], role: str | None) -> LLMCall:
    call = again(describe(model, dialect, kwargs.get("messages") or [], None, None))
    # The model's own limit is not sent on this way.
    limits = [value for name in _LIMITS if isinstance(value := kwargs.get(name), int)]
    limit = max(limits) if limits else None
    call = replace(call, max_output_tokens=limit, min_output_tokens=min(_FLOOR, limit) if limit else _FLOOR, clamp=True)
    call.tools = [*(kwargs.get("tools") or ()), *filter(None, [kwargs.get("response_format"), kwargs.get("system")])]
    call.node = role or gates[0].watchdog.node.get()
    call.tool = gates[0].watchdog.tool.get()
    return call


def quiet_method(send: Callable[..., Any]) -> Callable[..., Any]:
    """Give an SDK's method that sends a request once."""
    resource = getattr(send, "__self__", None)
    client = getattr(resource, "_client", None)
    if resource is None or client is None:
        return send
    method: Callable[..., Any] = getattr(type(resource)(quiet(client)), send.__name__)
    return method
