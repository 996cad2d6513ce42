"""What LangChain keeps from its callback handlers, made good: from when the first handler of ours is made, for the whole process.

- A call of ``ainvoke`` that is cancelled ends without a word to any handler. So does what was begun beside a call that is refused, or
  that fails, in one ``generate``. What is left open then is charged, or given back where it was not sent.
- One handler that runs inline, as ours must, and no other handler hears of the start of an asynchronous text completion.
- Where an inline handler refuses one of several messages, the coroutines for the others are never awaited.
- LangChain logs what a handler raises as an error of the handler; a refusal is none.

Checked with langchain-core 1.4 to 1.8.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks.base import BaseCallbackHandler
from langchain_core.callbacks.manager import AsyncCallbackManager
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.llms import BaseLLM

from clevagent_core.coverage import uncover
from clevagent_core.errors import ClevAgentError
from clevagent_core.tickets import Ticket
from clevagent_langchain.failures import comes_before_sending, comes_from_a_callback

Begun = list[Callable[[], Ticket | None]]
"""For each call that was begun, what takes its ticket if nobody has ended it."""

_begun: ContextVar[Begun | None] = ContextVar("clevagent_langchain_begun", default=None)
"""What the ``generate`` or ``agenerate`` around this context has begun."""
_lock = threading.RLock()
_filled: list[bool] = []
_PLAIN = "_clevagent_plain"


def note_begun(take: Callable[[], Ticket | None]) -> None:
    """Let the ``generate`` around this end a call that LangChain itself does not end. ``take`` gives its ticket, once."""
    begun = _begun.get()
    if begun is not None:
        begun.append(take)


def fill() -> None:
    """Put it in place, once in a process."""
    if _filled:
        return
    with _lock:
        if _filled:
            return
        _filled.append(True)
        for models in (BaseChatModel, BaseLLM):
            _replace(models, "generate", _ending)
            _replace(models, "agenerate", _aending)
        _replace(AsyncCallbackManager, "on_llm_start", functools.partial(_one_by_one, "prompts"))
        _replace(AsyncCallbackManager, "on_chat_model_start", functools.partial(_one_by_one, "messages"))
        logging.getLogger("langchain_core.callbacks.manager").addFilter(_is_fault)


def plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``generate`` or ``agenerate`` as LangChain has it, for models that ask for themselves: no handler begins a call of theirs."""
    return vars(method).get(_PLAIN, method)  # type: ignore[no-any-return]  # put there below


def _replace(kind: type[Any], name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(kind, name, wrap(getattr(kind, name)))


def _ending(generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def ending(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _begun.get()
        begun: Begun = []
        _begun.set(begun)
        try:
            return generate(self, *args, **kwargs)
        except BaseException as error:
            # One is sent after the other, and LangChain tells of the one that fails; unless another handler keeps it from that.
            _end(begun, error, sent=comes_from_a_callback(error))
            raise
        finally:
            _begun.set(before)

    vars(ending)[_PLAIN] = generate
    return ending


def _aending(agenerate: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(agenerate)
    async def aending(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _begun.get()
        begun: Begun = []
        _begun.set(begun)
        try:
            return await agenerate(self, *args, **kwargs)
        except BaseException as error:
            _end(begun, error, sent=True)  # all at once
            raise
        finally:
            _begun.set(before)

    vars(aending)[_PLAIN] = agenerate
    return aending


def _end(begun: Begun, error: BaseException, *, sent: bool) -> None:
    """End what LangChain has not ended."""
    for take in begun:
        ticket = take()
        if ticket is not None:
            ticket.fail(error, sent=sent and not comes_before_sending(error))
            uncover(ticket)


def _one_by_one(name: str, start: Callable[..., Awaitable[list[Any]]]) -> Callable[..., Awaitable[list[Any]]]:
    """Tell inline handlers first, then the others, of one prompt after the other; ``name`` is that of the argument which has them."""

    @functools.wraps(start)
    async def start_one_by_one(self: AsyncCallbackManager, serialized: dict[str, Any], *args: Any, **kwargs: Any) -> list[Any]:
        sent, run_id = _two(args, kwargs, name)
        inline = [handler for handler in self.handlers if handler.run_inline]
        others = [handler for handler in self.handlers if not handler.run_inline]
        is_alone = len(self.handlers) == len(sent) == 1
        if is_alone or not any(getattr(handler, "is_clevagents", False) for handler in inline):
            return await start(self, serialized, sent, run_id, **kwargs)
        managers = []
        for one in sent:
            # Each inline handler by itself: LangChain makes the coroutines of all of them first.
            for handlers in (*([handler] for handler in inline), others):
                if handlers:
                    (manager,) = await start(_only(self, handlers), serialized, [one], run_id, **kwargs)
                    run_id = manager.run_id
            manager.handlers = self.handlers
            managers.append(manager)
            run_id = None
        return managers

    return start_one_by_one


def _two(args: Sequence[Any], kwargs: dict[str, Any], name: str) -> tuple[Sequence[Any], Any]:
    """Take the prompts and the run id out of the arguments, however they were given."""
    values = [*args]
    return (values.pop(0) if values else kwargs.pop(name)), (values.pop(0) if values else kwargs.pop("run_id", None))


def _only(manager: AsyncCallbackManager, handlers: list[BaseCallbackHandler]) -> AsyncCallbackManager:
    copy = manager.copy()
    copy.handlers = handlers
    return copy


def _is_fault(record: logging.LogRecord) -> bool:
    """Tell whether a line of LangChain's log is of a fault; a refusal is told by whoever gets it."""
    return not (record.msg == "Error in %s.%s callback: %s" and isinstance(sys.exc_info()[1], ClevAgentError))
