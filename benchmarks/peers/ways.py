"""What each peer's module offers: its ways in, each of which a benchmark can set up under a ceiling."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "gpt-4o"
PROMPT = "x" * 200
OUTPUT_LIMIT = 100
REQUEST: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": OUTPUT_LIMIT}
UNREACHABLE_USD = 1_000_000.0
"""A ceiling that no benchmark reaches."""
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_SETTINGS = ("LANGSMITH_", "LANGCHAIN_", "LANGFUSE_", "OPENAI_", "OTEL_", "AGENTGUARD_", "FLOE_", "CLEVAGENT_")


class NotOffered(Exception):
    """The peer has no such way; the message says why, for the note under the table."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a way in is set up with."""

    ceiling_usd: float = UNREACHABLE_USD
    provider_url: str = ""
    """The provider on this machine, for OpenAI clients."""
    collector_url: str = ""
    """Where a peer that reports to a service of its own may send: a stub on this machine."""
    folder: Path = Path()
    """For files that a peer writes."""
    is_shared: bool = False
    """Whether several processes with the same ``folder`` count against one ceiling."""


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A peer that was set up: how a call is made under it, and what it says was spent."""

    call: Callable[[], object]
    acall: Callable[[], Awaitable[object]]
    broken: Callable[[], object]
    """Stream, and leave after the first piece."""
    spent_usd: Callable[[], float | None]
    """By the peer's own account; ``None`` where it keeps none."""
    flush: Callable[[], object] = lambda: None
    """Send what it has queued, for peers that send."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way into one peer. ``attach(model, setting)`` is a context manager; ``model`` is a LangChain chat model or ``None``."""

    label: str
    attach: Callable[[Any, Setting], AbstractContextManager[Attached]]
    takes_model: bool
    has_ceiling: bool = True
    is_shareable: bool = False
    """Whether it has an account that several processes of one machine share, without a server."""


def through(
    model: Any, config: Any, spent_usd: Callable[[], float | None], *, flush: Callable[[], object] | None = None
) -> Attached:
    """Calls of a LangChain model with a config."""
    from langchain_core.messages import HumanMessage

    messages = [HumanMessage(PROMPT)]  # made once: turning a text into messages is the model's own work
    return Attached(
        call=lambda: model.invoke(messages, config),
        acall=lambda: model.ainvoke(messages, config),
        broken=lambda: leave(model.stream(messages, config)),
        spent_usd=spent_usd,
        flush=flush or (lambda: None),
    )


def around(client: Any, aclient: Any, spent_usd: Callable[[], float | None]) -> Attached:
    """Calls of OpenAI's own clients."""
    return Attached(
        call=lambda: client.chat.completions.create(**REQUEST),
        acall=lambda: aclient.chat.completions.create(**REQUEST),
        broken=lambda: leave(iter(client.chat.completions.create(**REQUEST, stream=True))),
        spent_usd=spent_usd,
    )


def leave(stream: Iterator[object]) -> None:
    """Take one piece and go away."""
    for _ in stream:
        break


def clients(url: str) -> tuple[Any, Any]:
    """Make OpenAI's synchronous and asynchronous client, without retries, for the provider on this machine."""
    import openai

    settings: dict[str, Any] = {"api_key": "test", "base_url": url, "max_retries": 0}
    return openai.OpenAI(**settings), openai.AsyncOpenAI(**settings)


def chat_model(url: str, **settings: Any) -> Any:
    """Make LangChain's OpenAI model for the provider on this machine. It asks for the usage of streams."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=MODEL, api_key="test", base_url=url, max_tokens=OUTPUT_LIMIT, **{"max_retries": 0, "stream_usage": True} | settings
    )


def instant_model() -> Any:
    """Make a LangChain model that answers at once and tells its usage in each of the places where handlers look for it."""
    from langchain_core.language_models.chat_models import BaseChatModel
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, ChatResult

    class InstantModel(BaseChatModel):
        model_name: str = MODEL
        max_tokens: int = OUTPUT_LIMIT

        @property
        def _llm_type(self) -> str:
            return "openai-chat"

        def _get_ls_params(self, stop: Any = None, **kwargs: Any) -> Any:
            return {"ls_provider": "openai", "ls_model_name": MODEL, "ls_model_type": "chat", "ls_max_tokens": OUTPUT_LIMIT}

        def _answer(self) -> ChatResult:
            told = {"prompt_tokens": 200, "completion_tokens": 100, "total_tokens": 300}
            usage = {"input_tokens": 200, "output_tokens": 100, "total_tokens": 300}
            metadata = {"model_name": MODEL, "token_usage": told, "finish_reason": "stop"}
            message = AIMessage(content="ok", usage_metadata=usage, response_metadata=metadata)
            return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"token_usage": told, "model_name": MODEL})

        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
            return self._answer()

        async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
            return self._answer()

    return InstantModel()


def stay_here() -> None:
    """Forget settings from outside, and refuse every connection beyond this machine: no peer phones home from a benchmark."""
    for name in [name for name in os.environ if name.startswith(_SETTINGS) or name.lower().endswith("_proxy")]:
        del os.environ[name]
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any, *, _original: Any = original) -> Any:
            if self.family in {socket.AF_INET, socket.AF_INET6} and address[0] not in _LOOPBACK:
                raise OSError(f"a benchmark tried to connect to {address!r}; it talks to this machine only")
            return _original(self, address)

        setattr(socket.socket, name, connect)


def no_account() -> None:
    """What a peer without an account says was spent."""


@contextlib.contextmanager
def only(attached: Attached) -> Iterator[Attached]:
    """Nothing to undo."""
    yield attached
