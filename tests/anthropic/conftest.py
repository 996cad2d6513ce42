"""The Anthropic SDK against the loopback provider. What it shares with OpenAI's is tested in ``tests/openai``, for both."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anthropic
import pytest

import clevagent
from clevagent.testing import LoopbackProvider


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as running:
        yield running


@pytest.fixture
def client(provider: LoopbackProvider) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="test", base_url=provider.anthropic_url) as client:
        yield clevagent.guard(client)


@pytest.fixture(scope="session")
def aio() -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Run coroutines in one event loop, each in the current context; ``asyncio.Runner`` else keeps that of its first."""
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait(), context=contextvars.copy_context())

        yield run
