"""Real web servers: requests of several users at once, each with a run of its own."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import httpx
import pytest

import clevagent
from clevagent import Budget, BudgetExceeded, Stopped
from clevagent.testing import LoopbackProvider

from .conftest import COUNTS, LIMIT, TRIES, WAIT_S, Client, counted, sent, together

pytestmark = pytest.mark.slow
NUMBERS = range(TRIES)


@pytest.fixture(params=COUNTS)
def names(request):
    return [f"user{number}" for number in range(request.param)]


@pytest.fixture
def provider(names):
    """It answers nobody before all users are there: their requests go on at once."""
    with LoopbackProvider(together(len(names))) as running:
        yield running


class Site:
    """What the pages of a site do, in whatever framework."""

    def __init__(self, caller):
        self.caller = caller
        self.runs = {}

    def block(self):
        return clevagent.run(budgets=[Budget(llm_calls=LIMIT)])

    def attempt(self, user, number):
        try:
            self.caller.ask(f"{user} {number}")
        except Stopped as stop:
            return f"{type(stop).__name__}\n"
        return "sent\n"

    async def aattempt(self, user, number):
        try:
            await self.caller.aask(f"{user} {number}")
        except Stopped as stop:
            return f"{type(stop).__name__}\n"
        return "sent\n"

    def steps(self, user):
        with self.block() as self.runs[user]:
            for number in NUMBERS:
                yield self.attempt(user, number)

    async def asteps(self, user):
        with self.block() as self.runs[user]:
            for number in NUMBERS:
                yield await self.aattempt(user, number)

    async def aattempts(self, user):
        return [await self.aattempt(user, number) for number in NUMBERS]

    def have_made(self, names, answers):
        """Make sure that each user's calls were sent up to its ceiling, and counted in its run."""
        assert answers == {user: ["sent"] * LIMIT + ["BudgetExceeded"] * (TRIES - LIMIT) for user in names}
        assert sent(self.caller.provider) == dict.fromkeys(names, LIMIT)
        assert {counted(run) for run in self.runs.values()} <= {LIMIT}


@pytest.fixture
def site(caller):
    return Site(caller)


