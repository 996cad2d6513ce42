"""Several users at once, each in a run of its own: whose a call is, by the requests that the provider was sent."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import httpx
import langchain_openai.chat_models._client_utils
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

import clevagent
from clevagent import Budget
from clevagent.testing import LoopbackProvider, Reply

LIMIT = 3
"""How many calls a run may make."""
TRIES = 6
"""How many it tries."""
COUNTS = [pytest.param(2, id="two"), pytest.param(5, id="five", marks=pytest.mark.slow)]
"""How many users there are at once."""
WAIT_S = 20.0
"""What anything here may take on a machine that has other work to do."""


def pytest_configure(config: pytest.Config) -> None:
    # The models' async clients are not closed by anybody: LangChain keeps them in a cache of its own.
    config.addinivalue_line("filterwarnings", "ignore:unclosed (transport|<socket):ResourceWarning")
    # A stream that is dropped is closed by the collector, when its event loop may be gone.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Exception ignored in. <async_generator object AsyncResponseStream:pytest.PytestUnraisableExceptionWarning",
    )


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield


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


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as running:
        yield running


class Model:
    """A guarded model of LangChain."""

    def __init__(self, provider: LoopbackProvider, **kw: Any) -> None:
        self.provider = provider
        self.guarded = clevagent.guard(
            ChatOpenAI(model="gpt-4o", api_key="test", base_url=provider.openai_url, max_tokens=20, max_retries=0), **kw
        )

    def ask(self, prompt: str) -> None:
        self.guarded.invoke(prompt)

    async def aask(self, prompt: str) -> None:
        await self.guarded.ainvoke(prompt)

    def stream(self, prompt: str) -> Iterator[Any]:
        return self.guarded.stream(prompt)

    async def astream(self, prompt: str) -> Any:
        return self.guarded.astream(prompt)


class Client:
    """Guarded clients of OpenAI, sync and async."""

    def __init__(self, provider: LoopbackProvider, **kw: Any) -> None:
        self.provider = provider
        options: dict[str, Any] = {"api_key": "test", "base_url": provider.openai_url, "max_retries": 0}
        self.guarded = clevagent.guard(OpenAI(**options), **kw)
        self.aguarded = clevagent.guard(AsyncOpenAI(**options), **kw)

    def ask(self, prompt: str) -> None:
        self.guarded.chat.completions.create(**_asked(prompt))

    async def aask(self, prompt: str) -> None:
        await self.aguarded.chat.completions.create(**_asked(prompt))

    def stream(self, prompt: str) -> Iterator[Any]:
        return self.guarded.chat.completions.create(**_asked(prompt), stream=True)

    async def astream(self, prompt: str) -> Any:
        return await self.aguarded.chat.completions.create(**_asked(prompt), stream=True)


def _asked(prompt: str) -> dict[str, Any]:
    return {"model": "gpt-4o", "max_tokens": 20, "messages": [{"role": "user", "content": prompt}]}


Caller = Model | Client


@pytest.fixture(params=[pytest.param(Model, id="model"), pytest.param(Client, id="client", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> type[Caller]:
    return request.param


@pytest.fixture
def caller(kind: type[Caller], provider: LoopbackProvider) -> Caller:
    """What calls are made with."""
    return kind(provider)


def sent(provider: LoopbackProvider) -> dict[str, int]:
    """How many requests the provider was sent for each user: a prompt's first word says whose it is."""
    return dict(Counter(request.body["messages"][-1]["content"].split()[0] for request in provider.requests))


def counted(run: clevagent.Run) -> int:
    """How many calls were counted in a run, and in those nested in it."""
    return run.summary().total.calls


