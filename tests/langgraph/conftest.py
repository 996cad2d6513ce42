"""Shared by everything that drives LangGraph against the loopback provider."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import operator
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any

import langchain_openai.chat_models._client_utils
import pytest
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

import clevagent
from clevagent.testing import LoopbackProvider

Aio = Callable[[Awaitable[Any]], Any]
PROMPT = "Write me a poem about the sea and the moon. " * 10
LIMIT = 400
CALL = len(PROMPT) * 2_500_000 + LIMIT * 10_000_000
"""What one call is billed, in pico-USD: a token for each byte, and the whole output limit."""


def pytest_configure(config: pytest.Config) -> None:
    # LangChain makes the coroutines for handlers that do not run inline first, and drops them when an inline one raises.
    config.addinivalue_line("filterwarnings", "ignore:coroutine 'ahandle_event' was never awaited:RuntimeWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:Exception ignored in. <coroutine object ahandle_event:pytest.PytestUnraisableExceptionWarning"
    )
    # A stream whose task was cancelled is closed by the collector, when its event loop may be gone.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Exception ignored in. <async_generator object AsyncResponseStream:pytest.PytestUnraisableExceptionWarning",
    )
    # The models' async clients are not closed by anybody: LangChain keeps them in a cache of its own.
    config.addinivalue_line("filterwarnings", "ignore:unclosed (transport|<socket):ResourceWarning")


class Texts(TypedDict):
    """What most graphs here gather."""

    texts: Annotated[list[str], operator.add]


@pytest.fixture(autouse=True)
def _own_process_watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "CLEVAGENT_ATTACH", "CLEVAGENT_BUDGETS"):
        monkeypatch.delenv(name, raising=False)
    yield
    clevagent.shutdown()


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as running:
        yield running


@pytest.fixture
def chat(provider: LoopbackProvider) -> Callable[..., ChatOpenAI]:
    def make(**kw: Any) -> ChatOpenAI:
        defaults = {"model": "gpt-4o", "api_key": "test", "base_url": provider.openai_url, "max_retries": 0, "max_tokens": LIMIT}
        return ChatOpenAI(**defaults | kw)

    return make


@pytest.fixture
def line() -> Callable[..., Any]:
    """Compile a graph of nodes one after the other."""

    def make(*nodes: Callable[..., Any], saved: bool = True, schema: Any = Texts, **options: Any) -> Any:
        builder = StateGraph(schema)
        before = START
        for node in nodes:
            builder.add_node(node.__name__, node)
            builder.add_edge(before, node.__name__)
            before = node.__name__
        return builder.compile(checkpointer=InMemorySaver() if saved else None, **options)

    return make


@pytest.fixture(scope="session", autouse=True)
def _clients_are_closed_by_nobody() -> Iterator[None]:
    """Let go, quietly, of the clients that LangChain keeps in caches of its own: pytest would report them when it ends."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for cached in vars(langchain_openai.chat_models._client_utils).values():
            clear = getattr(cached, "cache_clear", None)
            if clear is not None:
                clear()
        gc.collect()


@pytest.fixture(scope="session")
def aio() -> Iterator[Aio]:
    """Run coroutines in one event loop for the whole session: ChatOpenAI caches its async client, which is bound to a loop."""
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait(), context=contextvars.copy_context())

        yield run


def thread(name: str = "t1", **more: Any) -> dict[str, Any]:
    return {"configurable": {"thread_id": name, **more}}