@contextmanager
def _uvicorn(app):
    """Serve ``app`` on a free port of this machine, on an event loop and a thread of its own."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        listening.close()


@contextmanager
def _werkzeug(app):
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(WAIT_S)
        server.server_close()


def _visit(url, names):
    """Let every user ask for the page at once; give the lines that each was sent."""
    answers, threads = {}, []

    def ask(user):
        with httpx.Client(timeout=WAIT_S, trust_env=False) as browser:
            answers[user] = browser.get(url, params={"user": user}).text.split()

    for user in names:
        threads.append(threading.Thread(target=ask, args=(user,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(WAIT_S)
    return answers


# -- Starlette and FastAPI -------------------------------------------------------------------------------------------------


def _starlette(page):
    from starlette.applications import Starlette
    from starlette.routing import Route

    async def endpoint(request):
        return page(request.query_params["user"])

    return Starlette(routes=[Route("/", endpoint)])


def _fastapi(page):
    from fastapi import FastAPI

    app = FastAPI()

    async def endpoint(user):
        return page(user)

    app.get("/", response_model=None)(endpoint)
    return app


@pytest.mark.parametrize("app", [_starlette, _fastapi])
@pytest.mark.parametrize("generator", ["sync", "async"])
def test_a_streaming_response_counts_in_the_run_of_its_generator(site, names, app, generator):
    from starlette.responses import StreamingResponse

    steps = {"sync": site.steps, "async": site.asteps}[generator]
    with _uvicorn(app(lambda user: StreamingResponse(steps(user)))) as url:
        site.have_made(names, _visit(url, names))


@pytest.mark.parametrize("generator", ["sync", "async"])
def test_a_streaming_response_counts_in_the_run_of_its_decorated_generator(site, names, generator):
    from starlette.responses import StreamingResponse

    run = clevagent.run(budgets=[Budget(llm_calls=LIMIT)])

    @run
    def steps(user):
        for number in NUMBERS:
            yield site.attempt(user, number)

    @run
    async def asteps(user):
        for number in NUMBERS:
            yield await site.aattempt(user, number)

    with _uvicorn(_fastapi(lambda user: StreamingResponse({"sync": steps, "async": asteps}[generator](user)))) as url:
        site.have_made(names, _visit(url, names))


def test_a_stream_that_is_made_in_a_block_and_sent_after_it_counts_in_its_run(caller, names):
    """The endpoint has returned, and its block is over, when the server reads the stream: it counts for the tenant all the same."""
    from starlette.responses import StreamingResponse

    clevagent.init(budgets=[Budget(llm_calls=1, per="day", by="tenant", name="tenants")])

    async def endpoint(user):
        with clevagent.run(tags={"tenant": user}):
            try:
                stream = await caller.astream(f"{user} stream")
            except BudgetExceeded:
                return StreamingResponse(iter(["refused"]))
            return StreamingResponse(lines(stream))

    async def lines(stream):
        try:
            async for _ in stream:
                pass
        except BudgetExceeded:
            yield "refused"
        else:
            yield "sent"

    from fastapi import FastAPI

    app = FastAPI()
    app.get("/", response_model=None)(endpoint)
    with _uvicorn(app) as url:
        assert _visit(url, names) == {user: ["sent"] for user in names}
        assert _visit(url, names) == {user: ["refused"] for user in names}
    assert sent(caller.provider) == dict.fromkeys(names, 1)


def _depends(dependency, endpoint):
    from fastapi import Depends, FastAPI

    app = FastAPI()

    if endpoint == "sync":

        def page(user, run=Depends(dependency)):  # noqa: B008 - FastAPI's way
            return run[1](user, run[0])

    else:

        async def page(user, run=Depends(dependency)):  # noqa: B008 - FastAPI's way
            return await run[1](user, run[0])

    from starlette.responses import PlainTextResponse

    app.get("/", response_class=PlainTextResponse)(page)
    return app


def _pages(site, *, activate=False):
    """Endpoints that make all their calls in the run that a dependency gives them."""

    def page(user, run):
        site.runs[user] = run
        if activate:
            with run.activate():
                return "".join(site.attempt(user, number) for number in NUMBERS)
        return "".join(site.attempt(user, number) for number in NUMBERS)

    async def apage(user, run):
        site.runs[user] = run
        if activate:
            with run.activate():
                return "".join([await site.aattempt(user, number) for number in NUMBERS])
        return "".join([await site.aattempt(user, number) for number in NUMBERS])

    return {"sync": page, "async": apage}


@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_an_async_yield_dependency_covers_its_endpoint(site, names, endpoint):
    page = _pages(site)[endpoint]

    async def dependency():
        with site.block() as run:
            yield run, page

    with _uvicorn(_depends(dependency, endpoint)) as url:
        site.have_made(names, _visit(url, names))
    assert all(run.ended_at is not None for run in site.runs.values())


@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_what_a_sync_yield_dependency_opened_is_activated_by_the_endpoint(site, names, endpoint):
    """FastAPI runs it on a thread whose context is thrown away: the endpoint knows nothing of the block."""
    page = _pages(site, activate=True)[endpoint]

    def dependency():
        with site.block() as run:
            yield run, page

    with _uvicorn(_depends(dependency, endpoint)) as url:
        site.have_made(names, _visit(url, names))


@pytest.mark.parametrize("endpoint", ["sync", "async"])
def test_a_sync_yield_dependency_that_nobody_activates_makes_no_call_free(site, names, endpoint):
    """Several users at once are refused before anything is sent; one alone counts in the only run."""
    page = _pages(site)[endpoint]

    def dependency():
        with site.block() as run:
            yield run, page

    with _uvicorn(_depends(dependency, endpoint)) as url:
        _visit(url, names)
        made = sent(site.caller.provider)
        assert all(number <= LIMIT for number in made.values())
        site.caller.provider.reset([clevagent.testing.Reply()])
        assert _visit(url, ["alone"])["alone"].count("sent") == LIMIT
    assert counted(site.runs["alone"]) == LIMIT


@pytest.mark.parametrize("kind_of_task", ["sync", "async"])
def test_a_background_task_with_a_run_of_its_own_counts_in_it(site, names, kind_of_task):
    from starlette.background import BackgroundTask
    from starlette.responses import PlainTextResponse

    done = threading.Barrier(len(names) + 1)
    answers = {}

    def work(user):
        with site.block() as site.runs[user]:
            answers[user] = [site.attempt(user, number).strip() for number in NUMBERS]

    async def awork(user):
        async with site.block() as site.runs[user]:
            answers[user] = [(await site.aattempt(user, number)).strip() for number in NUMBERS]

    def tell():
        done.wait(WAIT_S)

    async def task(user):
        from starlette.concurrency import run_in_threadpool

        await (run_in_threadpool(work, user) if kind_of_task == "sync" else awork(user))
        await run_in_threadpool(tell)

    with _uvicorn(_fastapi(lambda user: PlainTextResponse("later", background=BackgroundTask(task, user)))) as url:
        assert _visit(url, names) == {user: ["later"] for user in names}
        done.wait(WAIT_S)
    site.have_made(names, answers)


def test_a_background_task_of_an_endpoint_whose_block_is_over_counts_for_the_process(site, names):
    """The endpoint's block has put back what was there: nothing says any more that its task came from it."""
    from starlette.background import BackgroundTask
    from starlette.responses import PlainTextResponse

    clevagent.init(budgets=[Budget(llm_calls=len(names), per="day")])

    async def endpoint(user):
        with clevagent.run():
            return PlainTextResponse("later", background=BackgroundTask(site.aattempts, user))

    from fastapi import FastAPI

    app = FastAPI()
    app.get("/", response_model=None)(endpoint)
    with _uvicorn(app) as url:
        _visit(url, names)
        assert site.caller.provider.wait_for_requests(len(names), timeout_s=WAIT_S)
    assert sum(sent(site.caller.provider).values()) == len(names)


