"""The one place through which every model call of CrewAI goes: ``call`` and ``acall`` of the model's class.

CrewAI's hook before model calls can refuse, but it neither sees a custom model that is called directly, nor the end of a call, nor
retries inside an SDK; it cannot lower an output limit; and the event that tells what a call used comes later, on another thread. So
the two methods are wrapped instead, on every class of models while anything is guarded or attached: crews make models of their own
(planning, managers, guardrails, memory), which no wrapper around one object would reach. Outside of what is guarded the wrappers
pass calls through.

A call that is let through is made on a *view* of the model: an object of a subclass that shares the model's state, all of it, and
differs in what holds for this call only: the output limit that was granted, and clients that do not retry. Checked with crewai 1.15.19 and 1.15.30.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from crewai.llms.base_llm import BaseLLM

from clevagent_core import default
from clevagent_core.attempts import Attempt, drive
from clevagent_core.budgets import Budget
from clevagent_core.calls import LLMCall
from clevagent_core.errors import Stopped, UsageError
from clevagent_core.interrupts import is_interrupt
from clevagent_crewai.aborted import aborted_by
from clevagent_crewai.caches import cache
from clevagent_crewai.calls import Call, again, call_of, plain_class, root_of, subclass, view_of
from clevagent_crewai.dialects import Dialect, describe, dialect_of
from clevagent_crewai.fallbacks import check_litellm, fallbacks_of
from clevagent_crewai.gates import (
    GUARD,
    Gate,
    ModelGuard,
    attached,
    doing,
    gates_of,
    guard_of,
    name_of,
    put_in_place,
    task_name_of,
    working,
)
from clevagent_crewai.instructors import unwatch_instructors, watch_instructors
from clevagent_crewai.scopes import open_scopes, put_back
from clevagent_crewai.usage import answer_of
from clevagent_crewai.works import works
from clevagent_providers import failures

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")


# -- the methods of all classes of models ---------------------------------------------------------------------------------


def _begin(model: BaseLLM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Gate], LLMCall, Dialect] | None:
    """Describe a call; ``None`` where nobody has to be asked."""
    try:
        return _describe(model, args, kwargs)
    except Exception as error:  # whose code: ours; what cannot be checked is not sent
        failed = error
    work = next(works(model), None)
    watchdog = work.watchdog if work is not None else attached[0] if attached else default.current()
    raise aborted_by(failed, watchdog)


def _describe(model: BaseLLM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Gate], LLMCall, Dialect] | None:
    agent, task = _argument(args, kwargs, 5, "from_agent"), _argument(args, kwargs, 4, "from_task")
    role, task_name = name_of(agent, "role"), task_name_of(task)
    around = doing.get()
    role, task_name = role or around[0], task_name or around[1]
    working.set(role)
    gates = gates_of(role, task_name, model)
    if not gates:
        return None
    dialect = dialect_of(model)
    if dialect.quiet is not None:
        check_litellm()
    call = describe(
        model,
        dialect,
        _argument(args, kwargs, 0, "messages"),
        _argument(args, kwargs, 1, "tools"),
        _argument(args, kwargs, 6, "response_model"),
    )
    put_in_place(call, gates[0].watchdog, role)
    return gates, call, dialect


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


class _Asking(Attempt[Call, Any]):
    """One call of a model, as CrewAI or the user makes it."""

    def __init__(
        self, model: BaseLLM, begun: tuple[list[Gate], LLMCall, Dialect], send: Callable[[BaseLLM], Any], *, is_async: bool
    ) -> None:
        """``send`` makes it, given the view of the model that it is made on."""
        self.failures = _failures
        self._model = model
        self._gates, self._asks, self._dialect = begun
        self._send = send
        self._is_async = is_async
        self._this: Call | None = None
        self._scopes: Any = None
        self._has_failed = False

    @property
    def retries(self) -> int:  # type: ignore[override]  # worked out only where it matters: a client may have to be made for it
        """How often the SDK would have repeated it."""
        return _retries(self._model, self._dialect, self._is_async)

    def _next(self) -> Call:
        self._this = Call(self._model, self._dialect, self._gates, again(self._asks) if self._has_failed else self._asks)
        self._scopes = open_scopes()
        return self._this

    def open(self) -> Call:
        """See :class:`Attempt`."""
        this = self._next()
        this.open()
        return this

    async def aopen(self) -> Call:
        """See :class:`Attempt`."""
        this = self._next()
        await this.aopen()
        return this

    def abandon(self) -> None:
        """See :class:`Attempt`."""
        if self._this is not None:
            self._this.abandon()

    def enter(self, this: Call) -> None:
        """See :class:`Attempt`."""
        this.__enter__()

    def send(self, this: Call) -> Any:
        """See :class:`Attempt`."""
        return self._send(view_of(this))

    def leave(self, this: Call) -> None:
        """See :class:`Attempt`."""
        this.__exit__()

    def settle(self, this: Call, answer: Any) -> None:
        """See :class:`Attempt`."""
        this.settle(answer_of(answer))

    def fail(self, this: Call, error: BaseException) -> None:
        """See :class:`Attempt`."""
        this.fail(error)
        put_back(self._scopes)
        self._has_failed = True


class _Failures:
    """What errors mean: those of the SDKs, around which CrewAI's providers put their own words."""

    def is_transient(self, error: BaseException) -> bool:
        return failures.is_transient(root_of(error))

    def wait_before_retry(self, state: Any) -> float:
        return failures.wait_before_retry(state, root_of)


