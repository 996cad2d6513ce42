"""Real SDKs of both providers against the loopback provider: what they share is tested here, for the three APIs at once."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from typing import Any

import anthropic
import openai
import pytest

import clevagent
from clevagent import Budget
from clevagent.testing import LoopbackProvider
from clevagent_core.money import PICO_PER_USD
from clevagent_core.watchdog import Watchdog
from clevagent_providers import failures

PROMPT = "Write me a poem about the sea and the moon. " * 10
LIMIT = 400


def pytest_configure(config: pytest.Config) -> None:
    # Clients that a test cancels, or whose streams it drops, are closed by the collector, after their event loop.
    config.addinivalue_line("filterwarnings", "ignore:unclosed (transport|<socket):ResourceWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:Exception ignored in. <async_generator:pytest.PytestUnraisableExceptionWarning"
    )


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as running:
        yield running


class Api:
    """One API: how its client is made, and how it is asked."""

    def __init__(self, name: str, provider: LoopbackProvider) -> None:
        self.name = name
        self.provider = provider
        self.is_anthropic = name == "messages"
        self.model = "claude-sonnet-4-6" if self.is_anthropic else "gpt-4o"
        self.rates = (3_000_000, 15_000_000) if self.is_anthropic else (2_500_000, 10_000_000)
        self.limit_key = {"chat": "max_tokens", "responses": "max_output_tokens", "messages": "max_tokens"}[name]

    def _options(self, **kw: Any) -> dict[str, Any]:
        url = self.provider.anthropic_url if self.is_anthropic else self.provider.openai_url
        return {"api_key": "test", "base_url": url} | kw

    def client(self, **kw: Any) -> Any:
        return (anthropic.Anthropic if self.is_anthropic else openai.OpenAI)(**self._options(**kw))

    def aclient(self, **kw: Any) -> Any:
        return (anthropic.AsyncAnthropic if self.is_anthropic else openai.AsyncOpenAI)(**self._options(**kw))

    def resource(self, client: Any) -> Any:
        return {
            "chat": lambda: client.chat.completions,
            "responses": lambda: client.responses,
            "messages": lambda: client.messages,
        }[self.name]()

    def params(self, prompt: str = PROMPT, limit: int | None = LIMIT) -> dict[str, Any]:
        text: dict[str, Any] = (
            {"input": prompt} if self.name == "responses" else {"messages": [{"role": "user", "content": prompt}]}
        )
        return {"model": self.model, **text, **({self.limit_key: limit} if limit is not None else {})}

    def ask(self, client: Any, prompt: str = PROMPT, limit: int | None = LIMIT, **kw: Any) -> Any:
        """Ask; of an async client, what is given back is to be awaited."""
        return self.resource(client).create(**self.params(prompt, limit), **kw)

    def price(self, prompt: str = PROMPT, output: int = LIMIT) -> int:
        """What the provider bills for one call, in pico-USD."""
        return len(prompt) * self.rates[0] + output * self.rates[1]


@pytest.fixture(params=["chat", *(pytest.param(api, marks=pytest.mark.slow) for api in ("responses", "messages"))])
def api(request: pytest.FixtureRequest, provider: LoopbackProvider) -> Api:
    return Api(request.param, provider)


@pytest.fixture
def chat(provider: LoopbackProvider) -> Api:
    return Api("chat", provider)


@pytest.fixture
def responses(provider: LoopbackProvider) -> Api:
    return Api("responses", provider)


@pytest.fixture
def messages(provider: LoopbackProvider) -> Api:
    return Api("messages", provider)


@pytest.fixture
def held(provider: LoopbackProvider) -> Callable[..., Any]:
    """A run under a ceiling in pico-USD: afterwards it must have held, nothing may be held, and nothing billed be unrecorded."""
    from contextlib import contextmanager

    @contextmanager
    def run(ceiling: int) -> Iterator[Any]:
        watchdog = clevagent.init(wait_s=20)
        with clevagent.run(budgets=[Budget(usd=Decimal(ceiling) / PICO_PER_USD, name="ceiling")]) as run:
            yield run
        assert watchdog.ledger.holds() == []
        summary = run.summary()
        billed, recorded = provider.billed_pico, round(summary.total.cost_usd * PICO_PER_USD)
        assert billed <= ceiling
        assert summary.overshoot_usd == 0
        assert billed <= recorded <= ceiling
        if not summary.calls_charged_at_bound:
            assert recorded == billed

    return run


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
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "wait_before_retry", lambda *_: 0.01)


@pytest.fixture(scope="session")
def aio() -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Run coroutines in one event loop, each in the current context; ``asyncio.Runner`` else keeps that of its first."""
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait(), context=contextvars.copy_context())

        yield run
