"""Shared by everything that drives LangChain against the loopback provider."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import langchain_anthropic._client_utils
import langchain_openai.chat_models._client_utils
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI

import clevagent
from clevagent.testing import LoopbackProvider
from clevagent_core.accounts import accounts_of
from clevagent_core.ledger.account import Balance
from clevagent_core.watchdog import Watchdog

Aio = Callable[[Awaitable[Any]], Any]


def pytest_configure(config: pytest.Config) -> None:
    # A stream whose task was cancelled is closed by the collector, when its event loop may be gone.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Exception ignored in. <async_generator object AsyncResponseStream:pytest.PytestUnraisableExceptionWarning",
    )
    # The same stream, one layer further out in HTTPX.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Exception ignored in. <async_generator object BoundAsyncStream:pytest.PytestUnraisableExceptionWarning",
    )
    # The models' async clients are not closed by anybody: LangChain keeps them in a cache of its own.
    config.addinivalue_line("filterwarnings", "ignore:unclosed (transport|<socket):ResourceWarning")


@pytest.fixture(autouse=True)
def _own_process_watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "ANTHROPIC_BASE_URL", "CLEVAGENT_ATTACH", "CLEVAGENT_BUDGETS"):
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
        return ChatOpenAI(**{"model": "gpt-4o", "api_key": "test", "base_url": provider.openai_url, "max_retries": 0} | kw)

    return make


@pytest.fixture
def anthropic(provider: LoopbackProvider) -> Callable[..., ChatAnthropic]:
    def make(**kw: Any) -> ChatAnthropic:
        return ChatAnthropic(
            **{"model": "claude-sonnet-4-6", "api_key": "test", "base_url": provider.anthropic_url, "max_retries": 0} | kw
        )

    return make


@pytest.fixture(params=["openai", *(pytest.param(api, marks=pytest.mark.slow) for api in ("responses", "anthropic"))])
def make(
    request: pytest.FixtureRequest, chat: Callable[..., ChatOpenAI], anthropic: Callable[..., ChatAnthropic]
) -> Callable[..., Any]:
    """Make models of three APIs."""
    if request.param == "anthropic":
        return lambda **kw: anthropic(**({"max_tokens": 300} | kw))
    own = {"use_responses_api": True} if request.param == "responses" else {}
    return lambda **kw: chat(**({"max_tokens": 300} | own | kw))


@pytest.fixture
def watchdog() -> Iterator[Callable[..., Watchdog]]:
    """Make watchdogs of the test's own, shut down after it."""
    made: list[Watchdog] = []

    def make(**settings: Any) -> Watchdog:
        made.append(Watchdog(**settings))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()


@pytest.fixture
def balance() -> Callable[[Watchdog], Balance]:
    """How the first budget of a watchdog stands (one that is not ``per="run"``), in its own unit: pico-USD for money."""

    def read(watchdog: Watchdog) -> Balance:
        return watchdog.ledger.balance(accounts_of(watchdog.process_run)[0][1])

    return read


@pytest.fixture(scope="session", autouse=True)
def _clients_are_closed_by_nobody() -> Iterator[None]:
    """Let go, quietly, of the clients that LangChain keeps in caches of its own: pytest would report them when it ends."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for module in (langchain_openai.chat_models._client_utils, langchain_anthropic._client_utils):
            for cached in vars(module).values():
                clear = getattr(cached, "cache_clear", None)
                if clear is not None:
                    clear()
        gc.collect()


@pytest.fixture(scope="session")
def aio() -> Iterator[Aio]:
    """Run coroutines in one event loop for the whole session: ChatOpenAI caches its async client, which is bound to a loop.

    Each run gets the current context; ``asyncio.Runner`` else keeps that of its first.
    """
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait(), context=contextvars.copy_context())

        yield run