class Users:
    """Several users of one program, each with a run under a ceiling of ``LIMIT`` calls, who are active all at once."""

    def __init__(self, count: int, caller: Caller) -> None:
        self.names = [f"user{number}" for number in range(count)]
        self.caller = caller
        self.runs: dict[str, clevagent.Run] = {}
        self.errors: list[BaseException] = []
        self._met = threading.Barrier(count)

    def block(self) -> Any:
        return clevagent.run(budgets=[Budget(llm_calls=LIMIT)])

    # -- calls ------------------------------------------------------------------------------------------------------------

    def attempt(self, user: str, number: int = 0) -> str:
        """Make a call; tell whether it was sent, or what refused it."""
        try:
            self.caller.ask(f"{user} {number}")
        except clevagent.Stopped as stop:
            return type(stop).__name__
        return "sent"

    async def aattempt(self, user: str, number: int = 0) -> str:
        try:
            await self.caller.aask(f"{user} {number}")
        except clevagent.Stopped as stop:
            return type(stop).__name__
        return "sent"

    # -- all at once ------------------------------------------------------------------------------------------------------

    def each(self, work: Callable[[str], object]) -> None:
        """Do ``work`` for every user, each on a thread of its own, all at once."""

        def job(user: str) -> None:
            try:
                work(user)
            except BaseException as error:  # raised again below
                self.errors.append(error)

        in_threads([lambda user=user: job(user) for user in self.names])
        if self.errors:
            raise self.errors[0]

    def each_in_a_run(self, work: Callable[[str], object]) -> None:
        """Do ``work`` for every user in a run of its own, all of which are active from the first call to the last."""

        def job(user: str) -> None:
            with self.block() as run:
                self.runs[user] = run
                self._met.wait(WAIT_S)
                try:
                    work(user)
                finally:
                    self._met.wait(WAIT_S)

        self.each(job)

    async def aeach(self, work: Callable[[str], Coroutine[Any, Any, object]]) -> None:
        """Do ``work`` for every user, each in a task of its own, all at once."""
        await asyncio.wait_for(asyncio.gather(*(asyncio.create_task(work(user)) for user in self.names)), WAIT_S * 3)

    async def aeach_in_a_run(self, work: Callable[[str], Coroutine[Any, Any, object]]) -> None:
        """Do ``work`` for every user in a run of its own, all of which are active from the first call to the last."""
        met = asyncio.Barrier(len(self.names))

        async def job(user: str) -> None:
            with self.block() as run:
                self.runs[user] = run
                await met.wait()
                try:
                    await work(user)
                finally:
                    await met.wait()

        await self.aeach(job)

    # -- what became of them ----------------------------------------------------------------------------------------------

    def have_made(self, calls: int = LIMIT) -> None:
        """Make sure that so many calls of each user were sent, and counted in that user's run."""
        assert sent(self.caller.provider) == dict.fromkeys(self.names, calls)
        assert {user: counted(run) for user, run in self.runs.items()} == dict.fromkeys(self.names, calls)

    def have_passed_no_ceiling(self) -> None:
        """Make sure that no user had more calls than allowed, and that all that was sent was counted in its own run."""
        made = sent(self.caller.provider)
        assert all(number <= LIMIT for number in made.values()), made
        assert {user: counted(run) for user, run in self.runs.items()} == {user: made.get(user, 0) for user in self.runs}


@pytest.fixture(params=COUNTS)
def users(request: pytest.FixtureRequest, caller: Caller) -> Users:
    """Users at once: two, and five."""
    return Users(request.param, caller)


def in_threads(works: list[Callable[[], object]]) -> None:
    """Run each in a raw thread of its own, and wait for all."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S * 3)
        assert not thread.is_alive()


def together(count: int) -> Callable[[dict[str, Any]], Reply]:
    """A script for the provider: the first calls of ``count`` users are answered when all of them are there."""
    met = threading.Barrier(count)

    def answer(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"].endswith(" 0"):
            with suppress(threading.BrokenBarrierError):
                met.wait(5)
        return Reply()

    return answer


@pytest.fixture(scope="session")
def aio() -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Run coroutines in one event loop, each in the current context: ChatOpenAI caches its async client, which is bound to a loop."""
    with asyncio.Runner() as runner:

        def run(awaitable: Awaitable[Any]) -> Any:
            async def wait() -> Any:
                return await awaitable

            return runner.run(wait(), context=contextvars.copy_context())

        yield run


@pytest.fixture
def in_loop(caller: Caller, aio: Callable[[Awaitable[Any]], Any]) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Run a coroutine, and close the async client after the test."""
    yield aio
    if isinstance(caller, Client):
        aio(caller.aguarded.close())


@pytest.fixture
def web() -> Iterator[httpx.Client]:
    """A browser."""
    with httpx.Client(timeout=WAIT_S, trust_env=False) as client:
        yield client