_failures = _Failures()


async def _called(
    model: BaseLLM, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, is_async: bool
) -> Any:
    """Do what ``call`` does, or ``acall``."""

    async def made(by: Callable[..., Any], *given: Any) -> Any:
        answer = by(*given, *args, **kwargs)
        return await answer if is_async else answer

    if "_clevagent_call" in type(model).__dict__:
        # A view: this call was asked for, once.
        this = call_of(model)
        this.begin_again()
        try:
            return await made(original, model)
        except Exception as error:  # whose code: CrewAI's, the SDK's
            this.failed = error
            raise
    begun = _begin(model, args, kwargs)
    if begun is None:
        return await made(original, model)
    asking = _Asking(model, begun, lambda view: original(view, *args, **kwargs), is_async=is_async)
    try:
        return await asking.acall() if is_async else asking.call()
    except Stopped as refusal:
        # CrewAI reads what it came after, too, and tries again what came after a provider's 429.
        refusal.__context__ = None
        raise
    except Exception as error:  # whose code: CrewAI's, the SDK's
        told = error
    for other in fallbacks_of(model, told):
        try:
            return await made(other.acall if is_async else other.call)
        except Stopped:
            raise
        except Exception as error:  # whose code: as above
            told = error
    raise told


def _guarding_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: BaseLLM, *args: Any, **kwargs: Any) -> Any:
        return drive(_called(self, original, args, kwargs, is_async=False))

    vars(call)["_clevagent_original"] = original
    return call


