"""``clevagent.guard(model)``: the strict door for LangChain chat models.

A guarded model is a copy of the user's, of a subclass made for its class, that overrides the four methods through which every
call goes (``_generate``, ``_agenerate``, ``_stream``, ``_astream``): after LangChain's cache was asked, and before anything is
sent. There, unlike in a callback, the request can still be changed (the output limit is clamped to what is left), and each call
has one beginning and one end, however it is cancelled. Retries inside the SDK bill each attempt, so the copy's are set to 0 and
made by an ``Attempt``, each with a reservation of its own. Checked with langchain-core 1.0 and 1.7.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.load import dumpd
from langchain_core.load.load import Reviver
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import (
    Runnable,
    RunnableAssign,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
    RunnablePick,
    RunnableSequence,
)
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives
from langchain_core.runnables.fallbacks import RunnableWithFallbacks

from clevagent_core import default
from clevagent_core.budgets import Budget
from clevagent_core.errors import UsageError
from clevagent_core.frames import Standing, enter, entry, leave
from clevagent_core.names import Known, check_known
from clevagent_core.streams import abelonging, belonging
from clevagent_langchain.attempts import Answering, AsyncStreaming, Guard, Streaming, is_inside, manager_of
from clevagent_langchain.dialects import dialect_of
from clevagent_langchain.gaps import plain
from clevagent_langchain.handler import ClevAgentCallbackHandler
from clevagent_langchain.marks import GUARDED, Serialized

if TYPE_CHECKING:
    from clevagent_core.watchdog import Watchdog

logger = logging.getLogger("clevagent")

_GUARD = "_clevagent_guard"


def guard_model(obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget]) -> object | None:
    """Guard a chat model, or the chat model inside a binding; ``None`` for anything else.

    Raises:
        UsageError: ``obj`` holds chat models, but where they cannot be reached from outside.

    """
    if isinstance(obj, BaseChatModel):
        return _guarded(obj, watchdog, tuple(budgets))
    if isinstance(obj, RunnableBindingBase) and isinstance(obj.bound, BaseChatModel):
        guarded: object = _guard_fallbacks_of(obj.model_copy(update={"bound": guard_model(obj.bound, watchdog, budgets)}))
        return guarded
    if isinstance(obj, RunnableWithFallbacks):
        runnable = guard_model(obj.runnable, watchdog, budgets)
        fallbacks = [guard_model(fallback, watchdog, budgets) for fallback in obj.fallbacks]
        if runnable is not None and None not in fallbacks:
            return obj.model_copy(update={"runnable": runnable, "fallbacks": fallbacks})
    module = type(obj).__module__.partition(".")[0]
    if module in {"langchain_core", "langchain", "langgraph", "langchain_classic"}:
        raise UsageError(
            f"guard() cannot reach the models inside a {type(obj).__qualname__}, so its calls would go out unchecked. Guard the "
            "model first and build the rest from it: clevagent.guard(model).with_structured_output(...), "
            "create_agent(clevagent.guard(model), tools); or attach to everything with clevagent.init(attach=['langchain'])."
        )
    return None


def check_model_names(obj: object, watchdog: Watchdog | None, budgets: Sequence[Budget]) -> None:
    """Refuse budgets that misspell the name of the model they were given to.

    Another model's name is fine, where that model is known: calls may name it (``model.bind(model=...)``).

    Raises:
        UsageError: a name that is nearly the model's, and no other model's.

    """
    if all(budget.model is None for budget in budgets):
        return
    names = set(_names_of(obj))
    price = (watchdog or default.current()).plugins.price
    unknown = [budget for budget in budgets if budget.model is not None and price(budget.model, None, None) is None]
    check_known(unknown, {"model": Known(names)}, where="guard(model)")


def _names_of(obj: object) -> Iterator[str]:
    if isinstance(obj, BaseChatModel):
        yield dialect_of(obj).model_name(obj)
    elif isinstance(obj, RunnableBindingBase):
        yield from (str(name) for name in (obj.kwargs.get("model"), obj.kwargs.get("model_name")) if name)
        yield from _names_of(obj.bound)
    elif isinstance(obj, RunnableWithFallbacks):
        for runnable in obj.runnables:
            yield from _names_of(runnable)


def _guarded(model: BaseChatModel, watchdog: Watchdog | None, budgets: tuple[Budget, ...]) -> BaseChatModel:
    for budget in budgets:
        if budget.tool_calls is not None:
            raise UsageError(
                f"guard(model, budgets=[{budget.label!r}]) limits tool calls, but a model is not asked when a tool is run, so the "
                "limit would never hold. Give it to clevagent.run(budgets=[...]) and attach what sees tools: "
                "clevagent.init(attach=['langchain']), or callbacks=[ClevAgentCallbackHandler()]."
            )
    before = _guard_of(model)
    if before is not None:
        if not budgets and watchdog in {None, before.watchdog}:
            return model
        # Guarded once more with budgets of its own: both sets hold.
        budgets = (*before.budgets, *(budget for budget in budgets if budget not in before.budgets))
        copy = model.model_copy()
        _set_guard(copy, replace(before, budgets=budgets, watchdog=watchdog or before.watchdog, lost=()))
        return copy
    dialect = dialect_of(model)
    guard_what_is_loaded()
    copy = model.model_copy()
    # Worked out from the plain model, and made again from the copy when they are needed.
    for name in ("_serialized", "_client_params"):
        copy.__dict__.pop(name, None)
    retries = dialect.take_over_retries(model, copy)
    object.__setattr__(copy, "__class__", _guarded_class(type(model)))
    _set_guard(copy, Guard(getattr(model, "max_retries", None), budgets, watchdog, dialect, retries))
    if not dialect.is_known:
        logger.warning(
            "guard(%s): how this model takes an output limit is not known to ClevAgent, so none is sent with its calls (set one on "
            "the model), and retries inside its SDK cannot be seen: each is billed, and only the last is counted.",
            type(model).__qualname__,
        )
    return copy


def _set_guard(model: BaseChatModel, guard: Guard) -> None:
    object.__setattr__(model, "__pydantic_private__", {**(model.__pydantic_private__ or {}), _GUARD: guard})


def _guard_of(model: BaseChatModel) -> Guard | None:
    return (model.__pydantic_private__ or {}).get(_GUARD)


@functools.cache
def _guarded_class(base: type[BaseChatModel]) -> type[BaseChatModel]:
    """Make the subclass for one class of models. Only what the class itself overrides is overridden: LangChain looks at that."""
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_generate": _generate,
        "_get_ls_params": _get_ls_params,
        "to_json": _to_json,
        "_serialized": functools.cached_property(_serialized),
        "with_fallbacks": _with_fallbacks,
        "configurable_alternatives": _configurable_alternatives,
        # Native producers of v2 events would go past _stream; without them LangChain makes the events from it.
        "_stream_chat_model_events": None,
        "_astream_chat_model_events": None,
    }
    body |= {name: _entering(plain(getattr(base, name))) for name in _ENTRIES}
    body["generate"] = plain(base.generate)
    body |= {name: _made_here(getattr(base, name), make) for name, make in _STREAMS}
    methods = {"_agenerate": _agenerate, "_stream": _stream, "_astream": _astream}
    body |= {name: method for name, method in methods.items() if getattr(base, name) is not getattr(BaseChatModel, name)}
    wrappers = {name: getattr(base, name, None) for name in _WRAPPERS}
    body |= {
        name: _guarding_fallbacks(method)
        for name, method in wrappers.items()
        # LangChain looks whether a model has tools by whether this is overridden.
        if method is not None and method is not BaseChatModel.bind_tools
    }
    for name in ("_stream_chat_model_events", "_astream_chat_model_events"):
        if getattr(base, name, None) is None:
            del body[name]
    return cast("type[BaseChatModel]", _subclass(base, body))


def _subclass(base: type[Any], body: dict[str, Any]) -> type[Any]:
    metaclass: Any = type(base)
    made: type[Any] = metaclass(base.__name__, (base,), body)
    return made


def budgets_of(model: BaseChatModel) -> tuple[Budget, ...]:
    """Give the budgets that a guarded model was given itself; none of a model that is not guarded."""
    guard = _guard_of(model)
    return guard.budgets if guard is not None else ()


def _state(model: BaseChatModel) -> Guard:
    guard = _guard_of(model)
    if guard is None:
        raise UsageError(
            f"This {type(model).__qualname__} was rebuilt from a guarded one (configurable_fields() does that), and nobody asked for "
            "the new one to be guarded, so its call was refused. Give what differs with the call (.bind(model=...)), or guard the result."
        )
    if guard.lost:
        names = ", ".join(map(repr, guard.lost))
        raise UsageError(
            f"This {type(model).__qualname__} was loaded from JSON, where the budgets that it was guarded with ({names}) cannot stand, so "
            "its call was refused. Give them again: clevagent.guard(model, budgets=[...])."
        )
    if model.__dict__.get("max_retries"):
        # Set after it was guarded: the SDK would retry again, unseen.
        guard = replace(guard, retries=guard.dialect.take_over_retries(model, model))
        _set_guard(model, guard)
    return guard


def _base(model: BaseChatModel) -> type[BaseChatModel]:
    return cast("type[BaseChatModel]", type(model).__bases__[0])


_WRAPPERS = (
    "bind", "bind_tools", "with_structured_output", "with_config", "with_retry", "with_listeners", "with_alisteners", "with_types",
    "pipe", "__or__",
)  # fmt: skip
"""Methods that put a model into something that has ``with_fallbacks`` too."""


_STREAMS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("stream", belonging),
    ("astream", abelonging),
    ("astream_events", abelonging),
)
"""Those that only begin something, which may be read elsewhere, each with how it is made to belong here."""
_ENTRIES = ("agenerate", "batch", "abatch")
"""Those that hand calls to other tasks and threads; what ``invoke`` does, and all others, ends here or in one of them."""

# -- the methods of guarded models ----------------------------------------------------------------------------------------


def _generate(
    self: BaseChatModel, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
) -> ChatResult:
    base = _base(self)._generate  # noqa: SLF001 - the method that is overridden
    if is_inside(self, run_manager):
        return base(self, messages, stop=stop, **manager_of(base, run_manager), **kwargs)
    asking = Answering(self, _state(self), base, messages, stop, run_manager, kwargs)
    try:
        return asking.call()
    finally:
        asking.end()


async def _agenerate(
    self: BaseChatModel, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
) -> ChatResult:
    base = _base(self)._agenerate  # noqa: SLF001 - the method that is overridden
    if is_inside(self, run_manager):
        return await base(self, messages, stop=stop, **manager_of(base, run_manager), **kwargs)
    asking = Answering(self, _state(self), base, messages, stop, run_manager, kwargs)
    try:
        return await asking.acall()
    finally:
        asking.end()


def _stream(
    self: BaseChatModel, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
) -> Iterator[ChatGenerationChunk]:
    base = _base(self)._stream  # noqa: SLF001 - the method that is overridden
    if is_inside(self, run_manager):
        yield from base(self, messages, stop=stop, run_manager=run_manager, **kwargs)
        return
    asking = Streaming(self, _state(self), base, messages, stop, run_manager, kwargs)
    chunks: Any = None
    try:
        chunks, chunk = asking.call()
        while True:
            if chunk is None:
                break
            if asking.note(chunk):
                yield chunk
            chunk = asking.next_of(chunks)
        asking.read()
    except BaseException as error:
        asking.break_off(error)
        if hasattr(chunks, "close"):
            chunks.close()
        raise
    finally:
        asking.end()


async def _astream(
    self: BaseChatModel, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
) -> AsyncIterator[ChatGenerationChunk]:
    base = _base(self)._astream  # noqa: SLF001 - the method that is overridden
    if is_inside(self, run_manager):
        async for chunk in base(self, messages, stop=stop, run_manager=run_manager, **kwargs):
            yield chunk
        return
    asking = AsyncStreaming(self, _state(self), base, messages, stop, run_manager, kwargs)
    chunks: Any = None
    try:
        chunks, piece = await asking.acall()
        while True:
            if piece is None:
                break
            if asking.note(piece):
                yield piece
            piece = await asking.anext_of(chunks)
        asking.read()
    except BaseException as error:
        asking.break_off(error)
        if hasattr(chunks, "aclose"):
            await chunks.aclose()
        raise
    finally:
        asking.end()


def _get_ls_params(self: BaseChatModel, stop: list[str] | None = None, **kwargs: Any) -> Any:
    _note_asked(self)  # LangChain calls this before it looks into its cache
    return _base(self)._get_ls_params(self, stop=stop, **kwargs)  # noqa: SLF001 - overridden here


def _note_asked(model: BaseChatModel) -> None:
    """Let the runs around know that a guarded model was asked, also where the answer comes from a cache, and is no call."""
    guard = _guard_of(model)
    if guard is not None:
        default.note_asked(guard.watchdog)


def _entering(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let what an entry point hands to other tasks or threads stand where it is called, in the steps of a generator, too."""
    if iscoroutinefunction(method):

        @functools.wraps(method)
        async def aenter(self: BaseChatModel, *args: Any, **kwargs: Any) -> Any:
            frame = entry(_watchdog_of(self))
            if frame is None:
                return await method(self, *args, **kwargs)
            with Standing(frame):
                return await method(self, *args, **kwargs)

        return aenter

    @functools.wraps(method)
    def enter(self: BaseChatModel, *args: Any, **kwargs: Any) -> Any:
        frame = entry(_watchdog_of(self))
        if frame is None:
            return method(self, *args, **kwargs)
        with Standing(frame):
            return method(self, *args, **kwargs)

    return enter