# -- Flask -----------------------------------------------------------------------------------------------------------------


def _flask(page):
    from flask import Flask, request

    app = Flask(__name__)

    @app.get("/")
    def endpoint():
        return page(request.args["user"])

    return app


@pytest.mark.parametrize("with_context", [False, True], ids=["plain", "stream_with_context"])
def test_a_stream_of_flask_counts_in_the_run_of_its_generator(site, names, with_context):
    from flask import Response, stream_with_context

    def page(user):
        return Response(stream_with_context(site.steps(user)) if with_context else site.steps(user))

    with _werkzeug(_flask(page)) as url:
        site.have_made(names, _visit(url, names))


def test_a_stream_of_flask_counts_in_the_run_of_its_decorated_generator(site, names):
    from flask import Response

    @clevagent.run(budgets=[Budget(llm_calls=LIMIT)])
    def steps(user):
        for number in NUMBERS:
            yield site.attempt(user, number)

    with _werkzeug(_flask(lambda user: Response(steps(user)))) as url:
        site.have_made(names, _visit(url, names))


def test_a_page_of_flask_counts_in_its_own_block(site, names):
    def page(user):
        with site.block() as site.runs[user]:
            return "".join(site.attempt(user, number) for number in NUMBERS)

    with _werkzeug(_flask(page)) as url:
        site.have_made(names, _visit(url, names))


def test_a_client_that_goes_away_leaves_nothing_behind(names, provider):
    """Its generator is closed by the server; the next request on the same thread or task is its own."""
    site = Site(Client(provider))
    from flask import Response

    with _werkzeug(_flask(lambda user: Response(site.steps(user)))) as url:
        provider.reset([clevagent.testing.Reply()])
        with httpx.Client(timeout=WAIT_S, trust_env=False) as browser:
            with browser.stream("GET", url, params={"user": "gone"}) as answer:
                next(answer.iter_lines())
            assert browser.get(url, params={"user": "next"}).text.split().count("sent") == LIMIT
    assert counted(site.runs["next"]) == LIMIT
