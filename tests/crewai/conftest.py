"""Shared by everything that drives CrewAI against the loopback provider."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import importlib.util
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import clevagent
from clevagent.testing import LoopbackProvider

if importlib.util.find_spec("crewai") is None:
    collect_ignore_glob = ["test_*.py"]

Aio = Callable[[Awaitable[Any]], Any]


@pytest.fixture(autouse=True)
def _own_process_watchdog(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "test")
    yield
    clevagent.shutdown()
    from crewai.events.event_bus import crewai_event_bus

    crewai_event_bus.flush(timeout=10)


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as running:
        yield running


@functools.cache
def echo_class() -> Any:
    """Make the class of a model of the user's own, which sends with a client that CrewAI knows nothing of."""
    from crewai.llms.base_llm import BaseLLM
    from openai import OpenAI

    class Echo(BaseLLM):
        url: str = ""
        tells: bool = True
        calls: int = 0

        def call(self, messages, *args, **kwargs):
            self.calls += 1
            if isinstance(messages, str):
                messages = [{"role": "user", "content": messages}]
            with OpenAI(api_key="test", base_url=self.url, max_retries=0) as client:
                answer = client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                    max_tokens=self.max_tokens,
                )
            if self.tells:
                usage = answer.usage
                self._track_token_usage_internal(
                    {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
                )
            return answer.choices[0].message.content

        async def acall(self, messages, *args, **kwargs):
            return await asyncio.to_thread(self.call, messages)

    return Echo


@pytest.fixture
def llm(provider: LoopbackProvider) -> Callable[..., Any]:
    """Make a model: of a native provider, of litellm, or of the user's own."""

    from crewai import LLM

    def make(kind: str = "openai", **kw: Any) -> Any:
        if kind == "anthropic":
            return LLM(**{"model": "anthropic/claude-sonnet-4-5", "api_key": "test", "base_url": provider.anthropic_url} | kw)
        if kind == "litellm":
            return LLM(**{"model": "openai/gpt-4o", "is_litellm": True, "api_key": "test", "base_url": provider.openai_url} | kw)
        if kind == "custom":
            return echo_class()(**{"model": "gpt-4o", "url": provider.openai_url, "max_tokens": 400} | kw)
        if kind == "responses":
            kw = {"api": "responses"} | kw
        return LLM(**{"model": "openai/gpt-4o", "api_key": "test", "base_url": provider.openai_url} | kw)

    return make


@pytest.fixture
def crew(llm: Callable[..., Any]) -> Callable[..., Any]:
    """Make a crew: some tasks for two agents in turn."""
    from crewai import Agent, Crew, Task

    def make(tasks: int = 3, model: Any = None, tools: Any = (), agent: dict[str, Any] | None = None, **kw: Any) -> Any:
        model = model if model is not None else llm(max_tokens=50)
        agents = [
            Agent(
                **{"role": role, "goal": "help", "backstory": "old", "llm": model, "tools": list(tools), "max_iter": 8}
                | (agent or {})
            )
            for role in ("writer", "editor")
        ]
        made = [
            Task(description=f"Do number {number}.", expected_output="text", agent=agents[number % 2], name=f"task {number}")
            for number in range(tasks)
        ]
        return Crew(agents=agents, tasks=made, **kw)

    return make


@pytest.fixture(scope="session")
def aio() -> Iterator[Aio]:
    """Run coroutines in one event loop for the whole session: models keep async clients, which are bound to one."""
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait(), context=contextvars.copy_context())

        yield run
    with warnings.catch_warnings():
        # Clients that nobody closes: let go here, where it is not told again when pytest ends.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