def _made_here(method: Callable[..., Any], make: Callable[[Watchdog, Callable[[], Any]], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def stream(self: Any, *args: Any, **kwargs: Any) -> Any:
        return make(_watchdog_of(self), lambda: method(self, *args, **kwargs))

    return stream


def _watchdog_of(runnable: Any) -> Watchdog:
    guard = _guard_within(runnable)
    return (guard.watchdog if guard is not None else None) or default.current()


def _with_fallbacks(self: BaseChatModel, fallbacks: Sequence[Any], **kwargs: Any) -> Any:
    # A refusal is an exception like any other to LangChain: unguarded fallbacks would answer in its place, and spend.
    return _guard_fallbacks_of(_base(self).with_fallbacks(self, _guard_all(_state(self), fallbacks), **kwargs))


def _configurable_alternatives(self: BaseChatModel, which: Any, **kwargs: Any) -> Any:
    # What is no option is an alternative, or what makes one.
    options = {name: kwargs.pop(name) for name in ("default_key", "prefix_keys") if name in kwargs}
    guard = _state(self)
    alternatives: dict[str, Any] = {
        name: _guard_all(guard, [other])[0] if isinstance(other, Runnable) else _guarding_made(guard, other)
        for name, other in kwargs.items()
    }
    return _guard_fallbacks_of(_base(self).configurable_alternatives(self, which, **options, **alternatives))


def _guarding_made(guard: Guard, make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: _guard_all(guard, [make()])[0]


def _reduce(self: BaseChatModel, protocol: Any) -> tuple[Callable[..., object], tuple[object, ...]]:  # noqa: ARG001 - as object's
    guard = _guard_of(self) or _state(self)
    return _guard_again, (_plain(self, guard), guard.budgets, guard.lost)


def _plain(model: BaseChatModel, guard: Guard) -> BaseChatModel:
    """Make the model again that was guarded."""
    plain = model.model_copy()
    object.__setattr__(plain, "__class__", _base(model))
    private = plain.__pydantic_private__ or {}
    object.__setattr__(plain, "__pydantic_private__", {key: value for key, value in private.items() if key != _GUARD} or None)
    # Made without retries, and (where they can be pickled at all) made again when they are needed.
    for name in ("_serialized", "_client_params", "_client", "_async_client"):
        plain.__dict__.pop(name, None)
    if "max_retries" in plain.__dict__:
        plain.__dict__["max_retries"] = guard.max_retries
    return plain


def _guard_again(plain: BaseChatModel, budgets: tuple[Budget, ...], lost: tuple[str, ...]) -> BaseChatModel:
    """Load a guarded model: it belongs to the watchdog of the process it comes to."""
    guarded = _guarded(plain, None, budgets)
    if lost:
        _set_guard(guarded, replace(_state(guarded), lost=lost))
    return guarded


def _to_json(self: BaseChatModel) -> Any:
    guard = _guard_of(self) or _state(self)
    written = _plain(self, guard).to_json()
    return {**written, GUARDED: [*(budget.label for budget in guard.budgets), *guard.lost]}


def _serialized(self: BaseChatModel) -> dict[str, Any]:
    # What callbacks and caches get to see: that of the plain model.
    return Serialized(dumpd(_plain(self, _guard_of(self) or _state(self))))


@functools.cache
def guard_what_is_loaded() -> None:
    """Let what was written as JSON from a guarded model (``dumps``) be guarded when it is loaded, from the first guard on."""
    revive = Reviver.__call__

    @functools.wraps(revive)
    def revive_guarded(self: Reviver, value: dict[str, Any]) -> Any:
        made = revive(self, value)
        if isinstance(made, BaseChatModel) and isinstance(value.get(GUARDED), list):
            return _guard_again(made, (), tuple(map(str, value[GUARDED])))
        return made

    Reviver.__call__ = revive_guarded  # type: ignore[method-assign]


# -- what they share ------------------------------------------------------------------------------------------------------


def _guarding_fallbacks(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _guard_fallbacks_of(method(self, *args, **kwargs))

    return wrapper


def _guard_fallbacks_of(wrapped: Any) -> Any:
    if isinstance(wrapped, (RunnableBindingBase, RunnableWithFallbacks, RunnableSequence, RunnableConfigurableAlternatives)):
        object.__setattr__(wrapped, "__class__", _wrapping_class(type(wrapped)))
    return wrapped


@functools.cache
def _wrapping_class(base: type[Any]) -> type[Any]:
    """Make the subclass for what a guarded model was put into: a binding, a chain, or one that retries or falls back."""
    if getattr(base, "_clevagent_guards_fallbacks", False):
        return base

    def with_fallbacks(self: Any, fallbacks: Sequence[Any], **kwargs: Any) -> Any:
        guard = _guard_within(self)
        fallbacks = fallbacks if guard is None else _guard_all(guard, fallbacks)
        return _guard_fallbacks_of(base.with_fallbacks(self, fallbacks, **kwargs))

    def reduce(self: Any, protocol: Any) -> tuple[Callable[..., object], tuple[object, ...]]:  # noqa: ARG001 - as object's
        plain = self.model_copy()
        object.__setattr__(plain, "__class__", base)
        return _guard_fallbacks_of, (plain,)

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "with_fallbacks": with_fallbacks,
        "_clevagent_guards_fallbacks": True,
        "__annotations__": {"_clevagent_guards_fallbacks": "ClassVar[bool]"},
    }
    body |= {name: _made_here(getattr(base, name), make) for name, make in _STREAMS}
    # A binding hands what it does not have itself to the model inside.
    body |= {name: _guarding_fallbacks(getattr(base, name)) for name in _WRAPPERS if hasattr(base, name)}
    return _subclass(base, body)


def _guard_within(runnable: Any) -> Guard | None:
    if isinstance(runnable, BaseChatModel):
        return _guard_of(runnable)
    if isinstance(runnable, (RunnableSequence, RunnableParallel)):
        steps = runnable.steps if isinstance(runnable, RunnableSequence) else runnable.steps__.values()
        return next((guard for step in steps if (guard := _guard_within(step)) is not None), None)
    if isinstance(runnable, RunnableBindingBase):
        return _guard_within(runnable.bound)
    if isinstance(runnable, RunnableConfigurableAlternatives):
        return _guard_within(runnable.default)
    return _guard_within(runnable.runnable) if isinstance(runnable, RunnableWithFallbacks) else None


def _guard_all(guard: Guard, fallbacks: Sequence[Any]) -> list[Any]:
    return [_guard_one(guard, fallback) for fallback in fallbacks]


def _guard_one(guard: Guard, fallback: Any) -> Any:
    if isinstance(fallback, (RunnableSequence, RunnableLambda)) and _is_guarded_throughout(fallback, guard.budgets):
        return _asked_inside(guard, fallback) if isinstance(fallback, RunnableLambda) else fallback
    return guard_model(fallback, guard.watchdog, guard.budgets) or fallback


def _asked_inside(guard: Guard, function: RunnableLambda[Any, Any]) -> RunnableLambda[Any, Any]:
    """Let a handler ask before whatever model a function makes when it is called, and the guard's own budgets cover that."""
    attached = function.with_config(callbacks=[ClevAgentCallbackHandler(watchdog=guard.watchdog)])

    @contextmanager
    def lending() -> Iterator[None]:
        watchdog = guard.watchdog or default.current()
        frame = enter(watchdog, watchdog.current_run())
        frame.lent = (*frame.lent, *guard.budgets)
        try:
            yield
        finally:
            leave(frame)

    def ask(value: Any, config: RunnableConfig) -> Any:
        with lending():
            return attached.invoke(value, config)

    async def aask(value: Any, config: RunnableConfig) -> Any:
        with lending():
            return await attached.ainvoke(value, config)

    return RunnableLambda(ask, afunc=aask, name=function.get_name())


def _is_guarded_throughout(runnable: Any, budgets: tuple[Budget, ...]) -> bool:
    """Tell whether all models of a chain are guarded with ``budgets`` already; not, where it cannot be looked into."""
    if isinstance(runnable, BaseChatModel):
        guard = _guard_of(runnable)
        return guard is not None and all(budget in guard.budgets for budget in budgets)
    if isinstance(runnable, RunnableSequence):
        parts: Sequence[Any] = runnable.steps
    elif isinstance(runnable, RunnableParallel):
        parts = list(runnable.steps__.values())
    elif isinstance(runnable, RunnableAssign):
        parts = [runnable.mapper]
    elif isinstance(runnable, RunnableLambda):
        parts = runnable.deps
    elif isinstance(runnable, RunnableWithFallbacks):
        parts = list(runnable.runnables)
    elif isinstance(runnable, RunnableBindingBase):
        parts = [runnable.bound]
    elif isinstance(runnable, RunnableConfigurableAlternatives):
        parts = [runnable.default, *runnable.alternatives.values()]
    else:
        return isinstance(runnable, (BasePromptTemplate, BaseOutputParser, RunnablePassthrough, RunnablePick))
    return all(_is_guarded_throughout(part, budgets) for part in parts)