def _guarding_acall(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(original)
    async def acall(self: BaseLLM, *args: Any, **kwargs: Any) -> Any:
        return await _called(self, original, args, kwargs, is_async=True)

    vars(acall)["_clevagent_original"] = original
    return acall


def _retries(model: BaseLLM, dialect: Dialect, is_async: bool) -> int:  # noqa: FBT001 - which of two clients
    """Tell how often the SDK would have repeated a failed request."""
    if dialect.quiet is not None:
        retries = model.additional_params.get("max_retries", model.additional_params.get("num_retries"))
        retries = 2 if retries is None else retries  # as the SDKs that litellm uses
    else:
        get = getattr(model, "_get_async_client" if is_async else "_get_sync_client", None)
        if get is None:
            return 0
        try:
            client = get()
        except Exception as error:  # whose code: CrewAI's; a client that cannot be made (no key) is its own error, told by the call
            if is_interrupt(error):
                raise
            logger.debug("The client of a model cannot be made.", exc_info=True)
            return 0
        retries = getattr(client, "max_retries", 0) if hasattr(client, "with_options") else 0
    return retries if isinstance(retries, int) and retries > 0 else 0


# -- putting them there, and taking them off ------------------------------------------------------------------------------

_lock = threading.RLock()
_is_installed = False
_keeps_installed = False
"""Whether something was guarded: nobody can tell how long it is used."""


def install(*, for_good: bool) -> None:
    """Wrap every class of models there is, and each that will be made."""
    global _is_installed, _keeps_installed  # noqa: PLW0603 - one per process: classes are
    with _lock:
        _keeps_installed = _keeps_installed or for_good
        if _is_installed:
            return
        _is_installed = True
        for cls in _classes(cast("Any", BaseLLM)):
            _wrap(cls)
        watch_instructors()
        _hear_of_subclasses()


def uninstall() -> None:
    """Take the wrappers off again, unless something was guarded."""
    global _is_installed  # noqa: PLW0603 - one per process: classes are
    with _lock:
        if not _is_installed or _keeps_installed or attached:
            return
        _is_installed = False
        unwatch_instructors()
        for cls in _classes(cast("Any", BaseLLM)):
            for name in ("call", "acall"):
                _restore(cls, name)


def _restore(cls: type[Any], name: str) -> None:
    method = cls.__dict__.get(name)
    # Not where somebody else has wrapped it since: then it stays, and passes through.
    original = method.__dict__.get("_clevagent_original") if method is not None else None
    if original is not None:
        setattr(cls, name, original)


def is_installed() -> bool:
    """Tell whether the wrappers are in place."""
    return _is_installed


def _classes(base: type[BaseLLM]) -> Iterator[type[BaseLLM]]:
    yield base
    for cls in base.__subclasses__():
        yield from _classes(cls)


def _wrap(cls: type[BaseLLM]) -> None:
    if "_clevagent_call" in cls.__dict__:
        return
    for name, wrapper in (("call", _guarding_call), ("acall", _guarding_acall)):
        method = cls.__dict__.get(name)
        if callable(method) and not getattr(method, "__isabstractmethod__", False) and "_clevagent_original" not in method.__dict__:
            setattr(cls, name, wrapper(method))


_hears: list[bool] = []


def _hear_of_subclasses() -> None:
    if _hears:
        return
    _hears.append(True)
    before = BaseLLM.__dict__.get("__init_subclass__")

    def __init_subclass__(cls: type[BaseLLM], **kwargs: Any) -> None:  # noqa: N807 - it takes the place of that one
        if before is not None:
            before.__get__(None, cls)(**kwargs)
        else:
            super(BaseLLM, cls).__init_subclass__(**kwargs)
        if _is_installed:
            _wrap(cls)

    BaseLLM.__init_subclass__ = classmethod(cast("Any", __init_subclass__))  # type: ignore[assignment,method-assign]


# -- guard(llm) -----------------------------------------------------------------------------------------------------------


def guard_model(model: BaseLLM, watchdog: Watchdog | None, budgets: tuple[Budget, ...]) -> BaseLLM:
    """Give a guarded copy of a model; it shares its clients and its token counter with the one that was given.

    Raises:
        UsageError: a budget limits what a model does not see.

    """
    for budget in budgets:
        if budget.tool_calls is not None:
            raise UsageError(
                f"guard(llm, budgets=[{budget.label!r}]) limits tool calls, but a model is not asked when a tool is run, so the limit "
                "would never hold. Give it to the crew: clevagent.guard(crew, budgets=[...])."
            )
    install(for_good=True)
    before = guard_of(model)
    if before is not None:
        budgets = (*before.budgets, *(budget for budget in budgets if budget not in before.budgets))
        watchdog = watchdog or before.watchdog
    elif not dialect_of(model).is_known:
        logger.warning(
            "guard(%s): how this model takes an output limit is not known to ClevAgent, so none is sent with its calls (max_tokens= on "
            "the model tells what to reserve), and retries inside of it cannot be seen: each is billed, and only the last is counted.",
            type(model).__qualname__,
        )
    return _clone(model, ModelGuard(watchdog, budgets))


def models_of(*values: object) -> list[BaseLLM]:
    """Give those that are models already, and not only the name of one."""
    return [value for value in values if isinstance(value, BaseLLM)]


def _clone(model: BaseLLM, guard: ModelGuard) -> BaseLLM:
    copy: BaseLLM = object.__new__(_guarded_class(plain_class(type(model))))
    object.__setattr__(copy, "__dict__", dict(model.__dict__))
    object.__setattr__(copy, "__pydantic_fields_set__", set(model.__pydantic_fields_set__))
    object.__setattr__(copy, "__pydantic_extra__", model.__pydantic_extra__)
    object.__setattr__(copy, "__pydantic_private__", {**(model.__pydantic_private__ or {}), GUARD: guard})
    return copy


@cache
def _guarded_class(base: type[BaseLLM]) -> type[BaseLLM]:
    """Make the subclass of guarded models: what CrewAI copies (for each item of ``kickoff_for_each``) stays guarded."""

    def again(self: BaseLLM, copy: BaseLLM) -> BaseLLM:
        guard = guard_of(self)
        if guard is None:
            raise UsageError(f"This {base.__qualname__} was rebuilt from a guarded one without its guard. Guard the new one.")
        return _clone(copy, guard)

    def copy_(self: BaseLLM) -> BaseLLM:
        return again(self, base.__copy__(_unguarded(self, base)))

    def deepcopy(self: BaseLLM, memo: dict[int, Any] | None = None) -> BaseLLM:
        return again(self, base.__deepcopy__(_unguarded(self, base), memo))

    def reduce(self: BaseLLM, protocol: Any) -> tuple[Callable[..., object], tuple[object, ...]]:  # noqa: ARG001 - as object's
        guard = guard_of(self)
        return _guard_again, (_unguarded(self, base), guard.budgets if guard is not None else ())

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__copy__": copy_,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
        "_clevagent_is_guarded": True,
        "__annotations__": {"_clevagent_is_guarded": "ClassVar[bool]"},
    }
    return cast("type[BaseLLM]", subclass(base, body))


def _unguarded(model: BaseLLM, base: type[BaseLLM]) -> BaseLLM:
    plain: BaseLLM = object.__new__(base)
    object.__setattr__(plain, "__dict__", dict(model.__dict__))
    object.__setattr__(plain, "__pydantic_fields_set__", set(model.__pydantic_fields_set__))
    object.__setattr__(plain, "__pydantic_extra__", model.__pydantic_extra__)
    private = {key: value for key, value in (model.__pydantic_private__ or {}).items() if key != GUARD}
    object.__setattr__(plain, "__pydantic_private__", private)
    return plain


def _guard_again(plain: BaseLLM, budgets: tuple[Budget, ...]) -> BaseLLM:
    """Unpickle a guarded model: it belongs to the watchdog of the process it comes to."""
    return guard_model(plain, None, budgets)
